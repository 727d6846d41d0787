"""Where latents fire: for each the sequences in which it is strongest, and some in which it is weaker.

A sequence counts once, by the strongest of its rows. Maxima alone mislead: a latent that is clean at the top is often
something else further down, so some contexts come from lower quantiles of the sequences' peaks.
Letters: N sequences of a batch, T context, D model dimension, L latents (of all chains), K contexts that are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dmsae_ray.activations.outliers import counted
from dmsae_ray.corpus.tokens import TokenSequences
from dmsae_ray.sae.latents import Latents

SAMPLE = 64
"""Sequences drawn for each latent, which the weaker contexts are chosen from: a quantile among them is right to 0.06
(standard error).
"""


@dataclass(frozen=True)
class Peak:
    """The row of a sequence on which a latent is strongest."""

    sequence: int
    position: int
    """in the sequence; BOS stands at 0"""
    activation: float
    """in units of the SAE, whose input is divided by the dataset's scale"""
    spread: bool = False
    """taken from a lower quantile, not from the top"""


@dataclass
class _Ranked:
    """The first K sequences of each latent by falling rank, and the peaks in them. Equal ranks: the earlier sequence
    first.
    """

    rank_LK: torch.Tensor
    """fp64; 0: no sequence"""
    value_LK: torch.Tensor
    sequence_LK: torch.Tensor
    position_LK: torch.Tensor

    @staticmethod
    def none(latents: int, device: torch.device) -> _Ranked:
        whole = torch.zeros(latents, 0, dtype=torch.int64, device=device)
        return _Ranked(whole.double(), whole.float(), whole, whole)

    def add(self, most: int, rank_LN, value_LN, sequence_LN, position_LN) -> None:
        """Take a batch in, later sequences than any so far, ascending."""
        rank_LM = torch.cat([self.rank_LK, rank_LN], dim=1)
        # Stable: what is equal keeps its order, which is that of the sequences.
        self.rank_LK, order_LK = (kept[:, :most] for kept in rank_LM.sort(dim=1, descending=True, stable=True))
        self.value_LK = torch.cat([self.value_LK, value_LN], dim=1).gather(1, order_LK)
        self.sequence_LK = torch.cat([self.sequence_LK, sequence_LN], dim=1).gather(1, order_LK)
        self.position_LK = torch.cat([self.position_LK, position_LN], dim=1).gather(1, order_LK)

    def peaks(self) -> list[list[Peak]]:
        """Of each latent, in order; none where it did not fire."""
        columns = (self.sequence_LK.tolist(), self.position_LK.tolist(), self.value_LK.tolist(), self.rank_LK.tolist())
        return [
            [Peak(sequence, position, value) for sequence, position, value, rank in zip(*row, strict=True) if rank > 0]
            for row in zip(*columns, strict=True)
        ]


@torch.no_grad()
def find_peaks(
    pieces: Sequence[Latents],
    lm,
    sequences: TokenSequences,
    scale: float,
    contexts: int,
    spread: int,
    sequences_per_batch: int,
    max_norm: float | None = None,
) -> list[list[Peak]]:
    """For each latent of all pieces, in their order, at most `contexts` peaks, at most one in a sequence.

    First come the contexts - spread largest, falling; then `spread` weaker ones, falling, at evenly spaced quantiles of
    the peaks in a sample of the other sequences in which the latent fires (the sample is drawn with a fixed seed). One
    pass over the sequences serves all chains, and memory does not grow with the tokens. max_norm: the dataset's bound;
    positions beyond it have no activation.
    """
    assert 0 <= spread < contexts, (spread, contexts)
    device = pieces[0].b_enc_N.device
    latents, most_drawn = sum(piece.size for piece in pieces), max(SAMPLE, 2 * contexts)
    strongest, drawn = _Ranked.none(latents, device), _Ranked.none(latents, device)
    draw_S = (torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0)) + 1).to(device, torch.float64)
    for sequence_N, value_LN, position_LN in _sequence_peaks(
        pieces, lm, sequences, scale, sequences_per_batch, device, max_norm
    ):
        sequence_LN = sequence_N.expand(latents, -1)
        strongest.add(contexts - spread, value_LN.double(), value_LN, sequence_LN, position_LN)
        if spread:
            rank_LN = torch.where(value_LN > 0, draw_S[sequence_N], 0)
            drawn.add(most_drawn, rank_LN, value_LN, sequence_LN, position_LN)
    return [top + _weaker(top, sample, spread) for top, sample in zip(strongest.peaks(), drawn.peaks(), strict=True)]


def _sequence_peaks(
    pieces, lm, sequences, scale, sequences_per_batch, device, max_norm
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Of each batch: its sequences [N], and each latent's largest activation there [L, N] (0: silent) and its position
    [L, N].
    """
    for first, (ids_NT, lengths_N) in enumerate(sequences.batches(sequences_per_batch)):
        ids_NT, lengths_N = ids_NT.to(device), lengths_N.to(device)
        value_NTD = lm.cut(ids_NT).value_BTD
        rows_NT, x_NTD = counted(lm.rows(ids_NT, lengths_N), value_NTD, max_norm), value_NTD / scale
        values, positions = [], []
        for piece in pieces:
            z_NTL = torch.where(rows_NT[:, :, None], piece.encode(x_NTD), 0)
            value_NL, position_NL = z_NTL.max(dim=1)  # of equal ones the first
            values.append(value_NL.T)
            positions.append(position_NL.T)
        real = min(sequences_per_batch, len(sequences) - first * sequences_per_batch)  # the last batch is filled up
        sequence_N = torch.arange(real, device=device) + first * sequences_per_batch
        yield sequence_N, torch.cat(values)[:, :real], torch.cat(positions)[:, :real]


def _weaker(top: list[Peak], sample: list[Peak], spread: int) -> list[Peak]:
    """At most `spread` peaks of the sample at evenly spaced quantiles, falling, from sequences that are not
    in `top`.
    """
    taken = {peak.sequence for peak in top}
    rest = sorted(
        (peak for peak in sample if peak.sequence not in taken), key=lambda peak: (-peak.activation, peak.sequence)
    )
    if len(rest) <= spread:
        chosen = rest
    else:
        chosen = [rest[(2 * i + 1) * len(rest) // (2 * spread)] for i in range(spread)]  # midpoints of equal parts
    return [Peak(peak.sequence, peak.position, peak.activation, spread=True) for peak in chosen]
