"""What the tests of features share: token sequences, a model whose stream is a table, and SAEs with planted latents."""

from __future__ import annotations

import numpy as np
import torch

from dmsae_ray.corpus.tokens import TokenSequences
from dmsae_ray.lm.model import Cut
from dmsae_ray.sae.sae import MatryoshkaSAE

BOS = 2


def sequences_of(rows: list[list[int]]) -> TokenSequences:
    """These tokens, BOS included, padded with 0."""
    context = max(map(len, rows))
    ids = np.zeros((len(rows), context), dtype=np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    return TokenSequences(ids, lengths, lengths - np.array([row.count(BOS) for row in rows], dtype=np.int32))


class TableModel:
    """What stands at the hook is a token's row of a table, NaN at padding: exact, whatever the batch."""

    bos_id = BOS

    def __init__(self, table_VD: torch.Tensor):
        self.table_VD = table_VD
        self.cuts = 0

    def rows(self, ids_BT, lengths_B):
        return (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]) & (ids_BT != BOS)

    def cut(self, ids_BT):
        self.cuts += 1
        return Cut(torch.where((ids_BT == 0)[:, :, None], torch.nan, self.table_VD[ids_BT]), None)


def sae_of(
    W_enc_FD: torch.Tensor, W_dec_FD: torch.Tensor, theta: float, core_size: int = 0, gate: str = "batchtopk"
) -> MatryoshkaSAE:
    """An SAE with these rows, no biases and one group."""
    sae = MatryoshkaSAE(W_enc_FD.shape[1], [len(W_enc_FD)], core_size, gate)
    with torch.no_grad():
        sae.encoder_rows().copy_(W_enc_FD)
        sae.W_dec.copy_(W_dec_FD)
        sae.theta.fill_(theta)
    return sae


def random_sae(
    d: int, width: int, theta: float, seed: int = 0, core_size: int = 0, gate: str = "batchtopk"
) -> MatryoshkaSAE:
    """Random unit rows, biases on both sides."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, width, d, generator=generator)
    sae = sae_of(*(rows / rows.norm(dim=2, keepdim=True)), theta, core_size, gate)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(width, generator=generator))
        sae.b_dec.copy_(0.1 * torch.randn(d, generator=generator))
    return sae
