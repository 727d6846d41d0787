"""Consensus of planted cores."""

import json
from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from compared_chains import core_of, latents, unit_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from dmsae_ray.compare.consensus import Member, NamedCore, find_consensus, group, links
from dmsae_ray.compare.match import cosines
from dmsae_ray.core.core import Core
from dmsae_ray.show.terminal.consensus_text import consensus_text

D = 64
COMMON = 10


def core_from(rows_CD, label, seed, k=16, scores=None, **changes) -> NamedCore:
    rows_CD = rows_CD / rows_CD.norm(dim=1, keepdim=True)
    sae = latents(2.0 * rows_CD, rows_CD)
    core = core_of(
        sae, range(len(rows_CD)), seed=seed, k=k, scores=np.ones(len(rows_CD)) if scores is None else scores, **changes
    )
    return NamedCore(label, seed, core)


def planted(common=COMMON, own=5, noise=0.05):
    """Four chains: three have the common features, with noise and in an order of their own; all have features of their
    own.

    Returns the chains and, for each, the row of every common feature.
    """
    torch.manual_seed(0)
    features_CD = unit_rows(common, 1, d=D)
    chains, places = [], []
    for seed in range(4):
        rows_CD = (
            torch.cat([features_CD + noise * torch.randn(common, D), unit_rows(own, 10 + seed, d=D)])
            if seed < 3
            else unit_rows(common + own, 99, d=D)
        )
        order = torch.randperm(common + own)
        chains.append(core_from(rows_CD[order], f"seed{seed}", seed))
        places.append(
            {int(source): row for row, source in enumerate(order.tolist()) if source < common} if seed < 3 else {}
        )
    return chains, places


def test_planted_features_are_the_groups_exactly():
    chains, places = planted()
    found = find_consensus(chains)
    expected = {frozenset((seed, places[seed][feature]) for seed in range(3)) for feature in range(COMMON)}
    members = [frozenset((member.chain, member.index) for member in feature.members) for feature in found.features]
    assert set(members[:COMMON]) == expected and all(len(one) == 1 for one in members[COMMON:])
    assert sum(map(len, members)) == 4 * 15 and len(set().union(*members)) == 4 * 15, "every latent is in one group"
    for feature in found.features[:COMMON]:
        assert (feature.in_seeds, feature.in_core) == (3, True)
        # Two of the three other seeds; Clopper and Pearson's ends, from their tables.
        assert feature.elsewhere == pytest.approx(2 / 3) and feature.interval == pytest.approx((0.094, 0.992), abs=5e-4)
        assert (
            0.7 <= feature.smallest_cosine <= feature.cosine < 1
            and feature.score == pytest.approx(1 / 15)
            and feature.density == pytest.approx(0.1)
        )
    single = found.features[-1]
    assert (single.in_seeds, single.elsewhere, single.cosine, single.smallest_cosine) == (1, 0, None, None)
    assert single.interval == pytest.approx((0, 0.708), abs=5e-4) and not single.in_core


def test_the_order_of_the_chains_does_not_matter():
    chains, _ = planted(noise=0.12)
    here, there = (
        {frozenset((some[m.chain].label, m.index) for m in members) for members in group(some, 0.7)}
        for some in (chains, chains[::-1])
    )
    assert here == there


def test_of_two_near_copies_in_a_chain_the_nearer_joins():
    base = unit_rows(3, 1, d=D)
    twin = base[0] + 0.3 * unit_rows(1, 5, d=D)[0]
    a = core_from(torch.stack([twin, base[0], base[1]]), "a", 0)
    b, c = core_from(base, "b", 1), core_from(base, "c", 2)
    groups = {frozenset((m.chain, m.index) for m in members) for members in group([a, b, c], 0.5)}
    assert cosines(a.core.W_dec_CD[:1], b.core.W_dec_CD[:1])[0, 0] > 0.9
    assert groups == {
        frozenset({(0, 1), (1, 0), (2, 0)}),
        frozenset({(0, 2), (1, 1), (2, 1)}),
        frozenset({(1, 2), (2, 2)}),
        frozenset({(0, 0)}),
    }


def test_a_chain_never_joins_twice_however_dense_the_links():
    torch.manual_seed(3)
    crowd = [core_from(unit_rows(1, 0, d=D) + 0.12 * torch.randn(6, D), f"c{i}", i) for i in range(5)]
    groups = group(crowd, 0.3)
    assert any(len(members) > 2 for members in groups)
    for members in groups:
        assert len({member.chain for member in members}) == len(members)


def smaller_cosine(chains, a: Member, b: Member) -> float:
    return min(
        float(
            torch.nn.functional.cosine_similarity(
                *(getattr(chains[m.chain].core, name)[m.index].double() for m in (a, b)), dim=0
            )
        )
        for name in ("W_enc_CD", "W_dec_CD")
    )


def at(*degrees):
    """Rows at these angles in a plane."""
    rows_ND = torch.zeros(len(degrees), D)
    rows_ND[:, :2] = torch.tensor([[np.cos(np.radians(one)), np.sin(np.radians(one))] for one in degrees])
    return rows_ND


def chain_of(seed, enc, dec):
    return NamedCore(f"s{seed}", seed, core_of(latents(2.0 * at(*enc), at(*dec)), range(len(dec)), seed=seed))


def fan(degrees):
    """Chains of one latent each, encoder and decoder row at one of these angles."""
    return [chain_of(seed, [degree], [degree]) for seed, degree in enumerate(degrees)]


def sizes(chains, cosine=0.7):
    return sorted((len(feature.members) for feature in find_consensus(chains, cosine).features), reverse=True)


def test_a_chain_of_small_steps_is_not_one_feature():
    """Each of these is within the bar of the next, cosine 0.72, and the ends stand at -0.67; a cluster within the bar
    throughout is one."""
    found = find_consensus(fan([0, 44, 88, 132]))
    assert max(feature.in_seeds for feature in found.features) == 2, "not one feature in four of four seeds"
    assert " 0 in all; " in consensus_text(found.to_dict()).plain
    assert all(feature.smallest_cosine is None or feature.smallest_cosine >= 0.7 for feature in found.features)
    cluster = find_consensus(fan([0, 10, 25, 44]))
    assert all(words in consensus_text(cluster.to_dict()).plain for words in (" 1 in all; ", "smallest cosine 0.72"))
    (tight,) = cluster.features
    assert (tight.in_seeds, tight.elsewhere) == (4, 1.0)
    assert tight.smallest_cosine == pytest.approx(np.cos(np.radians(44)), abs=1e-6)
    assert tight.cosine == pytest.approx(np.mean([np.cos(np.radians(a)) for a in (10, 25, 44, 15, 34, 19)]), abs=1e-6)


def test_one_bad_pair_keeps_two_groups_apart():
    assert sizes(fan([0, 8, 40, 45])) == [4] and sizes(fan([0, 8, 40, 47])) == [2, 2], "47 degrees: cosine 0.68"


def test_encoder_rows_have_to_agree_as_well():
    """Decoder rows as close as can be, of the encoder rows one far from another: and the smaller cosine is said."""
    assert sizes([chain_of(seed, [enc], [0]) for seed, enc in enumerate([0, 30, 60])]) == [2, 1]
    (near,) = find_consensus([chain_of(seed, [enc], [0]) for seed, enc in enumerate([0, 20, 40])]).features
    assert near.cosine == pytest.approx(1) and near.smallest_cosine == pytest.approx(np.cos(np.radians(40)), abs=1e-6)


def test_latents_that_are_no_matched_pair_may_be_one_feature():
    """The second chain's latent has a nearer decoder row beside the first one's in the first chain, so that the two
    matchings do not agree on it; it stands 16 degrees from the first, and both are near the third chain's.
    """
    chains = [chain_of(0, [0, 90], [0, 14]), chain_of(1, [16], [16]), chain_of(2, [6], [6])]
    assert (Member(0, 0), Member(1, 0)) not in links(chains, 0.7)
    assert sizes(chains) == [3, 1]


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_which_chain_comes_first_does_not_matter(order):
    chains = fan([0, 44, 87, 129])
    here, there = (
        {frozenset(some[m.chain].label for m in members) for members in group(some, 0.7)}
        for some in (chains, [chains[i] for i in order])
    )
    assert here == there


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5), noise=st.floats(0.02, 0.3), seed=st.integers(0, 10_000)
)
def test_groups_are_what_greedy_joining_must_leave(sizes, noise, seed):
    """Every latent once, no chain twice, the surest link joined, and no link left that could still join two groups."""
    generator = torch.Generator().manual_seed(seed)
    features_CD = unit_rows(4, 1, d=16)
    chains = []
    for i, size in enumerate(sizes):
        which = torch.randint(4, (size,), generator=generator)
        chains.append(core_from(features_CD[which] + noise * torch.randn(size, 16, generator=generator), f"c{i}", i))
    groups = [set(members) for members in group(chains, 0.5)]
    assert sorted(member for members in groups for member in members) == [
        Member(i, row) for i, size in enumerate(sizes) for row in range(size)
    ]
    assert all(len({member.chain for member in members}) == len(members) for members in groups)
    of = {member: members for members in groups for member in members}
    found = links(chains, 0.5)
    assert not found or of[found[0][0]] is of[found[0][1]]
    for left, right in found:
        assert (
            of[left] is of[right]
            or {m.chain for m in of[left]} & {m.chain for m in of[right]}
            or any(smaller_cosine(chains, a, b) < 0.5 for a in of[left] for b in of[right])
        )
    for members in groups:
        assert all(smaller_cosine(chains, a, b) >= 0.5 for a, b in combinations(members, 2))


def test_chains_of_one_seed_count_once():
    rows_CD = unit_rows(4, 1, d=D)
    chains = [core_from(rows_CD, f"seed0-k{k}", 0, k) for k in (16, 32, 64)] + [
        core_from(unit_rows(4, 7, d=D), "seed1-k16", 1)
    ]
    found = find_consensus(chains)
    assert (found.features[0].in_seeds, len(found.features[0].members), found.features[0].elsewhere) == (1, 3, 0)
    assert found.core is None, "half of the seeds, and yet one seed: no agreement"
    assert found.to_dict()["core_size"] == 0


@pytest.mark.parametrize("share, size", [(0.5, 2), (0.75, 1), (1.0, 0)])
def test_how_many_seeds_make_a_consensus(share, size):
    """Of four seeds one feature is in three, one in two."""
    rows_CD, own = unit_rows(2, 1, d=D), [unit_rows(2, 20 + i, d=D) for i in range(4)]
    rows = [rows_CD, rows_CD, torch.cat([rows_CD[:1], own[2]]), own[3]]
    found = find_consensus([core_from(some, f"s{i}", i) for i, some in enumerate(rows)], share=share)
    assert (0 if found.core is None else found.core.size) == size


def test_the_core_is_made_of_means(tmp_path):
    chains, _ = planted()
    found = find_consensus(chains)
    core = found.core
    assert core.size == COMMON and (core.cycle, core.seed, core.k, core.selected) == (0, 0, 16, ((0,),) * COMMON)
    for row, feature in enumerate(found.features[:COMMON]):
        rows = [chains[m.chain].core for m in feature.members]
        W_dec_GD = torch.stack([one.W_dec_CD[m.index] for one, m in zip(rows, feature.members, strict=True)])
        assert torch.allclose(core.W_dec_CD[row], W_dec_GD.mean(0) / W_dec_GD.mean(0).norm(), atol=1e-6)
        assert float(core.W_enc_CD[row].norm()) == pytest.approx(2.0, abs=1e-5), (
            "as long as the members' rows, not shorter"
        )
        assert cosines(core.W_enc_CD[row : row + 1], core.W_dec_CD[row : row + 1])[0, 0] == pytest.approx(1, abs=1e-6)
    path = tmp_path / "consensus.safetensors"
    core.save(path)
    assert torch.equal(Core.load(path).W_enc_CD, core.W_enc_CD)


def test_means_weigh_members_alike_and_rows_are_sorted():
    rows_CD = unit_rows(3, 1, d=D)
    a = core_from(rows_CD, "a", 0, scores=[1.0, 5.0, 4.0])
    b = core_from(rows_CD[[2, 0, 1]], "b", 1, scores=[2.0, 2.0, 4.0], theta=1.5)
    found = find_consensus([a, b])
    # Shares 0.1, 0.5, 0.4 and, in the same order, 0.25, 0.5, 0.25.
    assert [feature.score for feature in found.features] == pytest.approx([0.5, 0.325, 0.175])
    assert found.core.scores_C.tolist() == pytest.approx([4.5, 3.0, 1.5]) and found.core.theta == 1.0
    assert torch.allclose(found.core.W_dec_CD, rows_CD[[1, 2, 0]], atol=1e-6)


def test_one_chain_and_empty_cores():
    alone = find_consensus([core_from(unit_rows(3, 0, d=D), "a", 0)])
    assert alone.core is None and [feature.elsewhere for feature in alone.features] == [None] * 3
    assert alone.features[0].in_seeds == 1 and alone.features[0].interval is None, "there is no other seed"
    empty = core_from(unit_rows(3, 0, d=D), "a", 0)
    sae = latents(unit_rows(3, 0, d=D))
    nothing = replace(empty, label="n", seed=1, core=core_of(sae, torch.zeros(0, dtype=torch.int64), seed=1))
    assert find_consensus([nothing]).features == () and len(find_consensus([empty, nothing]).features) == 3
    zero = core_from(unit_rows(3, 0, d=D), "z", 1, scores=np.zeros(3))
    assert find_consensus([zero]).features[0].score == 0


@pytest.mark.parametrize(
    "name, value", [("hook", "elsewhere"), ("model", "other"), ("scale", 2.0), ("selected_by", "random")]
)
def test_cores_of_different_things_are_refused(name, value):
    a, b = core_from(unit_rows(3, 0, d=D), "a", 0), core_from(unit_rows(3, 0, d=D), "b", 1, **{name: value})
    with pytest.raises(ValueError, match=f"b has {name} .*, a has "):
        find_consensus([a, b])


def test_the_plain_form():
    chains, _ = planted()
    plain = json.loads(json.dumps(find_consensus(chains).to_dict(), allow_nan=False))
    assert (
        plain["chains"] == ["seed0", "seed1", "seed2", "seed3"]
        and plain["seeds"] == [0, 1, 2, 3]
        and plain["core_size"] == COMMON
    )
    first = plain["groups"][0]
    assert (
        first["id"] == "f000"
        and first["in_chains"] == 3
        and [member["chain"] for member in first["members"]] == ["seed0", "seed1", "seed2"]
    )
    assert (
        set(first["members"][0]) == {"chain", "index", "latent", "score", "density"}
        and plain["groups"][-1]["id"] == "f039"
    )
