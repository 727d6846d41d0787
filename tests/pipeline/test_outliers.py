"""Rows of extreme norm: a model one of whose tokens stands far outside all others."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import islice

import pytest
from conftest import command, results, run_command
from ray_here import harvest_here, ray_here, train_here
from safetensors.torch import load_file, save_file

from dmsae_ray import harvest
from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.activations.outliers import write_data
from dmsae_ray.config import Config, CorpusConfig
from dmsae_ray.corpus.mixture import load_parts
from dmsae_ray.distill.grid import plan_chains
from dmsae_ray.driver.options import SweepCommand, load
from dmsae_ray.evaluation.references import references_of, write_references
from dmsae_ray.lm.model import LanguageModel, load_tokenizer
from dmsae_ray.lm.source import TINY


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The shipped model, in which one of about 500 tokens of text has an embedding of norm 1000, eleven times that at
    the hook (the median row has 28).
    """
    tokenizer, counts = load_tokenizer("tiny"), Counter()
    for document in islice(load_parts(CorpusConfig())[0], 20):
        counts.update(tokenizer(document.text)["input_ids"])
    total = counts.total()
    token = min(counts, key=lambda token: (abs(counts[token] / total - 1 / 500), token))
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(TINY, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = 0
    weights["model.embed_tokens.weight"][token, 5] = 1000
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def configured(output, *argv) -> Config:
    return Config(**load(SweepCommand, command(output, *argv)[3:]).sections())


def said_by_the_command(output, capfd, *argv) -> str:
    """What `python -m dmsae_ray.harvest` says of rows that are there."""
    assert harvest.main(command(output, *argv, module="harvest")[3:]) == 0
    return capfd.readouterr().out


def test_kept_outliers_are_warned_of_and_by_default_they_count_nowhere(model, tmp_path, capfd):
    """Harvest and cycle in this process; the command is told what there is to say of the rows. Long form: below."""
    kept = ("--model.name", str(model), "--harvest.outlier_norm", "null")
    harvest_here(configured(tmp_path / "kept", *kept))
    assert_warned(said_by_the_command(tmp_path / "kept", capfd, *kept))

    output, argv = tmp_path / "out", ("--model.name", str(model), "--sweep.seeds", "0", "--sweep.cycles", "1")
    config = configured(output, *argv)
    dataset = harvest_here(config)
    (plan,) = plan_chains(config, dataset)
    plan.folder.describe(plan.key, plan.label, plan.fields)
    lm = LanguageModel.of(config.model, "cpu")
    write_references(plan.references, config.evaluate, references_of(lm, dataset, config.evaluate, "cpu"))
    with ray_here(cpus=2, include_dashboard=False):
        train_here([plan])
    assert plan.finished(), plan.folder.failure()
    left_out_everywhere(output, said_by_the_command(output, capfd, *argv), write_data(dataset, tmp_path / "data.json"))


@pytest.mark.slow
def test_a_sweep_warns_of_outliers_that_it_keeps_and_counts_none_by_default(model, tmp_path):
    """The same through the front door. Short form: above."""
    kept = run_command(
        tmp_path / "kept", "--model.name", str(model), "--harvest.outlier_norm", "null", module="harvest"
    )
    assert kept.code == 0, kept.out
    assert_warned(kept.out)
    output = tmp_path / "out"
    run = run_command(output, "--model.name", str(model), "--sweep.seeds", "0", "--sweep.cycles", "1")
    assert run.code == 0, run.out
    left_out_everywhere(output, run.out, json.loads((results(output) / "data.json").read_text()))


def assert_warned(said: str) -> None:
    (line,) = [line for line in said.splitlines() if "of the variance" in line]
    assert "warning: " in line and "Set harvest.outlier_norm to 10" in line


def left_out_everywhere(output, said: str, data: dict) -> None:
    """data: what stands in data.json."""
    assert "rows of more than 10 times the median norm are left out" in said and "of the variance" not in said
    assert (
        data["dropped"] > 0
        and data["outlier_norm"] == 10
        and data["warning"] is None
        and data["outliers"]["share_of_variance"] < 0.05
    )
    (folder,) = (output / "data").glob("*/manifest.json")
    dataset = ActivationDataset(folder.parent)
    assert dataset.manifest.max_norm == data["max_norm"] < 1000
    assert max(float(rows_ND.float().norm(dim=1).max()) for rows_ND in dataset.some_rows()) <= dataset.manifest.max_norm
    record = json.loads(next(output.glob("chains/*/cycle_00/record.json")).read_text())
    assert 0 < record["rows_left_out"] < 0.03 * record["evaluation_tokens"]
