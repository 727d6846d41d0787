"""The verdicts of python -m dmsae_ray.compare on planted truth."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from dmsae_ray.compare.__main__ import main
from dmsae_ray.interop import saelens
from dmsae_ray.interop.plain import About, PlainSAE, Threshold
from dmsae_ray.results.any_saes import Settings, check_comparable, choose, compare
from dmsae_ray.sae.sae import unit_rows

D, SHARED, OWN = 48, 12, 20


def planted(seed: int, noise: float = 0.05) -> PlainSAE:
    """An SAE with 12 latents that all have, a little turned, and 20 of its own, in an order of its own."""
    common, own = torch.Generator().manual_seed(100), torch.Generator().manual_seed(seed)
    truth = unit_rows(torch.randn(SHARED, D, generator=common))
    rows = torch.cat(
        [
            truth + noise * unit_rows(torch.randn(SHARED, D, generator=own)),
            torch.randn(OWN, D, generator=own),
        ]
    )
    W_dec = unit_rows(rows)[torch.randperm(SHARED + OWN, generator=own)]
    about = About(f"sae{seed}", "made here", model="google/gemma-2-2b", hook="blocks.2.hook_resid_post", k=4)
    zeros_D = torch.zeros(D)
    theta = Threshold(torch.full((SHARED + OWN,), 0.8))
    return PlainSAE(W_dec.clone(), torch.zeros(SHARED + OWN), W_dec, zeros_D, zeros_D, theta, about)


def rows_of_truth(count: int) -> torch.Tensor:
    common, own = torch.Generator().manual_seed(100), torch.Generator().manual_seed(5)
    truth = unit_rows(torch.randn(SHARED, D, generator=common))
    on = torch.rand(count, SHARED, generator=own) < 0.15
    return on.float() * (1 + torch.rand(count, SHARED, generator=own)) @ truth + 0.02 * torch.randn(
        count, D, generator=own
    )


def quiet(line: str) -> None:
    pass


@pytest.mark.parametrize("rows", [0, 3000])
def test_planted_features_are_found_and_nothing_else(rows):
    rows_RD = rows_of_truth(rows) if rows else None
    chosen = [choose(f"sae{seed}", planted(seed), rows_RD, Settings()) for seed in (1, 2, 3)]
    found, consensus = compare(chosen, rows_RD, Settings(), quiet)
    in_all = [feature for feature in found["features"] if feature["in_chains"] == 3]
    assert len(in_all) == SHARED == found["core_size"]
    assert consensus.core is not None and consensus.core.size == SHARED
    for row in found["reproducibility"]:
        assert row["in_others"][2] == SHARED and row["in_others"][1] == 0
    for pair in found["pairs"]:
        assert pair["shared"] == SHARED
        assert pair["pw_mcc"] > pair["nulls"]["isotropic"]["pw_mcc_p99"]
        if rows:
            assert pair["activation"]["mean"] > 0.5 > pair["activation"]["permuted_largest"]
    if rows:
        assert all(one.quality is not None and 0.5 < one.quality["l0"] < 4 for one in chosen)


def test_saes_with_nothing_in_common_have_no_feature_and_do_not_exceed_chance():
    chosen = [choose(f"sae{seed}", planted(seed, noise=100.0), None, Settings()) for seed in (1, 2)]
    found, consensus = compare(chosen, None, Settings(), quiet)
    (pair,) = found["pairs"]
    assert pair["shared"] == 0 and pair["pw_mcc"] < pair["nulls"]["isotropic"]["pw_mcc_p99"] + 0.02
    assert consensus.core is None and found["core_size"] == 0


def test_of_too_many_latents_those_are_compared_that_add_most():
    rows_RD = rows_of_truth(3000)
    chosen = choose("sae", planted(1), rows_RD, Settings(latents=SHARED))
    truth = unit_rows(torch.randn(SHARED, D, generator=torch.Generator().manual_seed(100)))
    assert float((chosen.W_dec_ND @ truth.T).max(dim=1).values.min()) > 0.9


def test_an_sae_that_is_silent_on_the_rows_is_named():
    sae = replace(planted(1), gate=Threshold(torch.full((SHARED + OWN,), 1e6)))
    with pytest.raises(ValueError, match="sae1: none of its latents is active on these 100 rows"):
        choose("sae", sae, rows_of_truth(100), Settings())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hook": "blocks.3.hook_resid_post"}, "their hook is blocks.2.hook_resid_post and blocks.3.hook_resid_post"),
        ({"model": "google/gemma-2-9b"}, "their model is gemma-2-2b and gemma-2-9b"),
    ],
)
def test_what_reads_other_activations_is_refused(change, said):
    a = planted(1)
    b = replace(a, about=replace(a.about, place="b", **change))
    with pytest.raises(ValueError, match=said):
        check_comparable([a, b])
    check_comparable([a, replace(a, about=replace(a.about, hook=None, model="gemma-2-2b"))])
    check_comparable(
        [replace(a, about=replace(a.about, model=name)) for name in ("gpt2-small", "openai-community/gpt2")]
    )
    check_comparable([a, replace(a, about=replace(a.about, model="my-copy"))], same_model=True)


def test_the_command_writes_what_it_shows(tmp_path, capsys):
    for seed in (1, 2):
        saelens.write(tmp_path / f"sae{seed}", planted(seed))
    places = [str(tmp_path / f"sae{seed}") for seed in (1, 2)]
    assert main([*places, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found["format_version"] == 1 and found["pairs"][0]["shared"] == SHARED and "12 features" in shown
    assert (tmp_path / "out" / "consensus.safetensors").exists()
    assert main(places[:1]) == 2 and "one SAE alone" in capsys.readouterr().err
    assert main([*places, "--data", str(tmp_path / "none")]) == 2
    assert "no finished dataset here" in capsys.readouterr().err
