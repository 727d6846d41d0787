"""A sweep that is done, by its results folder: what it was, its chains with their cores and SAEs, and its results."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dmsae_ray.activations.catalogue import dataset_store
from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.config import Config
from dmsae_ray.config_checks import problem_lines
from dmsae_ray.core.core import Core
from dmsae_ray.distill.folder import CycleFolder
from dmsae_ray.distill.grid import plan_all
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.distill.record import CycleRecord
from dmsae_ray.files import refresh
from dmsae_ray.interop.ours import about_of, plain_of
from dmsae_ray.interop.plain import PlainSAE
from dmsae_ray.ownership import named_key
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.yaml_file import read_yaml

ADDRESSES = ("models:/", "runs:/")
"""How the address of a core in an MLflow store begins."""
DESCRIPTION = ("config.yaml", "chains.json")
"""Files of a results folder that say what the sweep was."""


@dataclass(frozen=True)
class SavedChain:
    """One chain of a sweep: its finished cycles. A cycle is counted from 0; -1 is the last finished one."""

    plan: ChainPlan

    @property
    def label(self) -> str:
        return self.plan.label

    @property
    def arm(self) -> str:
        return self.plan.arm

    @property
    def seed(self) -> int:
        return self.plan.seed

    @property
    def k(self) -> int:
        return self.plan.k

    @cached_property
    def records(self) -> list[CycleRecord]:
        """One per finished cycle. Raises ValueError naming the file if one is damaged."""
        return self.plan.folder.records()[: self.plan.cycles]

    @property
    def finished(self) -> bool:
        return len(self.records) == self.plan.cycles

    @property
    def failure(self) -> str | None:
        """Why it ended before its time; None if it did not."""
        failure = self.plan.folder.failure()
        return None if failure is None or self.finished else failure.text()

    def core(self, cycle: int = -1) -> Core:
        """The core that a cycle selected. Raises ValueError if that cycle is not finished or its file is damaged."""
        return Core.load(self._cycle(cycle).core)

    def sae(self, cycle: int = -1) -> tuple[MatryoshkaSAE, dict[str, Any]]:
        """The SAE that a cycle trained, on rows divided by `scale`, and what is known of it (see `load_sae`).

        Raises ValueError if that cycle is not finished or its file is damaged.
        """
        return load_sae(self._cycle(cycle).sae)

    def plain(self, cycle: int = -1) -> tuple[PlainSAE, dict[str, Any]]:
        """The same SAE in raw units, with all that is known of it, and what its file says. Raises as `sae` does."""
        sae, known = self.sae(cycle)
        record, model = self.records[cycle], self.plan.config.model
        about = about_of(sae, known, self.label)
        more = about.more | {
            "chain": self.label,
            "key": self.plan.key,
            "model_dtype": model.dtype,
            "model_revision": model.revision,
            "tokens": record.tokens,
            "data_digest": record.data_digest,
            "fvu": record.fvu,
        }
        # A path is this machine's affair; the model itself is not needed, and may be gone.
        name = Path(model.name).name if Path(model.name).is_absolute() else model.name
        about = replace(about, model=name, context=model.context, prepend_bos=True, l0=record.l0, more=more)
        return plain_of(sae, known, about), known

    def _cycle(self, cycle: int) -> CycleFolder:
        done = len(self.records)
        if not -done <= cycle < done:
            raise ValueError(f"{self.plan.folder.path}: {self.label} has {done} finished cycles, none is {cycle}")
        return self.plan.folder.cycle(cycle % done)


@dataclass(frozen=True)
class SavedSweep:
    """A sweep, to look at; nothing is computed or written."""

    folder: Path
    """its results folder"""
    config: Config
    plans: list[ChainPlan]

    @cached_property
    def chains(self) -> dict[str, SavedChain]:
        """By label, as in the tables: `seed0-k16`, `seed0-k16-random`, ..."""
        return {plan.label: SavedChain(plan) for plan in self.plans}

    def result(self, name: str) -> dict[str, Any]:
        """One of the files of results: evaluation, comparison, consensus, features, numbers, expectations, data.

        Raises ValueError with the reason if it is not there.
        """
        path = self.folder / f"{name}.json"
        if not path.exists():
            there = ", ".join(sorted(path.stem for path in self.folder.glob("*.json"))) or "nothing"
            raise ValueError(f"{path}: no such result; there is {there}. python -m dmsae_ray.report makes them again")
        return json.loads(path.read_text())

    @property
    def numbers(self) -> dict[str, float]:
        """Every named number, such as `evaluation.base.k16.fvu`. Raises ValueError as `result` does."""
        return self.result("numbers")

    def consensus_core(self) -> Core | None:
        """The latents on which the seeds agree, as one core; None where there are none."""
        path = self.folder / "consensus.safetensors"
        return Core.load(path) if path.exists() else None

    def dataset(self) -> ActivationDataset:
        """The activations that it was trained on. Raises ValueError if they are not there any more."""
        return ActivationDataset(dataset_store(self.config, self.config.model.hook, self.plans[0].dataset_key))

    @staticmethod
    def open(folder: Path, needs: tuple[str, ...] = ()) -> SavedSweep:
        """folder: `<output>/sweeps/<name>-<key>`. needs: results that must be there.

        Raises ValueError, naming what is missing, if it is none, or of another version.
        """
        folder = folder.expanduser().absolute()
        missing = [name for name in (*DESCRIPTION, *needs) if not (folder / name).exists()]
        if missing:
            raise ValueError(
                f"{folder}: not a sweep's results folder (lacks {', '.join(missing)}); give one of the "
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
            chain["label"]: named_key(folder / "chains.json", chain["key"])
            for chain in json.loads((folder / "chains.json").read_text())
        }
        described = [path for key in chains.values() if (path := config.home / "chains" / key / "chain.json").exists()]
        if not described:
            raise ValueError(f"{folder}: none of its chains is in {config.home / 'chains'} any more")
        dataset = named_key(described[0], json.loads(described[0].read_text())["fields"]["dataset"])
        plans = plan_all(config, "", dataset)
        if {plan.label: plan.key for plan in plans} != chains:
            raise ValueError(
                f"{folder}: its chains were made by another version of this program, whose fields mean something else"
            )
        return SavedSweep(folder, config, plans)


def load_sweep(folder: str | Path) -> SavedSweep:
    """A sweep by its output folder or URL, or by its results folder `<output>/sweeps/<name>-<key>`.

        sweep = dmsae_ray.load_sweep("~/dmsae_ray/quickstart")
        core = sweep.chains["seed0-k16"].core()
        sweep.result("comparison")["pairs"]

    Raises ValueError if it is none, or an output folder with the results of several: then one has to be named.
    """
    return _sweep_in(local_folder(folder))


def sweep_at(place: str | Path) -> SavedSweep | None:
    """The sweep of a place, as for `load_sweep`; None where it looks like one SAE. Raises ValueError as that does."""
    folder = local_folder(place)
    looks_so = (folder / "sweeps").is_dir() or all((folder / name).exists() for name in DESCRIPTION)
    return _sweep_in(folder) if looks_so else None


def _sweep_in(folder: Path) -> SavedSweep:
    if not (folder / "sweeps").is_dir():
        return SavedSweep.open(folder)
    found = sorted(path for path in (folder / "sweeps").iterdir() if (path / "chains.json").exists())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(
            f"{folder}: holds the results of {len(found)} sweeps ({names}); give the folder of one of them"
        )
    return SavedSweep.open(found[0])


def local_folder(place: str | Path) -> Path:
    """The folder that a place stands for: itself or, of an output at a URL, that on this machine's disk."""
    if "://" not in str(place) or str(place).startswith("file://"):
        return Path(str(place).removeprefix("file://")).expanduser().absolute()
    url, _, key = str(place).partition("/sweeps/")
    url, options = (url, key.partition("?")[2]) if key else (url.partition("?")[0], url.partition("?")[2])
    home = Config(output=url.rstrip("/") + (f"?{options}" if options else "")).home
    refresh(home)
    name = key.partition("?")[0].strip("/")
    return home / "sweeps" / name if name else home


def load_sae(path: str | Path) -> tuple[MatryoshkaSAE, dict[str, Any]]:
    """The SAE in `sae.safetensors`, or in the cycle's folder that holds it, and what is known of it: `scale` (it takes
    rows divided by that), `hook`, `model`, `density` [F], `seed`, `k`, `chain`, `cycle`.

    Raises ValueError naming the file if it is none.
    """
    path = Path(path).expanduser()
    return MatryoshkaSAE.load(path / "sae.safetensors" if path.is_dir() else path)


def load_core(path: str | Path, store: str | Path | None = None) -> Core:
    """The core in `core.safetensors` or `consensus.safetensors`, in the cycle's folder that holds it, or at an address
    in an MLflow store.

        load_core("models:/quickstart-consensus@current", store="~/dmsae_ray/quickstart")
        load_core("runs:/<id of a chain's run>/core")

    store: for an address alone: a tracking URI, or a sweep's output folder; None: $MLFLOW_TRACKING_URI. Raises
    ValueError naming the file or the address if there is none.
    """
    if str(path).startswith(ADDRESSES):
        from dmsae_ray.show.mlflow.core_model import fetch_core

        return fetch_core(str(path), store)
    if store is not None:
        raise ValueError(f"{path}: is a file, and no address of a store's ({' or '.join(ADDRESSES)}); leave out store=")
    path = Path(path).expanduser()
    return Core.load(path / "core.safetensors" if path.is_dir() else path)
