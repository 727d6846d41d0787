"""Comparing the finished chains of a sweep: from folders to `comparison.json`. Computed once per set of cores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.compare.pair import ChainResult, CompareSettings, compare_all
from dmsae_ray.compare.summary import summarise
from dmsae_ray.config import Config, fields_key
from dmsae_ray.distill.core import Core
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.distill.select import load_scores, rank
from dmsae_ray.files import file_sha256, write_json
from dmsae_ray.sae.sae import MatryoshkaSAE

FORMAT_VERSION = 1


def compare_chains(config: Config, dataset: ActivationDataset, plans: list[ChainPlan], folder: Path, say: Callable[[str], None]) -> dict:
    """Every pair of finished chains, each score beside its nulls; kept in `folder` and reused while the cores are the same."""
    finished = [plan for plan in plans if plan.finished()]
    last = config.sweep.cycles - 1
    key = fields_key(
        {
            "format": FORMAT_VERSION, "settings": config.compare.model_dump(mode="json"),
            "cores": {plan.label: file_sha256(plan.folder.cycle(last).core) for plan in finished},
            "failed": sorted(plan.label for plan in plans if not plan.finished()),
        }
    )  # fmt: skip
    path = folder / "comparison.json"
    if path.exists() and (known := json.loads(path.read_text())).get("key") == key:
        return known
    say(f"compare: {len(finished) * (len(finished) - 1) // 2} pairs of cores, {config.compare.draws} draws of each null")
    c = config.compare
    settings = CompareSettings(draws=c.draws, cosine=c.cosine, max_latents=c.max_latents, seed=c.seed)
    # Without a pair the rows are not asked for: what failed the chains may be that they cannot be read.
    pairs = compare_all([chain_result(plan, last) for plan in finished], covariance(dataset), settings) if len(finished) > 1 else []
    comparison = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "chains": [plan.label for plan in finished],
        "failed": [{"label": p.label, "reason": (p.folder.failure() or {}).get("reason", "not finished")} for p in plans if not p.finished()],
        "pairs": [pair.to_dict() for pair in pairs],
        "summary": summarise(pairs, seed=c.seed).to_dict(),
    }
    write_json(path, comparison)
    return comparison


def chain_result(plan: ChainPlan, cycle: int) -> ChainResult:
    """What comparison needs of one chain: its last core and SAE, and cycle 0's candidates by score."""
    core = Core.load(plan.folder.cycle(cycle).core)
    sae, stored = MatryoshkaSAE.load(plan.folder.cycle(cycle).sae)
    first, _ = MatryoshkaSAE.load(plan.folder.cycle(0).sae)
    W_enc_FD, W_dec_FD = first.encoder().detach(), first.W_dec.detach()
    by_score_N = rank(load_scores(plan.folder.cycle(0).scores)).ids_N
    return ChainResult(
        label=plan.label, seed=plan.seed, k=plan.k, core=core, W_enc_FD=sae.encoder().detach(), W_dec_FD=sae.W_dec.detach(),
        density_F=stored["density"], core_ids=core.latent_ids_C,
        cycle0_W_enc_ND=W_enc_FD[by_score_N], cycle0_W_dec_ND=W_dec_FD[by_score_N], cycle0_whole_FD=W_dec_FD,
    )  # fmt: skip


def covariance(dataset: ActivationDataset) -> torch.Tensor:
    """Covariance of the scaled activations over the calibration rows, [D, D] fp64."""
    x_ND = dataset.calibration_rows().double() / dataset.manifest.scale
    return torch.cov(x_ND.T)
