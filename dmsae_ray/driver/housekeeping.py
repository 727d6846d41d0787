"""`sweep --clean`: what nobody needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dmsae_ray.activations.catalogue import Identity
from dmsae_ray.config import CompareConfig, Config
from dmsae_ray.distill.folder import ChainFolder
from dmsae_ray.distill.grid import planned
from dmsae_ray.files import elsewhere, refresh
from dmsae_ray.lock import OutputLock
from dmsae_ray.ownership import FOLDERS, MARKER, marked, named_key, ours_in, remove, temporaries
from dmsae_ray.results.comparison import pair_names
from dmsae_ray.yaml_file import read_yaml


@dataclass(frozen=True)
class Superfluous:
    """Something of ours that may go."""

    path: Path
    kind: str
    """folder of the output folder that it lies in"""
    within: Path | None = None
    """the entry of that folder, if it is not the path itself"""

    def remove(self) -> list[Path]:
        """Returns what lies there and is not ours: it stays."""
        return remove(self.path, self.kind, self.within)


def superfluous(config: Config) -> list[Superfluous]:
    """What no finished result and no chain of this configuration needs. Raises ValueError if that cannot be told."""
    home, wanted = config.home, {plan.key for plan in planned(config)}
    found = [Superfluous(path, "") for path in temporaries(home)] + [
        Superfluous(path, "ray") for path in ours_in(home, "ray")
    ]
    identity = Identity(config)
    datasets = {identity.key(hook) for hook in config.hooks}
    for folder in ours_in(home, "chains"):
        chain = ChainFolder(folder)
        done = len(chain.records())
        if folder.name not in wanted and done == 0:
            found.append(Superfluous(folder, "chains"))
            continue
        if done or (folder / "chain.json").exists():
            datasets.add(dataset_of(folder))
        if folder.name not in wanted and (unfinished := chain.cycle(done).path).is_dir():
            found.append(Superfluous(unfinished, "chains", folder))
    found += [Superfluous(folder, "data") for folder in ours_in(home, "data") if folder.name not in datasets]
    # Token sequences serve to make shards: those of other configurations can be made again.
    found += [Superfluous(folder, "tokens") for folder in ours_in(home, "tokens") if folder.name != identity.tokens_key]
    found += [Superfluous(folder, "models") for folder in unused_models(config)]
    kept = kept_pairs(config)
    return found + [
        Superfluous(path, "pairs") for path in ours_in(home, "pairs") if kept is not None and path.name not in kept
    ]


def unused_models(config: Config) -> list[Path]:
    """Converted models, and what killed conversions left, that neither this configuration nor a sweep with results in
    the output folder names.
    """
    named = {Path(config.model.name).name}
    for folder in ours_in(config.home, "sweeps"):
        try:
            named.add(Path(str((read_yaml(folder / "config.yaml").get("model") or {}).get("name"))).name)
        except (OSError, ValueError) as error:
            print(f"kept all of {config.home / 'models'}: which one {folder} needs cannot be told ({error})")
            return []
    return [folder for folder in ours_in(config.home, "models") if folder.name not in named]


def kept_pairs(config: Config) -> set[str] | None:
    """Names of the compared pairs that this configuration, or a sweep with results in the output folder, would ask for
    again.

    None if that cannot be told of one of them: then all are kept.
    """
    home, plans = config.home, planned(config)
    data = home / "data"
    names = pair_names(
        config.compare, data / Identity(config).key(config.model.hook), [(plan.folder, plan.cycles) for plan in plans]
    )
    for folder in ours_in(home, "sweeps"):
        try:
            chains = json.loads((folder / "chains.json").read_text())
            lasting = [
                (ChainFolder(home / "chains" / named_key(folder / "chains.json", chain["key"])), chain["cycles"])
                for chain in chains
            ]
            there = [(chain, cycles) for chain, cycles in lasting if chain.path.is_dir()]
            compare = CompareConfig(**read_yaml(folder / "config.yaml").get("compare") or {})
            for rows in {dataset_of(chain.path) for chain, _ in there}:
                names |= pair_names(compare, data / rows, there)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"kept all of {home / 'pairs'}: what {folder} needs of it cannot be told ({error})")
            return None
    return names


def dataset_of(chain: Path) -> str:
    """Key of the dataset that a chain was trained on. Raises ValueError if its chain.json does not say."""
    path = chain / "chain.json"
    try:
        return named_key(path, json.loads(path.read_text())["fields"]["dataset"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}), so it is not known which activations this chain needs: nothing is "
            "removed. Restore it, or delete the chain's folder"
        ) from error


def size_of(path: Path) -> int:
    if (place := elsewhere(path)) is not None:
        return place.bytes_below(path)
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def clean(config: Config, dry_run: bool) -> int:
    """Remove it, or with dry_run only say what would go. Refused while a driver is at work, and where the folder is
    none of ours.
    """
    if not config.home.exists():
        print(f"{config.place}: nothing there")
        return 0
    if not marked(config.home):
        raise ValueError(
            f"output folder {config.place}: none that this program made (it has no {MARKER}), so nothing in it is "
            "removed; give --output, or --config, the one that is meant"
        )
    lock = OutputLock(config.home)
    try:
        refresh(config.home)
        found = superfluous(config)
        for one in found:
            print(f"{'would remove' if dry_run else 'removing'} {one.path} ({size_of(one.path) / 1e6:,.1f} MB)")
            for path in [] if dry_run else one.remove():
                print(f"left {path}: not made by this program")
        for path in [config.home / kind for kind in FOLDERS if (config.home / kind).is_symlink()]:
            print(f"left {path}: a link, what it leads to is not looked at")
        print(f"{len(found)} to remove" if dry_run else f"{len(found)} removed")
    finally:
        lock.release()
    return 0
