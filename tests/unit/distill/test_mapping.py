"""Every field of the configuration that training and attribution are made of arrives where it is used."""

from __future__ import annotations

from dataclasses import asdict, fields

import pytest

from dmsae_ray.activations.stream import StreamLimits
from dmsae_ray.attribution.gradients import AttributionSettings
from dmsae_ray.attribution.scores import ScoreSettings
from dmsae_ray.config import AttributionConfig, ClusterConfig, Config, SAEConfig, TrainConfig
from dmsae_ray.distill.mapping import sae_settings, score_settings, stream_limits
from dmsae_ray.sae.settings import SAESettings

ELSEWHERE = {
    "sae": {"core": "the chain's start"},
    "train": {
        "tokens": "steps",
        "betas": "beta1 and beta2",
        "lanes": "the order of data",
        "threads": "the worker",
        "checkpoint_steps": "when to write",
        "log_steps": "when to write",
        "warmup_share": "lengths",
        "decay_share": "lengths",
        "dead_window_share": "lengths",
    },
    "attribution": {"tokens": "the cycle", "sequences_per_shard": "the cycle", "outlier_norm": "max_norm"},
}
"""What no settings have by that name, and where it goes."""


@pytest.mark.parametrize(
    "section, model, targets",
    [
        ("sae", SAEConfig, (SAESettings,)),
        ("train", TrainConfig, (SAESettings,)),
        ("attribution", AttributionConfig, (AttributionSettings, ScoreSettings)),
    ],
)
def test_no_field_is_left_over(section, model, targets):
    taken = {field.name for target in targets for field in fields(target)}
    assert set(model.model_fields) - taken == set(ELSEWHERE[section])


def test_values_arrive_under_their_names():
    config = Config(
        sae={"width": 320, "core_gate": "relu", "core_budget": "exempt", "auxk_alpha": 0.5},
        train={
            "batch": 64,
            "tokens": 6400,
            "lr": 0.01,
            "betas": [0.8, 0.7],
            "clip": 2.0,
            "micro_batch": 16,
            "lanes": 2,
        },
        attribution={"aggregator": "quantile", "quantile": 0.8, "tau": 0.6, "until_jaccard": 0.9},
        cluster={"object_store_mb": 700, "read_tasks": 3, "fetch_ahead": 5},
    )
    found = asdict(sae_settings(config, 7, 24))
    given = config.sae.model_dump() | config.train.model_dump()
    worked_out = {"warmup_steps": 5, "dead_window_tokens": 640, "decay_steps": 20, "total_steps": 100}
    for name, value in ({"k": 7, "d": 24, "beta1": 0.8, "beta2": 0.7} | worked_out).items():
        assert found.pop(name) == value, name
    assert found.pop("prefix_seed") == 0, "the chain's cycle decides it"
    for name, value in found.items():
        assert name == "threshold_start_step" or value == given[name], name
    assert score_settings(config) == ScoreSettings("quantile", 0.8, 0.6, 0.9)
    assert stream_limits(config) == StreamLimits(700, 3, 5)
    assert {field.name for field in fields(StreamLimits)} <= set(ClusterConfig.model_fields)
