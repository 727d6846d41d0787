"""Commands that are struck while at work: their processes, how far they are, and what must survive."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch
from conftest import HANGS, command, environment
from frozen import frozen
from safetensors.torch import load_file

LOCAL = ("--cluster.address", "local")
"""A private cluster, whatever else runs on this machine: what is struck must be ours."""
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's own helpers outlive their raylet by up to a minute and then end by themselves; they run nothing of ours."""

STARTED: list[Victim] = []


@pytest.fixture(autouse=True)
def none_left_running():
    """A test that fails leaves no command at work."""
    yield
    while STARTED:
        if (victim := STARTED.pop()).alive:
            victim.process.kill()
            victim.process.wait()


class Victim:
    """A running command of ours and the processes that its private cluster started for it."""

    def __init__(self, output: Path, *args: str, module: str = "sweep", root: psutil.Process | None = None, **env: str):
        """root: the process whose descendants do the work, where that is not the command itself."""
        self.output, self.log = output, output.parent / "driver.log"
        self._known: dict[int, psutil.Process] = {}
        with open(self.log, "a") as log:
            start = log.tell()
            self.process = subprocess.Popen(
                command(output, *args, module=module),
                env=environment(**env),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._start, self._root = start, root or psutil.Process(self.process.pid)
        STARTED.append(self)

    @property
    def said(self) -> str:
        """What this command, not an earlier one with the same output, printed."""
        return self.log.read_bytes()[self._start :].decode()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def family(self) -> dict[int, str]:
        """pid -> title of every descendant."""
        titles = {}
        for child in self._root.children(recursive=True):
            try:
                titles[child.pid] = " ".join(child.cmdline())
            except psutil.Error:
                continue
            self._known[child.pid] = child
        return titles

    def find(self, title: str) -> list[psutil.Process]:
        """Descendants whose title starts so."""
        return [self._known[pid] for pid, found in self.family().items() if found.startswith(title)]

    def wait_for(self, condition: Callable[[], object], seconds: float = HANGS, every: float = 0.01) -> None:
        """Until the condition holds, asked every so many seconds; the command must be alive all the while. A condition
        that looks through all processes asks files first: it would keep a core busy that the command needs.
        """
        end = time.monotonic() + seconds
        while not condition():
            assert self.alive, f"the command ended before it could be struck:\n{self.said}"
            assert time.monotonic() < end, f"the phase to strike in never came:\n{self.said}"
            time.sleep(every)

    def kill(self, everything: bool = False) -> None:
        """kill -9 of the driver, or of all its processes at the same moment as a power cut would.

        Returns when all have ended; those of a lasting cluster are the caller's to watch.
        """
        assert self.alive
        self.family()
        victims = list(self._known.values())
        os.kill(self.process.pid, signal.SIGKILL)
        for victim in victims if everything else ():
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        assert self.process.wait() == -signal.SIGKILL
        if self._root.pid == self.process.pid:
            survivors = psutil.wait_procs(victims, timeout=HANGS)[1]
            titles = [" ".join(survivor.cmdline()) for survivor in survivors if survivor.is_running()]
            assert all(title.startswith(AGENTS) for title in titles), titles

    def finish(self, seconds: float = HANGS) -> None:
        assert self.process.wait(timeout=seconds) == 0, self.said


@contextmanager
def frozen_when(victim: Victim, process: psutil.Process, condition: Callable[[], object]) -> Iterator[None]:
    """Stopped where the condition first holds. The process runs in short turns and is looked at while it stands still,
    so that it cannot be past that place by the time a busy machine lets us look.
    """
    end = time.monotonic() + HANGS
    while True:
        assert victim.alive and time.monotonic() < end, f"the moment to strike at never came:\n{victim.said}"
        with frozen(process):
            if condition():
                yield
                return
        time.sleep(0.02)


def temporaries(output: Path) -> list[str]:
    """Files under a name that only a writer at work should have."""
    return [
        str(path.relative_to(output))
        for part in ("data", "tokens", "chains")
        for path in (output / part).rglob("*tmp*")
    ]


def copy_parts(source: Path, output: Path, *parts: str) -> None:
    """Give a new output folder what another one has finished, to spend the test's time on what comes after."""
    for part in parts:
        shutil.copytree(source / part, output / part)


def cycles(output: Path) -> list[Path]:
    """Cycle folders of the only chain."""
    return sorted(output.glob("chains/*/cycle_*"))


def results(cycle: Path) -> dict[str, bytes]:
    """Every number a finished cycle leaves: weights, core, scores (as raw bytes), theta and the metrics."""
    found = {
        f"{file}.{name}": tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for file in ("sae", "core", "scores")
        for name, tensor in load_file(cycle / f"{file}.safetensors").items()
    }
    record = json.loads((cycle / "record.json").read_text())
    told = (
        "data_digest",
        "theta",
        "theta_training",
        "fvu",
        "l0",
        "core_out",
        "core_share",
        "coverage",
        "steps",
        "tokens",
    )
    return found | {name: json.dumps(record[name]).encode() for name in told}


def curve(cycle: Path) -> list[dict]:
    """Points of the training curve without what depends on the clock, or on guesses that decide speed only."""
    left_out = ("tokens_per_s", "candidates", "retries")
    points = [json.loads(line) for line in (cycle / "curve.jsonl").read_text().splitlines()]
    return [{name: value for name, value in point.items() if name not in left_out} for point in points]
