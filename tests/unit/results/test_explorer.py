"""One SAE and its language model, looked at: against what the model itself gives."""

from __future__ import annotations

import pytest
import torch

from dmsae_ray.interop.plain import About, PlainSAE, Threshold
from dmsae_ray.lm.model import LanguageModel
from dmsae_ray.results.explorer import Explorer
from dmsae_ray.sae.sae import unit_rows

HOOK, TEXT = "blocks.2.hook_resid_post", "def read(self):\n    return self"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.load("tiny", HOOK)


@pytest.fixture(scope="module")
def lab(model) -> Explorer:
    rows = unit_rows(torch.randn(40, model.d, generator=torch.Generator().manual_seed(0)))
    zeros_D = torch.zeros(model.d)
    theta_F = torch.full((40,), 2.0)
    theta_F[7] = 1e6  # never active
    return Explorer(
        PlainSAE(rows, torch.zeros(40), rows, zeros_D, zeros_D, Threshold(theta_F), About("here", "made", hook=HOOK)),
        model,
    )


def stream(model: LanguageModel, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[model.bos_id, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]])
    return ids, model.sites(ids, [HOOK])[HOOK][0]


def test_a_text_is_read_as_the_sae_encodes_the_stream_but_for_bos(lab, model):
    reading, (ids, x_TD) = lab.read(TEXT), stream(model, TEXT)
    assert len(reading.tokens) == ids.shape[1] and "".join(reading.tokens[1:]) == TEXT
    assert torch.equal(reading.z_TF[1:], lab.sae.encode(x_TD)[1:]) and not reading.z_TF[0].any()
    top = reading.top(3)
    assert [one.activation for one in top] == sorted((one.activation for one in top), reverse=True)
    assert all(reading.z_TF[one.position, one.latent] == one.activation for one in top)
    assert top[0].token == reading.tokens[top[0].position] and top[0].activation == float(reading.z_TF.max())


def test_ablation_takes_away_what_the_latent_adds_and_nothing_else(lab, model):
    latent = lab.read(TEXT).top(1)[0].latent
    change, (ids, x_TD) = lab.ablate(TEXT, latent), stream(model, TEXT)
    expected_TD = x_TD - lab.sae.encode(x_TD)[:, latent, None] * lab.sae.W_dec_FD[latent]
    expected_TD[0] = x_TD[0]
    cut, lengths = model.cut(ids), torch.tensor([ids.shape[1]])
    with torch.no_grad():
        clean, changed = (
            float(model.loss(cut, v[None], ids, lengths)) / (ids.shape[1] - 1) for v in (x_TD, expected_TD)
        )
        whole = model.bridge(ids, return_type="loss")
    assert change.loss == pytest.approx(clean) == pytest.approx(float(whole), rel=1e-5)
    assert change.changed_loss == pytest.approx(changed) and abs(change.effect) > 1e-3
    silent = lab.ablate(TEXT, 7)
    assert silent.effect == 0 and all(before == after for _, before, after in silent.next_token)


def test_steering_moves_the_next_token_the_further_the_more_is_added(lab):
    moved = [
        abs(after - before) for add in (0.0, 1.0, 20.0) for _, before, after in lab.steer(TEXT, 3, add, 1).next_token
    ]
    assert moved[0] == 0 < moved[1] < moved[2] <= 1


def test_the_logit_lens_is_the_final_norm_and_unembedding_of_the_row(model):
    """A row that is one token's unembedding direction says that token."""
    token = model.tokenizer(" return", add_special_tokens=False)["input_ids"][0]
    unembedding = model.bridge.original_model.get_output_embeddings().weight
    assert unembedding.shape[0] == model.vocabulary
    row = unit_rows(unembedding[token : token + 1].detach().float())
    zeros_D = torch.zeros(model.d)
    sae = PlainSAE(row, torch.zeros(1), row, zeros_D, zeros_D, Threshold(torch.zeros(1)), About("here", "made"))
    lens = Explorer(sae, model).logit_lens(0, 5)
    assert lens.up[0][0] == " return" and lens.up[0][1] > lens.up[1][1] > 0 > lens.down[0][1]


def test_what_does_not_fit_is_refused(lab, model):
    with pytest.raises(ValueError, match="latent 40: this SAE has latents 0 to 39"):
        lab.logit_lens(40)
    with pytest.raises(ValueError, match="text without a token"):
        lab.read("")
    with pytest.raises(ValueError, match="of no sweep"):
        lab.feature("f000")
    from dataclasses import replace

    other = replace(lab.sae, about=replace(lab.sae.about, hook="blocks.1.hook_resid_post"))
    with pytest.raises(ValueError, match="reads blocks.1.hook_resid_post, the model was loaded with blocks.2"):
        Explorer(other, model)
