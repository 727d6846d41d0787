"""Rows of extreme norm, through the front door: a model one of whose tokens stands far outside all others."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import islice

import pytest
from conftest import results, run_command
from safetensors.torch import load_file, save_file

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.config import CorpusConfig
from dmsae_ray.corpus.mixture import load_parts
from dmsae_ray.lm.model import load_tokenizer
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


def test_kept_outliers_are_warned_of_and_by_default_they_count_nowhere(model, tmp_path):
    kept = run_command(
        tmp_path / "kept", "--model.name", str(model), "--harvest.outlier_norm", "null", module="harvest"
    )
    assert kept.code == 0, kept.out
    (line,) = [line for line in kept.out.splitlines() if "of the variance" in line]
    assert "warning: " in line and "Set harvest.outlier_norm to 10" in line

    output = tmp_path / "out"
    run = run_command(output, "--model.name", str(model), "--sweep.seeds", "0", "--sweep.cycles", "1")
    assert run.code == 0, run.out
    assert "rows of more than 10 times the median norm are left out" in run.out and "of the variance" not in run.out
    data = json.loads((results(output) / "data.json").read_text())
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
    assert record["fvu"] < record["fvu_all_rows"], "which the rows left out decide"
    assert f"{record['fvu']:.3f}/{record['fvu_all_rows']:.3f}" in run.out
