"""A small finished dataset of random rows that tests share, made by the parts that make the real ones."""

from __future__ import annotations

import torch

from dmsae_ray.activations.dataset import ActivationDataset, Manifest, statistics_of
from dmsae_ray.activations.shard import DTYPES, ShardEntry, ShardWriter, read_rows
from dmsae_ray.store import Store

D, PER_GROUP = 12, 8
NOTHING = {"bos": 0, "padding": 0, "outlier": 0, "unused": 0}
FIELDS = {"model": {"hook": "blocks.1.hook_resid_post", "dtype": "float32"}, "harvest": {"dtype": "float16", "seed": 0}}


def some_rows(rows: int, seed: int = 0, d: int = D, dtype: str = "float16") -> torch.Tensor:
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])


def bits(rows_ND: torch.Tensor) -> torch.Tensor:
    return rows_ND.contiguous().view(torch.int16)


def write(
    store: Store, name: str, rows_ND: torch.Tensor, per_group: int = PER_GROUP, key: str = "key", **about
) -> ShardEntry:
    return ShardWriter().write(store, name, rows_ND, per_group, {"dataset": key, **about}, NOTHING)


def make_dataset(
    folder,
    shards: int = 2,
    rows: int = 32,
    per_group: int = PER_GROUP,
    last: int | None = None,
    key: str = "key",
    parts: int = 1,
):
    """shards of so many rows, the last one of each part of `last` rows, and a calibration shard."""
    store = Store(folder)
    sizes = [*[rows] * (shards // parts - 1), rows if last is None else last] * parts
    entries = [
        write(store, f"shards/train-{i:05d}.parquet", some_rows(size, seed=i), per_group, key)
        for i, size in enumerate(sizes)
    ]
    calibration = write(store, "shards/calibration.parquet", some_rows(rows, seed=99), per_group, key)
    Manifest(
        key=key,
        model="m",
        model_fingerprint="f",
        corpus_fingerprint="c",
        hook="blocks.1.hook_resid_post",
        d=D,
        dtype="float16",
        context=8,
        seed=0,
        rows_per_group=per_group,
        positions=NOTHING,
        shards=entries,
        calibration=calibration,
        fields=FIELDS | ({"sweep": {"parts": parts}} if parts > 1 else {}),
        **statistics_of(read_rows(store, calibration, per_group, D, "float16")),
    ).save(store)
    return ActivationDataset(store)
