"""Re-discovery of planted features in SAEs that never had a core."""

import json

import numpy as np
import pytest
import torch
from compared_chains import core_of, latents, unit_rows

from dmsae_ray.compare import rediscovery
from dmsae_ray.compare.consensus import NamedCore, find_consensus
from dmsae_ray.compare.match import cosines, mmcs
from dmsae_ray.compare.rediscovery import (
    Directions,
    PlainSAE,
    look_for,
    recurring,
    rediscover,
    sought,
    summarise_rediscovery,
)
from dmsae_ray.config import ExpectConfig
from dmsae_ray.results.expectations import judge
from dmsae_ray.results.numbers import numbers_of
from dmsae_ray.show.terminal.consensus_text import consensus_text

D = 64
CORE_CD = unit_rows(10, 1, d=D)


def chain(seed, core_CD=CORE_CD, free=40, free_density=0.1, common=None):
    """A chain whose core is given, beside free latents of its own, the first of which may be given."""
    own_CD = unit_rows(free, 100 + seed, d=D)
    if common is not None:
        own_CD[: len(common)] = common
    sae = latents(torch.cat([core_CD, own_CD]))
    sae.density_N[len(core_CD) :] = free_density
    return NamedCore(f"seed{seed}", seed, core_of(sae, range(len(core_CD)), seed=seed)), sae


def plain(rows_CD, seed=7, k=16, arm="plain", width=30):
    return PlainSAE(
        f"{arm}-seed{seed}-k{k}",
        arm,
        seed,
        k,
        latents(torch.cat([unit_rows(width - len(rows_CD), 200 + seed, d=D), rows_CD])),
    )


def start_of(seed, common=None):
    """Cycle 0's candidates by falling attribution, the first of which may be given."""
    own_CD = unit_rows(20, 300 + seed, d=D)
    if common is not None:
        own_CD[: len(common)] = common
    return latents(own_CD)


def found_in(sae, chains=None, starts=None, no_start=None):
    chains = chains or [chain(0), chain(1)]
    starts = starts or [start_of(named.seed) for named, _ in chains]
    consensus = find_consensus([named for named, _ in chains])
    all_sought = [
        sought(named, own, start, no_start, seed=0) for (named, own), start in zip(chains, starts, strict=True)
    ]
    return rediscover(sae, consensus, all_sought, recurring(all_sought, 0.7, 0.5), 0.7)


def test_seven_of_ten_planted():
    row = found_in(plain(CORE_CD[:7]))
    assert row["consensus"]["found"] == pytest.approx(0.7) and row["consensus"]["size"] == 10
    assert row["cores"]["found"] == pytest.approx(0.7) and row["cores"]["size"] == 20
    rest = cosines(CORE_CD[7:], plain(CORE_CD[:7]).latents.W_dec_ND).max(axis=1)
    assert row["consensus"]["mmcs"] == pytest.approx((7 + rest.sum()) / 10, abs=1e-6) and (rest < 0.7).all()
    for name in ("matched", "matched_consensus"):
        assert row[name]["found"] == 0 and row[name]["available"] and row[name]["density_gap"] == pytest.approx(1)
        assert row[name]["size"] == 20 * rediscovery.DRAWS and row[name]["mmcs"] < 0.6
    assert (row["chain"], row["arm"], row["k"], row["seed"]) == ("plain-seed7-k16", "plain", 16, 7)
    assert json.dumps(row, allow_nan=False)


def test_free_latents_that_the_sae_has_are_found_among_the_matched():
    chains = [chain(0), chain(1)]
    row = found_in(plain(torch.cat([own.W_dec_ND[10:] for _, own in chains]), width=90), chains)
    assert row["matched"]["found"] == row["matched_consensus"]["found"] == 1 and row["matched"][
        "mmcs"
    ] == pytest.approx(1)
    assert row["cores"]["found"] == row["consensus"]["found"] == 0


def test_one_latent_must_have_both_cosines():
    features = Directions(CORE_CD, CORE_CD)
    for W_enc_ND, W_dec_ND, found in (
        (CORE_CD, CORE_CD, True),
        (unit_rows(10, 5, d=D), CORE_CD, False),
        (CORE_CD, unit_rows(10, 5, d=D), False),
        (CORE_CD.roll(1, dims=0), CORE_CD, False),  # both are there, in different latents
    ):
        assert look_for(features, latents(W_enc_ND, W_dec_ND), 0.7).found_N.tolist() == [found] * 10


def test_chunks_equal_the_whole(monkeypatch):
    features, whole = (
        Directions(unit_rows(9, 3, d=8), unit_rows(9, 4, d=8)),
        latents(unit_rows(50, 5, d=8), unit_rows(50, 6, d=8)),
    )
    monkeypatch.setattr(rediscovery, "CHUNK", 7)
    found = look_for(features, whole, 0.3)
    encoder, decoder = cosines(features.W_enc_ND, whole.W_enc_ND), cosines(features.W_dec_ND, whole.W_dec_ND)
    assert (
        found.found_N.tolist() == ((encoder >= 0.3) & (decoder >= 0.3)).any(axis=1).tolist()
        and found.found_N.any()
        and not found.found_N.all()
    )
    assert found.of(slice(None))["mmcs"] == pytest.approx(mmcs(features.W_dec_ND, whole.W_dec_ND), abs=1e-6)


def test_only_members_of_the_consensus_stand_for_it():
    """Chains share five of ten: the matched latents of the other five are no comparison for the consensus."""
    first, second = (chain(seed, torch.cat([CORE_CD[:5], unit_rows(5, 30 + seed, d=D)])) for seed in (0, 1))
    row = found_in(plain(CORE_CD[:5]), [first, second])
    assert row["consensus"] | {"mmcs": 0} == {"found": 1.0, "mmcs": 0, "size": 5} and row["cores"]["found"] == 0.5
    assert (
        row["matched_consensus"]["size"] == 10 * rediscovery.DRAWS and row["matched"]["size"] == 20 * rediscovery.DRAWS
    )


def test_without_a_consensus_and_without_enough_free_latents():
    chains = [chain(0), chain(1, unit_rows(10, 9, d=D), free=5)]
    row = found_in(plain(CORE_CD), chains)
    assert row["consensus"] == {"found": None, "mmcs": None, "size": 0} and row["cores"]["found"] == 0.5
    assert not row["matched"]["available"] and "last SAE of seed1 has 5 free latents" in row["matched"]["reason"]
    assert row["matched"]["size"] == 10 * rediscovery.DRAWS, "the other chain's are given all the same"
    far = found_in(plain(CORE_CD), [chain(0), chain(1, free_density=0.01)])
    assert not far["matched"]["available"] and "seed1: the free latents nearest" in far["matched"]["reason"]
    assert far["matched"]["density_gap"] == pytest.approx(10)


def test_an_sae_of_a_chains_seed_is_refused():
    with pytest.raises(ValueError, match="plain-seed1-k16 has the seed of seed1"):
        found_in(plain(CORE_CD, seed=1))


def test_the_summary_is_over_the_plain_seeds():
    rows = [
        found_in(plain(CORE_CD[:n], seed=seed, k=k)) for k in (16, 32) for seed, n in ((7, 7), (8, 8), (9, 9), (10, 4))
    ]
    summary = summarise_rediscovery(rows)
    assert set(summary) == {"plain", "plain/k16", "plain/k32"}
    found = summary["plain/k16"]["consensus"]["found"]
    assert found["mean"] == pytest.approx(0.7) and (found["min"], found["max"], found["n"]) == pytest.approx(
        (0.4, 0.9, 4)
    )
    low, high = found["interval"]
    # Student's t on four values: their deviation, 0.216, halved, times 3.18; and no share is above 1.
    assert (low, high) == (pytest.approx(0.7 - 3.1824463 * 0.2160247 / 2), 1)
    # The same four seeds at two sparsities are four seeds.
    assert (
        summary["plain"]["consensus"]["found"]["interval"] == pytest.approx([low, high])
        and summary["plain"]["seeds"] == 4
    )
    assert summary["plain"]["excess"]["cores"]["matched"]["found"]["mean"] == pytest.approx(0.7)
    assert summary["plain"]["excess"]["consensus"]["free_consensus"]["found"] is None, "no free latents recur"
    few = summarise_rediscovery(rows[:3])["plain"]["cores"]["found"]
    assert few["interval"] is None and few["values"] == pytest.approx([0.7, 0.8, 0.9])
    assert summarise_rediscovery([]) == {} and json.dumps(summary, allow_nan=False)


def test_matched_latents_that_are_no_comparison_are_not_summed_up():
    far = found_in(plain(CORE_CD), [chain(0), chain(1, free_density=0.01)])
    near = found_in(plain(CORE_CD, seed=8))
    summary = summarise_rediscovery([far, near])["plain"]
    assert (
        summary["matched"]["found"]["n"] == 1
        and summary["cores"]["found"]["n"] == 2
        and summary["excess"]["cores"]["matched"]["found"]["n"] == 1
    )


def test_draws_are_as_dense_as_the_core_and_decided_by_the_seed():
    named, sae = chain(0, free=200)
    sae.density_N[:] = torch.rand(210, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.001
    one, again, other = (sought(named, sae, start_of(0), None, seed) for seed in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(one.draws, again.draws, strict=True)) and not all(
        (a == b).all() for a, b in zip(one.draws, other.draws, strict=True)
    )
    assert len(one.draws) == rediscovery.DRAWS and 1 <= one.density_gap < 1.2
    ids = [int(np.argmax(cosines(row[None], sae.W_dec_ND)[0])) for row in one.free.W_dec_ND]
    for draw in one.draws:
        drawn = sae.density_N[[ids[place] for place in draw]]
        assert len(set(draw.tolist())) == 10 and (drawn / sae.density_N[:10]).log().abs().mean() < 0.3
    assert min(ids) >= 10, "never of the core"


FREE_CD, START_CD = unit_rows(20, 60, d=D), unit_rows(10, 61, d=D)


def verdicts(knows_CD, free=FREE_CD, start=START_CD):
    """Whether plain SAEs that know these rows find the consensus core more often than each control, as it is judged;
    what is printed of it; and the first SAE's row. Free latents and cycle 0's recur across the chains where given."""
    chains = [chain(seed, common=free) for seed in (0, 1)]
    starts = [start_of(seed, start) for seed in (0, 1)]
    rows = [found_in(plain(knows_CD, seed=seed, width=50), chains, starts) for seed in (7, 8)]
    consensus = find_consensus([named for named, _ in chains]).to_dict() | {
        "rediscovery": rows,
        "rediscovery_summary": summarise_rediscovery(rows),
    }
    numbers = numbers_of([], None, consensus)
    names = [f"rediscovery.plain.excess.consensus.{control}_consensus.found" for control in ("free", "cycle0")]
    entries = judge([ExpectConfig(claim="found", value=name, above=0) for name in names], numbers, {})["expectations"]
    return [entry["outcome"] for entry in entries], consensus_text(consensus).plain, rows[0]


def test_the_consensus_is_held_against_what_recurs_as_well():
    outcomes, text, row = verdicts(CORE_CD)
    assert outcomes == ["hit", "hit"] and row["free_consensus"]["size"] > 5 and row["cycle0_consensus"]["size"] == 10
    assert "100% of the consensus core, 0% of what recurs among cycle 0's top latents (10 features), 0% of what" in text
    # The SAE knows all that recurs, in a core or not. The old control, of which most never recurred, is found less.
    outcomes, text, row = verdicts(torch.cat([CORE_CD, FREE_CD, START_CD]))
    assert outcomes == ["miss", "miss"]
    assert row["consensus"]["found"] == 1 > 0.7 > row["matched_consensus"]["found"]
    assert "100% of what recurs among cycle 0's top latents" in text and "100% of what recurs among free" in text


def test_free_latents_that_never_recur_are_no_control_and_their_count_is_said():
    outcomes, text, row = verdicts(CORE_CD, free=None)
    assert outcomes == ["not available", "hit"] and row["free_consensus"]["found"] is None
    assert (
        "Not held against what recurs among free latents as dense as the cores': of 10 draws of 20 free latents as "
        "dense as the cores' members, of 2 seeds, none recurs"
    ) in text
    began = found_in(plain(CORE_CD), no_start="seed0 began with a core")
    assert not began["cycle0_consensus"]["available"] and "began with a core" in began["cycle0_consensus"]["reason"]


def test_means_are_compared_with_means():
    """Members of a feature stand 39 degrees apart, and plain SAEs know their middle: means are met exactly, and no
    single member of the consensus or of the control would be."""

    def turned(rows_CD, towards_CD, sign):
        rows = rows_CD + sign * 0.35 * towards_CD
        return rows / rows.norm(dim=1, keepdim=True)

    middle, aside = unit_rows(10, 80, d=D), unit_rows(10, 81, d=D)
    aside = aside - (aside * middle).sum(1, keepdim=True) * middle
    aside = aside / aside.norm(dim=1, keepdim=True)
    core, other = CORE_CD, unit_rows(10, 82, d=D)
    other = other - (other * core).sum(1, keepdim=True) * core
    other = other / other.norm(dim=1, keepdim=True)
    chains = [chain(seed, turned(core, other, sign)) for seed, sign in ((0, 1), (1, -1))]
    starts = [start_of(seed, turned(middle, aside, sign)) for seed, sign in ((0, 1), (1, -1))]
    known = torch.cat([core, middle])
    row = found_in(plain(known, width=50), chains, starts)
    assert row["consensus"]["mmcs"] == pytest.approx(1, abs=1e-5) == row["cycle0_consensus"]["mmcs"]
    assert row["members"]["mmcs"] < 0.95 and row["consensus"]["size"] == row["cycle0_consensus"]["size"] == 10
