"""What is told of a sweep to whoever watches the cluster, and that the shipped panels ask for nothing else."""

from __future__ import annotations

import re

import pytest
import ray.util.metrics
from panels import METRIC, asked_metrics, queries

from dmsae_ray.cluster import metrics
from dmsae_ray.cluster.metrics import GAUGES, ChainMetrics, StepMetrics
from dmsae_ray.held_up import HeldUp
from dmsae_ray.store import Store, StoreError

OF_RAY = {"ray_object_store_used_memory", "ray_object_store_available_memory", "ray_object_store_num_local_objects"}
"""Its own, seen at an endpoint in tests/pipeline/test_job.py."""


@pytest.fixture
def told(monkeypatch) -> dict:
    """(name, tags in order) -> the last value."""
    found: dict = {}

    def record(self, value, tags):
        self._validate_tags(tags)
        found[self._name, *(tags[key] for key in self._tag_keys)] = value

    monkeypatch.setattr(ray.util.metrics.Gauge, "set", record)
    return found


def test_the_panels_ask_for_every_metric_of_ours_and_by_tags_that_it_has():
    ours = {f"ray_{name}" for name in GAUGES}
    assert asked_metrics() == ours | OF_RAY
    for query in queries():
        tags = [set(GAUGES[name.removeprefix("ray_")][1]) for name in METRIC.findall(query) if name in ours]
        asked = set(re.findall(r"(\w+)=~", query))
        for group in re.findall(r"by \((.*?)\)", query):
            asked |= set(group.split(", "))
        assert all(asked <= some for some in tags), query


def test_a_step_s_time_is_that_since_the_last_log_step(told):
    steps = StepMetrics("mine", "seed0-k8", 1)
    steps.begin(8, 100.0)
    steps.log(9, 103.0, 2.0)
    assert told == {
        ("dmsae_step_seconds", "mine", "seed0-k8", "1"): 3.0,
        ("dmsae_data_wait_seconds", "mine", "seed0-k8", "1"): 2.0,
    }
    steps.log(13, 105.0, 3.0)
    assert set(told.values()) == {0.5, 0.25}
    steps.end()
    assert set(told.values()) == {0.0}


def test_a_phase_that_is_over_has_no_rate(told):
    chain = ChainMetrics("mine", "seed0-k8")
    chain.at("train", 0.5, 100.0)
    chain.at("evaluate", 0.9, 20.0)
    name = "dmsae_tokens_per_second", "mine", "seed0-k8"
    assert told == {("dmsae_chain_fraction", "mine", "seed0-k8"): 0.9, (*name, "train"): 0.0, (*name, "evaluate"): 20.0}
    chain.at("done", 1.0, None)
    assert told[*name, "evaluate"] == 0.0 and (*name, "done") not in told


def test_every_phase_is_told_of_also_one_without_chains(told):
    metrics.tell_phases("mine", ("train", "done"), ["train", "train"])
    assert told == {("dmsae_chains", "mine", "train"): 2, ("dmsae_chains", "mine", "done"): 0}


def test_a_request_that_a_server_holds_up_is_told_of_until_it_is_over(monkeypatch, tmp_path):
    held_up, counts = HeldUp(), []
    monkeypatch.setattr("dmsae_ray.store.REQUESTS", held_up)
    monkeypatch.setattr("dmsae_ray.store.FIRST_WAIT_S", 0.0)
    held_up.tell(counts.append)
    closed = Store("s3://bucket/x?endpoint_override=127.0.0.1:1&scheme=http&allow_delayed_open=true", attempts=3)
    answers = iter([OSError("503"), OSError("503"), 5])

    def ask():
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert closed._again("x", ask) == 5
    assert counts == [0, 1, 0]
    with pytest.raises(StoreError):
        closed._again("x", lambda: (_ for _ in ()).throw(OSError("503")))
    assert counts == [0, 1, 0, 1, 0]
