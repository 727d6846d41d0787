"""A study's arms: further chains, planned, named and keyed; and what may not be asked for."""

from __future__ import annotations

import json

import pytest
import torch

from dmsae_ray.config import Config
from dmsae_ray.core.core import Core
from dmsae_ray.distill.grid import check_start, plan_all
from dmsae_ray.distill.plan import BASE
from dmsae_ray.driver.options import SweepCommand, load

STUDY = """
name: study
harvest: {tokens: 655_360}
sweep: {seeds: [0, 1], k: [16, 32], cycles: 3, parts: 2}
study:
  arms:
    random: {fields: {selection.by: random, selection.size: match}, seeds: [0], k: [16]}
    disjoint: {fields: {sweep.data: disjoint}, k: [16]}
    order: {fields: {sweep.data_seed: 7}, seeds: [0], k: [16]}
    plain: {cycles: 1, seeds: [100]}
    plain-long: {fields: {train.tokens: 983_040}, cycles: 1, seeds: [100], k: [16]}
    transfer: {core: distilled, cycles: 1, k: [16, 64]}
"""


def config_of(tmp_path, text=STUDY, *argv) -> Config:
    (tmp_path / "study.yaml").write_text(text)
    command = load(SweepCommand, ["--config", str(tmp_path / "study.yaml"), "--output", str(tmp_path / "out"), *argv])
    return Config(**command.section_dict())


def plans_of(tmp_path, text=STUDY, *argv):
    return {plan.label: plan for plan in plan_all(config_of(tmp_path, text, *argv), "data", "key")}


def test_every_arm_adds_its_chains_after_the_grid(tmp_path):
    plans = plans_of(tmp_path)
    assert list(plans) == [
        "seed0-k16",
        "seed1-k16",
        "seed0-k32",
        "seed1-k32",
        "seed0-k16-random",
        "seed0-k16-disjoint",
        "seed1-k16-disjoint",
        "seed0-k16-order",
        "seed100-k16-plain",
        "seed100-k32-plain",
        "seed100-k16-plain-long",
        "seed0-k64-transfer-from-k16",
        "seed1-k64-transfer-from-k16",
        "seed0-k16-transfer-from-k32",
        "seed0-k64-transfer-from-k32",
        "seed1-k16-transfer-from-k32",
        "seed1-k64-transfer-from-k32",
    ]
    assert len({plan.key for plan in plans.values()}) == len(plans), "no two chains in one folder"
    assert {label: plan.stage for label, plan in plans.items() if plan.arm != BASE and plan.stage != "distill"} == {
        label: "transfer" if "transfer" in label else "plain"
        for label in plans
        if "transfer" in label or "plain" in label
    }
    assert [plans[label].cycles for label in ("seed0-k16", "seed0-k16-random", "seed100-k16-plain")] == [3, 3, 1]
    assert plans["seed100-k16-plain-long"].steps == 3 * plans["seed100-k16-plain"].steps


def test_a_whole_chains_tokens_are_those_of_all_its_cycles(tmp_path):
    long = "seed100-k16-plain-long"
    words = plans_of(tmp_path, STUDY.replace("983_040", "whole_chain"))
    assert words[long].key == plans_of(tmp_path)[long].key, "the number by another name: the same chain"
    # Rows that fill no batch are dropped in every cycle of the grid's chains.
    uneven = plans_of(tmp_path, STUDY.replace("983_040", "whole_chain"), "--train.tokens", str(327_680 + 100))
    assert uneven[long].steps == 3 * uneven["seed0-k16"].steps
    with pytest.raises(ValueError, match="study.arms.plain-long: train.tokens: .*whole_life"):
        plans_of(tmp_path, STUDY.replace("983_040", "whole_life"))


def test_the_grid_is_what_it_is_without_a_study(tmp_path):
    alone = plans_of(tmp_path, STUDY.split("study:")[0])
    beside = plans_of(tmp_path)
    assert {label: plan.key for label, plan in alone.items()} == {label: beside[label].key for label in alone}


def test_an_arm_is_the_same_chain_as_the_command_with_its_fields(tmp_path):
    arm = plans_of(tmp_path)["seed0-k16-random"]
    alone = plans_of(tmp_path, STUDY.split("study:")[0], "--selection.by", "random", "--selection.size", "match")
    assert arm.key == alone["seed0-k16-random"].key, "a control that was run alone is not run again"


def test_all_arms_read_one_dataset_of_as_many_parts(tmp_path):
    plans = plans_of(tmp_path)
    assert {plan.config.sweep.n_parts for plan in plans.values()} == {2}
    assert {label: plan.part for label, plan in plans.items() if plan.part is not None} == {
        "seed0-k16-disjoint": 0,
        "seed1-k16-disjoint": 1,
    }
    shared = STUDY.replace(", parts: 2}", ", data: disjoint}").replace("sweep.data: disjoint", "sweep.data: shared")
    parts = {label: plan.part for label, plan in plans_of(tmp_path, shared.replace("[100]", "[100, 101]")).items()}
    assert parts["seed0-k16"] == 0 and parts["seed1-k32"] == 1 and parts["seed101-k16-plain"] == 1
    assert parts["seed0-k16-disjoint"] is None, "the name of the arm is only a name: it reads all parts"


def test_what_a_chain_needs_is_what_must_be_finished_before_it(tmp_path):
    plans = plans_of(tmp_path)
    needs = {label: [chain.label for chain in plan.needs()] for label, plan in plans.items() if plan.needs()}
    assert needs.pop("seed0-k16-random") == ["seed0-k16"]
    assert needs == {
        label: [f"{label.split('-')[0]}-{label.split('from-')[1]}"] for label in plans if "transfer" in label
    }


def test_a_transfer_draws_what_its_source_never_drew(tmp_path):
    plans = plans_of(tmp_path)
    source, transfer = plans["seed0-k16"], plans["seed0-k64-transfer-from-k16"]
    assert transfer.start.path == source.folder.cycle(2).core and transfer.number(0) == 3
    assert transfer.init_seed(0) not in {source.init_seed(cycle) for cycle in range(source.cycles)}
    assert transfer.fields["start"] == {"chain": source.key, "cycle": 2} and "start" not in source.fields
    longer = plans_of(tmp_path, STUDY.replace("cycles: 3", "cycles: 4"))
    assert longer["seed0-k16"].key == source.key != longer["seed0-k64-transfer-from-k16"].key


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("selection.by: random", "selection.by: best", "study.arms.random: selection.by: Input should be"),
        (
            "sweep.data: disjoint",
            "model.context: 64",
            "model.context cannot differ in an arm: chains are compared on the same data",
        ),
        ("sweep.data: disjoint", "sweep.cycles: 2", "sweep.cycles cannot differ in an arm"),
        ("sweep.data: disjoint", "sae.depth: 2", "study.arms.disjoint: sae.depth: no such field"),
        ("sweep.data: disjoint", "sweep.parts: 3", "sweep.parts cannot differ in an arm"),
        (
            ", parts: 2}",
            "}",
            "study.arms.disjoint: sweep.data disjoint: documents are dealt to parts when they are harvested, for all "
            "arms: set sweep.parts to 2",
        ),
        ("    plain:", "    base:", "an arm cannot be called base"),
        ("    plain:", "    Plain Ones:", "study.arms"),
        ("core: distilled", "core: all", "study.arms.transfer.core"),
    ],
)
def test_an_arm_that_cannot_be_is_refused_by_name(tmp_path, old, new, said):
    assert old in STUDY
    with pytest.raises(ValueError) as error:
        config_of(tmp_path, STUDY.replace(old, new))
    assert said in str(error.value)


@pytest.mark.parametrize(
    "expect, said",
    [
        (
            "value: agreement.base.seed, above: 0",
            "results begin with chains, evaluation, consistency, consensus, rediscovery",
        ),
        ("value: evaluation.randm.k16.fvu, above: 0", "no arm 'randm'; there are base, disjoint"),
        ("value: consistency.base.seed.pw_mcc, above: consistency.bse.seed.pw_mcc", "no arm 'bse'"),
        ("value: consistency.base.seed.pw_mcc", "names no bound: set above, below or both"),
    ],
)
def test_an_expectation_of_nothing_is_refused_before_the_run(tmp_path, expect, said):
    with pytest.raises(ValueError) as error:
        config_of(tmp_path, STUDY + f"  expect:\n  - {{claim: cores agree, {expect}}}\n")
    assert said in str(error.value)
    assert config_of(
        tmp_path, STUDY + "  expect:\n  - {claim: x, value: consistency.base~random.arm.pw_mcc, below: 1}\n"
    ).study.expect


# -- a core file to start from
# -------------------------------------------------------------------------------------------


def core_file(path, d=8, scale=2.0, cycle=2):
    torch.manual_seed(0)
    W = torch.randn(3, d)
    core = Core(
        W_enc_CD=W,
        W_dec_CD=W / W.norm(dim=1, keepdim=True),
        b_enc_C=torch.zeros(3),
        b_dec_D=torch.zeros(d),
        scores_C=torch.ones(3),
        density_C=torch.full((3,), 0.1),
        latent_ids_C=torch.arange(3),
        theta=0.1,
        scale=scale,
        hook="blocks.1.hook_resid_post",
        model="m",
        cycle=cycle,
        seed=0,
        k=4,
        entered_C=torch.full((3,), cycle),
        selected=((cycle,),) * 3,
    )
    core.save(path)
    return path


class Fits:
    model_fingerprint, hook, d, scale = "m", "blocks.1.hook_resid_post", 8, 2.0


def test_a_chain_starts_from_a_core_file_under_a_key_of_its_content(tmp_path):
    text, path = STUDY.split("study:")[0], core_file(tmp_path / "core.safetensors")
    plans = plans_of(tmp_path, text, "--sae.core", str(path))
    plan, plain = plans["seed0-k16"], plans_of(tmp_path, text)["seed0-k16"]
    assert plan.start.path == path and plan.number(0) == 3 and plan.key != plain.key and plan.stage == "distill"
    moved = core_file(tmp_path / "elsewhere.safetensors")
    assert plans_of(tmp_path, text, "--sae.core", str(moved))["seed0-k16"].key == plan.key, (
        "where it lies decides nothing"
    )
    assert json.loads(json.dumps(plan.fields)) == plan.fields
    check_start(path, Fits)


@pytest.mark.parametrize(
    "field, value", [("d", 9), ("hook", "blocks.2.hook_resid_post"), ("scale", 2.1), ("model_fingerprint", "n")]
)
def test_a_core_of_other_activations_is_refused_before_the_run(tmp_path, field, value):
    path = core_file(tmp_path / "core.safetensors")
    with pytest.raises(ValueError, match=r"sae.core .*core.safetensors: made with .* leave sae.core empty"):
        check_start(path, type("Other", (Fits,), {field: value}))


def test_a_core_file_beside_a_study_or_missing_is_refused(tmp_path):
    path = core_file(tmp_path / "core.safetensors")
    with pytest.raises(ValueError, match="sae.core and study.arms are both given"):
        config_of(tmp_path, STUDY, "--sae.core", str(path))
    with pytest.raises(ValueError, match="no such core file"):
        plans_of(tmp_path, STUDY.split("study:")[0], "--sae.core", str(tmp_path / "none"))
