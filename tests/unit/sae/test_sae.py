import copy
import dataclasses

import pytest
import safetensors.torch
import torch

from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.settings import SAESettings

SETTINGS = SAESettings(d=5, width=40, k=3, batch=8)


def core(size=4):
    return 2 * torch.randn(size, 5, generator=torch.Generator().manual_seed(1))


def test_init_follows_the_method():
    sae = MatryoshkaSAE.init(SETTINGS, core(), seed=3)
    assert sae.group_ends == [5, 7, 11, 20, 40] and sae.core_size == 4
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    assert torch.equal(sae.W_enc, sae.W_dec[4:])
    assert torch.equal(sae.W_enc_core, core())
    torch.testing.assert_close(sae.W_dec[:4], torch.nn.functional.normalize(core(), dim=1))
    assert not sae.b_enc.any() and not sae.b_dec.any()
    assert [name for name, _ in sae.named_parameters()] == ["W_enc", "b_enc", "W_dec", "b_dec"]


def test_init_depends_on_its_own_seed_only():
    torch.manual_seed(0)
    first = MatryoshkaSAE.init(SETTINGS, None, seed=3)
    torch.manual_seed(1)
    second = MatryoshkaSAE.init(SETTINGS, None, seed=3)
    assert torch.equal(first.W_dec, second.W_dec)
    assert not torch.equal(first.W_dec, MatryoshkaSAE.init(SETTINGS, None, seed=4).W_dec)


def test_random_core_decoder():
    settings = SAESettings(d=5, width=40, k=3, batch=8, core_decoder_init="random")
    random, encoder = MatryoshkaSAE.init(settings, core(), 3), MatryoshkaSAE.init(SETTINGS, core(), 3)
    assert not torch.allclose(random.W_dec[:4], encoder.W_dec[:4])
    assert torch.equal(random.W_dec[4:], encoder.W_dec[4:]), "free rows do not depend on the option"


def test_a_core_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="no free latent"):
        MatryoshkaSAE.init(SETTINGS, torch.ones(40, 5), 0)
    with pytest.raises(ValueError, match="shape"):
        MatryoshkaSAE.init(SETTINGS, torch.ones(4, 6), 0)
    with pytest.raises(ValueError, match="zero or not finite"):
        MatryoshkaSAE.init(SETTINGS, torch.zeros(4, 5), 0)


@pytest.mark.parametrize("core_transfer", ["frozen", "init"])
@pytest.mark.parametrize("core_gate", ["batchtopk", "relu"])
def test_inference_rule_and_prefixes(core_gate, core_transfer):
    sae = MatryoshkaSAE.init(
        SAESettings(d=5, width=40, k=3, batch=8, core_gate=core_gate, core_transfer=core_transfer), core(), 3
    )
    with torch.no_grad():
        sae.b_enc.normal_()
        sae.b_dec.normal_()
        sae.theta.fill_(0.7)
    x = torch.randn(2, 9, 5)
    W_enc = torch.cat([sae.W_enc_core, sae.W_enc])
    assert torch.equal(W_enc[:4], core()) and sae.W_enc.requires_grad and not sae.W_enc_core.requires_grad
    assert len(sae.W_enc_core) == sae.n_frozen == (4 if core_transfer == "frozen" else 0)
    p = (x - sae.b_dec) @ W_enc.T + sae.b_enc
    threshold = torch.full((40,), 0.7)
    threshold[:4] = 0 if core_gate == "relu" else 0.7
    z = p * (p > threshold)
    torch.testing.assert_close(sae.pre(x), p)
    torch.testing.assert_close(sae.encode(x), z)
    torch.testing.assert_close(sae.decode(z), z @ sae.W_dec + sae.b_dec)
    for upto in (2, 4, 5, 11):
        torch.testing.assert_close(sae.encode(x, upto), z[..., :upto])
        torch.testing.assert_close(sae.decode(z[..., :upto]), z[..., :upto] @ sae.W_dec[:upto] + sae.b_dec)


@pytest.mark.parametrize("core_transfer", ["frozen", "init"])
@pytest.mark.parametrize("core_size", [0, 4])
def test_file_round_trip(tmp_path, core_size, core_transfer):
    sae = MatryoshkaSAE.init(dataclasses.replace(SETTINGS, core_transfer=core_transfer), core(core_size), 3)
    sae.theta.fill_(0.123456789123)
    density = torch.rand(40, dtype=torch.float64)
    path = tmp_path / "sae.safetensors"
    sae.save(path, {"k": 3, "hook": "blocks.2", "scale": 1.5, "density": density})
    loaded, metadata = MatryoshkaSAE.load(path)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor) and loaded.state_dict()[name].dtype == tensor.dtype
    for copied in (loaded, copy.deepcopy(sae)):
        assert (copied.group_ends, copied.core_gate, copied.core_size) == (sae.group_ends, sae.core_gate, core_size)
        assert copied.core_transfer == core_transfer and torch.equal(copied.encoder_rows(), sae.encoder_rows())
    assert torch.equal(metadata.pop("density"), density)
    assert metadata == {"k": 3, "hook": "blocks.2", "scale": 1.5}
    assert [entry.name for entry in tmp_path.iterdir()] == ["sae.safetensors"], "no temporary file stays"


def test_files_that_are_not_ours_are_refused_by_name(tmp_path):
    text, foreign, newer = (
        tmp_path / name for name in ("text.safetensors", "foreign.safetensors", "newer.safetensors")
    )
    text.write_text("not a tensor file")
    safetensors.torch.save_file({"W": torch.zeros(1)}, foreign)
    safetensors.torch.save_file({"W": torch.zeros(1)}, newer, {"format": "dmsae_ray.sae", "format_version": "99"})
    for path, reason in (
        (text, "cannot be read"),
        (foreign, "not an SAE"),
        (newer, "format version 99"),
        (tmp_path / "none", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=reason) as error:
            MatryoshkaSAE.load(path)
        assert str(path) in str(error.value)
