"""Attribution and evaluation against cases with a known answer, on the real small model."""

import pytest
import torch

from dmsae_ray.distill.attribution import AttributionSettings, attribute
from dmsae_ray.distill.evaluate import Tally, reference_losses, scores_of, tally_batch
from dmsae_ray.lm.model import LanguageModel
from dmsae_ray.sae.sae import MatryoshkaSAE

SCALE = 20.0


@pytest.fixture(scope="module", params=["hook_resid_post", "hook_resid_pre", "hook_resid_mid", "hook_attn_out", "hook_mlp_out"])
def lm(request):
    return LanguageModel.load("tiny", f"blocks.2.{request.param}")


@pytest.fixture(scope="module")
def batch(lm):
    """Two sequences; the first holds two documents, each with its BOS."""
    texts = [["def read(self, path):\n    with open(path) as file:", "        return file.read()"], ["The list is sorted in place."]]
    rows = [
        [token for text in row for token in (lm.bos_id, *lm.tokenizer(text, add_special_tokens=False)["input_ids"])] for row in texts
    ]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((2, int(lengths.max())), lm.pad_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, lengths


def tokens_of(lm, ids, lengths) -> int:
    """Tokens that are neither BOS nor padding, counted one by one."""
    return sum(int(token) != lm.bos_id for row, length in zip(ids, lengths.tolist(), strict=True) for token in row[:length])


def identity_sae(d: int) -> MatryoshkaSAE:
    """Latents +e_i and -e_i: relu keeps x whole, so the reconstruction is exact."""
    sae = MatryoshkaSAE(d, [2 * d], 0, "batchtopk")
    with torch.no_grad():
        eye = torch.eye(d)
        sae.W_enc.copy_(torch.cat([eye, -eye]))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
    return sae


def test_an_exact_reconstruction_explains_all_and_recovers_all_loss(lm, batch):
    ids, lengths = batch
    tally = Tally()
    tally_batch(tally, identity_sae(lm.d), lm, ids, lengths, SCALE)
    references = reference_losses(lm, [batch], torch.zeros(lm.d))
    metrics, density = scores_of(tally, 0, references)
    assert metrics["fvu"] < 1e-10 and metrics["evaluation_tokens"] == references["tokens"] == tokens_of(lm, ids, lengths)
    assert metrics["loss_spliced"] == pytest.approx(metrics["loss_clean"], rel=1e-5)
    assert metrics["loss_recovered_zero"] == pytest.approx(1, abs=1e-4)
    assert metrics["l0"] == pytest.approx(lm.d, rel=1e-3)  # of +e_i and -e_i exactly one is active
    assert references["zero"] == references["mean"] > references["clean"]  # the mean given here is zero
    assert density.shape == (2 * lm.d,)


def test_ablation_keeps_what_stands_at_every_bos(lm, batch):
    ids, lengths = batch
    mean, cut = torch.linspace(-3, 3, lm.d), lm.cut(ids)
    references, losses = reference_losses(lm, [batch], mean), {}
    for kind, value in (("zero", torch.zeros(lm.d)), ("mean", mean)):
        ablated = cut.value_BTD.clone()
        for n, length in enumerate(lengths.tolist()):
            for t in range(length):
                if ids[n, t] != lm.bos_id:
                    ablated[n, t] = value
        losses[kind] = float(lm.loss(cut, ablated, ids, lengths)) / tokens_of(lm, ids, lengths)
    assert references["zero"] == pytest.approx(losses["zero"], rel=1e-6) and references["mean"] == pytest.approx(losses["mean"], rel=1e-6)
    assert references["zero"] != pytest.approx(references["mean"], rel=1e-3)


def test_an_sae_of_nothing_recovers_nothing(lm, batch):
    tally = Tally()
    tally_batch(tally, MatryoshkaSAE(lm.d, [64], 0, "batchtopk"), lm, *batch, SCALE)
    metrics, _ = scores_of(tally, 0, reference_losses(lm, [batch], torch.zeros(lm.d)))
    assert metrics["loss_recovered_zero"] == pytest.approx(0, abs=1e-4)
    assert metrics["l0"] == 0 and metrics["dead_share"] == 1 and metrics["fvu"] > 1


@pytest.mark.parametrize("splice", ["replace", "keep_error"])
def test_attribution_is_the_derivative_of_the_loss_by_the_latent_s_size(lm, batch, splice):
    """sum_n a_j(n) = d Loss / d alpha where latent j is scaled by 1 + alpha everywhere: central differences agree."""
    ids, lengths = batch
    torch.manual_seed(0)
    candidates = 12
    sae = MatryoshkaSAE(lm.d, [candidates, 64], 0, "batchtopk")
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(64, lm.d) / lm.d**0.5)
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(64, lm.d), dim=1))
        sae.b_enc.fill_(0.05)
    settings = AttributionSettings(splice=splice, aggregator="mean_signed")
    sums, tokens = attribute(sae, lm, ids, lengths, SCALE, settings)
    assert tokens == tokens_of(lm, ids, lengths) == int((lengths - 1).sum()) - 1 and sums.dtype == torch.float64
    rows = (torch.arange(ids.shape[1])[None, :] < lengths[:, None]) & (ids != lm.bos_id)
    cut = lm.cut(ids)
    x = cut.value_BTD[rows] / SCALE

    def loss(j: int, alpha: float) -> float:
        z = sae.encode(x, upto=candidates)
        base = sae.decode(z) if splice == "replace" else sae.decode(z) + x - sae.decode(sae.encode(x))
        spliced = cut.value_BTD.clone()
        spliced[rows] = (base + alpha * z[:, j : j + 1] * sae.W_dec[j]) * SCALE
        return float(lm.loss(cut, spliced, ids, lengths))

    with torch.no_grad():
        for j in sums.abs().topk(3).indices.tolist():
            numeric = (loss(j, 0.02) - loss(j, -0.02)) / 0.04
            assert float(sums[j]) == pytest.approx(numeric, rel=0.01)


def test_mean_abs_is_at_least_mean_signed_and_padding_adds_nothing(lm, batch):
    ids, lengths = batch
    sae = identity_sae(lm.d)
    absolute, _ = attribute(sae, lm, ids, lengths, SCALE, AttributionSettings())
    signed, _ = attribute(sae, lm, ids, lengths, SCALE, AttributionSettings(aggregator="mean_signed"))
    assert bool((absolute >= signed.abs() - 1e-9).all()) and float(absolute.sum()) > float(signed.abs().sum())
    wider = torch.cat([ids, torch.full((2, 5), lm.pad_id)], dim=1)
    padded, _ = attribute(sae, lm, wider, lengths, SCALE, AttributionSettings())
    assert torch.allclose(padded, absolute, rtol=1e-4, atol=1e-6)
