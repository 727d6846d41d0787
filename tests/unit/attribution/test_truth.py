"""Whether attribution says what it should: against ablation on the real small model, and against planted effects.

Letters: N sequences, T tokens, R rows, D dimension, K planted features.
"""

from types import SimpleNamespace

import pytest
import torch
from scipy.stats import spearmanr

from dmsae_ray.attribution.gradients import AttributionSettings, attribute, gradients
from dmsae_ray.attribution.scores import ScoreSettings, scores
from dmsae_ray.core.select import select
from dmsae_ray.corpus.documents import load_documents
from dmsae_ray.lm.model import LanguageModel
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.settings import SAESettings, schedule
from dmsae_ray.sae.threshold import calibrate
from dmsae_ray.sae.trainer import Trainer

FLOORS = {"each": 0.85, "sum": 0.55}
"""Rank correlation of mean_abs with ablation that must be reached: with the mean over tokens of |change of the token's
loss|, and with the |change of the summed loss|, in which tokens cancel. A first-order estimate at single positions
cannot reach 1."""


def trained(rows_RD, steps: int, **fields) -> tuple[MatryoshkaSAE, float]:
    """An SAE really trained on these raw rows, and their scale."""
    scale = float(rows_RD.double().square().sum(dim=1).mean().sqrt())
    settings = SAESettings(d=rows_RD.shape[1], **fields, **schedule(steps, fields["batch"]))
    sae = MatryoshkaSAE.init(settings, None, seed=0)
    trainer, generator = Trainer(sae, settings), torch.Generator().manual_seed(0)
    for _ in range(steps):
        trainer.step(rows_RD[torch.randint(len(rows_RD), (settings.batch,), generator=generator)] / scale)
    sae.theta.fill_(calibrate(sae, lambda: (rows_RD / scale).split(settings.batch), settings.k, settings))
    return sae, scale


# -- planted effects
# -----------------------------------------------------------------------------------------------------


class Planted:
    """Stands where a language model does: x(token) = sum_i f_i v_i, Loss = sum over rows of sum_i effect_i * tanh(f_i).

    f_i is read from x by the features' dual directions, so that a feature's effect on a row's loss, the difference that
    setting f_i = 0 makes, is effect_i * tanh(f_i) exactly.
    """

    def __init__(self, features: int = 48, d: int = 64, vocabulary: int = 4096, active: int = 4):
        generator = torch.Generator().manual_seed(5)
        self.v_KD = torch.nn.functional.normalize(torch.randn(features, d, generator=generator), dim=1)
        self.dual_DK = torch.linalg.pinv(self.v_KD)
        self.effect_K = torch.logspace(0, -2, features)[torch.randperm(features, generator=generator)]
        on_VK = torch.rand(vocabulary, features, generator=generator) < active / features
        f_VK = on_VK * (0.5 + torch.rand(vocabulary, features, generator=generator))
        self.x_VD = f_VK @ self.v_KD
        self.true_K = (self.effect_K * torch.tanh(f_VK)).mean(dim=0)
        """mean effect on a row's loss"""

    def rows(self, ids_NT, lengths_N):
        return (torch.arange(ids_NT.shape[1]) < lengths_N[:, None]) & (torch.arange(ids_NT.shape[1]) > 0)

    def cut(self, ids_NT):
        return SimpleNamespace(value_BTD=self.x_VD[ids_NT])

    def loss(self, cut, value_NTD, ids_NT, lengths_N):
        f_RK = value_NTD[self.rows(ids_NT, lengths_N)] @ self.dual_DK
        return (self.effect_K * torch.tanh(f_RK)).sum()


@pytest.fixture(scope="module")
def planted():
    world = Planted()
    sae, scale = trained(world.x_VD, 400, width=256, k=5, batch=512, prefix_fractions=(1 / 4, 1 / 4), lr=3e-3)
    # Every token once, eight sequences of 512 and what stands first in them.
    ids_NT = torch.cat([torch.zeros(8, 1, dtype=torch.int64), torch.arange(4096).reshape(8, 512)], dim=1)
    return world, sae, scale, ids_NT, torch.full((8,), 513)


@pytest.mark.parametrize("aggregator", ["mean_abs", "quantile", "mean_signed"])
@pytest.mark.parametrize("candidates", ["first_group", "all"])
def test_planted_features_are_found_and_ranked_by_their_effect(planted, aggregator, candidates):
    world, sae, scale, ids_NT, lengths_N = planted
    partial = attribute(sae, world, ids_NT, lengths_N, scale, AttributionSettings(candidates=candidates))
    scores_P = scores([partial], ScoreSettings(aggregator))
    cosine_KP = world.v_KD @ sae.W_dec[: len(scores_P)].detach().T
    matter = select(world.true_K, 0.9)
    recall = float((cosine_KP[matter][:, select(scores_P, 0.9)].max(dim=1).values >= 0.9).double().mean())
    correlation = spearmanr(scores_P[cosine_KP.argmax(dim=1)], world.true_K).statistic
    print(f"{aggregator}, {candidates}: recall {recall:.3f} of {len(matter)}, Spearman {correlation:.3f}")
    assert 10 < len(matter) < len(world.v_KD), "some matter, some do not"
    assert recall >= 0.9 and correlation >= 0.9


# -- ablation
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    """The small model, an SAE trained on its activations, and held-out sequences."""
    lm = LanguageModel.load("tiny", "blocks.2.hook_resid_post")
    sequences = []
    for document in load_documents("embedded"):
        ids = lm.tokenizer(document.text[:4000], add_special_tokens=False)["input_ids"][:127]
        if len(ids) == 127:
            sequences.append([lm.bos_id, *ids])
        if len(sequences) == 144:
            break
    ids_NT = torch.tensor(sequences)
    rows_RD = torch.cat([lm.cut(some_NT).value_BTD[:, 1:].flatten(0, 1) for some_NT in ids_NT[:128].split(32)])
    sae, scale = trained(rows_RD, 300, width=512, k=16, batch=512, prefix_fractions=(1 / 8, 1 / 4), lr=3e-3)
    return lm, sae, scale, ids_NT[128:]


def test_attribution_ranks_latents_as_ablating_them_does(real):
    lm, sae, scale, ids_NT = real
    lengths_N = torch.full((len(ids_NT),), ids_NT.shape[1])
    partial = attribute(sae, lm, ids_NT, lengths_N, scale, AttributionSettings())
    z_RP, _ = gradients(sae, lm, ids_NT, lengths_N, scale, AttributionSettings())
    rows_NT, cut = lm.rows(ids_NT, lengths_N), lm.cut(ids_NT)

    @torch.no_grad()
    def losses(z_RP) -> torch.Tensor:
        """Of every token, [R]."""
        value_NTD = cut.value_BTD.clone()
        value_NTD[rows_NT] = sae.decode(z_RP) * scale
        logits_RV = lm.logits(cut, value_NTD)[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits_RV, ids_NT[:, 1:].flatten(), reduction="none").double()

    base_R, changes = losses(z_RP), {"each": [], "sum": []}
    active = (z_RP > 0).any(dim=0).nonzero().flatten().tolist()[::2]  # half of them, to be quick
    for j in active:
        without_RP = z_RP.clone()
        without_RP[:, j] = 0
        change_R = losses(without_RP) - base_R
        changes["each"].append(float(change_R.abs().mean()))
        changes["sum"].append(abs(float(change_R.sum())))
    assert len(active) >= 30
    for aggregator in ("mean_abs", "quantile", "mean_signed"):
        scores_A = scores([partial], ScoreSettings(aggregator))[active]
        found = {kind: spearmanr(scores_A, change).statistic for kind, change in changes.items()}
        print(
            f"{aggregator}: Spearman with ablation of {len(active)} latents",
            {kind: round(value, 3) for kind, value in found.items()},
        )
        if aggregator == "mean_abs":
            assert all(found[kind] >= floor for kind, floor in FLOORS.items())
