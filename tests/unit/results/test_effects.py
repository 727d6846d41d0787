"""What the removal of a latent does to every later token's loss, against whole forward passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from features_cases import BOS, random_sae, sequences_of
from language_models import IDS_BT, LENGTHS, load

from dmsae_ray.lm import divergence as divergence_
from dmsae_ray.lm.divergence import token_losses
from dmsae_ray.results.features.effects import remove_latents
from dmsae_ray.sae.latents import Latents

SCALE = 20.0
PLACES = [
    *(("tiny", f"blocks.2.{kind}") for kind in ("hook_resid_post", "hook_resid_mid", "hook_attn_out")),
    ("llama", "blocks.0.hook_mlp_out"),
]


def make_sequences():
    rng = np.random.default_rng(2)
    rows = [[BOS, *rng.integers(3, 4096, n).tolist()] for n in (30, 11, 40, 25)]
    rows[2][15] = BOS
    return sequences_of(rows)


@pytest.mark.parametrize("architecture, hook", PLACES)
def test_token_losses_are_the_terms_of_the_loss(architecture, hook):
    lm = load(architecture, hook)
    cut = lm.cut(IDS_BT)
    value_BTD = 1.1 * cut.value_BTD
    losses_BT = token_losses(lm, cut, value_BTD, IDS_BT, LENGTHS)
    log_p_BTV = torch.log_softmax(lm.logits(cut, value_BTD), dim=2)
    terms_BT = -log_p_BTV[:, :-1].gather(2, IDS_BT[:, 1:, None])[:, :, 0]
    rows_BT = lm.rows(IDS_BT, LENGTHS)
    torch.testing.assert_close(losses_BT[:, 1:][rows_BT[:, 1:]], terms_BT[rows_BT[:, 1:]], rtol=1e-5, atol=1e-5)
    assert torch.all(losses_BT[~rows_BT] == 0) and bool((losses_BT[rows_BT] > 0).all())
    torch.testing.assert_close(losses_BT.sum(), lm.loss(cut, value_BTD, IDS_BT, LENGTHS), rtol=1e-5, atol=0)


@pytest.mark.parametrize("architecture, hook", PLACES)
def test_sequences_of_a_cut_go_on_alone(architecture, hook):
    lm = load(architecture, hook)
    order = torch.tensor([2, 0, 2])
    taken = lm.cut(IDS_BT).take(order)
    alone = lm.cut(IDS_BT[order])
    value_BTD = 0.9 * alone.value_BTD
    torch.testing.assert_close(lm.logits(taken, value_BTD), lm.logits(alone, value_BTD), rtol=1e-4, atol=1e-4)


def by_hand(lm, sae, latent, ids_T, length):
    """Activations and change of loss in one sequence, without batches, padding or a cut that is shared."""
    ids_1T = torch.from_numpy(ids_T[:length].astype(np.int64))[None]
    cut = lm.cut(ids_1T)
    clean_V, z_T = torch.log_softmax(lm.logits(cut, cut.value_BTD)[0].double(), dim=1), torch.zeros(length)
    without_TD = cut.value_BTD[0].clone()
    for t in range(1, length):
        if int(ids_T[t]) != BOS:
            z_T[t] = sae.encode(cut.value_BTD[0, t] / SCALE)[latent]
            without_TD[t] -= z_T[t] * SCALE * sae.W_dec[latent]
    changed_V = torch.log_softmax(lm.logits(cut, without_TD[None])[0].double(), dim=1)
    delta_T = torch.zeros(length)
    for t in range(1, length):
        if int(ids_T[t]) != BOS:
            delta_T[t] = clean_V[t - 1, ids_T[t]] - changed_V[t - 1, ids_T[t]]
    return z_T, delta_T


@pytest.mark.parametrize("architecture, hook", PLACES)
@torch.no_grad()
def test_equals_two_forward_passes(architecture, hook):
    lm, sequences = load(architecture, hook), make_sequences()
    # Where attention or MLP adds less than the stream holds, less is above the threshold.
    size = float(lm.cut(torch.from_numpy(sequences.ids.astype(np.int64))).value_BTD[:, 1:].norm(dim=2).median())
    saes = [random_sae(lm.d, 12, 0.1 * size / SCALE, seed) for seed in (0, 1)]
    wanted = [[3, 1, 8], [0, 11]]
    pieces = [Latents.some_of(sae, ids) for sae, ids in zip(saes, wanted, strict=True)]
    pairs = [(latent, s) for latent in (4, 0, 2, 1, 3) for s in (2, 0, 3, 1)]
    read = remove_latents(pieces, lm, sequences, SCALE, pairs, 6)
    flat = [(sae, latent) for sae, ids in zip(saes, wanted, strict=True) for latent in ids]
    for p, (latent, s) in enumerate(pairs):
        length = int(sequences.lengths[s])
        z_T, delta_T = by_hand(lm, *flat[latent], sequences.ids[s], length)
        torch.testing.assert_close(read.activation_PT[p, :length], z_T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(read.delta_PT[p, :length], delta_T, rtol=0, atol=3e-5)
        assert torch.all(read.delta_PT[p, length:] == 0) and torch.all(read.activation_PT[p, length:] == 0)
        active = z_T.nonzero()[:, 0].tolist()
        first = active[0] if active else length
        assert torch.all(read.delta_PT[p, : first + 1] == 0)
        ids_T = sequences.ids[s]
        assert read.after_PT[p].nonzero()[:, 0].tolist() == [t for t in range(first + 1, length) if ids_T[t] != BOS]
        assert read.rows_PT[p].nonzero()[:, 0].tolist() == [t for t in range(1, length) if ids_T[t] != BOS]
    assert int((read.activation_PT > 0).sum()) > 50 and float(read.delta_PT.abs().max()) > 1e-3

    for batch in (1, 20):
        again = remove_latents(pieces, lm, sequences, SCALE, pairs, batch)
        torch.testing.assert_close(again.delta_PT, read.delta_PT, rtol=0, atol=3e-5)
        torch.testing.assert_close(again.activation_PT, read.activation_PT, rtol=1e-4, atol=1e-5)


def test_what_adds_nothing_can_be_removed():
    lm, sequences = load("tiny", "blocks.2.hook_resid_post"), make_sequences()
    sae = random_sae(lm.d, 4, 0.02)
    with torch.no_grad():
        sae.W_dec[1] = 0
    read = remove_latents([Latents.some_of(sae, [1, 2])], lm, sequences, SCALE, [(0, 0), (1, 0)], 2)
    assert bool((read.activation_PT > 0).any(dim=1).all())
    assert float(read.delta_PT[0].abs().max()) < 1e-5 < 1e-3 < float(read.delta_PT[1].abs().max())


def test_without_removal_activations_are_the_same():
    lm, sequences = load("tiny", "blocks.2.hook_resid_post"), make_sequences()
    pieces, pairs = [Latents.some_of(random_sae(lm.d, 4, 0.02), [1, 2])], [(0, 0), (1, 3)]
    read, kept = (remove_latents(pieces, lm, sequences, SCALE, pairs, 2, remove=remove) for remove in (True, False))
    assert (
        torch.equal(read.activation_PT, kept.activation_PT)
        and bool((read.delta_PT != 0).any())
        and not bool((kept.delta_PT != 0).any())
    )


def test_a_sequence_passes_the_lower_blocks_once_for_neighbouring_pairs(monkeypatch):
    lm, sequences = load("tiny", "blocks.2.hook_resid_post"), make_sequences()
    cut, seen = lm.cut, []
    monkeypatch.setattr(lm, "cut", lambda ids_BT: seen.append(len(ids_BT)) or cut(ids_BT))
    pairs = [(latent, s) for latent in range(6) for s in range(4)]
    remove_latents([Latents.some_of(random_sae(lm.d, 6, 0.02), range(6))], lm, sequences, SCALE, pairs, 6)
    assert seen == [1, 1, 1, 1]


def test_logits_are_never_there_all_at_once(monkeypatch):
    """A vocabulary of 256k words times a batch of long sequences would be tens of gigabytes."""
    lm, rows = load("tiny", "blocks.2.hook_resid_post"), []
    monkeypatch.setattr(lm, "logits", None)
    unembed = lm.unembed
    monkeypatch.setattr(lm, "unembed", lambda stream_RD: rows.append(len(stream_RD)) or unembed(stream_RD))
    monkeypatch.setattr(divergence_, "LOGITS_AT_ONCE", {"cpu": 7 * lm.vocabulary})
    sequences, sae = make_sequences(), random_sae(lm.d, 4, 0.5, seed=3)
    pieces, pairs = (
        [Latents.some_of(sae, [0, 1, 2, 3])],
        [(latent, sequence) for latent in range(4) for sequence in range(4)],
    )
    few = remove_latents(pieces, lm, sequences, SCALE, pairs, 8)
    assert max(rows) == 7 and sum(rows) > 100
    monkeypatch.undo()
    whole = remove_latents(pieces, lm, sequences, SCALE, pairs, 8)
    torch.testing.assert_close(few.delta_PT, whole.delta_PT, rtol=1e-4, atol=1e-5)
    assert float(whole.delta_PT.abs().max()) > 0.01
