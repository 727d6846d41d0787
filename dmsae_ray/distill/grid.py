"""All chains of a configuration: arms, seeds and sparsities, and what they must find before they begin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dmsae_ray.activations.dataset import ActivationDataset, Manifest
from dmsae_ray.config import Config
from dmsae_ray.core.core import Core
from dmsae_ray.distill.folder import ChainFolder
from dmsae_ray.distill.plan import BASE, ChainPlan, Start
from dmsae_ray.lock import Lease
from dmsae_ray.secret_url import SecretUrl


def check_twins(twins: dict[str, tuple[ChainFolder, int]]) -> None:
    """The chains that `selection.size: match` takes core sizes from have done what is needed.

    twins: by the label of their placebo, folder and cycles needed. Raises ValueError with the command that makes them.
    """
    done = {label: len(folder.records()) for label, (folder, _) in twins.items()}
    short = [
        f"{label} from {folder.path} ({done[label]} of {cycles} cycles done)"
        for label, (folder, cycles) in twins.items() if done[label] < cycles
    ]  # fmt: skip
    if short:
        raise ValueError(
            "selection.size match: core sizes are taken from the chain that selects by attribution and has all else in common, "
            f"{', '.join(short)}. Finish it first: the same command with --selection.by attribution --selection.size tau"
        )


def plan_chains(config: Config, dataset: ActivationDataset, lease: Lease) -> list[ChainPlan]:
    """Every chain of a sweep: the grid seeds x k, then the arms of its study.

    Raises ValueError if a core to start from does not fit the dataset.
    """
    plans = plan_all(config, dataset.store.url, dataset.manifest.key, lease)
    for path in sorted({plan.start.path for plan in plans if plan.start and plan.start.chain is None}):
        check_start(path, dataset.manifest)
    return plans


def plan_all(config: Config, dataset: SecretUrl | str, dataset_key: str, lease: Lease | None) -> list[ChainPlan]:
    """The same without a look at the dataset. Raises ValueError if a core file to start from cannot be read."""
    base = grid(config, BASE, dataset, dataset_key, lease)
    plans = list(base)
    for name, arm in config.study.arms.items():
        arm_config = config.of_arm(name)
        if arm.core == "none":
            plans += grid(arm_config, name, dataset, dataset_key, lease)
        else:
            plans += [
                replace(plan, config=arm_config, k=k, arm=name, start=Start(
                    plan.folder.cycle(plan.cycles - 1).core, plan.number(plan.cycles),
                    {"chain": plan.key, "cycle": plan.cycles - 1}, plan,
                ))
                for plan in base if plan.seed in arm_config.sweep.seeds
                for k in arm_config.sweep.k if k != plan.k
            ]  # fmt: skip
    return plans


def grid(config: Config, arm: str, dataset: SecretUrl | str, dataset_key: str, lease: Lease | None) -> list[ChainPlan]:
    """One chain for every seed and k."""
    start = None
    if config.sae.core is not None:
        core = Core.load(config.sae.core)
        start = Start(config.sae.core, core.cycle + 1, {"core": core.fingerprint})
    return [
        ChainPlan(config, seed, k, dataset, dataset_key, lease, arm, start) for k in config.sweep.k for seed in config.sweep.seeds
    ]


def check_start(path: Path, manifest: Manifest) -> None:
    """A core file fits the activations. Raises ValueError."""
    core = Core.load(path)
    d = core.W_enc_CD.shape[1]
    for what, there, here in (
        ("model", core.model, manifest.model_fingerprint), ("hook", core.hook, manifest.hook), ("d", d, manifest.d),
        ("scale", f"{core.scale:.12g}", f"{manifest.scale:.12g}"),
    ):  # fmt: skip
        if there != here:
            raise ValueError(
                f"sae.core {path}: made with {what} {there}, the activations have {here}: its encoder rows mean nothing here; "
                "use the model, hook and dataset it was made with, or leave sae.core empty"
            )
