"""Two processes over gloo do what one does: same kept pairs, same parameters."""

import pytest
import torch
import torch.multiprocessing
from gloo_ranks import CASES, STEPS, rank_main, rows_of, run_alone


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(rank_main, (2, str(folder)), nprocs=2)
    return run_alone(), [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_kept_pairs_are_those_of_one_process(found):
    alone, ranks = found
    masks = [name for name in alone if name.startswith("mask.")]
    assert len(masks) == 8 + len(CASES) * STEPS
    for name in masks:
        for rank in range(2):
            assert torch.equal(ranks[rank][name], alone[name][rows_of(rank, 2)]), name


@pytest.mark.parametrize("case", CASES)
def test_parameters_and_reports_are_those_of_one_process(found, case):
    alone, ranks = found[0][case], [rank[case] for rank in found[1]]
    for rank in ranks:
        for name, tensor in alone["state"]["sae"].items():
            torch.testing.assert_close(rank["state"]["sae"][name], tensor, rtol=0, atol=1e-9)
            assert torch.equal(rank["state"]["sae"][name], ranks[0]["state"]["sae"][name]), "ranks hold the same bits"
        assert torch.equal(rank["state"]["silent"], alone["state"]["silent"])
        for theirs, expected in zip(rank["reports"], alone["reports"], strict=True):
            assert theirs == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if case != "counted":
        assert any(report["loss_aux"] > 0 for report in alone["reports"]), "dead latents come and go"


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_stop_when_one_batch_is_bad(found, case):
    assert found[0][case]["stopped"] and all(rank[case]["stopped"] for rank in found[1])
