"""The parts of a sweep's results stand alone: what cannot be made is said, the rest is there, and only that is made
again.
"""

from __future__ import annotations

import json

import pytest
from shards import make_dataset
from test_comparison import COMPARE, chains

from dmsae_ray.driver.results import write_results
from dmsae_ray.files import file_sha256, write_json
from dmsae_ray.lock import Superseded
from dmsae_ray.results.features.task import features_key
from dmsae_ray.results.parts import Parts, reason_of
from dmsae_ray.show.terminal.tables import plain_text

METRICS = {
    "l0": 4.0,
    "core_l0": 1.0,
    "free_l0": 3.0,
    "fvu": 0.5,
    "kl": 0.1,
    "loss_recovered_zero": 0.9,
    "dead_share": 0.0,
}


@pytest.fixture
def sweep(tmp_path):
    """Finished chains on disk, their dataset and a results folder."""
    dataset = make_dataset(tmp_path / "d", shards=6)
    plans = chains(dataset, tmp_path / "out", "--sweep.seeds", "0,1,2", "--sweep.k", "4")
    for plan in plans:
        for cycle, record in enumerate(plan.folder.records()):
            more = {
                "origins": {"0": record.core_out},
                "jaccard": 1.0 if cycle else None,
                "coverage": 0.9,
                "prefixes": [],
            }
            write_json(plan.folder.cycle(cycle).record, record.to_json() | METRICS | more)
    folder = tmp_path / "sweep"
    folder.mkdir()
    return plans, dataset, folder


def no_cluster():
    raise ValueError("the Ray cluster is too small for one chain")


def made(sweep, connect=no_cluster):
    plans, dataset, folder = sweep
    said: list[str] = []
    config = plans[0].config.model_copy(update={"compare": COMPARE})
    return write_results(config, dataset, plans, folder, said.append, connect), said


def failed_parts(folder) -> dict[str, str]:
    path = folder / "failed_parts.json"
    return {part["part"]: part["reason"] for part in json.loads(path.read_text())} if path.exists() else {}


def know_features(sweep) -> dict:
    """features.json as a run with Ray would have left it."""
    plans, dataset, folder = sweep
    consensus = json.loads((folder / "consensus.json").read_text())
    from dmsae_ray.identity import fields_key

    cores = {plan.label: file_sha256(plan.folder.cycle(1).core) for plan in plans}
    known = {
        "key": features_key(plans[0].config.features, dataset.manifest.key, cores, fields_key(consensus)),
        "features": [],
        "tokens": 0,
        "left_out": 0,
    }
    write_json(folder / "features.json", known)
    return known


def test_without_features_all_else_is_there_and_only_they_are_made_again(sweep):
    plans, dataset, folder = sweep
    results, said = made(sweep)
    assert failed_parts(folder) == results.failed == {"features": "the Ray cluster is too small for one chain"}
    for name in (
        "evaluation.json",
        "comparison.json",
        "consensus.json",
        "numbers.json",
        "expectations.json",
        "consistency.png",
        "report.html",
    ):
        assert (folder / name).exists(), name
    assert len(results.comparison["pairs"]) == 3 and results.numbers["chains.base"] == 3
    text = (folder / "report.txt").read_text()
    assert "too small for one chain" in (folder / "report.html").read_text()
    assert text == plain_text(results.tables) and "features: the Ray cluster is too small" in text and "PW-MCC" in text
    assert "features: NOT MADE: the Ray cluster is too small for one chain" in said

    know_features(sweep)
    results, said = made(sweep)
    assert results.failed == {} and not (folder / "failed_parts.json").exists() and said == [], (
        "nothing is computed twice"
    )
    assert "could not be made" not in (folder / "report.txt").read_text()


def test_features_of_other_settings_do_not_pass_for_these_and_are_not_lost(sweep):
    plans, dataset, folder = sweep
    made(sweep)
    known = know_features(sweep)
    longer = [
        plan.config.model_copy(update={"features": plan.config.features.model_copy(update={"most": 7})})
        for plan in plans
    ]
    others = [type(plan)(**vars(plan) | {"config": config}) for plan, config in zip(plans, longer, strict=True)]
    results, _ = made((others, dataset, folder))
    assert list(results.failed) == ["features"] and not (folder / "features.json").exists()
    results, said = made(sweep)
    assert results.failed == {} and json.loads((folder / "features.json").read_text()) == known, (
        "those of before, where they fit again"
    )


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
    ],
)
def test_a_damaged_sae_of_one_chain_leaves_the_others_their_results(sweep, harm):
    plans, dataset, folder = sweep
    sae = plans[1].folder.cycle(1).sae
    whole = sae.read_bytes()
    harm(sae)
    results, _ = made(sweep)
    assert {"comparison", "features"} <= set(failed_parts(folder)) and "consensus" not in results.failed
    for words in (plans[1].label, str(plans[1].folder.path), "delete this cycle's folder"):
        assert words in results.failed["comparison"]
    assert results.comparison["chains"] == [plans[0].label, plans[2].label] and len(results.comparison["pairs"]) == 1
    assert [row["chain"] for row in results.evaluation] == [plan.label for plan in plans for _ in range(2)]
    sae.write_bytes(whole)
    results, _ = made(sweep)
    assert list(results.failed) == ["features"] and len(results.comparison["pairs"]) == 3


def test_a_damaged_core_takes_with_it_what_needs_it(sweep):
    plans, dataset, folder = sweep
    plans[0].folder.cycle(1).core.write_bytes(b"not a core")
    results, _ = made(sweep)
    assert {"comparison", "consensus", "features"} <= set(results.failed)
    assert results.failed["features"] == "not begun: it needs consensus, which could not be made"
    assert (folder / "report.txt").exists() and results.numbers["evaluation.base.k4.fvu"] == 0.5


def test_files_of_before_that_are_damaged_are_made_again(sweep):
    plans, dataset, folder = sweep
    first, _ = made(sweep)
    for path in (
        folder / "comparison.json",
        folder / "consensus.json",
        *(plans[0].config.home / "pairs").glob("*.json"),
    ):
        path.write_text("{")
    again, said = made(sweep)
    assert list(again.failed) == ["features"] and sum("damaged" in line for line in said) == 5
    for one in (first, again):
        one.comparison.pop("seconds_per_pair")
    assert again.comparison == first.comparison and again.consensus == first.consensus


def test_another_driver_and_an_interruption_are_no_failures_of_a_part(tmp_path):
    for error in (Superseded("another"), KeyboardInterrupt()):
        parts = Parts(tmp_path, lambda line: None)
        with pytest.raises(type(error)):
            parts.make("features", lambda error=error: (_ for _ in ()).throw(error))
        assert parts.reasons == {}


def test_a_reason_has_no_wrapping_of_ray_and_no_secret():
    from ray.exceptions import RayTaskError

    inner = RuntimeError("CUDA out of memory at s3://k:hunter2@b/p\nmore")
    wrapped = RayTaskError("f", "Traceback of it all", inner)
    assert reason_of(wrapped) == "RuntimeError: CUDA out of memory at s3://***@b/p"
    ours = ValueError("a sentence")
    ours.__cause__ = ConnectionRefusedError(111, "refused")
    assert (
        reason_of(RayTaskError("f", "Traceback", ours)) == reason_of(ours) == "a sentence"
        and reason_of(KeyError()) == "KeyError: no reason given"
    )
