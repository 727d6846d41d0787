"""Placebo criteria on planted cases, and what `choose` makes of them."""

from __future__ import annotations

import json

import pytest
import torch
from plans import configured, plans_of
from records import cycle_record
from shards import make_dataset

from dmsae_ray.core.criterion import criterion, removal_cost
from dmsae_ray.distill.selection import choose
from dmsae_ray.sae.sae import MatryoshkaSAE

D, WIDTH, CANDIDATES = 8, 12, 5
SCORES_P = torch.tensor([5, 1, 3, 3, 4], dtype=torch.float64)
DENSITY_F = torch.tensor([0.1, 0.4, 0.2, 0.4, 0.0, *[0.9] * 7], dtype=torch.float64)


def make_sae(core_size=0, **fields) -> MatryoshkaSAE:
    """Latent j reads and writes along axis j (those beyond the eighth do nothing); candidates are the first five."""
    sae = MatryoshkaSAE(D, [CANDIDATES, WIDTH], core_size, "batchtopk", **fields)
    with torch.no_grad():
        sae.encoder_rows()[:D] = torch.eye(D)
        sae.W_dec[:D] = torch.eye(D)
        sae.W_dec[D:, 0] = 1
    return sae


def values(by, sae=None, seed=0, removal_P=None):
    found_P = criterion(by, make_sae() if sae is None else sae, SCORES_P, DENSITY_F, removal_P, seed)
    assert found_P.shape == (CANDIDATES,) and found_P.dtype == torch.float64
    return found_P


# -- what candidates are ranked by
# ---------------------------------------------------------------------------------------


def test_attribution_and_frequency_are_those_of_the_candidates():
    assert torch.equal(values("attribution"), SCORES_P)
    assert torch.equal(values("frequency"), DENSITY_F[:CANDIDATES]), (
        "the denser latents of later groups are no candidates"
    )


@pytest.mark.parametrize("core_transfer", ["frozen", "init"])
def test_norm_is_that_of_the_encoder_row_core_first(core_transfer):
    sae = make_sae(core_size=2, core_transfer=core_transfer)
    with torch.no_grad():
        sae.encoder_rows()[:CANDIDATES] *= torch.tensor([3.0, 0.5, 2.0, 7.0, 1.0])[:, None]
    assert values("norm", sae).tolist() == [3, 0.5, 2, 7, 1]


def test_random_is_its_seed_s_and_uniform():
    assert torch.equal(values("random", seed=4), values("random", seed=4))
    assert not torch.equal(values("random", seed=4), values("random", seed=5))
    first = torch.bincount(
        torch.stack([values("random", seed=seed).argmax() for seed in range(2000)]), minlength=CANDIDATES
    )
    assert (first - 400).abs().max() < 80, "each comes first in a fifth of the draws; four and a half deviations are 80"


def test_a_latent_that_nothing_stands_in_for_costs_its_square():
    """Orthogonal latents and an exact reconstruction: without latent j exactly z_j^2 is missing."""
    sae, x_RD = make_sae(), torch.zeros(3, D)
    x_RD[0, 0], x_RD[1, 0], x_RD[1, 2], x_RD[2, 6] = 2.0, 1.0, 3.0, 9.0  # axis 6 belongs to no candidate
    assert removal_cost(sae, x_RD, sae.encode(x_RD)).tolist() == [4 + 1, 0, 9, 0, 0]


def test_a_latent_that_does_harm_costs_less_than_nothing_and_a_double_is_missed_less():
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc[1] = 2.0  # writes 2 along axis 1, where there is nothing
        sae.W_enc[3], sae.W_dec[3] = sae.W_enc[0].clone(), sae.W_dec[0].clone()  # latents 0 and 3 both write x_0
    x_RD = torch.zeros(1, D)
    x_RD[0, 0], x_RD[0, 2] = 1.0, 1.0
    # Twice 1 along axis 0 where 1 is true: without either the error falls from 1 to 0.
    assert removal_cost(sae, x_RD, sae.encode(x_RD)).tolist() == [-1, -4, 1, -1, 0]


@pytest.mark.parametrize("core_size", [0, 3])
def test_cost_of_removal_is_the_rise_in_squared_error_when_it_is_done(core_size):
    generator = torch.Generator().manual_seed(core_size)
    sae = MatryoshkaSAE(D, [CANDIDATES, 9, WIDTH], core_size, "batchtopk", torch.float64)
    with torch.no_grad():
        sae.encoder_rows().copy_(torch.randn(WIDTH, D, generator=generator))
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(WIDTH, D, generator=generator), dim=1))
        sae.b_dec.copy_(torch.randn(D, generator=generator))
    x_RD = torch.randn(40, D, generator=generator, dtype=torch.float64)
    z_RF = sae.encode(x_RD)
    cost_P, z_RP = removal_cost(sae, x_RD, z_RF), z_RF[:, :CANDIDATES]
    whole = (x_RD - sae.decode(z_RP)).square().sum()
    for j in range(CANDIDATES):
        without_RP = z_RP.clone()
        without_RP[:, j] = 0
        assert cost_P[j].item() == pytest.approx(((x_RD - sae.decode(without_RP)).square().sum() - whole).item())
    halves = removal_cost(sae, x_RD[:15], z_RF[:15]) + removal_cost(sae, x_RD[15:], z_RF[15:])
    torch.testing.assert_close(halves, cost_P)
    assert torch.equal(removal_cost(sae, x_RD[:0], z_RF[:0]), torch.zeros(CANDIDATES, dtype=torch.float64))


# -- what is chosen
# ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("controls") / "d", shards=4)


def chosen(dataset, *argv, cycle=0, sae=None, removal_P=None):
    (plan, *_) = plans_of(dataset, *argv)
    ids_C, values_P = choose(plan, cycle, make_sae() if sae is None else sae, SCORES_P, DENSITY_F, removal_P)
    assert ids_C.dtype == torch.int64
    return ids_C.tolist(), values_P


def test_by_default_the_core_is_what_carries_tau(dataset):
    assert chosen(dataset, "--attribution.tau", "0.75") == ([0, 2, 4], None)
    assert chosen(dataset, "--attribution.tau", "0.5") == ([0, 4], None)


@pytest.mark.parametrize(
    ("by", "share", "ids"),
    [
        ("attribution", "0.2", [0]),
        ("attribution", "0.6", [0, 2, 4]),
        ("attribution", "1", [0, 1, 2, 3, 4]),
        ("frequency", "0.2", [1]),
        ("frequency", "0.3", [1, 3]),
        ("frequency", "0.6", [1, 2, 3]),
        ("reconstruction", "0.2", [2]),
        ("reconstruction", "0.4", [0, 2]),
        ("reconstruction", "0.8", [0, 1, 2, 3]),
        ("norm", "0.01", [3]),
        ("norm", "0.4", [0, 3]),
        ("norm", "0.41", [0, 2, 3]),
    ],
)
def test_a_share_of_the_candidates_by_each_criterion_ties_by_id(dataset, by, share, ids):
    sae = make_sae()
    with torch.no_grad():
        sae.encoder_rows()[:CANDIDATES] *= torch.tensor([3.0, 0.5, 2.0, 7.0, 1.0])[:, None]
    removal_P = torch.tensor([3, 3, 8, 0, -2], dtype=torch.float64)
    found, values_P = chosen(dataset, "--selection.by", by, "--selection.size", share, sae=sae, removal_P=removal_P)
    assert found == ids
    assert values_P is None if by == "attribution" else torch.equal(values_P, values(by, sae, removal_P=removal_P))


def test_a_random_core_is_its_chain_s_seed_s_and_another_in_every_cycle(dataset):
    argv = ("--selection.by", "random", "--selection.size", "0.4", "--sweep.seeds", "7,8")
    cycles = [chosen(dataset, *argv, cycle=cycle)[0] for cycle in range(12)]
    assert cycles == [chosen(dataset, *argv, "--sweep.data_seed", "3", cycle=cycle)[0] for cycle in range(12)]
    assert {len(ids) for ids in cycles} == {2} and len({tuple(ids) for ids in cycles}) > 3
    plan, other = plans_of(dataset, *argv)
    seeds = {draw(cycle) for p in (plan, other) for cycle in range(8) for draw in (p.selection_seed, p.init_seed)}
    assert len(seeds) == 32, "a seed of its own for each chain, cycle and purpose"


def finish(plan, sizes):
    for cycle, size in enumerate(sizes):
        folder = plan.folder.cycle(cycle)
        folder.path.mkdir(parents=True)
        folder.record.write_text(json.dumps(cycle_record(cycle=cycle, core_out=size)))


def test_a_matched_core_has_the_size_of_its_twin_s_in_the_same_cycle(dataset, tmp_path):
    argv = ("--output", str(tmp_path), "--sae.width", "64")
    finish(plans_of(dataset, *argv)[0], [0, 1, 5, 6])
    match = (*argv, "--selection.by", "frequency", "--selection.size", "match")
    assert [chosen(dataset, *match, cycle=cycle)[0] for cycle in range(3)] == [[], [1], [0, 1, 2, 3, 4]]
    random_rows = (*argv, "--sae.core_transfer", "random", "--selection.size", "match")
    assert [chosen(dataset, *random_rows, cycle=cycle)[0] for cycle in range(3)] == [[], [0], [0, 1, 2, 3, 4]], (
        "by attribution, the size that of the chain which hands its cores on"
    )
    with pytest.raises(ValueError, match="core of 6 latents cannot be selected from 5"):
        chosen(dataset, *match, cycle=3)
    with pytest.raises(
        ValueError,
        match=r"seed0-k4-frequency from .*4 of 5 cycles done.*--selection.by attribution --selection.size tau",
    ):
        chosen(dataset, *match, cycle=4)
    # A chain that differs in anything else, or another seed's, is no twin.
    for other in (
        ["--sae.width", "32"],
        ["--attribution.tau", "0.5"],
        ["--sae.core_transfer", "init"],
        ["--sweep.seeds", "1"],
    ):
        with pytest.raises(ValueError, match="0 of 1 cycles done"):
            chosen(dataset, *match, *other)


def test_controls_have_keys_and_labels_of_their_own(dataset):
    plain = plans_of(dataset)[0]
    assert plain.label == "seed0-k4"
    keys = {plain.key}
    for argv, label in (
        (["--selection.by", "random", "--selection.size", "0.5"], "seed0-k4-random"),
        (["--selection.by", "random", "--selection.size", "0.25"], "seed0-k4-random"),
        (["--selection.by", "norm", "--selection.size", "match", "--sae.core_transfer", "init"], "seed0-k4-norm-init"),
        (["--selection.size", "0.5"], "seed0-k4"),
        (["--sae.core_transfer", "init"], "seed0-k4-init"),
        (["--sae.core_transfer", "random"], "seed0-k4-random-rows"),
    ):
        plan = plans_of(dataset, *argv)[0]
        assert plan.label == label and plan.key not in keys
        keys.add(plan.key)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--selection.by", "random"], ["selection.by random", "set selection.size to a share", "match"]),
        (["--selection.size", "match"], ["selection.size match", "set selection.by"]),
        (["--selection.by", "norm", "--selection.size", "0"], ["selection.size", "greater than 0"]),
        (["--selection.by", "norm", "--selection.size", "1.5"], ["selection.size", "less than or equal to 1"]),
        (["--selection.by", "norm", "--selection.size", "nan"], ["selection.size", "less than or equal to 1"]),
        (["--selection.by", "size"], ["selection.by", "'random'"]),
    ],
)
def test_a_selection_that_makes_no_sense_is_refused_before_any_work(argv, words):
    with pytest.raises(ValueError) as error:
        configured(*argv, tokens=4 * 32)
    for word in words:
        assert word in str(error.value), str(error.value)
