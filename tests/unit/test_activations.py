"""Shards, datasets and the order of rows. No Ray."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmsae_ray.activations.dataset import ActivationDataset, DatasetError, Manifest, scale_of
from dmsae_ray.activations.harvest import plan_shards, shard_entry
from dmsae_ray.activations.order import Order
from dmsae_ray.activations.shard import COLUMN, ShardError, as_tensor, read_group, read_rows, write_shard

D, PER_GROUP = 12, 8


def make_dataset(folder, shards=2, rows=32, dtype=torch.float16):
    """A small finished dataset of random rows."""
    (folder / "shards").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    entries = []
    for name in [*(f"train-{i:05d}" for i in range(shards)), "calibration"]:
        path = folder / "shards" / f"{name}.parquet"
        write_shard(path, torch.randn(rows, D, generator=generator).to(dtype), PER_GROUP, {"dataset": "key"})
        entries.append(shard_entry(folder, path, rows))
    calibration = read_rows(folder / "shards" / "calibration.parquet", D, str(dtype).split(".")[1])
    fields = {"model": {"hook": "blocks.1.hook_resid_post", "dtype": "float32"}, "harvest": {"dtype": "float16", "seed": 0}}
    Manifest(
        key="key", model="m", model_fingerprint="f", corpus_fingerprint="c", hook="blocks.1.hook_resid_post", d=D,
        dtype="float16", context=8, seed=0, rows_per_group=PER_GROUP, scale=scale_of(calibration),
        mean=calibration.double().mean(0).tolist(), shards=entries[:-1], calibration=entries[-1], fields=fields,
    ).save(folder)  # fmt: skip
    return ActivationDataset(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_come_back_bit_for_bit(tmp_path, dtype):
    rows = torch.randn(20, D).to(dtype)
    write_shard(tmp_path / "s.parquet", rows, PER_GROUP, {})
    back = read_rows(tmp_path / "s.parquet", D, str(dtype).split(".")[1])
    assert back.dtype == dtype and torch.equal(back.view(torch.int16), rows.view(torch.int16))
    sliced = as_tensor(read_group(tmp_path / "s.parquet", 1)[COLUMN].slice(2, 3), D, str(dtype).split(".")[1])
    assert torch.equal(sliced, rows[PER_GROUP + 2 : PER_GROUP + 5])


def test_same_rows_same_bytes(tmp_path):
    rows = torch.randn(20, D).half()
    for name in ("a", "b"):
        write_shard(tmp_path / name, rows, PER_GROUP, {"dataset": "k"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_nothing_is_written_of_rows_that_are_not_finite(tmp_path):
    rows = torch.zeros(4, D).half()
    rows[2, 3] = float("inf")
    with pytest.raises(ValueError, match="row 2"):
        write_shard(tmp_path / "s.parquet", rows, PER_GROUP, {})
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_byte_is_an_error_and_never_a_number(tmp_path):
    path = tmp_path / "s.parquet"
    write_shard(path, torch.randn(64, D).half(), 64, {})
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ShardError, match=r"s\.parquet.*harvest"):
        read_group(path, 0)


def test_a_good_dataset_verifies(tmp_path):
    make_dataset(tmp_path / "d").verify()


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "scale"])
def test_damage_is_found_at_the_start_and_names_the_file(tmp_path, harm):
    dataset = make_dataset(tmp_path / "d")
    path = dataset.paths()[1]
    if harm == "truncate":
        path.write_bytes(path.read_bytes()[:-40])
    elif harm == "flip":
        raw = bytearray(path.read_bytes())
        raw[200] ^= 8
        path.write_bytes(raw)
    elif harm == "remove":
        path.unlink()
    else:
        manifest = dataset.folder / "manifest.json"
        manifest.write_text(manifest.read_text().replace(f'"scale": {dataset.manifest.scale}', '"scale": 1.5'))
        path = manifest
    with pytest.raises((ShardError, DatasetError)) as error:
        ActivationDataset(tmp_path / "d").verify()
    assert str(path) in str(error.value) and "dmsae_ray.harvest" in str(error.value)


def test_a_dataset_made_otherwise_names_each_field(tmp_path):
    dataset = make_dataset(tmp_path / "d")
    asked = {"model": {"hook": "blocks.2.hook_resid_post", "dtype": "float32"}, "harvest": {"dtype": "bfloat16", "seed": 0}}
    with pytest.raises(DatasetError) as error:
        dataset.expect(asked)
    message = str(error.value)
    assert "model.hook" in message and "blocks.1.hook_resid_post" in message and "harvest.dtype" in message
    assert "seed" not in message


def test_no_manifest_no_dataset(tmp_path):
    with pytest.raises(DatasetError, match="no finished dataset"):
        ActivationDataset(tmp_path)


def test_shards_share_no_sequence_and_their_plan_is_seeded():
    rows = np.random.default_rng(0).integers(4, 29, size=400)
    plans = plan_shards(rows, 2048, 256, 512, 64, seed=1)
    assert [p.name for p in plans] == ["calibration", "train-00000", "train-00001", "train-00002", "train-00003"]
    taken = [s for p in plans for s in p.sequences]
    assert len(taken) == len(set(taken))
    for plan in plans:
        have = sum(rows[s] for s in plan.sequences)
        assert have >= plan.rows > have - 30
    assert plan_shards(rows, 2048, 256, 512, 64, seed=1) == plans != plan_shards(rows, 2048, 256, 512, 64, seed=2)


def test_a_corpus_that_is_too_small_says_how_much_it_has():
    with pytest.raises(ValueError, match=r"harvest\.tokens 2048.*gives only 900 rows"):
        plan_shards(np.full(100, 9), 2048, 256, 512, 64, seed=0)


@given(st.integers(8, 40), st.sampled_from([1, 2, 4]), st.integers(0, 3), st.integers(0, 3))
def test_the_global_batch_is_the_same_for_any_number_of_workers(n_units, world, seed, cycle):
    order = Order(n_units=n_units, unit_rows=32, batch=64, lanes=8, data_seed=seed, cycle=cycle)
    round_, row = order.position(5)
    units = order.units(round_)
    alone = np.concatenate([units[lane] * 32 + order.rows(round_, units[lane])[row : row + 8] for lane in range(8)])
    shared = np.empty_like(alone)
    for rank in range(world):
        mine = np.concatenate([units[l] * 32 + order.rows(round_, units[l])[row : row + 8] for l in order.lanes_of(rank, world)])
        shared[order.token_index(rank, world)] = mine
    assert (alone == shared).all()


def test_a_pass_takes_every_row_at_most_once_and_passes_differ():
    order = Order(n_units=17, unit_rows=16, batch=32, lanes=8, data_seed=3, cycle=1)
    passes = []
    for pass_ in range(2):
        rows = []
        for round_ in range(pass_ * order.rounds_per_pass, (pass_ + 1) * order.rounds_per_pass):
            for unit in order.units(round_):
                rows += (unit * 16 + order.rows(round_, unit)).tolist()
        assert len(rows) == len(set(rows)) == 16 * 16
        passes.append(rows)
    assert passes[0] != passes[1]


def test_cycles_and_data_seeds_give_other_orders():
    def first(seed, cycle):
        order = Order(n_units=64, unit_rows=16, batch=32, lanes=8, data_seed=seed, cycle=cycle)
        return order.units(0).tolist(), order.rows(0, 5).tolist()

    assert first(0, 0) == first(0, 0)
    assert first(0, 0)[0] != first(0, 1)[0] and first(0, 0)[1] != first(1, 0)[1]
