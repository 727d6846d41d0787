"""`sweep --status`: what is there.

Asked for often, and in a terminal: it imports nothing heavy, as long as the output folder remembers what names its
chains.
"""

from __future__ import annotations

import fcntl
import gc
import json
import sys
from pathlib import Path

from rich import box
from rich.table import Table

from dmsae_ray.activations.found import recall
from dmsae_ray.config import Config
from dmsae_ray.distill.folder import ChainFolder
from dmsae_ray.distill.grid import planned
from dmsae_ray.files import elsewhere, refresh
from dmsae_ray.lock import no_locks
from dmsae_ray.show.terminal.console import terminal_console


def driver_alive(home: Path) -> bool:
    """Whether a driver holds this output folder now."""
    if elsewhere(home) is not None:
        from dmsae_ray.claim import gone, read_claim

        holder = read_claim(home / "claim")
        return holder is not None and not gone(home / "claim", holder)
    try:
        with open(home / "driver.lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    except OSError as error:
        raise no_locks(home, error) from error
    return False


def chain_state(folder: ChainFolder, cycles: int, alive: bool) -> tuple[str, str]:
    """(state, detail): done, failed, running, waiting, or not finished."""
    done, failure = len(folder.records()), folder.failure()
    if done >= cycles:
        return "done", f"{cycles} cycles"
    if failure:
        return "failed", failure.text()
    curve = folder.cycle(done).curve
    detail = f"{done} of {cycles} cycles done"
    if curve.exists() and (lines := curve.read_text().splitlines()):
        detail += f", cycle {done} at step {json.loads(lines[-1])['step']}"
    if alive:
        return ("running" if folder.cycle(done).path.exists() else "waiting"), detail
    return "not finished", detail


def status(config: Config) -> int:
    """Print each chain's state; changes nothing."""
    alive = driver_alive(config.home)
    refresh(config.home)
    print(f"{config.place}: {'a driver is at work' if alive else 'no driver at work'}")
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("chain", "folder", "state", "detail"):
        table.add_column(column, overflow="fold")
    for plan in planned(config, recall(config)):
        state, detail = chain_state(plan.folder, plan.cycles, alive)
        table.add_row(plan.label, f"chains/{plan.key}", state, detail)
    terminal_console().print(table)
    if "torch" not in sys.modules:
        # At its end the interpreter would look for garbage in all that was imported, a tenth of this command's time.
        # (Libraries that come with torch report leaks where it does not look.)
        gc.freeze()
    return 0
