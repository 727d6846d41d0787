"""`sweep --status` and `sweep --clean`: what is there, and what nobody needs."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

from rich import box
from rich.table import Table

from dmsae_ray.activations.harvest import Identity
from dmsae_ray.config import Config
from dmsae_ray.distill.folder import ChainFolder
from dmsae_ray.distill.plan import ChainPlan, plan_all
from dmsae_ray.files import leftovers
from dmsae_ray.lock import OutputLock
from dmsae_ray.track.terminal import terminal_console


def planned(config: Config) -> list[ChainPlan]:
    """Every chain the configuration asks for, only to look at: where the dataset is not there yet, nothing is missed."""
    return plan_all(config, "", Identity(config).key(config.model.hook), None)


def driver_alive(home: Path) -> bool:
    """Whether a driver holds this output folder now."""
    try:
        with open(home / "driver.lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def chain_state(folder: ChainFolder, cycles: int, alive: bool) -> tuple[str, str]:
    """(state, detail): done, failed, running, waiting, or not finished."""
    done, failure = len(folder.records()), folder.failure()
    if done >= cycles:
        return "done", f"{cycles} cycles"
    if failure:
        return "failed", f"cycle {failure['cycle']}: {failure['reason']}"
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
    print(f"{config.home}: {'a driver is at work' if alive else 'no driver at work'}")
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("chain", "folder", "state", "detail"):
        table.add_column(column, overflow="fold")
    for plan in planned(config):
        state, detail = chain_state(plan.folder, plan.cycles, alive)
        table.add_row(plan.label, f"chains/{plan.key}", state, detail)
    terminal_console().print(table)
    return 0


def superfluous(config: Config) -> list[Path]:
    """What no finished result and no chain of this configuration needs."""
    home, wanted = config.home, {plan.key for plan in planned(config)}
    found = leftovers(home) + [path for path in [home / "ray"] if path.exists()]
    identity = Identity(config)
    datasets = {identity.key(hook) for hook in config.hooks}
    for folder in sorted((home / "chains").glob("*")):
        chain = ChainFolder(folder)
        done = len(chain.records())
        if folder.name in wanted:
            datasets.add(json.loads((folder / "chain.json").read_text())["fields"]["dataset"] if (folder / "chain.json").exists() else "")
        elif done == 0:
            found.append(folder)
        else:
            datasets.add(json.loads((folder / "chain.json").read_text())["fields"]["dataset"])
            if (unfinished := chain.cycle(done).path).exists():
                found.append(unfinished)
    found += [folder for folder in sorted((home / "data").glob("*")) if folder.name not in datasets]
    # Token sequences serve to make shards: those of other configurations can be made again.
    found += [folder for folder in sorted((home / "tokens").glob("*")) if folder.name != identity.tokens_key]
    return found


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def clean(config: Config, dry_run: bool) -> int:
    """Remove it, or with dry_run only say what would go. Refused while a driver is at work."""
    if not config.home.exists():
        print(f"{config.home}: nothing there")
        return 0
    lock = OutputLock(config.home)
    try:
        found = superfluous(config)
        for path in found:
            print(f"{'would remove' if dry_run else 'removing'} {path} ({size_of(path) / 1e6:,.1f} MB)")
            if not dry_run:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(f"{len(found)} to remove" if dry_run else f"{len(found)} removed")
    finally:
        lock.release()
    return 0
