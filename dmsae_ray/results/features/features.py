"""features.json: every feature of the finished cores with the text it fires on and what its removal does to the loss.

Letters: P contexts of all features, T context length in tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmsae_ray.config import FeaturesConfig
from dmsae_ray.core.core import Core
from dmsae_ray.corpus.tokens import TokenSequences
from dmsae_ray.files import write_json
from dmsae_ray.identity import fields_key
from dmsae_ray.results.features.contexts import Peak, find_peaks
from dmsae_ray.results.features.effects import Removals, remove_latents
from dmsae_ray.results.features.roster import Feature, cosines_to_representative, roster_of
from dmsae_ray.results.features.token_text import TokenText
from dmsae_ray.sae.latents import Latents
from dmsae_ray.sae.sae import MatryoshkaSAE

FORMAT_VERSION = 2
NEAR = 8
"""Tokens shown before and after one whose loss changes."""


@dataclass(frozen=True)
class ChainCore:
    """A finished chain, as far as its features are concerned."""

    label: str
    core: Core
    """the last one"""
    sae: Path
    """file of the SAE in which that core was selected; read when its turn comes, since those of all chains may not fit
    in memory
    """


def features_key(settings: FeaturesConfig, dataset: str, cores: Mapping[str, str], consensus: str | None) -> str:
    """What decides a features.json: settings, the dataset's key, and sha256 of each chain's last core and of
    consensus.json.

    A core's file decides its latents: it holds all that they are computed from, but the gate, which is the chain's.
    """
    return fields_key(
        {
            "format": FORMAT_VERSION,
            "settings": settings.model_dump(mode="json"),
            "dataset": dataset,
            "cores": dict(cores),
            "order": list(cores),
            "consensus": consensus,
        }
    )


def write_features(
    path: Path,
    lm,
    sequences: TokenSequences,
    scale: float,
    tokenizer,
    chains: Sequence[ChainCore],
    consensus: dict | None,
    settings: FeaturesConfig,
    key: str,
    device: str | torch.device = "cpu",
    max_norm: float | None = None,
) -> dict[str, Any]:
    """Describe the features of these chains' cores, write features.json and return what stands in it.

    sequences: the evaluation split; scale, max_norm: the dataset's. consensus: what consensus.json holds; None where
    chains were not compared, then every core latent is a feature of its own. key: stored, for whoever asks whether the
    file still holds (`features_key`). Raises ValueError if there is no chain, or consensus and cores do not belong
    together.
    """
    if not chains:
        raise ValueError("features.json: no finished chain has a core to describe")
    cores = {chain.label: chain.core for chain in chains}
    every = roster_of(cores, consensus)
    features = every[: settings.most]
    sequences = sequences.first_tokens(settings.tokens)
    described = _describe(features, chains, lm, sequences, scale, tokenizer, settings, device, max_norm)
    content = {
        "format_version": FORMAT_VERSION,
        "key": key,
        "tokens": sequences.tokens,
        "left_out": len(every) - len(features),
        "features": [_about(feature, cores) | what for feature, what in zip(features, described, strict=True)],
    }
    write_json(path, content)
    return content


def _describe(
    features: list[Feature],
    chains: Sequence[ChainCore],
    lm,
    sequences: TokenSequences,
    scale: float,
    tokenizer,
    settings: FeaturesConfig,
    device: str | torch.device,
    max_norm: float | None,
) -> list[dict[str, Any]]:
    """max_activation, mean_loss_change, contexts and effects of each feature's representative."""
    places, pieces = [], []
    for chain in chains:
        mine = [place for place, feature in enumerate(features) if feature.representative.chain == chain.label]
        if mine:
            sae, _ = MatryoshkaSAE.load(chain.sae)
            places += mine
            pieces.append(Latents.some_of(sae, [features[place].representative.latent for place in mine], device))
    if not pieces:
        return []
    peaks_L = find_peaks(
        pieces, lm, sequences, scale, settings.contexts, settings.spread, settings.sequences_per_batch, max_norm
    )
    pairs = [(latent, peak.sequence) for latent, peaks in enumerate(peaks_L) for peak in peaks]
    read = remove_latents(
        pieces,
        lm,
        sequences,
        scale,
        pairs,
        settings.sequences_per_batch,
        remove=settings.effects > 0,
        max_norm=max_norm,
    )
    text, described, first = TokenText(tokenizer), {}, 0
    for place, peaks in zip(places, peaks_L, strict=True):
        own = slice(first, first + len(peaks))
        described[place] = {
            "max_activation": _short(peaks[0].activation) if peaks else 0.0,
            "mean_loss_change": _mean_change(read, own) if settings.effects and peaks else None,
            "contexts": [
                _context(peak, activation_T, sequences, lm.bos_id, settings.window, text)
                for peak, activation_T in zip(peaks, read.activation_PT[own], strict=True)
            ],
            "effects": _effects(peaks, read, own, sequences, lm.bos_id, settings.effects, text),
        }
        first += len(peaks)
    return [described[place] for place in range(len(features))]


def _about(feature: Feature, cores: Mapping[str, Core]) -> dict[str, Any]:
    """What is known of a feature without the text."""
    cosines = cosines_to_representative(feature, cores)
    chains = list(dict.fromkeys(member.chain for member in feature.members))
    return {
        "id": feature.id,
        "kind": feature.kind,
        "chains": chains,
        "in_chains": len(chains),
        "in_seeds": feature.in_seeds,
        "n_chains": feature.n_chains,
        "n_seeds": feature.n_seeds,
        "elsewhere": feature.elsewhere,
        "interval": None if feature.interval is None else list(feature.interval),
        "score": feature.score,
        "density": feature.density,
        "cosine": feature.cosine,
        "smallest_cosine": feature.smallest_cosine,
        "representative": asdict(feature.representative),
        "partners": [
            asdict(member) | {"cosine": cosine} for member, cosine in zip(feature.members[1:], cosines, strict=True)
        ],
    }


def _context(
    peak: Peak, activation_T: torch.Tensor, sequences: TokenSequences, bos_id: int, window: int, text: TokenText
) -> dict[str, Any]:
    """The tokens around a peak, as far as its document goes."""
    start, end = _document(sequences, peak.sequence, peak.position, bos_id)
    first, last = max(start, peak.position - window), min(end, peak.position + window + 1)
    return {
        "tokens": [text.token(token) for token in sequences.ids[peak.sequence, first:last].tolist()],
        "activations": [_short(value) for value in activation_T[first:last].tolist()],
        "peak": peak.position - first,
        "document_token": peak.position - start,
        "spread": peak.spread,
    }


def _effects(
    peaks: list[Peak], read: Removals, mine: slice, sequences: TokenSequences, bos_id: int, most: int, text: TokenText
) -> list[dict[str, Any]]:
    """The tokens whose loss changes most, either way; equal ones in the order of contexts and positions."""
    size_PT = torch.where(read.after_PT[mine], read.delta_PT[mine].abs(), -1).flatten()
    order = size_PT.argsort(descending=True, stable=True)[:most]
    effects = []
    for flat in order[size_PT[order] >= 0].tolist():
        context, position = divmod(flat, read.delta_PT.shape[1])
        sequence = peaks[context].sequence
        start, end = _document(sequences, sequence, position, bos_id)
        ids_T = sequences.ids[sequence]
        effects.append(
            {
                "before": text.join(ids_T[max(start, position - NEAR) : position].tolist()),
                "token": text.token(int(ids_T[position])),
                "after": text.join(ids_T[position + 1 : min(end, position + 1 + NEAR)].tolist()),
                "delta": _short(float(read.delta_PT[mine][context, position])),
            }
        )
    return effects


def _mean_change(read: Removals, mine: slice) -> float:
    """Nats per token over all tokens of the sequences that the contexts are from."""
    return float(read.delta_PT[mine].double().sum() / read.rows_PT[mine].sum())


def _document(sequences: TokenSequences, sequence: int, position: int, bos_id: int) -> tuple[int, int]:
    """First token and end, in the sequence, of the part of a document that `position` lies in. BOS belongs to none."""
    bos = np.flatnonzero(sequences.ids[sequence] == bos_id)
    length = int(sequences.lengths[sequence])
    after = bos[bos > position]
    return int(bos[bos < position].max()) + 1, min(length, int(after[0]) if len(after) else length)


def _short(value: float) -> float:
    """Six digits: what fp32 has to say, at half the length."""
    return float(f"{value:.6g}")
