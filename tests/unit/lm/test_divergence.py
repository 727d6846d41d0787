"""Loss and divergence of other values at the hook, in chunks of rows, against whole logits; for every kind of place and
model.
"""

from __future__ import annotations

import pytest
import torch
from language_models import IDS_BT, LENGTHS, PLACES, T, at, load

from dmsae_ray.lm import divergence as module
from dmsae_ray.lm.divergence import divergence


def values_of(cut):
    """Three values that move the predictions by less and less, and the clean one."""
    noise_BTD = torch.randn(cut.value_BTD.shape, generator=torch.Generator().manual_seed(1)) * cut.value_BTD.std()
    return [torch.zeros_like(cut.value_BTD), cut.value_BTD + noise_BTD, cut.value_BTD + 0.1 * noise_BTD, cut.value_BTD]


def by_whole_logits(lm, cut, values):
    """Both sums for each value, from all logits at once; the targets are picked one by one."""
    targets = [
        (b, t) for b, length in enumerate(LENGTHS.tolist()) for t in range(1, length) if IDS_BT[b, t] != lm.bos_id
    ]
    b_R, t_R = torch.tensor(targets).T

    @torch.no_grad()
    def log_softmax(value_BTD):
        return torch.log_softmax(lm.logits(cut, value_BTD)[b_R, t_R - 1].double(), dim=1)

    log_p_RV, sums = log_softmax(cut.value_BTD), []
    for value_BTD in values:
        log_q_RV = log_softmax(value_BTD)
        loss_R = -log_q_RV[torch.arange(len(targets)), IDS_BT[b_R, t_R]]
        sums.append((float(loss_R.sum()), float((log_p_RV.exp() * (log_p_RV - log_q_RV)).sum())))
    return sums


@pytest.mark.parametrize("architecture, kind", PLACES)
def test_sums_are_those_of_whole_logits(architecture, kind, monkeypatch):
    """Rows in chunks of twenty, so that there are many and the last is short; at the first and at the last block."""
    for layer in (0, 3) if architecture == "tiny" else (0, 2):
        lm = load(architecture, at(kind, layer))
        monkeypatch.setattr(module, "LOGITS_AT_ONCE", {"cpu": 20 * lm.vocabulary})
        cut = lm.cut(IDS_BT)
        before_BTD, values = cut.value_BTD.clone(), values_of(cut)
        loss_Q, kl_Q = (sums_QB.sum(dim=1) for sums_QB in divergence(lm, cut, iter(values), IDS_BT, LENGTHS))
        assert loss_Q.dtype == kl_Q.dtype == torch.float64 and torch.equal(cut.value_BTD, before_BTD)
        expected = by_whole_logits(lm, cut, values)
        for value_BTD, loss, kl, sums in zip(values, loss_Q.tolist(), kl_Q.tolist(), expected, strict=True):
            expected_loss, expected_kl = sums
            assert loss == pytest.approx(expected_loss, rel=1e-5) and kl == pytest.approx(
                expected_kl, rel=1e-4, abs=1e-4
            )
            assert loss == pytest.approx(float(lm.loss(cut, value_BTD, IDS_BT, LENGTHS).detach()), rel=1e-5)
        assert kl_Q[3] == 0 and kl_Q[1] > 5 * kl_Q[2] > 0


def test_how_rows_are_cut_changes_no_sum(monkeypatch):
    lm, ids_BT, lengths_B = load("tiny", at("hook_resid_post")), IDS_BT[1:], LENGTHS[1:]
    cut = lm.cut(ids_BT)
    found = []
    for rows in (1, 50, 10_000):
        monkeypatch.setattr(module, "LOGITS_AT_ONCE", {"cpu": rows * lm.vocabulary})
        found.append(torch.stack(divergence(lm, cut, values_of(cut), ids_BT, lengths_B)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found[0], found[2], rtol=1e-6, atol=1e-5)


def test_where_nothing_counts_sums_are_zero():
    lm = load("tiny", at("hook_resid_post"))
    cut = lm.cut(IDS_BT)
    loss_QB, kl_QB = divergence(lm, cut, values_of(cut), IDS_BT, torch.ones(len(IDS_BT), dtype=torch.int64))
    assert loss_QB.shape == kl_QB.shape == (4, len(IDS_BT)) and not loss_QB.any() and not kl_QB.any()


def test_each_sequence_has_its_own_sum():
    lm = load("tiny", at("hook_resid_post"))
    cut = lm.cut(IDS_BT)
    together = torch.stack(divergence(lm, cut, values_of(cut), IDS_BT, LENGTHS))
    for b in range(len(IDS_BT)):
        one = lm.cut(IDS_BT[b : b + 1])
        values = [value_BTD[b : b + 1] for value_BTD in values_of(cut)]
        alone = torch.stack(divergence(lm, one, values, IDS_BT[b : b + 1], LENGTHS[b : b + 1]))
        torch.testing.assert_close(together[:, :, b : b + 1], alone, rtol=1e-5, atol=1e-4)


def test_what_stands_at_padding_changes_nothing():
    lm = load("tiny", at("hook_resid_post"))
    cut = lm.cut(IDS_BT)
    other_BTD = cut.value_BTD.clone()
    other_BTD[torch.arange(T) >= LENGTHS[:, None]] = 100.0
    one, other = (divergence(lm, cut, [value_BTD], IDS_BT, LENGTHS) for value_BTD in (cut.value_BTD, other_BTD))
    assert torch.equal(torch.stack(one), torch.stack(other))
