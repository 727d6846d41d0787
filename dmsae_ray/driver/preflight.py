"""What can be found out before any work is done. Every mistake ends here with one message that names its remedy."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from dmsae_ray.activations.stream import BLOCKS_IN_FLIGHT
from dmsae_ray.cluster.temporary import check_temporary_folder
from dmsae_ray.config import Config
from dmsae_ray.corpus.mixture import check_mixture
from dmsae_ray.distill.grid import planned
from dmsae_ray.distill.plan import ChainPlan, check_twins
from dmsae_ray.driver.stage_memory import check_memory
from dmsae_ray.lm.model import ModelInfo, layer_of
from dmsae_ray.lm.source import check_chat, info_of, pinned_revision
from dmsae_ray.ownership import make_home, refuse_strangers
from dmsae_ray.sae.ops import native
from dmsae_ray.store import Store

MARGIN = 1.2
"""Margin on the disk estimate."""


def preflight(config: Config, say: Callable[[str], None] = lambda line: None) -> Config:
    """Look at model, hook, corpus, GPU memory and disk, without loading weights; the configuration, pinned.

    say: is told what is needed of a GPU. Raises ValueError.
    """
    refuse_strangers(config.home)
    check_temporary_folder(config)
    check_urls(config)
    chat = check_mixture(config.corpus)
    info = info_of(config.model)
    if chat:
        check_chat(config.model)
    for hook in config.hooks:
        layer_of(hook, info.name, info.n_layers)
    if config.model.context > info.max_context:
        raise ValueError(
            f"model.context {config.model.context}: {config.model.name} takes at most {info.max_context} tokens"
        )
    check_stream(config, info.d)
    if (needs := check_memory(config, info)) is not None:
        say(needs)
    check_disk(config, info)
    return pinned(config)


def pinned(config: Config) -> Config:
    """The configuration with the commit that a hub model's revision stands for now: every process of the run loads that
    one.

    Raises ValueError if the hub has no such model or cannot be asked.
    """
    revision = pinned_revision(config.model.name, config.model.revision)
    return config.model_copy(update={"model": config.model.model_copy(update={"revision": revision})})


def check_urls(config: Config) -> None:
    """No URL is one whose secret was masked, as a results folder's config.yaml has it. Raises ValueError naming the
    field.
    """
    urls = [
        ("output", config.output),
        ("harvest.store", config.harvest.store),
        ("harvest.dataset", config.harvest.dataset),
        ("track.uri", config.track.uri),
        *(("corpus.source", part.source) for part in config.corpus.parts),
    ]
    for field, url in urls:
        try:
            if url is not None:
                url.reveal()
        except ValueError as error:
            raise ValueError(f"{field} {error}") from None


def check_stream(config: Config, d: int) -> None:
    """A worker's share of the object store holds the blocks its stream needs at the same time. Raises ValueError."""
    unit = config.harvest.rows_per_group * 2 * d
    need = -(-unit * BLOCKS_IN_FLIGHT // 2**20)
    if config.cluster.object_store_mb < need:
        raise ValueError(
            f"cluster.object_store_mb {config.cluster.object_store_mb}: {BLOCKS_IN_FLIGHT} row groups of "
            f"harvest.rows_per_group {config.harvest.rows_per_group} rows at d = {d} need {need}; raise it or lower "
            "harvest.rows_per_group"
        )


def without_kernels(config: Config) -> str | None:
    """Why training on this machine's CPU will have to do without compiled kernels; None if it will not.

    Builds them, so that workers find them built. Raises ValueError if they are asked for and cannot be had.
    """
    if config.train.kernels == "torch" or config.cluster.gpus_per_worker:
        return None
    try:
        native.library()
    except native.NotBuilt as error:
        if config.train.kernels == "compiled":
            raise ValueError(f"train.kernels compiled: {error}; install gcc, or set train.kernels to auto") from error
        return str(error)
    return None


def check_needs(config: Config) -> list[ChainPlan]:
    """Every chain that another one needs is finished, or is one of this sweep. Returns all chains. Raises ValueError.

    Only `selection.size: match` needs chains that the sweep may not have itself.
    """
    plans = planned(config)
    keys = {plan.key for plan in plans}
    twins = [(plan, twin) for plan in plans if (twin := plan.twin()) is not None]
    check_twins({plan.label: (twin.folder, plan.cycles) for plan, twin in twins if twin.key not in keys})
    return plans


def disk_bytes(config: Config, d: int) -> int:
    """Upper estimate of what a whole sweep writes to the output folder."""
    elsewhere = config.harvest.dataset or config.harvest.store or (config.output is not None and config.output.is_url)
    rows = 0 if elsewhere else (config.harvest.tokens + config.harvest.calibration_tokens) * len(config.hooks)
    sae = 2 * config.sae.width * d * 4
    plans = planned(config)
    at_once = config.cluster.concurrent or len(plans)
    saes = sum(plan.cycles for plan in plans)
    return int(MARGIN * (rows * 2 * d + saes * 1.5 * sae + at_once * 4 * sae + (64 << 20)))


def check_disk(config: Config, info: ModelInfo) -> None:
    """The output folder can be written and has room. Raises ValueError."""
    home = config.home
    make_home(home)
    if config.harvest.store:
        Store(config.harvest.store)  # a URL that pyarrow cannot open ends here
    used = sum(file.stat().st_size for file in home.rglob("*") if file.is_file())
    need, free = disk_bytes(config, info.d) - used, shutil.disk_usage(home).free
    if need > free:
        raise ValueError(
            f"output folder {home}: needs up to {need / 1e9:,.1f} GB more, {free / 1e9:,.1f} GB are free; give "
            "--output a larger disk, or lower harvest.tokens or the number of chains"
        )
