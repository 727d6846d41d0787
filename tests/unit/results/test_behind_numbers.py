"""The samples behind named numbers have their means and intervals."""

from itertools import combinations

import numpy as np
import pytest
from compared_chains import compare_all, comparer, make_chain, named

from dmsae_ray.compare.pairing import pairs_within
from dmsae_ray.compare.rediscovery import SETS, summarise_rediscovery
from dmsae_ray.compare.summary import summarise
from dmsae_ray.results.behind_numbers import samples_by_name
from dmsae_ray.results.numbers import numbers_of


def rediscovered(seed, k, rng):
    row = {"chain": f"plain-seed{seed}-k{k}", "arm": "plain", "seed": seed, "k": k}
    row |= {name: {"found": rng.random(), "mmcs": rng.random(), "size": 9} for name in SETS}
    row["matched"] |= {"available": seed != 11}
    return row


def results():
    """Evaluation, comparison and consensus as their files hold them, of four seeds at two k."""
    rng = np.random.default_rng(0)
    (model,) = compare_all([make_chain(0), make_chain(1)], comparer())
    chains = [named(seed=seed, k=k) for seed in range(4) for k in (16, 32)]
    pairs = [
        model.of(pairing).__class__(**vars(model.of(pairing)) | {"pw_mcc": rng.random(), "overlap": rng.random()})
        for pairing in pairs_within(chains)
    ]
    evaluation = [
        {
            "arm": "base",
            "seed": seed,
            "k": k,
            "last": True,
            "fvu": rng.random(),
            "decoder_drift": {"mean": rng.random()},
        }
        for seed in range(4)
        for k in (16, 32)
    ]
    rows = [rediscovered(seed, k, rng) for seed in range(10, 14) for k in (16, 32)]
    consensus = {"seeds": [0], "core_size": 0, "groups": [], "rediscovery": rows}
    return (
        evaluation,
        {"pairs": [pair.to_dict() for pair in pairs], "summary": summarise(pairs).to_dict()},
        consensus | {"rediscovery_summary": summarise_rediscovery(rows)},
    )


def test_the_samples_are_what_the_numbers_are_means_of():
    numbers, samples = numbers_of(*results()), samples_by_name(*results())
    for name, sample in samples.items():
        assert numbers[name] == pytest.approx(sample.mean), name
        if f"{name}.low" in numbers:
            assert (numbers[f"{name}.low"], numbers[f"{name}.high"]) == pytest.approx(sample.interval()), name
    counts = (".pairs", ".of", ".scored", ".seeds", ".available", ".above", ".saes", ".features", ".tokens")
    ends = (".min", ".max", ".low", ".high")
    alone = {
        name for name in numbers if name not in samples and not name.endswith(counts + ends) and ".beyond." not in name
    }
    assert alone == {"chains.base", "consensus.groups", "consensus.core_size"}
    for name in (
        "evaluation.base.k16.fvu",
        "consistency.base.seed.pw_mcc",
        "consistency.base.seed.k32.pw_mcc",
        "consistency.base.seed.nulls.cycle0.excess.pw_mcc",
        "rediscovery.plain.k16.excess.consensus.free_consensus.found",
    ):
        assert name in samples


def test_a_sample_has_the_seeds_and_k_of_its_values():
    samples = samples_by_name(*results())
    assert {o.seeds for o in samples["consistency.base.seed.pw_mcc"].origins} == set(combinations(range(4), 2))
    assert {o.ks for o in samples["consistency.base.seed.k16.pw_mcc"].origins} == {(16, 16)}
    assert {o.ks for o in samples["consistency.base.k.pw_mcc"].origins} == {(16, 32)}
    assert samples["rediscovery.plain.matched.found"].seeds == {10, 12, 13}, "where it is no comparison it is left out"
    assert samples["evaluation.base.k32.fvu"].seeds == {0, 1, 2, 3}
