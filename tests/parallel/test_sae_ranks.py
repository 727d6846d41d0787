"""Two and four processes over gloo do what one does, whatever they share: same kept pairs, same parameters."""

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from gloo_ranks import (
    CASES,
    FLOAT32_STEPS,
    HANDOVERS,
    LEG,
    MODES,
    STEPS,
    cases_of,
    hand_over,
    rank_main,
    run_alone,
    undisturbed,
)

from dmsae_ray.sae.ranks.collective import Alone

PRELOAD = ("gloo_ranks", "torch._dynamo")
"""What a server imports once, which forks each rank: DistributedDataParallel asks torch._dynamo, which takes longer to
import than all the rest.
"""


@pytest.fixture(scope="module")
def alone():
    return run_alone()


@pytest.fixture(scope="module")
def folder(alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(alone["float32", "ddp"]["masks"], folder / "masks.pt")
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOAD))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the server does not get this process's sys.path
        torch.multiprocessing.start_processes(rank_main, (str(folder),), nprocs=4, start_method="forkserver")
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, folder):
    return [torch.load(folder / f"rank{rank}of{request.param}.pt", weights_only=True) for rank in range(request.param)]


def joined(masks):
    """What all ranks kept; a pair kept by two of them counts twice."""
    return torch.stack(list(masks)).sum(dim=0, dtype=torch.int8)


def test_ties_are_cut_where_one_process_cuts_them(alone, ranks):
    names = [name for name in alone if name[0] == "t"]
    assert len(names) == 8
    for name in names:
        for spread in ("rows", "latents"):
            assert torch.equal(joined(found[name][spread] for found in ranks), alone[name]["rows"]), (name, spread)


@pytest.mark.parametrize("parallel", MODES)
def test_kept_pairs_are_those_of_one_process(alone, ranks, parallel):
    for case in cases_of(len(ranks)):
        one = alone[case, "ddp"]["masks"]
        assert len(one) == STEPS[case]
        for step, mask in enumerate(one):
            assert torch.equal(joined(rank[case, parallel]["masks"][step] for rank in ranks), mask), (case, step)


@pytest.mark.parametrize("parallel", MODES)
def test_parameters_and_reports_are_those_of_one_process(alone, ranks, parallel):
    for case in cases_of(len(ranks)):
        check(case, parallel, alone[case, "ddp"], [rank[case, parallel] for rank in ranks])


def check(case, parallel, one, found):
    # A first guess from a part of the latents is another one than from all, and decides how much is screened, not what
    # is found.
    left_out = {"candidates", "retries"} if parallel == "latent" else set()
    for rank in found:
        assert_state(rank["state"], one["state"])
        for name, tensor in rank["state"]["sae"].items():
            assert torch.equal(tensor, found[0]["state"]["sae"][name]), "ranks hold the same bits"
            assert torch.equal(rank["whole"][name], tensor)
        for theirs, expected in zip(rank["reports"], one["reports"], strict=True):
            for name in expected.keys() - left_out:
                assert theirs[name] == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name
    if case != "counted":
        assert any(report["loss_aux"] > 0 for report in one["reports"]), "dead latents come and go"


def assert_state(found, expected):
    for name, tensor in expected["sae"].items():
        torch.testing.assert_close(found["sae"][name], tensor, rtol=0, atol=1e-9)
    for name in ("mean", "square"):
        torch.testing.assert_close(found["adam"][name], expected["adam"][name], rtol=0, atol=1e-9)
    assert torch.equal(found["silent"], expected["silent"])
    for name in ("steps_done", "threshold_sum", "threshold_steps", "first_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-9)


@pytest.mark.parametrize("parallel", MODES)
def test_float32_parameters_after_50_steps_given_the_same_kept_pairs(alone, ranks, parallel):
    assert FLOAT32_STEPS == 50
    for rank in ranks:
        for name, tensor in alone["float32", "ddp"]["state"]["sae"].items():
            if name != "theta":  # the running mean of smallest kept values, which are fed, not found
                torch.testing.assert_close(rank["float32", parallel]["state"]["sae"][name], tensor, rtol=0, atol=1e-5)


def test_ranks_that_gather_have_the_bits_of_one_process(alone, ranks):
    """Here nothing is fed: the gate finds the same pairs, and every sum has the order that it has in one process."""
    one = alone["float32", "ddp"]
    for rank in ranks:
        found = rank["float32", "gather"]
        for name, tensor in one["state"]["sae"].items():
            assert torch.equal(found["state"]["sae"][name], tensor), name
        for name in ("mean", "square"):
            assert torch.equal(found["state"]["adam"][name], one["state"]["adam"][name])
    for step, mask in enumerate(one["masks"]):
        assert torch.equal(joined(rank["float32", "gather"]["masks"][step] for rank in ranks), mask)


@pytest.mark.parametrize("parallel", MODES)
def test_all_ranks_stop_when_one_batch_is_bad(alone, ranks, parallel):
    for case in cases_of(len(ranks)):
        assert alone[case, "ddp"]["stopped"] and all(rank[case, parallel]["stopped"] for rank in ranks)


def test_a_run_handed_over_between_modes_and_numbers_of_ranks_is_the_undisturbed_one(folder):
    expected = undisturbed()
    ended = hand_over(Alone(), folder)
    assert set(ended) == set(HANDOVERS) and expected["steps_done"] == 3 * LEG
    for state in ended.values():
        assert_state(state, expected)


@pytest.mark.parametrize("parallel", MODES)
def test_bytes_sent_are_those_of_the_formula(ranks, parallel):
    for rank in ranks:
        steps = rank["traffic"][parallel][1:]  # the first step looks for b_dec's start, too
        assert len(steps) == 13 and all(sent == formula > 0 for sent, formula, _, _ in steps), steps
        dead = [dead for _, _, dead, _ in steps]
        assert any(spare for *_, spare in steps)
        assert min(dead) == 0 and max(dead) > 2, (
            "with and without AuxK, and with more dead latents than it uses per token"
        )


def test_two_processes_do_every_case():
    assert set(cases_of(2)) == set(CASES)
