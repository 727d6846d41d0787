"""One run of the report: all results of a sweep again from its chains' files, and beside another sweep's."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group

from dmsae_ray.config import Config
from dmsae_ray.driver.options import ReportCommand
from dmsae_ray.driver.preflight import preflight
from dmsae_ray.driver.session import session
from dmsae_ray.driver.sweep_run import Finished, Sweep
from dmsae_ray.driver.transcript import Screen
from dmsae_ray.results.comparison import compare_across
from dmsae_ray.results.saved_sweep import SavedSweep, local_folder
from dmsae_ray.secret_url import SecretUrl
from dmsae_ray.show.terminal.console import terminal_console
from dmsae_ray.show.terminal.tables import across_tables, write_report


def run(command: ReportCommand) -> int:
    """Raises ValueError on bad input before anything is computed."""
    other = None if command.against is None else against(command.against)
    config = preflight(Config(**command.sections()))
    with session(config, "report", command.verbose) as (lock, say):
        finished = Sweep(config, lock.lease(), say, command.verbose).run(train=False, fresh=command.fresh)
        finished.show(say)
        if command.numbers:
            for name, value in finished.results.numbers.items():
                say(f"{name} {value:.6g}")
        if other is not None:
            across(finished, other, say)
    return 0 if finished.done else 1


def against(place: SecretUrl) -> SavedSweep:
    """The sweep of --against. Raises ValueError."""
    try:
        return SavedSweep.open(local_folder(place.reveal()), needs=("numbers.json",))
    except ValueError as error:
        raise ValueError(f"--against {error}") from error


def across(finished: Finished, other: SavedSweep, say: Screen) -> None:
    """Cores of this sweep and the other one, pair by pair, and their numbers side by side; kept in this sweep's
    folder.
    """
    if finished.folder.resolve() == other.folder.resolve():
        raise ValueError(f"--against {other.folder}: is this sweep itself")
    names = finished.folder.name, other.folder.name
    stem = f"against-{other.folder.name}"
    comparison = compare_across(
        finished.config,
        finished.dataset,
        finished.plans,
        other.plans,
        names,
        finished.folder / f"{stem}.json",
        say,
    )
    tables: Group = across_tables(names, comparison, finished.results.means(), other.numbers)
    write_report(Path(finished.folder / f"{stem}.txt"), tables)
    terminal_console(say.stream).print(tables)
    say(f"both sweeps compared in {finished.folder / stem}.json and .txt")
