"""SAEs of other packages: read as those packages compute them, and ours written so that they do.

`tests/data/formats` holds small SAEs that the packages themselves wrote, with rows and what their own classes made of
them (jobs/peers/formats.py).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dmsae_ray.interop import dictionary_learning, hub_folder, saelens
from dmsae_ray.interop.ours import about_of, plain_of
from dmsae_ray.interop.plain import PlainSAE, Threshold, Unknown
from dmsae_ray.interop.read import read_sae
from dmsae_ray.sae.sae import MatryoshkaSAE, unit_rows

RECORDED = Path(__file__).resolve().parents[2] / "data" / "formats"
NAMES = sorted(path.name for path in RECORDED.iterdir())


def made(gate: str, scale: float) -> tuple[MatryoshkaSAE, PlainSAE]:
    """A random SAE of ours with a core of 4."""
    sae = MatryoshkaSAE(8, [10, 20, 40], 4, gate)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in (*sae.parameters(), sae.W_enc_core):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        sae.W_dec.copy_(unit_rows(sae.W_dec))
        sae.theta.fill_(0.3)
    known = {"scale": scale, "hook": "blocks.2.hook_resid_post", "k": 8, "chain": "0123456789ab"}
    about = replace(about_of(sae, known, "made here"), model="google/gemma-2-2b", context=64, prepend_bos=True, l0=8.5)
    return sae, plain_of(sae, known, about)


def test_every_kind_was_recorded():
    assert len(NAMES) == 12
    assert {name.partition("-")[0] for name in NAMES} == {"saelens", "dictionary_learning"}


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_sae_is_read_as_its_package_computes_it(name):
    sae, rows = read_sae(str(RECORDED / name)), load_file(RECORDED / name / "rows.safetensors")
    torch.testing.assert_close(sae.W_dec_FD.norm(dim=1), torch.ones(sae.width))
    z_BF = sae.encode(rows["x"])
    assert torch.equal(z_BF > 0, rows["z"] > 0)
    assert 0 < int((z_BF > 0).sum()) < z_BF.numel()
    torch.testing.assert_close(sae.decode(z_BF), rows["x_hat"], rtol=1e-5, atol=1e-5)
    # Activations are those of unit decoder rows: theirs times the norms, unless theirs are that already.
    ratio_F = (z_BF.sum(dim=0) / rows["z"].sum(dim=0))[rows["z"].sum(dim=0) > 0]
    assert (float(ratio_F.std()) < 1e-5) == (name == "saelens-topk-rescaled")
    expected = {
        "saelens": ("gpt2", "blocks.1.hook_resid_pre"),
        "dictionary_learning": ("gpt2", "blocks.3.hook_resid_post"),
    }
    assert (sae.about.model, sae.about.hook) == expected[name.partition("-")[0]]


@pytest.mark.parametrize("scale", [1.0, 0.25, 28.18])
@pytest.mark.parametrize("gate", ["batchtopk", "relu"])
def test_ours_in_raw_units_is_ours_and_comes_back_from_saelens_to_the_bit(gate, scale, tmp_path):
    sae, plain = made(gate, scale)
    x_BD = torch.randn(200, 8, generator=torch.Generator().manual_seed(1)) * scale
    with torch.no_grad():
        z_BF, p_BF = sae.encode(x_BD / scale), sae.pre(x_BD / scale)
        raw_BF = plain.encode(x_BD)
        sure_BF = (p_BF - sae.thresholds()).abs() > 1e-6
        assert torch.equal((raw_BF > 0)[sure_BF], (z_BF > 0)[sure_BF])
        torch.testing.assert_close(raw_BF, z_BF * scale, rtol=1e-5, atol=1e-5 * scale)
        torch.testing.assert_close(plain.decode(raw_BF), sae.decode(z_BF) * scale, rtol=1e-5, atol=1e-5 * scale)
    saelens.write(tmp_path / "sae", plain, density_F=torch.full((40,), 0.01))
    again = read_sae(str(tmp_path / "sae"))
    for name in ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D", "b_in_D"):
        assert torch.equal(getattr(again, name), getattr(plain, name)), name
    assert isinstance(again.gate, Threshold) and torch.equal(again.gate.theta_F, plain.gate.theta_F)
    about = again.about
    assert (about.model, about.hook, about.context, about.k, about.prefixes, about.l0, about.prepend_bos) == (
        "google/gemma-2-2b",
        "blocks.2.hook_resid_post",
        64,
        8,
        (10, 20, 40),
        8.5,
        True,
    )
    assert load_file(tmp_path / "sae" / "sparsity.safetensors")["sparsity"].tolist() == pytest.approx([-2.0] * 40)
    metadata = json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]
    assert metadata["sae_lens_version"] and metadata["dmsae_chain"] == "0123456789ab"


def test_ours_comes_back_from_dictionary_learning_and_an_exempt_core_is_refused(tmp_path):
    _, plain = made("batchtopk", 28.18)
    dictionary_learning.write(tmp_path / "sae", plain)
    again = read_sae(str(tmp_path / "sae"))
    for name in ("W_enc_FD", "b_enc_F", "W_dec_FD", "b_dec_D", "b_in_D"):
        assert torch.equal(getattr(again, name), getattr(plain, name)), name
    assert torch.equal(again.gate.theta_F, plain.gate.theta_F)
    assert (again.about.model, again.about.hook, again.about.prefixes, again.about.k) == (
        "google/gemma-2-2b",
        "blocks.2.hook_resid_post",
        (10, 20, 40),
        8,
    )
    with pytest.raises(ValueError, match="different thresholds .an exempt core.*--to saelens"):
        dictionary_learning.write(tmp_path / "other", made("relu", 1.0)[1])
    assert not (tmp_path / "other").exists()


def test_a_hub_folder_has_a_card_of_measured_figures(tmp_path):
    hub_folder.write(tmp_path / "sae", made("relu", 2.0)[1], {"FVU": 0.183}, None)
    card = (tmp_path / "sae" / "README.md").read_text()
    assert card.startswith("---\n") and "base_model: google/gemma-2-2b" in card and "| FVU | 0.183 |" in card
    assert read_sae(str(tmp_path / "sae")).width == 40


def test_gemma_scope_says_in_its_path_what_it_is(tmp_path):
    folder = tmp_path / "google" / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_82"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    W_dec = rng.standard_normal((30, 6)).astype(np.float32)
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    params = {
        "W_enc": rng.standard_normal((6, 30)).astype(np.float32),
        "b_enc": rng.standard_normal(30).astype(np.float32),
        "W_dec": W_dec,
        "b_dec": rng.standard_normal(6).astype(np.float32),
        "threshold": np.full(30, 0.5, np.float32),
    }
    np.savez(folder / "params.npz", **params)
    sae = read_sae(str(folder))
    x = rng.standard_normal((5, 6)).astype(np.float32)
    p = x @ params["W_enc"] + params["b_enc"]  # the decoder's bias is not taken from the input
    torch.testing.assert_close(sae.encode(torch.from_numpy(x)), torch.from_numpy(np.where(p > 0.5, p, 0)))
    about = sae.about
    assert (about.model, about.hook, about.l0) == ("google/gemma-2-2b", "blocks.12.hook_resid_post", 82)


def test_sparsify_ranks_by_its_own_activations_also_where_decoder_rows_are_not_of_norm_1(tmp_path):
    folder = tmp_path / "layers.5.mlp"
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "encoder.weight": torch.randn(30, 6, generator=generator),
        "encoder.bias": torch.randn(30, generator=generator),
        "W_dec": torch.randn(30, 6, generator=generator),
        "b_dec": torch.randn(6, generator=generator),
    }
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"k": 4, "activation": "topk", "d_in": 6}))
    sae = read_sae(str(folder))
    x_BD = torch.randn(9, 6, generator=generator)
    p_BF = (x_BD - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]
    values, indices = p_BF.relu().topk(4, dim=-1)
    z_BF = torch.zeros_like(p_BF).scatter(-1, indices, values)
    torch.testing.assert_close(sae.encode(x_BD), z_BF * tensors["W_dec"].norm(dim=1))
    torch.testing.assert_close(sae.decode(sae.encode(x_BD)), z_BF @ tensors["W_dec"] + tensors["b_dec"])
    assert sae.about.hook == "blocks.5.hook_mlp_out"
    (folder / "cfg.json").write_text(json.dumps({"k": 4, "activation": "groupmax", "d_in": 6}))
    assert isinstance(read_sae(str(folder)).gate, Unknown)
    (folder / "cfg.json").write_text(json.dumps({"k": 4, "transcode": True}))
    with pytest.raises(ValueError, match="cfg.json: transcode .* no SAE"):
        read_sae(str(folder))


def test_what_a_file_does_not_tell_is_refused_when_activations_are_asked_for(tmp_path):
    shutil.copytree(RECORDED / "saelens-standard", tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config | {"normalize_activations": "layer_norm"}))
    sae = read_sae(str(tmp_path / "sae"))
    with pytest.raises(ValueError, match="layer_norm: each row is normalised by its own mean"):
        sae.encode(torch.zeros(1, 6))


def test_a_decoder_row_of_zeros_in_a_rescaled_checkpoint_is_a_latent_that_never_fires(tmp_path):
    tensors = load_file(RECORDED / "saelens-topk-rescaled" / "sae_weights.safetensors")
    tensors["W_dec"][3] = 0
    (tmp_path / "sae").mkdir()
    save_file(tensors | {"topk_threshold": torch.tensor(0.1)}, tmp_path / "sae" / "sae_weights.safetensors")
    config = {"architecture": "matryoshka_batchtopk", "d_in": 6, "d_sae": 20, "rescale_acts_by_decoder_norm": True}
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config))
    z_BF = read_sae(str(tmp_path / "sae")).encode(torch.randn(200, 6, generator=torch.Generator().manual_seed(0)))
    assert not z_BF[:, 3].any() and int((z_BF > 0).any(dim=0).sum()) > 10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "cfg.json").write_text("{"), "cfg.json: not readable as JSON"),
        (lambda f: (f / "cfg.json").unlink(), "cfg.json: no such file"),
        (lambda f: (f / "sae_weights.safetensors").write_bytes(b"x" * 20), "cannot be read as a safetensors file"),
        (lambda f: save_file({"W_enc": torch.zeros(6, 20)}, f / "sae_weights.safetensors"), "lacks W_dec, b_dec"),
        (
            lambda f: save_file(
                load_file(f / "sae_weights.safetensors") | {"b_enc": torch.zeros(3)}, f / "sae_weights.safetensors"
            ),
            "b_enc has shape .3,., W_dec asks for .20,.: not of one SAE",
        ),
        (
            lambda f: save_file(
                load_file(f / "sae_weights.safetensors") | {"b_dec": torch.full((6,), torch.nan)},
                f / "sae_weights.safetensors",
            ),
            "b_dec holds a value that is not finite",
        ),
    ],
)
def test_a_damaged_folder_is_refused_by_name(change, said, tmp_path):
    shutil.copytree(RECORDED / "saelens-jumprelu", tmp_path / "sae")
    change(tmp_path / "sae")
    with pytest.raises(ValueError, match=said) as caught:
        read_sae(str(tmp_path / "sae"))
    assert str(tmp_path / "sae") in str(caught.value)


def test_a_pickle_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    (tmp_path / "sae").mkdir()
    torch.save({"W_enc": Evil()}, tmp_path / "sae" / "ae.pt")
    (tmp_path / "sae" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="ae.pt: cannot be read as tensors alone"):
        read_sae(str(tmp_path / "sae"))
    assert not (tmp_path / "touched").exists()


def test_a_place_without_an_sae_names_those_below_it(tmp_path):
    shutil.copytree(RECORDED / "saelens-jumprelu", tmp_path / "deep" / "sae")
    with pytest.raises(ValueError, match="holds no SAE; give a SAELens folder .*there are SAEs below it: deep/sae"):
        read_sae(str(tmp_path))
    with pytest.raises(ValueError, match="there is nothing; give"):
        read_sae(str(tmp_path / "nothing"))
