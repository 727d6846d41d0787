"""What distillation adds to training a plain SAE on as many tokens: planted agreement, from folders to the verdict."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from shards import D, make_dataset
from test_comparison import chains, run

from dmsae_ray.compare.pairing import differs
from dmsae_ray.config import ExpectConfig
from dmsae_ray.core.core import Core
from dmsae_ray.results.behind_numbers import samples_by_name
from dmsae_ray.results.comparison import identity
from dmsae_ray.results.expectations import judge
from dmsae_ray.results.numbers import numbers_of
from dmsae_ray.results.plain_pairs import stand_ins, trained_tokens
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.show.columns import pair_columns, summary
from dmsae_ray.show.terminal import tables

KNOWN = torch.nn.functional.normalize(torch.randn(6, D, generator=torch.Generator().manual_seed(3)), dim=1)
LONG = ("--sweep.cycles", "1", "--train.tokens", "1280")  # the small chains have two cycles of 640 each
VALUE = "consistency.base.seed.nulls.matched_compute.excess.pw_mcc"


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "d", shards=6)


def plant(plans, count):
    """Give the chains' last cores so many latents in common, in the place of their first ones."""
    for plan in plans:
        folder = plan.folder.cycle(plan.cycles - 1)
        sae, stored = MatryoshkaSAE.load(folder.sae)
        core = Core.load(folder.core)
        ids = core.latent_ids_C[:count]
        with torch.no_grad():
            sae.encoder_rows()[ids], sae.W_dec[ids] = KNOWN[:count], KNOWN[:count]
        sae.save(folder.sae, stored)
        dataclasses.replace(
            core, W_enc_CD=sae.encoder_rows()[core.latent_ids_C], W_dec_CD=sae.W_dec[core.latent_ids_C]
        ).save(folder.core)


def study(tmp_path, dataset, cores, plain):
    """Three chains with so many core latents in common, and four plain SAEs on as many tokens with so many."""
    base = chains(dataset, tmp_path / "out", "--sweep.seeds", "0,1,2")
    long = chains(dataset, tmp_path / "out", "--sweep.seeds", "10,11,12,13", *LONG, arm="plain-long")
    plant(base, cores)
    plant(long, plain)
    return base, long, run(base + long, dataset, tmp_path / "sweep")[0]


@pytest.mark.parametrize("cores, plain, outcome", [(5, 2, "hit"), (4, 6, "miss")])
def test_distillation_adds_something_only_beyond_plain_saes_on_as_many_tokens(tmp_path, dataset, cores, plain, outcome):
    """Cycle 0's sets share nothing in both cases: against them alone both would pass."""
    _, _, found = study(tmp_path, dataset, cores, plain)
    numbers = numbers_of([], found, None)
    claims = [
        ExpectConfig(claim="adds agreement", value=VALUE.replace("matched_compute", name), above=0)
        for name in ("matched_compute", "cycle0")
    ]
    entries = judge(claims, numbers, samples_by_name([], found, None))["expectations"]
    assert [entry["outcome"] for entry in entries] == [outcome, "hit"]
    place = "consistency.base.seed.nulls.matched_compute"
    assert numbers[f"{place}.draws"] == 6 and numbers[f"{place}.available"] == 3
    assert f"{place}.above" not in numbers, "six draws carry no 99th percentile"
    mean = numbers["consistency.plain-long.seed.pw_mcc"]
    assert numbers[f"{place}.mean"] == pytest.approx(mean), "plain SAEs are compared among each other, by the same sets"
    assert numbers[VALUE] == pytest.approx(numbers["consistency.base.seed.pw_mcc"] - mean)
    printed = tables.plain_text(tables.groups_table(found["summary"]["groups"]))
    (line,) = [line for line in printed.splitlines() if line.startswith("base/seed")]
    assert f"{numbers[VALUE]:+.2f}" in line and f"{mean:.2f}" in line
    pairs = [pair for pair in found["pairs"] if pair["group"] == "base/seed"]
    assert tables.plain_text(tables.pairs_table(pairs)).count(f" {mean:.2f} ") >= 3
    assert "Plain: the mean of 6 pairs of plain SAEs." in tables.plain_text(tables.pairs_note(found))
    assert "share_above_matched_compute" not in summary(found | {"pairs": pairs})
    assert pair_columns(pairs)["matched_compute draws"] == [6, 6, 6]


def test_what_each_null_is_made_of(tmp_path, dataset):
    _, _, found = study(tmp_path, dataset, 4, 4)
    one = next(pair for pair in found["pairs"] if pair["group"] == "base/seed")
    null, whole = one["nulls"]["matched_compute"], one["dictionary_nulls"]["matched_compute"]
    plain = [pair for pair in found["pairs"] if pair["group"] == "plain-long/seed"]
    for name, own in (("mean", "pw_mcc"), ("overlap_mean", "overlap"), ("activation_mean", "activation")):
        assert null[name] == pytest.approx(sum(pair[own] for pair in plain) / 6, abs=1e-6)
        assert null[f"core_{own}_same_size"] == one[own]
    assert null["mmcs_mean"] == pytest.approx(sum(pair["mmcs_ab"] + pair["mmcs_ba"] for pair in plain) / 12)
    assert (null["size"], null["draws"], whole["draws"]) == ([6, 6], 6, 6)
    assert whole["mean"] == pytest.approx(sum(pair["pw_mcc_dictionary"] for pair in plain) / 6)
    assert all("plain SAEs themselves" in pair["nulls"]["matched_compute"]["reason"] for pair in plain)


def test_cores_larger_than_the_plain_saes_candidates_are_cut(tmp_path, dataset, monkeypatch):
    from dmsae_ray.results import comparison

    real = comparison.chain_result

    def with_few_candidates(plan, label):
        result = real(plan, label)
        return dataclasses.replace(result, start_ids_N=result.start_ids_N[:3]) if plan.cycles == 1 else result

    monkeypatch.setattr(comparison, "chain_result", with_few_candidates)
    _, _, found = study(tmp_path, dataset, 4, 4)
    null = next(pair for pair in found["pairs"] if pair["group"] == "base/seed")["nulls"]["matched_compute"]
    assert null["size"] == [3, 3] and null["available"] and null["core_pw_mcc_same_size"] is not None


def reason(tmp_path, dataset, base, plain):
    found = run(base + plain, dataset, tmp_path / "sweep")[0]
    null = found["pairs"][0]["nulls"]["matched_compute"]
    assert not null["available"] and null["mean"] is None
    assert found["summary"]["groups"][found["pairs"][0]["group"]]["nulls"]["matched_compute"]["available"] == 0
    said = tables.plain_text(tables.pairs_note(found | {"pairs": found["pairs"][:1]}))
    assert "Plain is not available" in said
    return null["reason"]


def test_without_such_plain_saes_the_reason_names_the_remedy(tmp_path, dataset):
    base = chains(dataset, tmp_path / "out", "--sweep.seeds", "0,1")
    none = reason(tmp_path, dataset, base, [])
    assert "on its 1,280 tokens: add an arm to study.arms" in none and "cycles: 1" in none and "tokens: 1280" in none
    short = chains(dataset, tmp_path / "out", "--sweep.seeds", "10,11", "--sweep.cycles", "1", arm="plain")
    assert reason(tmp_path, dataset, base, short) == none, "one cycle's tokens are not a chain's"
    other = chains(dataset, tmp_path / "out", "--sweep.seeds", "10,11", *LONG, "--train.lr", "0.1", arm="other")
    assert reason(tmp_path, dataset, base, other) == none, "trained otherwise"
    alone = chains(dataset, tmp_path / "out", "--sweep.seeds", "10", *LONG, arm="one")
    assert "no two differ in seed, data_seed alone" in reason(tmp_path, dataset, base, alone)
    assert trained_tokens(base[0]) == trained_tokens(alone[0]) == 1280


def test_only_pairs_that_differ_in_the_same_things_stand_in(tmp_path, dataset):
    home = tmp_path / "out"
    base = chains(dataset, home, "--sweep.seeds", "0,1", "--sweep.k", "4,8", write=False)
    gate = chains(dataset, home, "--sweep.seeds", "0", "--sae.core_gate", "relu", arm="relu", write=False)
    long = chains(dataset, home, "--sweep.seeds", "10,11", "--sweep.k", "4,8", *LONG, arm="long", write=False)
    by_label = {plan.label: plan for plan in base + gate + long}
    plain = {plan.label: plan for plan in long}

    def stands_for(a, b):
        found = dataclasses.make_dataclass("Pair", ["a", "b", "differences"])
        names = ("seed", "data_seed", "part", "k", "rest")
        one, other = identity(by_label[a]), identity(by_label[b])
        return stand_ins(
            found(a, b, tuple(name for name in names if getattr(one, name) != getattr(other, name))), by_label, plain
        )

    assert stands_for("seed0-k4", "seed1-k4") == ([("seed10-k4-long", "seed11-k4-long")], None)
    assert stands_for("seed0-k4", "seed0-k8") == (
        [("seed10-k4-long", "seed10-k8-long"), ("seed11-k4-long", "seed11-k8-long")],
        None,
    )
    assert stands_for("seed0-k4", "seed1-k8")[0] == [
        ("seed10-k4-long", "seed11-k8-long"),
        ("seed11-k4-long", "seed10-k8-long"),
    ]
    assert "neither seed, data nor k" in stands_for("seed0-k4", "seed0-k4-relu")[1]


def test_a_plain_arm_with_the_grids_own_seeds_is_compared_too(tmp_path, dataset):
    """Its chains are the grid's first cycles: the number of cycles is all that differs."""
    base = chains(dataset, tmp_path / "out", "--sweep.seeds", "0,1")
    plain = chains(dataset, tmp_path / "out", "--sweep.seeds", "0,1", "--sweep.cycles", "1", arm="plain")
    assert plain[0].key == base[0].key and differs(identity(base[0]), identity(plain[0])) == "arm"
    found = run(base + plain, dataset, tmp_path / "sweep")[0]
    assert [pair["group"] for pair in found["pairs"]].count("base~plain/arm") == 2
