"""Attribution and evaluation against cases with a known answer, on the real small model."""

import numpy as np
import pytest
import torch
from language_models import load as load_model

from dmsae_ray.attribution.gradients import AttributionSettings, attribute, gradients
from dmsae_ray.attribution.histogram import RELATIVE_ERROR
from dmsae_ray.attribution.scores import ScoreSettings, scores
from dmsae_ray.evaluation.measure import Tally, scores_of, tally_batch
from dmsae_ray.evaluation.references import reference_losses
from dmsae_ray.sae.sae import MatryoshkaSAE

SCALE = 20.0


@pytest.fixture(
    scope="module", params=["hook_resid_post", "hook_resid_pre", "hook_resid_mid", "hook_attn_out", "hook_mlp_out"]
)
def lm(request):
    return load_model("tiny", f"blocks.2.{request.param}")


@pytest.fixture(scope="module")
def batch(lm):
    """Two sequences; the first holds two documents, each with its BOS."""
    texts = [
        ["def read(self, path):\n    with open(path) as file:", "        return file.read()"],
        ["The list is sorted in place."],
    ]
    rows = [
        [token for text in row for token in (lm.bos_id, *lm.tokenizer(text, add_special_tokens=False)["input_ids"])]
        for row in texts
    ]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((2, int(lengths.max())), lm.pad_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, lengths


def tokens_of(lm, ids, lengths) -> int:
    """Tokens that are neither BOS nor padding, counted one by one."""
    return sum(
        int(token) != lm.bos_id for row, length in zip(ids, lengths.tolist(), strict=True) for token in row[:length]
    )


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
    metrics, density = scores_of(tally, identity_sae(lm.d), references)
    assert metrics["fvu"] < 1e-10 and metrics["evaluation_tokens"] == references["tokens"] == tokens_of(
        lm, ids, lengths
    )
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
    assert references["zero"] == pytest.approx(losses["zero"], rel=1e-6) and references["mean"] == pytest.approx(
        losses["mean"], rel=1e-6
    )
    assert references["zero"] != pytest.approx(references["mean"], rel=1e-3)


def test_an_sae_of_nothing_recovers_nothing(lm, batch):
    tally, nothing = Tally(), MatryoshkaSAE(lm.d, [64], 0, "batchtopk")
    tally_batch(tally, nothing, lm, *batch, SCALE)
    metrics, _ = scores_of(tally, nothing, reference_losses(lm, [batch], torch.zeros(lm.d)))
    assert metrics["loss_recovered_zero"] == pytest.approx(0, abs=1e-4)
    assert metrics["l0"] == 0 and metrics["dead_share"] == 1 and metrics["fvu"] > 1


def random_sae(d: int, candidates: int = 12) -> MatryoshkaSAE:
    torch.manual_seed(0)
    sae = MatryoshkaSAE(d, [candidates, 64], 0, "batchtopk")
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(64, d) / d**0.5)
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(64, d), dim=1))
        sae.b_enc.fill_(0.05)
    return sae


class Spliced:
    """The spliced model as a function of how the candidates' activations z [R, P] are scaled, written down
    once more.
    """

    def __init__(self, lm, sae, ids, lengths, splice="replace", candidates=12, rows=None):
        self.lm, self.sae, self.ids, self.lengths = lm, sae, ids, lengths
        self.rows = lm.rows(ids, lengths) if rows is None else rows
        self.cut = lm.cut(ids)
        x = self.cut.value_BTD[self.rows] / SCALE
        with torch.no_grad():
            self.z = sae.encode(x, upto=candidates)
            self.rest = x - sae.decode(sae.encode(x)) if splice == "keep_error" else torch.zeros_like(x)

    @torch.no_grad()
    def loss(self, z) -> float:
        """Sum over targets, in nats."""
        value = self.cut.value_BTD.clone()
        value[self.rows] = (self.sae.decode(z) + self.rest) * SCALE
        return float(self.lm.loss(self.cut, value, self.ids, self.lengths))

    def slope(self, place, size=0.02) -> float:
        """d Loss / d alpha where z[place] is scaled by 1 + alpha: central difference."""
        up, down = self.z.clone(), self.z.clone()
        up[place] *= 1 + size
        down[place] *= 1 - size
        return (self.loss(up) - self.loss(down)) / (2 * size)


CASES = [("replace", "first_group"), ("keep_error", "first_group"), ("replace", "all")]


@pytest.mark.parametrize(("splice", "candidates"), CASES)
def test_attribution_is_the_derivative_of_the_loss_by_the_latent_s_size(lm, batch, splice, candidates):
    """sum_n a_j(n) = d Loss / d alpha where latent j is scaled by 1 + alpha everywhere."""
    ids, lengths = batch
    sae = random_sae(lm.d)
    partial = attribute(sae, lm, ids, lengths, SCALE, AttributionSettings(splice, candidates))
    assert partial.tokens == tokens_of(lm, ids, lengths) == int((lengths - 1).sum()) - 1
    assert partial.signed_P.dtype == torch.float64 and len(partial.signed_P) == (64 if candidates == "all" else 12)
    spliced = Spliced(lm, sae, ids, lengths, splice, len(partial.signed_P))
    for j in partial.signed_P.abs().topk(3).indices.tolist():
        assert float(partial.signed_P[j]) == pytest.approx(spliced.slope((slice(None), j)), rel=0.01)


@pytest.mark.parametrize(("splice", "candidates"), CASES)
def test_every_aggregator_is_made_of_the_derivatives_at_single_tokens(lm, batch, splice, candidates):
    """a_j(n) = d Loss / d alpha where latent j is scaled at row n alone; sums and counts are those of the a_j(n)."""
    ids, lengths = batch
    sae = random_sae(lm.d)
    settings = AttributionSettings(splice, candidates)
    z, grad = gradients(sae, lm, ids, lengths, SCALE, settings)
    a = (z * (grad @ sae.W_dec[: z.shape[1]].T) * SCALE).detach()
    spliced = Spliced(lm, sae, ids, lengths, splice, z.shape[1])
    assert torch.allclose(z, spliced.z, rtol=1e-4, atol=1e-5)
    for flat in a.abs().flatten().topk(4).indices.tolist():
        place = divmod(flat, a.shape[1])
        assert float(a[place]) == pytest.approx(spliced.slope(place, size=0.05), rel=0.01)
    partial = attribute(sae, lm, ids, lengths, SCALE, settings)
    a, active = a.double().numpy(), (z > 0).numpy()
    assert np.allclose(scores([partial], ScoreSettings("mean_abs")), np.abs(a).mean(axis=0), rtol=1e-5)
    assert np.allclose(scores([partial], ScoreSettings("mean_signed")), np.abs(a.mean(axis=0)), rtol=1e-5, atol=1e-8)
    found = scores([partial], ScoreSettings("quantile")).numpy()
    for j in range(a.shape[1]):
        values = np.abs(a[active[:, j], j])
        exact = np.quantile(values, 0.9, method="inverted_cdf") * active[:, j].mean() if len(values) else 0.0
        assert found[j] == pytest.approx(exact, rel=RELATIVE_ERROR)


def test_mean_abs_is_at_least_mean_signed_and_padding_adds_nothing(lm, batch):
    ids, lengths = batch
    sae = identity_sae(lm.d)
    partial = attribute(sae, lm, ids, lengths, SCALE, AttributionSettings())
    assert bool((partial.absolute_P >= partial.signed_P.abs() - 1e-9).all())
    assert float(partial.absolute_P.sum()) > float(partial.signed_P.abs().sum())
    wider = torch.cat([ids, torch.full((2, 5), lm.pad_id)], dim=1)
    padded = attribute(sae, lm, wider, lengths, SCALE, AttributionSettings())
    assert padded.tokens == partial.tokens
    assert torch.allclose(padded.absolute_P, partial.absolute_P, rtol=1e-4, atol=1e-6)
    assert torch.allclose(padded.signed_P, partial.signed_P, rtol=1e-4, atol=1e-5)


def test_outliers_neither_count_nor_are_spliced(lm, batch):
    """With the bound between the norms of two rows, the three above it keep what stands there."""
    ids, lengths = batch
    sae = random_sae(lm.d)
    cut, rows = lm.cut(ids), lm.rows(ids, lengths)
    norms = cut.value_BTD.norm(dim=2)
    bound = float(norms[rows].sort().values[-4:-2].mean())
    partial = attribute(sae, lm, ids, lengths, SCALE, AttributionSettings(max_norm=bound))
    assert partial.tokens == int(rows.sum()) - 3
    spliced = Spliced(lm, sae, ids, lengths, rows=rows & (norms <= bound))
    whole = attribute(sae, lm, ids, lengths, SCALE, AttributionSettings())
    j = int(partial.signed_P.abs().argmax())
    assert float(partial.signed_P[j]) == pytest.approx(spliced.slope((slice(None), j)), rel=0.01)
    assert float(partial.signed_P[j]) != pytest.approx(float(whole.signed_P[j]), rel=0.02)
