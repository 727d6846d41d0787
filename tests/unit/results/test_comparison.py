"""From chains' folders to comparison.json: real files of small random SAEs."""

from __future__ import annotations

import gc
import json
from collections import Counter
from dataclasses import replace
from weakref import WeakSet

import pytest
import torch
from plans import plans_of
from records import cycle_record
from shards import D, make_dataset

from dmsae_ray.config import CompareConfig
from dmsae_ray.core.core import Core
from dmsae_ray.core.next_core import next_core
from dmsae_ray.core.score_file import save_scores
from dmsae_ray.distill.mapping import sae_settings
from dmsae_ray.files import write_json
from dmsae_ray.results import comparison
from dmsae_ray.results.comparison import compare_across, compare_chains, identity
from dmsae_ray.results.consensus import write_consensus
from dmsae_ray.sae.sae import MatryoshkaSAE

WIDTH, CANDIDATES = 48, 12
COMPARE = CompareConfig(draws=100)


def write_chain(plan, dataset, cycles=2):
    """A chain's folder as training leaves it: random SAEs, cores of six that stay."""
    core = None
    for cycle in range(cycles):
        generator = torch.Generator().manual_seed(plan.init_seed(cycle) % 2**31 + plan.k)
        size = 0 if core is None else core.size
        sae = MatryoshkaSAE.init(
            sae_settings(plan.config, plan.k, D), None if core is None else core.W_enc_CD, plan.init_seed(cycle)
        )
        density_F = torch.rand(WIDTH, generator=generator) * 0.2 + 0.1
        scores_N = torch.rand(CANDIDATES, generator=generator, dtype=torch.float64)
        folder = plan.folder.cycle(cycle)
        folder.path.mkdir(parents=True)
        sae.save(folder.sae, {"density": density_F})
        save_scores(folder.scores, scores_N)
        ids_C = torch.arange(6) if size else scores_N.topk(6).indices.sort().values
        manifest = dataset.manifest
        core = next_core(
            core,
            sae,
            ids_C,
            scores_N,
            density_F,
            cycle=cycle,
            seed=plan.seed,
            k=plan.k,
            scale=manifest.scale,
            hook=manifest.hook,
            model=manifest.model_fingerprint,
        )
        core.save(folder.core)
        write_json(folder.record, cycle_record(cycle=cycle, core_in=size, core_out=core.size))


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "d", shards=6)


def chains(dataset, home, *argv, arm="base", write=True):
    fixed = (
        "--output",
        str(home),
        "--sweep.cycles",
        "2",
        "--sae.width",
        str(WIDTH),
        "--sae.prefix_fractions",
        "0.25,0.25",
    )
    plans = [replace(plan, arm=arm) for plan in plans_of(dataset, *fixed, *argv)]
    for plan in plans if write else []:
        if not plan.finished():
            write_chain(plan, dataset)
    return plans


def run(plans, dataset, folder, compare=COMPARE):
    said = []
    folder.mkdir(exist_ok=True)
    config = plans[0].config.model_copy(update={"compare": compare})
    found = compare_chains(config, dataset, plans, folder, said.append)
    assert json.loads((folder / "comparison.json").read_text()) == json.loads(json.dumps(found, allow_nan=False))
    return found, said


def test_a_study_with_two_arms(tmp_path, dataset):
    base = chains(dataset, tmp_path / "out", "--sweep.seeds", "0,1", "--sweep.k", "4,8")
    control = ("--selection.by", "random", "--selection.size", "0.5")
    placebo = chains(dataset, tmp_path / "out", "--sweep.seeds", "0,1", "--sweep.k", "4", *control, arm="random")
    order = chains(dataset, tmp_path / "out", "--sweep.seeds", "0", "--sweep.data_seed", "7", arm="order", write=False)
    found, said = run(base + placebo + order, dataset, tmp_path / "sweep")
    assert said == ["compare: 9 pairs of cores, 100 draws of each null"]
    assert Counter(pair["group"] for pair in found["pairs"]) == {
        "base/seed": 2,
        "base/k": 2,
        "base/both": 2,
        "random/seed": 1,
        "base~random/arm": 2,
    }
    assert found["arms"] == {plan.label: plan.arm for plan in base + placebo} and found["chains"] == list(found["arms"])
    assert found["failed"] == [{"label": order[0].label, "reason": "not finished"}]
    assert found["seconds_per_pair"] > 0 and found["sample"] is None
    group = found["summary"]["groups"]["base/seed"]
    assert (group["pairs"], group["of"], group["pw_mcc"]["n"], group["pw_mcc"]["interval"]) == (2, 2, 2, None)
    for pair in found["pairs"]:
        assert pair["activation_rows"] == 32 and pair["nulls"]["covariance"]["draws"] == 100


def test_the_fields_that_identify_a_chain(tmp_path, dataset):
    (plain,) = chains(dataset, tmp_path, "--sweep.seeds", "1", write=False)
    (order,) = chains(dataset, tmp_path, "--sweep.seeds", "1", "--sweep.data_seed", "7", write=False)
    disjoint = chains(dataset, tmp_path, "--sweep.seeds", "0,1", "--sweep.data", "disjoint", write=False)[1]
    relu = chains(dataset, tmp_path, "--sweep.seeds", "1", "--sae.core_gate", "relu", write=False)[0]
    assert identity(plain).rest == identity(order).rest == identity(disjoint).rest != identity(relu).rest
    assert (identity(order).data_seed, identity(disjoint).part, identity(plain).part) == (7, (1, 2), None)


def without(tree, name):
    return {other: value for other, value in tree.items() if other != name}


def test_what_was_compared_is_not_compared_again(tmp_path, dataset, monkeypatch):
    two = chains(dataset, tmp_path / "out", "--sweep.seeds", "0,1")
    first, said = run(two, dataset, tmp_path / "sweep")
    assert said and len(first["pairs"]) == 1
    # The same again: the file. One seed more, in a new folder: its own two pairs only, and the old result under the new
    # labels.
    assert run(two, dataset, tmp_path / "sweep") == (first, [])
    three = chains(dataset, tmp_path / "out", "--sweep.seeds", "0,1,2")
    more, said = run([replace(plan, arm="plain") for plan in three], dataset, tmp_path / "next")
    assert said == ["compare: 2 pairs of cores, 100 draws of each null, 1 more are known"]
    changed = {"a", "b", "arm_a", "arm_b", "group"}
    # Which plain SAEs a pair is read against depends on the study that it stands in, and is no part of what is kept.
    before, after = (
        {**found["pairs"][0], **dict.fromkeys(changed, 0)}
        | {nulls: without(found["pairs"][0][nulls], "matched_compute") for nulls in ("nulls", "dictionary_nulls")}
        for found in (first, more)
    )
    assert before == after
    assert (more["pairs"][0]["a"], more["pairs"][0]["b"]) == (three[0].label + "-plain", three[1].label + "-plain")
    assert more["pairs"][0]["group"] == "plain/seed" and more["seconds_per_pair"] > 0
    # All known: rows and SAEs are not read.
    monkeypatch.setattr(type(dataset), "calibration_rows", None)
    again, said = run(three, dataset, tmp_path / "third")
    assert said == [] and len(again["pairs"]) == 3
    monkeypatch.undo()
    # Other settings, other numbers.
    other, said = run(two, dataset, tmp_path / "sweep", CompareConfig(draws=100, seed=1))
    assert said and other["pairs"][0]["nulls"]["covariance"]["mean"] != first["pairs"][0]["nulls"]["covariance"]["mean"]
    assert other["pairs"][0]["pw_mcc"] == first["pairs"][0]["pw_mcc"]


def test_a_comparison_that_was_stopped_goes_on(tmp_path, dataset, monkeypatch):
    plans = chains(dataset, tmp_path / "out", "--sweep.seeds", "0,1,2")
    calls, real = [], comparison.Comparer.pair

    def stop_at_the_second(self, a, b):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, a, b)

    monkeypatch.setattr(comparison.Comparer, "pair", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(plans, dataset, tmp_path / "sweep")
    monkeypatch.undo()
    found, said = run(plans, dataset, tmp_path / "sweep")
    assert said == ["compare: 2 pairs of cores, 100 draws of each null, 1 more are known"] and len(found["pairs"]) == 3


def test_a_sample_says_of_how_many(tmp_path, dataset):
    plans = chains(dataset, tmp_path / "out", "--sweep.seeds", "0,1,2,3")
    found, _ = run(plans, dataset, tmp_path / "sweep", CompareConfig(draws=100, pairs="sample", sample=2))
    group = found["summary"]["groups"]["base/seed"]
    assert (len(found["pairs"]), group["pairs"], group["of"], found["sample"]) == (2, 2, 6, 2)


def test_the_last_cycle_is_the_plans_own_and_few_chains_stay_in_memory(tmp_path, dataset, monkeypatch):
    plans = chains(dataset, tmp_path / "out", "--sweep.seeds", "0,1,2")
    shorter = [
        replace(
            plan, config=plan.config.model_copy(update={"sweep": plan.config.sweep.model_copy(update={"cycles": 1})})
        )
        for plan in plans
    ]
    monkeypatch.setattr(comparison, "KEPT_BYTES", 0)
    loaded, real = [], comparison.chain_result
    monkeypatch.setattr(comparison, "chain_result", lambda plan, label: loaded.append(plan.seed) or real(plan, label))
    alive, most = WeakSet(), []

    def count(some):
        gc.collect()
        return len(some)

    side, pair = comparison.Comparer.side, comparison.Comparer.pair
    monkeypatch.setattr(comparison.Comparer, "side", lambda self, result: alive.add(result) or side(self, result))
    monkeypatch.setattr(comparison.Comparer, "pair", lambda self, a, b: most.append(count(alive)) or pair(self, a, b))
    found, _ = run(shorter, dataset, tmp_path / "sweep")
    assert loaded == [0, 1, 2, 1] and max(most) == 2, "two chains at a time"
    assert not any(pair["nulls"]["cycle0"]["available"] for pair in found["pairs"])


def test_a_long_comparison_says_how_far_it_is(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(comparison, "QUIET_S", 0.0)
    _, said = run(chains(dataset, tmp_path / "out", "--sweep.seeds", "0,1,2"), dataset, tmp_path / "sweep")
    assert [line.rsplit(",", 1)[0] for line in said[1:]] == ["compare: 1 of 3 pairs", "compare: 2 of 3 pairs"] and said[
        1
    ].endswith("s left")


@pytest.mark.parametrize("fields", [{"pairs": "sample"}, {"sample": 3}])
def test_a_sample_needs_its_size_and_a_size_its_sample(fields):
    with pytest.raises(ValueError, match="compare.pairs sample and compare.sample, .* go together"):
        CompareConfig(**fields)


def test_one_chain_needs_no_rows(tmp_path, dataset, monkeypatch):
    plans = chains(dataset, tmp_path / "out", "--sweep.seeds", "0")
    monkeypatch.setattr(type(dataset), "calibration_rows", None)
    found, said = run(plans, dataset, tmp_path / "sweep")
    assert found["pairs"] == [] and not said and found["seconds_per_pair"] is None and not found["summary"]["available"]


def test_two_sweeps(tmp_path, dataset):
    left = chains(dataset, tmp_path / "a", "--sweep.seeds", "0,1")
    right = chains(dataset, tmp_path / "b", "--sweep.seeds", "0,1", "--train.lr", "0.001")
    said = []
    config = left[0].config.model_copy(update={"compare": COMPARE})
    found = compare_across(config, dataset, left, right, ("a", "b"), tmp_path / "across.json", said.append)
    assert found["chains"] == ["a:seed0-k4", "a:seed1-k4", "b:seed0-k4", "b:seed1-k4"]
    assert [(pair["a"], pair["b"]) for pair in found["pairs"]] == [
        (f"a:seed{i}-k4", f"b:seed{j}-k4") for i in (0, 1) for j in (0, 1)
    ]
    assert {tuple(pair["differences"]) for pair in found["pairs"]} == {("rest",), ("seed", "data_seed", "rest")}
    # write_chain initialises by seed alone, so the two sweeps' chains of one seed hold the same SAEs.
    assert found["pairs"][0]["pw_mcc"] == pytest.approx(1) and found["pairs"][0]["activation"] == pytest.approx(
        1, abs=1e-6
    )
    own = compare_across(config, dataset, left, left, ("a", "same"), tmp_path / "own.json", said.append)
    assert [pair["group"] for pair in own["pairs"]] == ["base/seed", "base/seed"], "a chain is not compared with itself"
    with pytest.raises(ValueError, match="both sweeps are called a"):
        compare_across(config, dataset, left, right, ("a", "a"), tmp_path / "x.json", said.append)


def agree(plans, dataset):
    """Give the chains after the first the first one's last core, in their own SAE's place, so that there is a
    consensus.
    """
    source = MatryoshkaSAE.load(plans[0].folder.cycle(1).sae)[0]
    for plan in plans[1:]:
        folder = plan.folder.cycle(1)
        sae, stored = MatryoshkaSAE.load(folder.sae)
        core = Core.load(folder.core)
        with torch.no_grad():
            sae.encoder_rows()[:6], sae.W_dec[:6] = source.encoder_rows()[:6], source.W_dec[:6]
        sae.save(folder.sae, stored)
        replace(core, W_enc_CD=sae.encoder_rows()[:6], W_dec_CD=sae.W_dec[:6]).save(folder.core)
    return source


def test_consensus_and_rediscovery_from_folders(tmp_path, dataset):
    base = chains(dataset, tmp_path / "out", "--sweep.seeds", "0,1,2")
    plain = [
        *chains(
            dataset,
            tmp_path / "out",
            "--sweep.seeds",
            "0,5,6",
            "--sweep.cycles",
            "1",
            "--train.lr",
            "0.001",
            arm="plain",
        ),
        *chains(dataset, tmp_path / "out", "--sweep.seeds", "7", "--train.lr", "0.001", arm="transfer"),
    ]
    assert [plan.cycles for plan in plain] == [1, 1, 1, 2]
    source = agree(base, dataset)
    knows = plain[1].folder.cycle(0)
    sae, stored = MatryoshkaSAE.load(knows.sae)
    with torch.no_grad():
        sae.encoder_rows()[20:23], sae.W_dec[20:23] = source.encoder_rows()[:3], source.W_dec[:3]
    sae.save(knows.sae, stored)
    said = []
    config = base[0].config.model_copy(update={"compare": COMPARE})
    folder = tmp_path / "sweep"
    folder.mkdir()
    found = write_consensus(config, base, plain, folder, said.append)
    assert said == ["consensus: of 3 cores, looked for in 4 plain SAEs"]
    assert json.loads((folder / "consensus.json").read_text()) == json.loads(json.dumps(found, allow_nan=False))
    assert (found["arm"], found["core_size"], found["seeds"]) == ("base", 6, [0, 1, 2])
    assert [group["in_seeds"] for group in found["groups"]] == [3] * 6
    core = Core.load(folder / "consensus.safetensors")
    assert core.size == 6 and core.scale == dataset.manifest.scale
    assert [row["chain"] for row in found["rediscovery"]] == [plan.label for plan in plain[1:3]]
    assert found["rediscovery"][0]["consensus"]["found"] >= 0.5 > found["rediscovery"][1]["consensus"]["found"]
    assert [(one["chain"], one["reason"][:8]) for one in found["rediscovery_left_out"]] == [
        (plain[0].label, "has the "),
        (plain[3].label, "was trai"),
    ]
    assert found["rediscovery_summary"]["plain"]["consensus"]["found"]["n"] == 2
    for row in found["rediscovery"]:
        assert row["cycle0_consensus"]["size"] < row["consensus"]["size"] == 6, "hardly any of 18 random ones recurs"
        assert (
            "18 free latents as dense as the cores' members, of 3 seeds, none recurs" in row["free_consensus"]["reason"]
        )
        assert row["members"]["size"] == 18
    assert write_consensus(config, base, plain, folder, said.append) == found and len(said) == 1, "reused"
    # A chain that shares nothing with another leaves no consensus, and no file of an older one.
    alone = write_consensus(config, base[:1], [], folder, said.append)
    assert alone["core_size"] == 0 and not (folder / "consensus.safetensors").exists() and alone["rediscovery"] == []
    assert write_consensus(config, base[:1], [], folder, said.append) == alone and len(said) == 2
    nothing = write_consensus(config, [], plain, folder, said.append)
    assert nothing["groups"] == [] and nothing["arm"] is None
