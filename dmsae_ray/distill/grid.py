"""All chains of a configuration: arms, seeds and sparsities, and what they must find before they begin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dmsae_ray.config import Config
from dmsae_ray.distill.plan import BASE, ChainPlan, Start
from dmsae_ray.secret_url import SecretUrl

if TYPE_CHECKING:
    from dmsae_ray.activations.dataset import ActivationDataset, Manifest
    from dmsae_ray.activations.found import Found


def plan_chains(config: Config, dataset: ActivationDataset) -> list[ChainPlan]:
    """Every chain of a sweep: the grid seeds x k, then the arms of its study.

    Raises ValueError if a core to start from does not fit the dataset.
    """
    plans = plan_all(config, dataset.store.url, dataset.manifest.key)
    for path in sorted({plan.start.path for plan in plans if plan.start and plan.start.chain is None}):
        check_start(path, dataset.manifest)
    return plans


def plan_all(config: Config, dataset: SecretUrl | str, dataset_key: str) -> list[ChainPlan]:
    """The same without a look at the dataset. Raises ValueError if a core file to start from cannot be read."""
    base = grid(config, BASE, dataset, dataset_key)
    plans = list(base)
    for name, arm in config.study.arms.items():
        arm_config = config.of_arm(name)
        if arm.core == "none":
            plans += grid(arm_config, name, dataset, dataset_key)
        else:
            plans += [
                replace(
                    plan,
                    config=arm_config,
                    k=k,
                    arm=name,
                    start=Start(
                        plan.folder.cycle(plan.cycles - 1).core,
                        plan.number(plan.cycles),
                        {"chain": plan.key, "cycle": plan.cycles - 1},
                        plan,
                    ),
                )
                for plan in base
                if plan.seed in arm_config.sweep.seeds
                for k in arm_config.sweep.k
                if k != plan.k
            ]
    return plans


def grid(config: Config, arm: str, dataset: SecretUrl | str, dataset_key: str) -> list[ChainPlan]:
    """One chain for every seed and k."""
    start = None
    if config.sae.core is not None:
        from dmsae_ray.core.core import Core

        core = Core.load(config.sae.core)
        start = Start(config.sae.core, core.cycle + 1, {"core": core.fingerprint})
    return [
        ChainPlan(config, seed, k, dataset, dataset_key, arm, start)
        for k in config.sweep.k
        for seed in config.sweep.seeds
    ]


def read_more_often(plans: list[ChainPlan], dataset: ActivationDataset) -> str | None:
    """A line if chains on disjoint data, compared with chains on all of it, pass over theirs more often."""
    m, apart = dataset.manifest, [plan.config.train for plan in plans if plan.part is not None]
    rows, read = m.rows // m.parts, max((train.tokens for train in apart), default=0)
    if len(apart) == len(plans) or read <= rows:
        return None
    round_ = m.rows_per_group * apart[0].lanes
    return (
        f"warning: sweep.data disjoint: a cycle reads {read:,} rows, one of {m.parts} parts has {rows:,}: disjoint "
        f"chains read each row {read / rows:.2g} times, chains on shared data {read / m.rows:.2g} times, and differ in "
        f"that as well; harvest.tokens {-(-read // round_) * round_ * m.parts} or more gives one pass"
    )


def check_start(path: Path, manifest: Manifest) -> None:
    """A core file fits the activations. Raises ValueError."""
    from dmsae_ray.core.core import Core

    core = Core.load(path)
    d = core.W_enc_CD.shape[1]
    for what, there, here in (
        ("model", core.model, manifest.model_fingerprint),
        ("hook", core.hook, manifest.hook),
        ("d", d, manifest.d),
        ("scale", f"{core.scale:.12g}", f"{manifest.scale:.12g}"),
    ):
        if there != here:
            raise ValueError(
                f"sae.core {path}: made with {what} {there}, the activations have {here}: its encoder rows mean "
                "nothing here; use the model, hook and dataset it was made with, or leave sae.core empty"
            )


def planned(config: Config, found: Found | None = None) -> list[ChainPlan]:
    """Every chain the configuration asks for, only to look at: where the dataset is not there yet, nothing is
    missed.

    found: what is known of model and corpus; None: they are looked at.
    """
    if found is None:
        from dmsae_ray.activations.catalogue import Identity

        found = Identity(config).found
    return plan_all(config, "", found.key(config, config.model.hook))
