"""What other values at a model's hook do to its predictions: their cross-entropy, and their divergence from the clean
ones.

The vocabulary is gone through in chunks of rows, so that no distribution is kept: at 256k words one batch of them would
be gigabytes.

B sequences, T tokens, D width of the residual stream, R targets (r of them at a time), V vocabulary, Q values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from dmsae_ray.lm.model import Cut, LanguageModel

LOGITS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Logits that exist at a time. On a CPU, 4 MB stay in its cache: with all of a batch at once everything but the product
itself took 2 to 8 times as long. A GPU's launches are worth 256 rows of the largest vocabularies (256 MB in fp32)."""


@torch.no_grad()
def divergence(
    lm: LanguageModel, cut: Cut, values: Iterable[torch.Tensor], ids_BT: torch.Tensor, lengths_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each value [B, T, D] at the hook and each sequence: loss_QB and kl_QB, fp64 on the CPU, in nats, summed over
    the sequence's targets, which are the `rows`.

        loss = sum over targets of  -log q(target)        kl = sum over targets of  sum_v p(v) (log p(v) - log q(v))

    p: next-token distribution of the model as it is; q: with the value at its hook. `loss` is that of
    `LanguageModel.loss`. The lower blocks are those of the cut, the upper ones run once for p and once for each value.
    values: taken one at a time; an iterator may make each when it is asked for.
    """
    predicts_Bt, targets_R = _targets(lm, ids_BT, lengths_B)
    sequence_R = predicts_Bt.nonzero()[:, 0].cpu()

    def at_targets(value_BTD: torch.Tensor) -> torch.Tensor:
        return _at_targets(lm, cut, value_BTD, predicts_Bt)

    clean_RD = at_targets(cut.value_BTD)
    streams = [at_targets(value_BTD) for value_BTD in values]
    loss_QB = torch.zeros(len(streams), len(ids_BT), dtype=torch.float64)
    kl_QB = torch.zeros_like(loss_QB)
    for chunk in _chunks(lm, clean_RD):
        log_p_rV = torch.log_softmax(lm.unembed(clean_RD[chunk]).float(), dim=1)
        p_rV, targets_r1 = log_p_rV.exp(), targets_R[chunk, None].to(log_p_rV.device)
        for q, stream_RD in enumerate(streams):
            log_q_rV = torch.log_softmax(lm.unembed(stream_RD[chunk]).float(), dim=1)
            loss_r = -log_q_rV.gather(1, targets_r1)[:, 0]
            loss_QB[q].index_add_(0, sequence_R[chunk], loss_r.double().cpu())
            kl_r = torch.linalg.vecdot(p_rV, log_p_rV - log_q_rV)
            kl_QB[q].index_add_(0, sequence_R[chunk], kl_r.double().cpu())
    return loss_QB, kl_QB


@torch.no_grad()
def token_losses(
    lm: LanguageModel, cut: Cut, value_BTD: torch.Tensor, ids_BT: torch.Tensor, lengths_B: torch.Tensor
) -> torch.Tensor:
    """The terms of `LanguageModel.loss` with a value at the hook: what each of the `rows` cost to predict, in nats,
    fp32 [B, T] on the ids' device; 0 elsewhere."""
    predicts_Bt, targets_R = _targets(lm, ids_BT, lengths_B)
    stream_RD = _at_targets(lm, cut, value_BTD, predicts_Bt)
    losses = [torch.zeros(0, device=ids_BT.device)]
    for chunk in _chunks(lm, stream_RD):
        logits_rV = lm.unembed(stream_RD[chunk]).float()
        losses.append(
            torch.nn.functional.cross_entropy(logits_rV, targets_R[chunk].to(logits_rV.device), reduction="none").to(
                ids_BT.device
            )
        )
    losses_BT = torch.zeros(ids_BT.shape, device=ids_BT.device)
    losses_BT[:, 1:][predicts_Bt.to(ids_BT.device)] = torch.cat(losses)
    return losses_BT


def _targets(lm: LanguageModel, ids_BT: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions that predict something [B, T - 1], and what they are to predict [R]."""
    predicts_Bt = lm.rows(ids_BT, lengths_B)[:, 1:].to(lm.device)
    return predicts_Bt, ids_BT.to(lm.device, torch.int64)[:, 1:][predicts_Bt]


def _at_targets(lm: LanguageModel, cut: Cut, value_BTD: torch.Tensor, predicts_Bt: torch.Tensor) -> torch.Tensor:
    """The stream after the last block where it predicts something, [R, D]."""
    stream_BTD = lm.stream(cut, value_BTD)
    return stream_BTD[:, :-1][predicts_Bt.to(stream_BTD.device)]


def _chunks(lm: LanguageModel, stream_RD: torch.Tensor) -> Iterator[slice]:
    """Rows whose logits are made at a time."""
    rows = max(1, LOGITS_AT_ONCE.get(stream_RD.device.type, 1 << 20) // lm.vocabulary)
    return (slice(first, first + rows) for first in range(0, len(stream_RD), rows))
