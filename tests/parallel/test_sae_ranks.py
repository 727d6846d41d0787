"""Two and four processes over gloo do what one does: same kept pairs, same parameters."""

import pytest
import torch
import torch.multiprocessing
from gloo_ranks import CASES, STEPS, rank_main, rows_of, run_alone


@pytest.fixture(scope="module")
def alone():
    return run_alone()


def cases_of(ranks):
    """Four processes do the first case only: two cores are slow at it."""
    return CASES if len(ranks) == 2 else ["batchtopk"]


@pytest.fixture(scope="module")
def folder(alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(alone["float32"]["masks"], folder / "masks.pt")
    torch.multiprocessing.spawn(rank_main, (str(folder),), nprocs=4)
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, folder):
    return [torch.load(folder / f"rank{rank}of{request.param}.pt", weights_only=True) for rank in range(request.param)]


def test_kept_pairs_are_those_of_one_process(alone, ranks):
    masks = [name for name in ranks[0] if name.startswith("mask.")]
    assert len(masks) == 8 + sum(STEPS[case] for case in cases_of(ranks))
    for name in masks:
        for rank, found in enumerate(ranks):
            assert torch.equal(found[name], alone[name][rows_of(rank, len(ranks))]), name


def test_parameters_and_reports_are_those_of_one_process(alone, ranks):
    for case in cases_of(ranks):
        check(case, alone[case], [rank[case] for rank in ranks])


def check(case, one, found):
    for rank in found:
        for name, tensor in one["state"]["sae"].items():
            torch.testing.assert_close(rank["state"]["sae"][name], tensor, rtol=0, atol=1e-9)
            assert torch.equal(rank["state"]["sae"][name], found[0]["state"]["sae"][name]), "ranks hold the same bits"
        assert torch.equal(rank["state"]["silent"], one["state"]["silent"])
        for theirs, expected in zip(rank["reports"], one["reports"], strict=True):
            assert theirs == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if case != "counted":
        assert any(report["loss_aux"] > 0 for report in one["reports"]), "dead latents come and go"


def test_float32_parameters_after_50_steps_given_the_same_kept_pairs(alone, ranks):
    assert STEPS["batchtopk"] == 50
    for rank in ranks:
        for name, tensor in alone["float32"]["state"]["sae"].items():
            if name != "theta":  # the running mean of smallest kept values, which are fed, not found
                torch.testing.assert_close(rank["float32"]["state"]["sae"][name], tensor, rtol=0, atol=1e-5)


def test_all_ranks_stop_when_one_batch_is_bad(alone, ranks):
    for case in cases_of(ranks):
        assert alone[case]["stopped"] and all(rank[case]["stopped"] for rank in ranks)
