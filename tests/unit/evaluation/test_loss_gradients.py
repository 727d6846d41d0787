"""Gradients of the loss at the hook, against differences of losses, and what the effects made of them are worth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from language_models import load

from dmsae_ray.corpus.tokens import TokenSequences
from dmsae_ray.evaluation.loss_gradients import gradients_of, read_gradients


@pytest.fixture(scope="module")
def lm():
    return load("tiny", "blocks.2.hook_resid_post")


@pytest.fixture(scope="module")
def sequences(lm):
    rng = np.random.default_rng(3)
    ids, lengths = np.full((5, 24), lm.pad_id, dtype=np.int32), np.array([24, 9, 17, 24, 12], dtype=np.int32)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = [lm.bos_id, *rng.integers(5, 4000, length - 1)]
    ids[3, 10] = lm.bos_id
    return TokenSequences(ids, lengths, np.array([23, 8, 16, 22, 11], dtype=np.int32))


def test_they_are_the_slopes_of_the_loss(lm, sequences):
    found = gradients_of(lm, sequences, 2, None)
    assert found.x_MD.shape == found.gradient_MD.shape == (80, lm.d)
    ids, lengths = (torch.from_numpy(array.astype(np.int64)) for array in (sequences.ids, sequences.lengths))
    cut = lm.cut(ids)
    rows_NT = lm.rows(ids, lengths)
    torch.testing.assert_close(found.x_MD, cut.value_BTD[rows_NT])
    direction_MD = torch.randn(found.x_MD.shape, generator=torch.Generator().manual_seed(0))
    step = 1e-3 * float(found.x_MD.norm(dim=1).mean()) / lm.d**0.5
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            value_NTD = cut.value_BTD.clone()
            value_NTD[rows_NT] += sign * step * direction_MD
            ends.append(float(lm.loss(cut, value_NTD, ids, lengths)))
    slope = float((found.gradient_MD.double() * direction_MD).sum())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=0.02)


def test_rows_beyond_the_bound_are_left_out(lm, sequences):
    every = gradients_of(lm, sequences, 5, None)
    bound = float(every.x_MD.norm(dim=1).median())
    some = gradients_of(lm, sequences, 5, bound)
    kept_M = every.x_MD.norm(dim=1) <= bound
    assert 0 < len(some.x_MD) == int(kept_M.sum()) < len(every.x_MD)
    torch.testing.assert_close(some.gradient_MD, every.gradient_MD[kept_M], rtol=1e-4, atol=1e-6)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "loss-gradients-64.safetensors"
    for content in (None, b"cut"):
        if content:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name}: cannot be read .*delete it"):
            read_gradients(path)
