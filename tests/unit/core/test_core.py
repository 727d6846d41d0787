"""The core and its file."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dmsae_ray.core.core import Core

FIELDS = ("W_enc_CD", "W_dec_CD", "b_enc_C", "b_dec_D", "scores_C", "density_C", "latent_ids_C", "entered_C")


def make_core(size=3, d=4, **changes) -> Core:
    generator = torch.Generator().manual_seed(0)
    W_dec_CD = torch.randn(size, d, generator=generator)
    fields = {
        "W_enc_CD": torch.randn(size, d, generator=generator),
        "W_dec_CD": W_dec_CD / W_dec_CD.norm(dim=1, keepdim=True),
        "b_enc_C": torch.randn(size, generator=generator),
        "b_dec_D": torch.randn(d, generator=generator),
        "scores_C": torch.rand(size, generator=generator, dtype=torch.float64),
        "density_C": torch.rand(size, generator=generator),
        "latent_ids_C": torch.arange(size) * 2,
        "theta": 0.1,
        "scale": 1 / 3,
        "hook": "blocks.2.hook_resid_post",
        "model": "abc",
        "cycle": 2,
        "seed": 5,
        "k": 16,
        "entered_C": torch.tensor([0, 1, 2][:size]),
        "selected": ((0, 1, 2), (1, 2), (2,))[:size],
    }
    return Core(**(fields | changes))


@pytest.mark.parametrize("size", [0, 1, 3])
def test_round_trip_is_exact(tmp_path, size):
    core = make_core(size)
    core.save(tmp_path / "core.safetensors")
    again = Core.load(tmp_path / "core.safetensors")
    assert again.size == size
    for name in FIELDS:
        assert torch.equal(getattr(again, name), getattr(core, name))
        assert getattr(again, name).dtype == getattr(core, name).dtype
    for name in ("theta", "scale", "hook", "model", "cycle", "seed", "k", "selected"):
        assert getattr(again, name) == getattr(core, name)
    assert os.listdir(tmp_path) == ["core.safetensors"]


def test_a_placebo_says_so_and_a_core_by_attribution_has_no_more_to_say(tmp_path):
    placebo, plain = tmp_path / "placebo.safetensors", tmp_path / "plain.safetensors"
    make_core(selected_by="random").save(placebo)
    make_core().save(plain)
    assert Core.load(placebo).selected_by == "random" and Core.load(plain).selected_by == "attribution"
    with safe_open(plain, framework="pt") as file:
        assert "selected_by" not in file.metadata()["core"], "the file is that of before there were placebos"


def test_keeps_its_own_copy_of_what_it_was_made_from():
    W_enc_CD = torch.randn(3, 4, requires_grad=True)
    core = make_core(W_enc_CD=W_enc_CD)
    before = core.W_enc_CD.clone()
    with torch.no_grad():
        W_enc_CD.zero_()
    assert torch.equal(core.W_enc_CD, before) and not core.W_enc_CD.requires_grad


def test_any_altered_byte_is_noticed(tmp_path):
    path = tmp_path / "core.safetensors"
    make_core().save(path)
    content = path.read_bytes()
    # A stride that visits header, sha256 and every tensor.
    for position in [*range(0, len(content), 7), len(content) - 1]:
        altered = bytearray(content)
        altered[position] ^= 1
        path.write_bytes(bytes(altered))
        with pytest.raises(ValueError, match=str(path)):
            Core.load(path)


def test_truncated_missing_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "core.safetensors"
    with pytest.raises(ValueError, match=f"{path}: no such core file"):
        Core.load(path)
    make_core().save(path)
    content = path.read_bytes()
    for length in (0, 5, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{path}: truncated or altered"):
            Core.load(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=f"{path}: not a core"):
        Core.load(path)


def test_another_format_version_is_refused(tmp_path):
    path = tmp_path / "core.safetensors"
    make_core().save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    save_file(tensors, path, metadata | {"format_version": "99"})
    with pytest.raises(ValueError, match=f"{path}: core format version 99"):
        Core.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "core.safetensors"
    make_core(seed=1).save(path)

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        make_core(seed=2).save(path)
    assert Core.load(path).seed == 1
    assert os.listdir(tmp_path) == ["core.safetensors"]


def test_a_reader_keeps_the_file_it_opened(tmp_path):
    path = tmp_path / "core.safetensors"
    make_core(seed=1).save(path)
    old = path.read_bytes()
    with open(path, "rb") as reader:
        make_core(seed=2).save(path)
        assert reader.read() == old
    assert Core.load(path).seed == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b_enc_C": torch.zeros(4)}, "b_enc_C has shape"),
        ({"W_dec_CD": torch.ones(3, 4)}, "norm is not 1"),
        ({"W_enc_CD": torch.full((3, 4), float("nan"))}, "not finite"),
        ({"latent_ids_C": torch.tensor([0, 2, 2])}, "ascending"),
        ({"scores_C": torch.tensor([1.0, -1.0, 1.0])}, "negative"),
        ({"density_C": torch.tensor([0.0, 0.5, 1.5])}, "density"),
        ({"scale": 0.0}, "scale"),
        ({"theta": float("inf")}, "theta"),
        ({"selected": ((0, 1, 2), (1, 2))}, "3 members"),
        ({"selected": ((0, 1, 2), (1,), (2,))}, "member 1 entered"),
        ({"selected": ((1, 2), (1, 2), (2,))}, "member 0 entered"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_core(**changes)


def test_three_readings_of_size():
    core = make_core()
    assert core.size == 3
    assert core.repeated_C(2).tolist() == [True, True, False]
    assert core.survivors_C().tolist() == [True, False, False]
    assert core.origins() == {0: 1, 1: 1, 2: 1}
