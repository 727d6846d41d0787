"""What is around every command: how it ends, and the output folder and terminal that are its own while it runs."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dmsae_ray.causes import disk_trouble
from dmsae_ray.config import Config
from dmsae_ray.driver.model_folder import with_model_folder
from dmsae_ray.driver.options import Command, load, only_looks
from dmsae_ray.driver.transcript import Screen
from dmsae_ray.files import elsewhere, publish, refresh
from dmsae_ray.kept_log import KeptLog
from dmsae_ray.lock import OutputBusy, OutputLock, OutputUnseen, Superseded
from dmsae_ray.secret_url import scrub
from dmsae_ray.stop import INTERRUPTED, stoppable

BAD_INPUT = 2
"""Exit status of a command that was refused, or that a full disk or another driver ended; the last line says why."""


def door(command: type[Command], interrupted: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Makes a command's work, which takes its options and returns an exit status, a `main` that takes the command line,
    see `ends_in_words`.
    """

    def decorate(work: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(work)
        def with_options(argv: list[str]) -> int:
            options = load(command, argv)
            return work(with_model_folder(options, make=not only_looks(options)))

        return ends_in_words(interrupted)(with_options)

    return decorate


def ends_in_words(interrupted: str) -> Callable[[Callable[[list[str]], int]], Callable[..., int]]:
    """Makes a `main` of what takes a command line. Whatever ends it is one line and an exit status; only what nobody
    expected is a traceback. interrupted: said when a signal ends it.
    """

    def decorate(work: Callable[[list[str]], int]) -> Callable[..., int]:
        @stoppable()
        @functools.wraps(work)
        def main(argv: list[str] | None = None) -> int:
            try:
                return work(sys.argv[1:] if argv is None else argv)
            except (ValueError, OutputBusy, Superseded, OutputUnseen) as error:
                print(f"error: {scrub(str(error))}", file=sys.stderr)
                return BAD_INPUT
            except KeyboardInterrupt:
                print(f"interrupted; {interrupted}", file=sys.stderr)
                return INTERRUPTED
            except Exception as error:
                if (line := disk_trouble(error)) is None:
                    raise
                print(f"error: {scrub(line)}", file=sys.stderr)
                return BAD_INPUT

        return main

    return decorate


@contextmanager
def session(config: Config, name: str, verbose: bool) -> Iterator[tuple[OutputLock, Screen]]:
    """While open, the output folder is this command's, and the terminal shows what it says and nothing else.

    name: the command's, for its log. Raises ValueError if the folder cannot be written, or the model or the corpus
    cannot be read, OutputBusy if another driver works on it.
    """
    from dmsae_ray.activations.catalogue import remember

    lock, started = OutputLock(config.home), time.time()
    try:
        refresh(config.home, alone=True)
        with Screen(config.home, name, verbose) as say, ExitStack() as kept:
            if elsewhere(config.home) is not None:  # what its end does not send, if this machine is lost
                for path in (say.path, say.path.with_suffix(".all")):
                    kept.enter_context(KeptLog([path], path))
            remember(config)
            yield lock, say
    finally:
        send_rest(lock, config.home, started)
        lock.release()


def send_rest(lock: OutputLock, home: Path, since: float) -> None:
    """To an output at a URL: what others than we write, and logs. Whatever ended the command matters more than a server
    that is away on top of it.
    """
    try:
        if lock.holds():  # else they are another driver's now
            for path in (home / "mlflow.db", home / "mlartifacts"):
                publish(path)
            for path in (home / "logs").glob("*"):
                if path.is_file() and path.stat().st_mtime >= since:
                    publish(path)
    except (OSError, ValueError) as error:
        print(f"warning: MLflow's database and the logs were not sent: {error}", file=sys.stderr)
