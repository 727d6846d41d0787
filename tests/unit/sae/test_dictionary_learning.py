"""With an empty core our updates are those of dictionary-learning 0.1.0.

Theirs were recorded by jobs/peers/record_reference_step.py.
"""

import json
from pathlib import Path

import pytest
import torch
from reference_sae import ReferenceTrainer
from safetensors import safe_open

from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.settings import SAESettings
from dmsae_ray.sae.trainer import Trainer

RECORDED = Path(__file__).parents[2] / "data" / "dictionary_learning_updates.safetensors"
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def recorded(name):
    with safe_open(RECORDED, framework="pt") as file:
        configuration = json.loads(file.metadata()["configurations"])[name]
        tensors = {
            key.removeprefix(f"{name}."): file.get_tensor(key) for key in file.keys() if key.startswith(f"{name}.")
        }
    settings = SAESettings(
        d=configuration["d"],
        width=configuration["width"],
        k=configuration["k"],
        batch=configuration["batch"],
        prefix_fractions=tuple(configuration["fractions"][:-1]),
        lr=configuration["lr"],
        warmup_steps=configuration["warmup_steps"],
        total_steps=configuration["steps"],
        decay_steps=configuration["steps"] - configuration["decay_start"],
        dead_window_tokens=configuration["dead_window"],
        threshold_start_step=configuration["threshold_start_step"],
        threshold_beta=configuration["threshold_beta"],
    )
    return settings, tensors


@pytest.mark.parametrize("name", ["alive", "clipped", "many_dead", "few_positive"])
def test_updates_equal_the_recorded_ones(name):
    settings, tensors = recorded(name)
    sae = MatryoshkaSAE.init(settings, None, seed=0)
    with torch.no_grad():
        for parameter in NAMES:
            getattr(sae, parameter).copy_(tensors[f"before.{parameter}"])
    trainer = Trainer(sae, settings)
    beta, mean, total_weight, last = settings.threshold_beta, 0.0, 0.0, None
    for step, x_BD in enumerate(tensors["batches"]):
        report = trainer.step(x_BD, log=True)
        assert report.loss == pytest.approx(tensors["after.loss"][step].item(), rel=1e-6)
        assert torch.equal(trainer.silent_F, tensors["after.silent"][step])
        for parameter in NAMES:
            torch.testing.assert_close(
                getattr(sae, parameter),
                tensors[f"after.{parameter}"][step],
                rtol=0,
                atol=1e-6,
                msg=lambda text: f"{parameter} after update {step}: {text}",
            )
        # Theirs is the running mean from the first value on, ours is bias-corrected: same values, other weights.
        theirs = tensors["after.threshold"][step].item()
        if theirs >= 0:
            smallest = theirs if last is None else (theirs - beta * last) / (1 - beta)
            last = theirs
            mean, total_weight = beta * mean + smallest, beta * total_weight + 1
            assert report.threshold == pytest.approx(mean / total_weight, rel=2e-5, abs=1e-6)
        else:
            assert report.threshold == 0
    assert last is not None, "the recording reaches the steps in which the threshold runs"
    if name in ("many_dead", "few_positive"):
        assert report.loss_aux > 0
    if name == "clipped":
        assert report.grad_norm > 1


@pytest.mark.parametrize("name", ["alive", "clipped", "many_dead", "few_positive"])
def test_the_reference_equals_them_too(name):
    settings, tensors = recorded(name)
    sae = MatryoshkaSAE.init(settings, None, seed=0)
    reference = ReferenceTrainer(
        {parameter: tensors[f"before.{parameter}"].double() for parameter in NAMES},
        sae.group_ends,
        0,
        settings.k,
        settings.lr,
        dead_window=settings.dead_window_tokens,
        warmup=settings.warmup_steps,
        decay=settings.decay_steps,
        total=settings.total_steps,
    )
    for step, x_BD in enumerate(tensors["batches"]):
        loss, _, _ = reference.update(x_BD.double())
        assert loss == pytest.approx(tensors["after.loss"][step].item(), rel=1e-5)
        for parameter in NAMES:
            expected = tensors[f"after.{parameter}"][step].double()
            torch.testing.assert_close(reference.parameters[parameter], expected, rtol=0, atol=5e-6)
