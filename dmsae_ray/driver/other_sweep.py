"""Another sweep, found by its results folder: what it was, and its chains."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from dmsae_ray.config import Config
from dmsae_ray.config_checks import problem_lines
from dmsae_ray.distill.grid import plan_all
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.driver.options import read_yaml
from dmsae_ray.ownership import KEY


def _key(path: Path, key: object) -> str:
    """A key that a file names, which becomes the name of a folder. Raises ValueError if it is none."""
    if not re.fullmatch(KEY, str(key)):
        raise ValueError(f"{path}: names {key!r} where a key of twelve hex digits belongs; the file was altered")
    return str(key)


@dataclass(frozen=True)
class OtherSweep:
    """A finished sweep, to look at."""

    folder: Path
    """its results folder"""
    config: Config
    plans: list[ChainPlan]
    numbers: dict[str, float]
    """numbers.json"""

    @staticmethod
    def open(folder: Path) -> OtherSweep:
        """folder: `<output>/sweeps/<name>-<key>`. Raises ValueError, naming what is missing, if it is none, or of
        another version.
        """
        folder = folder.expanduser().absolute()
        missing = [name for name in ("config.yaml", "chains.json", "numbers.json") if not (folder / name).exists()]
        if missing:
            raise ValueError(
                f"--against {folder}: not a sweep's results folder (lacks {', '.join(missing)}); give one of the "
                "folders in <output>/sweeps, or make its results with python -m dmsae_ray.report"
            )
        tree = read_yaml(folder / "config.yaml") | {"output": str(folder.parents[1])}
        try:
            config = Config(**tree)
        except ValidationError as error:
            raise ValueError(
                f"{folder / 'config.yaml'}: written by another version ({'; '.join(problem_lines(error))})"
            ) from error
        chains = {
            chain["label"]: _key(folder / "chains.json", chain["key"])
            for chain in json.loads((folder / "chains.json").read_text())
        }
        described = [path for key in chains.values() if (path := config.home / "chains" / key / "chain.json").exists()]
        if not described:
            raise ValueError(f"--against {folder}: none of its chains is in {config.home / 'chains'} any more")
        dataset = _key(described[0], json.loads(described[0].read_text())["fields"]["dataset"])
        plans = plan_all(config, "", dataset)
        if {plan.label: plan.key for plan in plans} != chains:
            raise ValueError(
                f"--against {folder}: its chains were made by another version of this program, whose fields mean "
                "something else"
            )
        return OtherSweep(folder, config, plans, json.loads((folder / "numbers.json").read_text()))
