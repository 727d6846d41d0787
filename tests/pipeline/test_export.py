"""What leaves a sweep: SAEs in other formats, compared again, and looked at with the language model."""

from __future__ import annotations

import json

import pytest
import torch

import dmsae_ray
from dmsae_ray.compare.__main__ import main as compare
from dmsae_ray.export import main as export


def test_every_chain_is_exported_and_reads_raw_activations_as_ours_does(small_sweep, tmp_path, capsys):
    output = str(small_sweep.output)
    for to in ("hub", "dictionary_learning"):
        assert export([output, "--to", to, "--out", str(tmp_path / to)]) == 0
        assert sorted(path.name for path in (tmp_path / to).iterdir()) == ["seed0-k8", "seed1-k8"]
    sweep = dmsae_ray.load_sweep(output)
    rows = sweep.dataset().calibration_rows().float()[:500]
    sae, known = sweep.chains["seed0-k8"].sae()
    with torch.no_grad():
        expected = sae.encode(rows / known["scale"]) * known["scale"]
        for to in ("hub", "dictionary_learning"):
            found = dmsae_ray.read_sae(str(tmp_path / to / "seed0-k8")).encode(rows)
            assert int(((found > 0) != (expected > 0)).sum()) <= 2  # within rounding of the threshold
            both = (found > 0) & (expected > 0)
            torch.testing.assert_close(found[both], expected[both], rtol=1e-4, atol=1e-4)
    metadata = json.loads((tmp_path / "hub" / "seed0-k8" / "cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["context_size"], metadata["prepend_bos"]) == ("tiny", 128, True)
    assert "loss recovered" in (tmp_path / "hub" / "seed0-k8" / "README.md").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    capsys.readouterr()
    assert export([output, "--to", "hub", "--chain", "seed0-k8", "--out", str(tmp_path / "mine")]) == 0
    assert export([output, "--to", "hub", "--chain", "seed7-k8", "--out", str(tmp_path / "x")]) == 2
    assert "--chain seed7-k8: " in capsys.readouterr().err and not (tmp_path / "x").exists()
    (tmp_path / "mine" / "seed0-k8" / "thesis.tex").write_text("precious")
    assert export([output, "--to", "hub", "--out", str(tmp_path / "mine")]) == 2
    assert "that no export wrote" in capsys.readouterr().err
    theirs = tmp_path / "theirs" / "seed0-k8"
    theirs.mkdir(parents=True)
    (theirs / "cfg.json").write_text("{}")
    assert export([output, "--to", "saelens", "--chain", "seed0-k8", "--out", str(tmp_path / "theirs")]) == 2
    assert "that no export wrote" in capsys.readouterr().err and (theirs / "cfg.json").read_text() == "{}"
    assert export([output, "--to", "dictionary_learning", "--out", str(tmp_path / "hub")]) == 0  # in place of ours
    assert sorted(path.name for path in (tmp_path / "hub" / "seed0-k8").iterdir()) == ["ae.pt", "config.json"]


def test_the_chains_of_a_sweep_are_compared_beside_an_export_of_one(small_sweep, tmp_path, capsys):
    output = small_sweep.output
    assert export([str(output), "--to", "saelens", "--chain", "seed0-k8", "--out", str(tmp_path)]) == 0
    (data,) = (output / "data").iterdir()
    capsys.readouterr()
    places = [str(output), str(tmp_path / "seed0-k8")]
    assert compare([*places, "--data", str(data), "--rows", "500", "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    by_pair = {(pair["a"], pair["b"]): pair for pair in found["pairs"]}
    same = by_pair["seed0-k8#1", "seed0-k8#2"]
    assert same["pw_mcc"] == pytest.approx(1) and same["overlap"] == 1 and same["activation"]["mean"] > 0.999
    other = by_pair["seed0-k8#1", "seed1-k8"]
    assert other["pw_mcc"] < 0.9 and other["activation"]["mean"] < 0.9
    assert all(sae["quality"]["l0"] == pytest.approx(8, abs=2) for sae in found["saes"])


def test_a_chain_is_looked_at_with_its_model(small_sweep):
    lab = dmsae_ray.Explorer.of_sweep(small_sweep.output, "seed0-k8")
    text = "import os\n\ndef read(self):\n    return self"
    top = lab.read(text).top(5)
    assert top and max(abs(lab.ablate(text, one.latent).effect) for one in top) > 1e-4
    feature = lab.feature("f000")
    assert feature["representative"]["chain"] in ("seed0-k8", "seed1-k8") and feature["contexts"]
    with pytest.raises(ValueError, match="has none of this id"):
        lab.feature("f999")
    with pytest.raises(ValueError, match="has no chain seed7-k8; it has seed0-k8, seed1-k8"):
        dmsae_ray.Explorer.of_sweep(small_sweep.output, "seed7-k8")
