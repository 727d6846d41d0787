"""Completion records as a finished cycle leaves them, for tests that look at a few of their fields."""

from __future__ import annotations

from typing import Any

from dmsae_ray.distill.record import CycleRecord

PREFIX = {
    "name": "0",
    "latents": 8,
    "l0": 4.0,
    "fvu": 0.5,
    "fvu_all_rows": 0.5,
    "loss": 3.5,
    "loss_recovered_zero": 0.9,
    "loss_recovered_mean": 0.8,
    "kl": 0.1,
}


def cycle_record(**given: Any) -> dict[str, Any]:
    """What record.json holds, with these fields as given."""
    core_in, core_out = given.get("core_in", 0), given.get("core_out", 5)
    values = {
        "chain": "0123456789ab",
        "label": "seed0-k4",
        "cycle": 0,
        "generation": 1,
        "seed": 0,
        "k": 4,
        "core_in": core_in,
        "core_out": core_out,
        "kept": min(core_in, core_out),
        "entered": max(core_out - core_in, 0),
        "left": max(core_in - core_out, 0),
        "decoder_drift": None,
        "jaccard": None,
        "origins": {"0": core_out},
        "steps": 4,
        "tokens": 2048,
        "resumes": [],
        "workers": 1,
        "parallel": "ddp",
        "micro_batch": None,
        "lockstep": 1,
        "data_digest": "0123456789abcdef",
        "rows_dropped": 0,
        "tokens_per_s": 1000.0,
        "data_wait_share": 0.1,
        "first_batch_s": 0.1,
        "theta_training": 0.4,
        "theta": 0.5,
        "l0": 4.0,
        "core_l0": 1.0,
        "free_l0": 3.0,
        "fvu": 0.5,
        "fvu_all_rows": 0.5,
        "dead_share": 0.0,
        "loss_clean": 3.0,
        "loss_zero": 8.0,
        "loss_mean": 7.0,
        "loss_spliced": 3.5,
        "loss_recovered_zero": 0.9,
        "loss_recovered_mean": 0.8,
        "kl": 0.1,
        "core_explained": None,
        "prefixes": [PREFIX],
        "evaluation_tokens": 1000,
        "rows_left_out": 0,
        "standard_errors": {"fvu": 0.01, "kl": 0.02, "loss_recovered_zero": 0.003, "loss_recovered_mean": 0.004},
        "core_share": 0.5,
        "coverage": 0.9,
        "selection": {"by": "attribution", "size": "tau", "candidates": 8},
        "seconds": {"train": 1.0, "evaluate": 1.0, "attribute": 1.0, "total": 3.0},
        "attribution": {"tokens": 1000, "shards": 3, "workers": 1, "resent": 0},
        "finished_at": 1_790_000_000.0,
    }
    return CycleRecord(**(values | given)).to_json()
