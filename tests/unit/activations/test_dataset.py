"""A dataset of shards: its manifest, its statistics, and that all damage is found before anyone trains on it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from shards import PER_GROUP, D, bits, make_dataset, some_rows, write

from dmsae_ray.activations.dataset import (
    PART,
    QUANTILES,
    ActivationDataset,
    DatasetError,
    Manifest,
    scale_of,
    statistics_of,
)
from dmsae_ray.activations.rowgroup import ShardError
from dmsae_ray.corpus.tokens import TokenSequences


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "d", shards=3, last=20)


def again(dataset) -> ActivationDataset:
    """The dataset as another process opens it."""
    return ActivationDataset(str(dataset))


def edit(dataset, change):
    """Change the manifest as it stands on disk."""
    path = dataset.store.local / "manifest.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def flip(path, place):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


# -- manifest and statistics
# ---------------------------------------------------------------------------------------------


def test_a_manifest_reads_back_as_itself(dataset):
    assert again(dataset).manifest == dataset.manifest
    assert Manifest.from_dict(json.loads(json.dumps(asdict(dataset.manifest)))) == dataset.manifest
    assert dataset.manifest.rows == 32 + 32 + 20 and dataset.manifest.row_bytes == 2 * D


@pytest.mark.parametrize("rows", [1, 100, PART + 3])
def test_statistics_are_those_of_numpy(rows):
    """In fp64: fp16 rows far from zero, whose squares overflow fp16 and whose mean would drown in fp32 sums."""
    rows_ND = (some_rows(rows).float() * 30 + torch.linspace(-900, 2000, D)).half()
    plain_ND = rows_ND.numpy().astype(np.float64)
    found, norms_N = statistics_of(rows_ND), np.linalg.norm(plain_ND, axis=1)
    np.testing.assert_allclose(found["mean"], plain_ND.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found["variance"], plain_ND.var(axis=0), rtol=1e-9, atol=1e-12)
    assert list(found["norm_quantiles"]) == [f"{q:g}" for q in QUANTILES]
    np.testing.assert_allclose(list(found["norm_quantiles"].values()), np.quantile(norms_N, QUANTILES), rtol=1e-12)
    assert found["scale"] == scale_of(rows_ND) == pytest.approx(np.sqrt((norms_N**2).mean()), rel=1e-12)
    assert ((plain_ND / found["scale"]) ** 2).sum(axis=1).mean() == pytest.approx(1, rel=1e-12)


def test_units_are_the_full_row_groups_in_file_order(dataset):
    per_shard = [shard.units() for shard in dataset.manifest.shards]
    assert [len(units) for units in per_shard] == [4, 4, 3] and dataset.units() == per_shard[0] + per_shard[
        1
    ] + per_shard[2][:2]
    assert dataset.units(range(1, 3)) == per_shard[1] + per_shard[2][:2] and dataset.units(range(0)) == []
    raw = b"".join(
        (dataset.store.local / u.file).read_bytes()[u.offset : u.offset + PER_GROUP * 2 * D] for u in dataset.units()
    )
    expected = torch.cat([some_rows(32, 0), some_rows(32, 1), some_rows(20, 2)[:16]])
    assert raw == bits(expected).numpy().tobytes()


def test_calibration_rows_are_those_that_were_written(dataset):
    assert torch.equal(dataset.calibration_rows(), some_rows(32, 99))


def test_held_out_sequences_are_read_from_the_dataset(dataset):
    lengths = np.array([5, 8], dtype=np.int32)
    sequences = TokenSequences(np.arange(16, dtype=np.int32).reshape(2, 8), lengths, lengths - np.int32(1))
    sequences.save(dataset.store.local / "tokens" / "evaluation.safetensors")
    found = dataset.held_out("evaluation")
    assert (found.ids == sequences.ids).all() and (found.lengths == lengths).all() and found.tokens == 11


# -- a manifest that is not one
# -----------------------------------------------------------------------------------------


def test_no_manifest_no_dataset(tmp_path):
    with pytest.raises(
        DatasetError, match=rf"{tmp_path}/manifest\.json: no finished dataset here; run .*dmsae_ray\.harvest"
    ):
        ActivationDataset(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00{", b"\x80abc", b"[]", b"null", b'"text"'])
def test_a_manifest_that_is_none_is_named_with_the_remedy(dataset, content):
    (dataset.store.local / "manifest.json").write_bytes(content)
    with pytest.raises(
        DatasetError, match=r"d/manifest\.json: (damaged|not a manifest).*delete it.*dmsae_ray\.harvest.*kept"
    ):
        again(dataset)


def test_a_manifest_of_another_format_is_named(dataset):
    for version in (1, 3, None):
        edit(dataset, lambda tree: tree.update(format_version=version))
        with pytest.raises(DatasetError, match=rf"d/manifest\.json: format version {version}, this program reads 2"):
            again(dataset)


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.pop("scale"),
        lambda tree: tree.pop("shards"),
        lambda tree: tree.pop("calibration"),
        lambda tree: tree["shards"][1].pop("digests"),
        lambda tree: tree.update(colour="blue"),
        lambda tree: tree.update(shards=None),
    ],
)
def test_a_manifest_with_other_fields_is_named(dataset, change):
    edit(dataset, change)
    with pytest.raises(DatasetError, match=r"d/manifest\.json: not a manifest .*delete it"):
        again(dataset)


def test_a_dataset_made_otherwise_names_each_field(dataset):
    dataset.expect(
        {"model": {"hook": "blocks.1.hook_resid_post", "dtype": "float32"}, "harvest": {"dtype": "float16", "seed": 0}}
    )
    asked = {
        "model": {"hook": "blocks.2.hook_resid_post", "dtype": "float32"},
        "harvest": {"dtype": "bfloat16", "seed": 0, "new": 1},
    }
    with pytest.raises(DatasetError) as error:
        dataset.expect(asked)
    message = str(error.value)
    for words in (
        "model.hook: the dataset has 'blocks.1.hook_resid_post'",
        "asks for 'blocks.2.hook_resid_post'",
        "harvest.dtype",
        "harvest.new: the dataset has None",
    ):
        assert words in message
    assert "seed" not in message and "model.dtype" not in message


# -- damage
# --------------------------------------------------------------------------------------------------------------


def bad(dataset, read=True) -> dict[str, str]:
    """file -> what is wrong with it."""
    found = {entry.file: error and str(error) for entry, error in again(dataset).problems(read)}
    assert list(found) == [entry.file for entry in dataset.entries()] and len(found) == 4
    for file, message in found.items():
        assert message is None or (str(dataset.store.local / file) in message and "harvest --repair" in message)
    return {file: message for file, message in found.items() if message is not None}


def test_a_good_dataset_has_no_problems(dataset):
    dataset.verify()
    assert bad(dataset) == bad(dataset, read=False) == {}


def harm_truncated(path, dataset):
    path.write_bytes(path.read_bytes()[:-40])


def harm_flipped(path, dataset):
    flip(path, dataset.manifest.shards[1].offsets[2] + 7)


def harm_missing(path, dataset):
    path.unlink()


def harm_longer(path, dataset):
    path.write_bytes(path.read_bytes() + b"0")


def harm_another_dataset(path, dataset):
    write(dataset.store, "shards/train-00001.parquet", some_rows(32, 1), key="yek")


def harm_other_rows(path, dataset):
    # A page's checksum takes four or five bytes in its header: rows for which they come out as long.
    size = path.stat().st_size
    assert any(
        write(dataset.store, "shards/train-00001.parquet", some_rows(32, seed)).bytes == size for seed in range(5, 99)
    )


def harm_sibling(path, dataset):
    shutil.copy(path.with_name("train-00000.parquet"), path)
    edit(dataset, lambda tree: tree["shards"][1].update(bytes=path.stat().st_size))


def harm_not_parquet(path, dataset):
    path.write_bytes(b"0" * path.stat().st_size)


@pytest.mark.parametrize(
    "harm, words, by_size_and_footer",
    [
        (harm_truncated, "bytes, the manifest says", True),
        (harm_longer, "bytes, the manifest says", True),
        (harm_missing, "is missing", True),
        (harm_another_dataset, "is a shard of another dataset, yek; this one is key", True),
        (harm_other_rows, "footer and the manifest disagree", True),
        (harm_sibling, "footer and the manifest disagree", True),
        (harm_not_parquet, "cannot be read as a shard", True),
        (harm_flipped, "has not the checksum", False),
    ],
)
def test_every_damage_is_found_and_it_alone(dataset, harm, words, by_size_and_footer):
    entry = dataset.manifest.shards[1]
    path = dataset.store.local / entry.file
    harm(path, dataset)
    if words != "is missing" and "the manifest says" not in words:
        assert path.stat().st_size == again(dataset).manifest.shards[1].bytes, "its size must not give it away"
    found = bad(dataset)
    assert list(found) == [entry.file] and words in found[entry.file]
    assert bool(bad(dataset, read=False)) == by_size_and_footer
    with pytest.raises(ShardError, match=r"train-00001\.parquet"):
        again(dataset).verify()


def test_all_bad_shards_are_found_at_once(dataset):
    for name in ("calibration", "train-00000", "train-00002"):
        (dataset.store.local / "shards" / f"{name}.parquet").write_bytes(b"")
    assert sorted(bad(dataset)) == [f"shards/{name}.parquet" for name in ("calibration", "train-00000", "train-00002")]


def test_a_manifest_whose_entry_was_altered_disagrees_with_the_footer(dataset):
    digest = dataset.manifest.shards[0].digests[0]
    edit(dataset, lambda tree: tree["shards"][0]["digests"].__setitem__(0, digest[::-1]))
    found = bad(dataset, read=False)
    assert list(found) == ["shards/train-00000.parquet"] and "manifest disagree" in found["shards/train-00000.parquet"]


def test_every_byte_of_a_shard_may_flip_and_no_row_becomes_another_number(dataset):
    """Found as damage, or one of the bytes that nothing here reads: page headers, and what Parquet repeats in its
    footer.
    """
    entry, whole = dataset.manifest.shards[2], some_rows(20, 2)
    path, found = dataset.store.local / entry.file, 0
    raw = path.read_bytes()
    for place in range(len(raw)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        try:
            dataset.check_shard(entry, read=True)
        except ShardError as error:
            assert str(path) in str(error)
            found += 1
        else:
            rows = [
                (dataset.store.local / u.file).read_bytes()[u.offset :][: PER_GROUP * 2 * D] for u in entry.units()[:2]
            ]
            assert b"".join(rows) == bits(whole[:16]).numpy().tobytes()
    assert found > 20 * 2 * D  # the rows themselves, and more


def test_a_scale_that_is_not_the_rows_is_found(dataset):
    edit(dataset, lambda tree: tree.update(scale=tree["scale"] * (1 + 1e-8)))
    with pytest.raises(
        DatasetError, match=r"d/manifest\.json: scale .*is not that of shards/calibration\.parquet .*dmsae_ray\.harvest"
    ):
        again(dataset).verify()


def test_entries_that_differ_in_any_field_are_not_equal(dataset):
    """What `check_shard` compares footers with."""
    entry = dataset.manifest.shards[0]
    changes = {"file": "x", "rows": 1, "bytes": 1, "offsets": [], "digests": [], "positions": {}}
    assert set(changes) == set(asdict(entry))
    assert all(replace(entry, **{name: value}) != entry for name, value in changes.items())
