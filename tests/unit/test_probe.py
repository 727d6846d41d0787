"""Probes (jobs/probe): what they say where the truth is planted."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "jobs" / "probe"))
from probe_fit import auc, auc_of, logistic, mean_over
from probe_texts import read_all

N, SETS = 400, 12


def features(rng, latents=8):
    """Sparse activations, as an SAE's are."""
    return np.maximum(rng.standard_normal((N, latents)) - 0.5, 0)


def differences(decides, seeds=5):
    """AUC of a core's probe less that of another set of its size, [seed, data set]. decides: whether the label is told
    by a latent of the core, or by nothing that any latent sees.
    """
    rng = np.random.default_rng(0)
    found = np.empty((seeds, SETS))
    for one in range(SETS):
        hidden_N = rng.standard_normal(N)
        train_N = rng.permutation(N) < N // 2
        for seed in range(seeds):
            core_NF, other_NF = features(rng), features(rng)
            if decides:
                core_NF[:, 3] = np.maximum(hidden_N + 0.5 * rng.standard_normal(N), 0)
            aucs = [auc_of(z_NF, hidden_N > 0, train_N, 2) for z_NF in (core_NF, other_NF)]
            found[seed, one] = aucs[0] - aucs[1]
    return found


def test_a_core_that_has_the_feature_carries_more_and_one_that_lacks_it_does_not():
    carried = mean_over(differences(True))
    assert carried.verdict() == "more" and carried.interval[0] > 0.3
    assert mean_over(-differences(True)).verdict() == "less"
    nothing = mean_over(differences(False))
    assert nothing.verdict() == "no difference shown" and abs(nothing.mean) < 0.05
    assert mean_over(differences(True)[:1]).verdict() == "not known: one seed or one data set"


@pytest.mark.parametrize("seeds", [4, 5, 8])
@pytest.mark.parametrize("parts", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (1, 0.2, 3)])
def test_intervals_hold_what_they_promise_wherever_the_variance_sits(seeds, parts):
    rng, hits, trials = np.random.default_rng(1), 0, 600
    between_seeds, between_sets, rest = parts
    for _ in range(trials):
        values_SD = (
            between_seeds * rng.standard_normal((seeds, 1))
            + between_sets * rng.standard_normal((1, 20))
            + rest * rng.standard_normal((seeds, 20))
        )
        low, high = mean_over(values_SD).interval
        hits += low <= 0 <= high
    assert hits / trials >= 0.92


def test_the_probe_is_the_ridge_regression_s_minimum_and_takes_separable_labels():
    rng = np.random.default_rng(2)
    z_NK = rng.standard_normal((200, 4))
    positive_N = z_NK @ [1.0, -2, 0, 0.5] + rng.logistic(size=200) > 0.3
    weights = logistic(z_NK, positive_N)
    moved = [logistic(z_NK, positive_N)[None] + 1e-3 * sign * np.eye(4) for sign in (1, -1)]

    def loss(w):
        best = min(
            np.logaddexp(0, -np.where(positive_N, 1, -1) * (z_NK @ w + bias)).sum() for bias in np.linspace(-2, 2, 4001)
        )
        return best + (w**2).sum() / 2

    assert all(loss(weights) < loss(w) for some in moved for w in some)
    assert weights[1] < -1 and abs(weights[2]) < 0.6
    separable = logistic(np.where(positive_N, 9.0, -9.0)[:, None], positive_N)
    assert np.isfinite(separable).all() and separable[0] > 0


def test_auc_counts_ties_half():
    positive_N = np.array([True, True, False, False])
    assert auc(np.array([3.0, 2, 1, 0]), positive_N) == 1 and auc(np.zeros(4), positive_N) == 0.5
    assert auc(np.array([1.0, 0, 1, 0]), positive_N) == 0.5 and auc(np.array([0.0, 1, 2, 3]), positive_N) == 0


def csv_of(labels, head="prompt,prompt_len,target"):
    return "\n".join([head, *(f'"text {i}, said",3,{label}' for i, label in enumerate(labels))]).encode()


def test_texts_are_read_loose_compressed_and_from_a_wheel(tmp_path):
    two, three = csv_of([i % 2 for i in range(100)]), csv_of([i % 3 for i in range(100)])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "two.csv").write_bytes(two)
    (tmp_path / "in" / "three.csv").write_bytes(three)
    with pa.CompressedOutputStream(str(tmp_path / "in" / "packed.csv.zst"), "zstd") as file:
        file.write(two)
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("p/data/cleaned_data/7_two.csv.zst", (tmp_path / "in" / "packed.csv.zst").read_bytes())
        archive.writestr("p/data/other/no.csv.zst", b"")
    found, left_out = read_all([tmp_path / "in", tmp_path / "x.whl"], most=80, seed=0)
    assert [one.name for one in found] == ["packed", "two", "7_two"]
    assert left_out == {"three": "has 3 labels, a probe needs two"}
    for one in found:
        assert len(one.texts) == 80 and one.texts[0].endswith(", said")
        for side_N in (one.positive_N, ~one.positive_N):
            assert abs(one.train_N[side_N].mean() - 0.5) < 0.05
    again, _ = read_all([tmp_path / "in"], most=80, seed=0)
    assert again[1].texts == found[1].texts != read_all([tmp_path / "in"], 80, 1)[0][1].texts


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (csv_of([0, 1], head="words,n,target"), "needs a text"),
        (b"\x28\xb5\x2f\xfd broken", "not a readable CSV"),
        (csv_of([0] * 30), "no data set with two labels"),
    ],
)
def test_what_cannot_be_probed_is_named(tmp_path, content, words):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_all([tmp_path / "a.csv"], 100, 0)
    with pytest.raises(ValueError, match="no such file or folder"):
        read_all([tmp_path / "nowhere"], 100, 0)
