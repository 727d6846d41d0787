"""One chain, planned: its part of the data, and what names its folder and its dataset's."""

from __future__ import annotations

import pytest
import torch
from plans import configured, plans_of
from shards import make_dataset

from dmsae_ray.distill.grid import read_more_often
from dmsae_ray.distill.mapping import attribution_settings
from dmsae_ray.driver.options import HarvestCommand, load
from dmsae_ray.identity import chain_fields, dataset_fields, fields_key


def files_of(plan, dataset) -> list[str]:
    return sorted({unit.file for unit in plan.units(dataset)})


# -- parts
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each, last", [(1, 32), (2, 32), (2, 16), (3, 8)])
@pytest.mark.parametrize("seeds, parts", [("0,1", None), ("0,1,2", None), ("5,1", 3), ("0,1", 4)])
def test_disjoint_parts_share_no_shard_and_are_equal(tmp_path, each, last, seeds, parts):
    """Also where the last shard of each is not full."""
    n = parts or seeds.count(",") + 1
    dataset = make_dataset(tmp_path / "d", shards=n * each, last=last, parts=n)
    plans = plans_of(
        dataset, "--sweep.data", "disjoint", "--sweep.seeds", seeds, *(["--sweep.parts", str(parts)] if parts else [])
    )
    units = [plan.units(dataset) for plan in plans]
    taken = [unit for some in units for unit in some]
    assert len(taken) == len(set(taken)) and {len(some) for some in units} == {len(units[0])}
    files = [files_of(plan, dataset) for plan in plans]
    assert len({file for some in files for file in some}) == sum(len(some) for some in files), "no shard in two parts"
    all_units, size = dataset.units(), len(units[0])
    assert n * size == len(all_units), "nothing is left over"
    for plan, some in zip(plans, units, strict=True):
        part = plan.seed % n
        assert some == all_units[part * size : (part + 1) * size], "seed modulo parts"
        assert plan.order(dataset, cycle=0).n_units == size
        assert plan.attribution_split == f"attribution-{part}"


def test_sparsities_of_a_seed_share_its_part_and_shared_data_is_all(tmp_path):
    dataset = make_dataset(tmp_path / "d", shards=4, parts=2)
    some = plans_of(dataset, "--sweep.data", "disjoint", "--sweep.k", "4,8")
    assert [(plan.seed, plan.k) for plan in some] == [(0, 4), (1, 4), (0, 8), (1, 8)]
    assert some[0].units(dataset) == some[2].units(dataset) != some[1].units(dataset)
    for shared in (plans_of(dataset), plans_of(dataset, "--sweep.parts", "2")):
        assert all(plan.units(dataset) == dataset.units() for plan in shared)
        assert {plan.attribution_split for plan in shared} == {"attribution"}


def test_a_seed_added_later_takes_a_part_of_its_own_where_parts_leave_room(tmp_path):
    dataset = make_dataset(tmp_path / "d", shards=4, parts=4)
    before = plans_of(dataset, "--sweep.data", "disjoint", "--sweep.parts", "4")
    after = plans_of(dataset, "--sweep.data", "disjoint", "--sweep.parts", "4", "--sweep.seeds", "0,1,2")
    assert [plan.key for plan in after[:2]] == [plan.key for plan in before]
    assert not set(files_of(after[2], dataset)) & {file for plan in before for file in files_of(plan, dataset)}


def test_disjoint_chains_that_read_their_rows_more_often_than_others_are_told_of(tmp_path):
    """640 rows a cycle: 5 passes over all 128 rows, 10 over a half of them."""
    dataset = make_dataset(tmp_path / "d", shards=4, parts=2)
    shared, apart = plans_of(dataset, "--sweep.parts", "2"), plans_of(dataset, "--sweep.data", "disjoint")
    said = read_more_often(shared + apart, dataset)
    assert "one of 2 parts has 64: disjoint chains read each row 10 times" in said
    assert "on shared data 5 times" in said and "harvest.tokens 1280 or more" in said
    assert read_more_often(shared, dataset) is read_more_often(apart, dataset) is None, "nothing unlike is compared"
    enough = ("--train.tokens", "64")
    both = plans_of(dataset, "--sweep.parts", "2", *enough) + plans_of(dataset, "--sweep.data", "disjoint", *enough)
    assert read_more_often(both, dataset) is None


def refused(*argv, tokens=4 * 32) -> str:
    with pytest.raises(ValueError) as error:
        configured(*argv, tokens=tokens)
    return str(error.value)


def test_two_seeds_of_one_part_are_refused_with_a_number_that_helps():
    message = refused("--sweep.data", "disjoint", "--sweep.seeds", "0,2")
    assert "sweep.seeds [0, 2]" in message and "the same of 2 parts" in message and "set sweep.parts to 3" in message
    configured("--sweep.data", "disjoint", "--sweep.seeds", "0,2", "--sweep.parts", "3", tokens=4 * 32)
    message = refused("--sweep.data", "disjoint", "--sweep.seeds", "0,4,6", "--sweep.parts", "4", tokens=40 * 32)
    assert "the same of 4 parts" in message and "set sweep.parts to 5" in message
    configured("--sweep.data", "disjoint", "--sweep.seeds", "0,4,6", "--sweep.parts", "5", tokens=40 * 32)
    message = refused("--sweep.data", "disjoint", "--sweep.seeds", "3")
    assert "sweep.data disjoint with one seed, 3: set sweep.parts" in message


def test_too_few_rows_for_the_parts_are_refused():
    message = refused("--sweep.data", "disjoint", "--sweep.parts", "4", tokens=4 * 32 - 1)
    assert "sweep.parts 4: of harvest.tokens 127 each part has 31, less than one row group for each lane" in message
    # Chains on shared data read all parts, but each part is made in whole row groups.
    assert "each part has 31" in refused("--sweep.parts", "4", tokens=4 * 32 - 1)
    configured("--sweep.data", "disjoint", "--sweep.parts", "4", tokens=4 * 32)


# -- keys
# ----------------------------------------------------------------------------------------------------------------


def chain_key(*argv, seed=0, k=4):
    return fields_key(chain_fields(configured(*argv, tokens=8 * 32), seed, k, "data"))


def test_a_chain_s_key_changes_with_its_part_and_not_with_who_works_on_it():
    same, disjoint = chain_key(), ("--sweep.data", "disjoint")
    for argv in (
        ["--cluster.workers", "2"],
        ["--cluster.workers", "4", "--cluster.cpus_per_worker", "1"],
        ["--cluster.read_tasks", "1"],
        ["--cluster.fetch_ahead", "1"],
        ["--cluster.object_store_mb", "64"],
    ):
        assert chain_key(*argv) == same, argv
    # One data seed and all else equal: only the part differs.
    fixed = ("--sweep.data_seed", "5")
    parts = [
        chain_key(*fixed),
        chain_key(*disjoint, *fixed),
        chain_key(*disjoint, *fixed, "--sweep.parts", "3"),
        chain_key(*disjoint, *fixed, "--sweep.seeds", "0,1,2,3"),
    ]
    assert len(set(parts)) == 4
    assert chain_key(*disjoint, "--sweep.seeds", "0,1,2", seed=1) == chain_key(*disjoint, "--sweep.parts", "3", seed=1)
    assert chain_key(*disjoint, "--cluster.workers", "2") == chain_key(*disjoint)


def dataset_key(*argv, hook=None):
    return fields_key(dataset_fields(load(HarvestCommand, list(argv)), "model", "corpus", hook))


def test_a_dataset_s_key_is_the_same_wherever_and_with_whatever_it_is_made():
    same = dataset_key()
    for argv in (
        ["--harvest.hooks", "blocks.1.hook_resid_post,blocks.0.hook_mlp_out"],
        ["--harvest.store", "s3://bucket/p"],
        ["--harvest.actors", "7"],
        ["--harvest.gpus_per_actor", "0.5"],
        ["--harvest.dataset", "/elsewhere"],
        ["--model.device_map", "auto"],
        ["--cluster.workers", "2"],
        ["--sweep.seeds", "5,6"],
    ):
        assert dataset_key(*argv) == same, argv
    for argv in (
        ["--harvest.seed", "1"],
        ["--harvest.dtype", "bfloat16"],
        ["--harvest.sequences_per_forward", "16"],
        ["--harvest.threads", "2"],
        ["--harvest.outlier_norm", "6"],
        ["--harvest.tokens", "400000"],
        ["--model.context", "64"],
        ["--model.dtype", "bfloat16"],
        ["--model.hook", "blocks.1.hook_resid_post"],
        ["--sweep.parts", "2"],
        ["--sweep.data", "disjoint"],
    ):
        assert dataset_key(*argv) != same, argv
    dealt = dataset_key("--sweep.parts", "3")
    assert (
        dataset_key("--sweep.data", "disjoint", "--sweep.seeds", "0,1,2") == dealt != dataset_key("--sweep.parts", "2")
    )


def test_a_further_hook_has_the_key_it_has_alone():
    alone = dataset_key("--model.hook", "blocks.1.hook_resid_post")
    beside = dataset_key("--harvest.hooks", "blocks.1.hook_resid_post", hook="blocks.1.hook_resid_post")
    assert beside == alone != dataset_key()


def test_every_cycle_and_seed_starts_from_numbers_of_its_own(tmp_path):
    plans = plans_of(make_dataset(tmp_path / "d", shards=4), "--sweep.k", "4,8")
    seeds = {(plan.seed, cycle): plan.init_seed(cycle) for plan in plans for cycle in range(8)}
    assert len(set(seeds.values())) == 16, "chains of different sparsity start alike, all else differs"
    assert all(0 <= seed < 2**63 for seed in seeds.values())
    torch.Generator().manual_seed(max(seeds.values()))  # what it is for takes it


def test_outliers_are_measured_by_the_median_norm_of_the_rows_held_back(tmp_path):
    dataset = make_dataset(tmp_path / "d", shards=4)
    (bounded, *_), (free, *_) = plans_of(dataset, "--attribution.outlier_norm", "3"), plans_of(dataset)
    median = float(dataset.calibration_rows().double().norm(dim=1).quantile(0.5))
    assert attribution_settings(bounded.config, dataset.manifest).max_norm == pytest.approx(3 * median)
    assert attribution_settings(free.config, dataset.manifest).max_norm is None
