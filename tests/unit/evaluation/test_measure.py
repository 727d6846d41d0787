"""Evaluation of every prefix against cases with a known answer and against a reference that splices token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from language_models import load as load_model

from dmsae_ray.evaluation.measure import Tally, scores_of, tally_batch
from dmsae_ray.evaluation.prefixes import prefixes_of, reconstructions
from dmsae_ray.evaluation.references import reference_losses
from dmsae_ray.sae.sae import MatryoshkaSAE, unit_rows

SCALE = 20.0


@pytest.fixture(scope="module")
def lm():
    return load_model("tiny", "blocks.2.hook_resid_post")


@pytest.fixture(scope="module")
def batch(lm):
    """Three sequences of several lengths, padded; the first has a second document in it."""
    ids = torch.randint(3, lm.vocabulary, (3, 24), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([24, 11, 3])
    ids[:, 0] = lm.bos_id
    ids[0, 9] = lm.bos_id
    for row, length in zip(ids, lengths.tolist(), strict=True):
        row[length:] = lm.pad_id
    return ids, lengths


def random_sae(lm, core_size=3, theta=0.3, seed=0, gate="batchtopk") -> MatryoshkaSAE:
    ends = [core_size + n for n in (4, 12, 40)]
    sae, generator = MatryoshkaSAE(lm.d, ends, core_size, gate), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        W_FD = unit_rows(torch.randn(ends[-1], lm.d, generator=generator))
        sae.encoder_rows().copy_(W_FD)
        sae.W_dec.copy_(W_FD)
        sae.b_dec.copy_(0.02 * torch.randn(lm.d, generator=generator))
        sae.theta.fill_(theta)
    return sae


def references_of(lm, batch):
    return reference_losses(lm, [batch], torch.linspace(-2, 2, lm.d))


def evaluated(sae, lm, batch, references):
    tally = Tally()
    tally_batch(tally, sae, lm, *batch, SCALE)
    return scores_of(tally, sae, references)


@pytest.mark.parametrize("core_size", [0, 1, 3])
@torch.no_grad()
def test_every_number_is_that_of_a_search_token_by_token(lm, batch, core_size):
    """One sequence at a time, its padding cut off, the whole model run for each prefix, sums in a plain loop."""
    (ids, lengths), sae = batch, random_sae(lm, core_size)
    references = references_of(lm, batch)
    metrics, density_F = evaluated(sae, lm, batch, references)
    rows, x_all, active, found = (
        0,
        [],
        torch.zeros(sae.width),
        {prefix.name: [0.0, 0.0, 0.0] for prefix in prefixes_of(sae)},
    )
    assert list(found) == ["core"] * bool(core_size) + ["0", "1", "2"]
    for row, length in zip(ids, lengths.tolist(), strict=True):
        one = row[None, :length]
        cut = lm.cut(one)
        keep = [t for t in range(1, length) if int(one[0, t]) != lm.bos_id]
        clean = F.log_softmax(lm.logits(cut, cut.value_BTD)[0].float(), dim=-1)
        for prefix in prefixes_of(sae):
            value = cut.value_BTD.clone()
            for t in keep:
                x = cut.value_BTD[0, t] / SCALE
                z = sae.encode(x)[: prefix.latents]
                x_hat = z @ sae.W_dec[: prefix.latents] + sae.b_dec
                value[0, t] = x_hat * SCALE
                found[prefix.name][0] += float((x - x_hat).double().square().sum())
            spliced = F.log_softmax(lm.logits(cut, value)[0].float(), dim=-1)
            for t in keep:
                found[prefix.name][1] -= float(spliced[t - 1, one[0, t]])
                found[prefix.name][2] += float(F.kl_div(spliced[t - 1], clean[t - 1], reduction="sum", log_target=True))
        for t in keep:
            x_all.append(cut.value_BTD[0, t] / SCALE)
            active += sae.encode(x_all[-1]) > 0
        rows += len(keep)
    x_RD = torch.stack(x_all).double()
    variance = float((x_RD - x_RD.mean(dim=0)).square().sum())
    assert metrics["evaluation_tokens"] == rows == references["tokens"]
    torch.testing.assert_close(density_F, active.double() / rows)
    for entry, prefix in zip(metrics["prefixes"], prefixes_of(sae), strict=True):
        error, loss, kl = found[prefix.name]
        assert (entry["name"], entry["latents"]) == (prefix.name, prefix.latents)
        assert entry["fvu"] == pytest.approx(error / variance, rel=1e-5)
        assert entry["loss"] == pytest.approx(loss / rows, rel=1e-5) and entry["kl"] == pytest.approx(
            kl / rows, rel=1e-4
        )
        assert entry["l0"] == pytest.approx(float(active[: prefix.latents].sum()) / rows)
        for kind in ("zero", "mean"):
            expected = (references[kind] - loss / rows) / (references[kind] - references["clean"])
            assert entry[f"loss_recovered_{kind}"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_last_prefix_is_the_whole_and_each_holds_the_one_before(lm, batch):
    sae = random_sae(lm)
    metrics, density_F = evaluated(sae, lm, batch, references_of(lm, batch))
    entries, whole = metrics["prefixes"], metrics["prefixes"][-1]
    assert [entry["latents"] for entry in entries] == [3, 7, 15, 43]
    assert whole["latents"] == sae.width and [
        metrics[name] for name in ("fvu", "kl", "l0", "loss_recovered_zero", "loss_spliced")
    ] == [whole[name] for name in ("fvu", "kl", "l0", "loss_recovered_zero", "loss")]
    assert [entry["l0"] for entry in entries] == sorted(entry["l0"] for entry in entries)
    assert metrics["core_l0"] == entries[0]["l0"] and metrics["core_l0"] + metrics["free_l0"] == pytest.approx(
        metrics["l0"]
    )
    x_RD = torch.randn(5, lm.d)
    *_, last = reconstructions(sae, sae.encode(x_RD))
    torch.testing.assert_close(last, sae.decode(sae.encode(x_RD)))


def test_an_sae_that_gives_x_back_changes_no_prediction(lm, batch):
    d = lm.d
    sae = MatryoshkaSAE(d, [d // 2, 2 * d], 0, "batchtopk")
    with torch.no_grad():
        both = torch.cat([torch.eye(d), -torch.eye(d)])
        sae.W_enc.copy_(both)
        sae.W_dec.copy_(both)
    metrics, _ = evaluated(sae, lm, batch, references_of(lm, batch))
    first, whole = metrics["prefixes"]
    assert (
        whole["fvu"] < 1e-10
        and abs(whole["kl"]) < 1e-6
        and whole["loss"] == pytest.approx(metrics["loss_clean"], rel=1e-5)
    )
    assert first["kl"] > 0.01 and first["fvu"] > 0.1, "half of the directions are not enough"


def test_the_core_explains_its_share(lm, batch):
    """Latents +-e_i: the core has some dimensions, the free latents the others, so its share is that of their
    variance.
    """
    d = lm.d
    sae = MatryoshkaSAE(d, [d, 2 * d], 32, "batchtopk")
    with torch.no_grad():
        rows = torch.stack([sign * torch.eye(d)[i] for i in range(d) for sign in (1, -1)])
        sae.encoder_rows().copy_(rows)
        sae.W_dec.copy_(rows)
        rows_NT = lm.rows(*batch)
        x_RD = lm.cut(batch[0]).value_BTD[rows_NT] / SCALE
        sae.b_dec.copy_(x_RD.mean(dim=0))
    metrics, _ = evaluated(sae, lm, batch, references_of(lm, batch))
    variance_D = x_RD.double().var(dim=0)
    assert metrics["fvu"] < 1e-9
    assert metrics["core_explained"] == pytest.approx(float(variance_D[:16].sum() / variance_D.sum()), rel=1e-5)


def test_an_sae_that_is_silent_is_an_ablation_to_its_bias(lm, batch):
    mean_D = torch.linspace(-2, 2, lm.d)
    references = reference_losses(lm, [batch], mean_D)
    for kind, bias_D in (("zero", torch.zeros(lm.d)), ("mean", mean_D / SCALE)):
        sae = random_sae(lm, theta=1e9)
        with torch.no_grad():
            sae.b_dec.copy_(bias_D)
        metrics, density_F = evaluated(sae, lm, batch, references)
        assert metrics["l0"] == 0 and metrics["dead_share"] == 1 and not density_F.any()
        for entry in metrics["prefixes"]:
            assert entry["loss"] == pytest.approx(references[kind], rel=1e-5)
            assert entry[f"loss_recovered_{kind}"] == pytest.approx(0, abs=1e-4) and entry["kl"] > 0


def test_without_a_core_nothing_is_said_of_one(lm, batch):
    metrics, _ = evaluated(random_sae(lm, core_size=0), lm, batch, references_of(lm, batch))
    assert (
        metrics["core_explained"] is None
        and metrics["core_l0"] == 0
        and [entry["name"] for entry in metrics["prefixes"]] == ["0", "1", "2"]
    )


def test_an_exempt_core_is_evaluated_by_its_own_threshold(lm, batch):
    gated, exempt = random_sae(lm, theta=0.3), random_sae(lm, theta=0.3, gate="relu")
    found = [evaluated(sae, lm, batch, references_of(lm, batch))[0] for sae in (gated, exempt)]
    assert found[1]["core_l0"] > found[0]["core_l0"] and found[1]["free_l0"] == found[0]["free_l0"]


def test_batches_add_up_however_they_are_cut_and_padded(lm, batch):
    (ids, lengths), sae, references = batch, random_sae(lm), references_of(lm, batch)
    whole, density_F = evaluated(sae, lm, batch, references)
    tally = Tally()
    for part in (slice(0, 1), slice(1, 3)):
        tally_batch(tally, sae, lm, ids[part], lengths[part], SCALE)
    # A sequence in which nothing counts, as the last batch of a rank may have: it changes no sum.
    tally_batch(tally, sae, lm, ids[:1], torch.ones(1, dtype=torch.int64), SCALE)
    parts, part_density_F = scores_of(tally, sae, references)
    torch.testing.assert_close(part_density_F, density_F)
    assert parts["evaluation_tokens"] == whole["evaluation_tokens"]
    for one, other in zip(parts["prefixes"], whole["prefixes"], strict=True):
        assert one.pop("name") == other.pop("name") and one == pytest.approx(other, rel=1e-5)
