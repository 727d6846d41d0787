"""A dataset of shards: its manifest, and the checks before anyone trains on it.

Layout of its store: `manifest.json` (written last), `shards/train-00000.parquet` ..., `shards/calibration.parquet`,
`tokens/{attribution,evaluation}.safetensors`; where documents are dealt to parts, training shards are listed part by
part, as many for each, and `tokens/attribution-0.safetensors` ... are each part's own. Letters: N rows, D model
dimension.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from dmsae_ray.activations.rowgroup import ShardError, Unit, damaged, read_unit
from dmsae_ray.activations.shard import ShardEntry, group_bytes, inspect_shard, read_rows
from dmsae_ray.corpus.tokens import TokenSequences
from dmsae_ray.secret_url import SecretUrl
from dmsae_ray.store import Missing, Store

SHARD_FILE = r"shards/[\w-][\w.-]*\.parquet"
"""What a manifest may name as a shard."""
FORMAT_VERSION = 2
FULL_CHECK_BYTES = 4 << 30
"""Up to this size every footer and checksum is verified when a sweep starts (a second); those of larger datasets as
they are read.
"""
PART = 16_384
"""Rows turned into fp64 at a time: all calibration rows of a large model would take several times the memory they need.
"""
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)


class DatasetError(ValueError):
    """A dataset that does not exist, is damaged, or is not the one asked for."""


@dataclass(frozen=True)
class Manifest:
    """What a dataset is. Rows are raw; x = row / scale has mean squared norm 1 over the calibration rows."""

    key: str
    model: str
    model_fingerprint: str
    corpus_fingerprint: str
    hook: str
    d: int
    dtype: str
    context: int
    seed: int
    rows_per_group: int
    scale: float
    mean: list[float]
    """mean row over the calibration rows, raw units, [D]"""
    variance: list[float]
    """variance of each dimension over the calibration rows, raw units, [D]"""
    norm_quantiles: dict[str, float]
    """quantiles of the calibration rows' norms, raw units"""
    positions: dict[str, int]
    """positions of the harvested sequences that became no row, by reason (bos, padding, outlier, unused)"""
    shards: list[ShardEntry]
    """training shards"""
    calibration: ShardEntry
    """the rows held back from training"""
    fields: dict
    """the configuration fields that decided the bytes"""
    max_norm: float | None = None
    """raw norm beyond which rows were left out, and are of every measurement: harvest.outlier_norm times the median of
    all rows of the calibration sequences; None: all rows count"""
    outliers: dict | None = None
    """what rows of extreme norm come to, see outliers.py; None in manifests of before they were looked for"""
    hub: dict = field(default_factory=dict)
    """commit of each repository of the hub that was read"""
    format_version: int = FORMAT_VERSION

    @staticmethod
    def from_dict(tree: dict) -> Manifest:
        """Raises ValueError for a name that is none of ours: as a path it could be any file, to be read, and deleted by
        a repair.
        """
        manifest = Manifest(
            **tree
            | {"shards": [ShardEntry(**s) for s in tree["shards"]], "calibration": ShardEntry(**tree["calibration"])}
        )
        for entry in (*manifest.shards, manifest.calibration):
            if not re.fullmatch(SHARD_FILE, str(entry.file)):
                raise ValueError(
                    f"it names {entry.file!r}, which is no shard of this dataset; that file was not touched"
                )
        if not re.fullmatch(r"[\w-]+", str(manifest.key)):
            raise ValueError(f"its key {manifest.key!r} cannot name a folder")
        return manifest

    @property
    def rows(self) -> int:
        """Training rows."""
        return sum(shard.rows for shard in self.shards)

    @property
    def row_bytes(self) -> int:
        return 2 * self.d

    @property
    def parts(self) -> int:
        """Parts that documents were dealt to; no document's text is in two of them."""
        return self.fields.get("sweep", {}).get("parts", 1)

    def shards_of(self, part: int) -> range:
        """Training shards that a part's documents became, by their place in `shards`."""
        each = len(self.shards) // self.parts
        return range(part * each, (part + 1) * each)

    def save(self, store: Store) -> None:
        store.write("manifest.json", json.dumps(asdict(self), indent=1).encode())


class ActivationDataset:
    """A finished dataset, opened for reading."""

    def __init__(self, place: str | Path | SecretUrl | Store):
        """place: folder or URL. Raises DatasetError if there is no readable manifest, StoreError if it cannot be
        reached.
        """
        self.store = place if isinstance(place, Store) else Store(place)
        path = self.store.where("manifest.json")
        try:
            tree = json.loads(self.store.read("manifest.json"))
        except Missing as error:
            raise DatasetError(f"{path}: no finished dataset here; run `python -m dmsae_ray.harvest`") from error
        except ValueError as error:
            if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
                raise DatasetError(
                    f"{path}: damaged ({error}); delete it and run `python -m dmsae_ray.harvest`: shards are kept"
                ) from error
            raise
        if not isinstance(tree, dict):
            raise DatasetError(
                f"{path}: not a manifest; delete it and run `python -m dmsae_ray.harvest`: shards are kept"
            )
        if tree.get("format_version") != FORMAT_VERSION:
            raise DatasetError(
                f"{path}: format version {tree.get('format_version')!r}, this program reads {FORMAT_VERSION}; "
                "harvest again with this version"
            )
        try:
            self.manifest = Manifest.from_dict(tree)
        except (TypeError, KeyError, ValueError) as error:
            raise DatasetError(
                f"{path}: not a manifest ({error}); delete it and run `python -m dmsae_ray.harvest`: shards are kept"
            ) from error

    @classmethod
    def of(cls, manifest: Manifest, store: Store) -> ActivationDataset:
        """One whose shards are there, but whose manifest has not been written yet."""
        dataset = cls.__new__(cls)
        dataset.store, dataset.manifest = store, manifest
        return dataset

    def __str__(self) -> str:
        return str(self.store)

    def units(self, shards: range | None = None) -> list[Unit]:
        """Every full row group of the training shards, or of some of them, in file order."""
        per_group = self.manifest.rows_per_group
        chosen = self.manifest.shards if shards is None else [self.manifest.shards[i] for i in shards]
        return [unit for shard in chosen for unit in shard.units()[: shard.rows // per_group]]

    def calibration_rows(self) -> torch.Tensor:
        """Rows held back from training, [N, D], stored precision, raw units."""
        m = self.manifest
        return read_rows(self.store, m.calibration, m.rows_per_group, m.d, m.dtype)

    def some_rows(self) -> Iterator[torch.Tensor]:
        """Calibration rows, then training rows, [N, D] each, stored precision: all where the dataset is small, else
        those of shards spread over it."""
        m = self.manifest
        stride = max(1, -(-m.rows * m.row_bytes // FULL_CHECK_BYTES))
        for entry in [m.calibration, *m.shards[::stride]]:
            yield read_rows(self.store, entry, m.rows_per_group, m.d, m.dtype)

    def held_out(self, split: str) -> TokenSequences:
        """The token sequences of one of the splits that are not trained on."""
        return read_held_out(self.store, split)

    def expect(self, asked: dict) -> None:
        """Check the fields that decided the bytes against those of a configuration.

        Raises DatasetError that names each field that differs.
        """
        differ = list(_differences(self.manifest.fields, asked))
        if differ:
            raise DatasetError(
                f"{self}: these activations were made otherwise than the configuration asks for:\n  "
                + "\n  ".join(
                    f"{name}: the dataset has {have!r}, the configuration asks for {want!r}"
                    for name, have, want in differ
                )
                + "\nSet these fields as the dataset has them, give harvest.dataset another folder, or leave it empty "
                "to harvest anew"
            )

    def check_shard(self, entry: ShardEntry, read: bool) -> None:
        """Compare a shard with its entry: size, dataset, checksums of the footer; read: the rows themselves as well.

        Raises ShardError that names the file and the remedy.
        """
        where = self.store.where(entry.file)
        self.check_size(entry, self.store.size(entry.file))
        found, about = inspect_shard(self.store, entry.file)
        if about.get("dataset") != self.manifest.key:
            raise damaged(
                where, f"is a shard of another dataset, {about.get('dataset')}; this one is {self.manifest.key}"
            )
        if found != entry:
            raise damaged(where, "its footer and the manifest disagree about its rows or their checksums")
        if read:
            for unit, length in zip(
                entry.units(), group_bytes(entry, self.manifest.rows_per_group, self.manifest.row_bytes), strict=True
            ):
                read_unit(self.store, unit, length)

    def check_size(self, entry: ShardEntry, size: int | None) -> None:
        """Raises ShardError if a file of so many bytes (None: no file) cannot be this shard."""
        if size != entry.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise damaged(self.store.where(entry.file), f"{found}, the manifest says {entry.bytes}")

    def entries(self) -> list[ShardEntry]:
        return [self.manifest.calibration, *self.manifest.shards]

    def problems(self, read: bool) -> Iterator[tuple[ShardEntry, ShardError | None]]:
        """Every shard with what is wrong with it, if anything."""
        for entry in self.entries():
            try:
                self.check_shard(entry, read)
                yield entry, None
            except ShardError as error:
                yield entry, error

    def check_scale(self) -> None:
        """Raises DatasetError if the manifest's scale is not that of the calibration rows."""
        scale = scale_of(self.calibration_rows())
        if abs(scale - self.manifest.scale) > 1e-9 * scale:
            raise DatasetError(
                f"{self.store.where('manifest.json')}: scale {self.manifest.scale!r} is not that of "
                f"{self.manifest.calibration.file} ({scale!r}). Restore the manifest, or delete it and run `python -m "
                "dmsae_ray.harvest`: shards are kept"
            )

    def verify(self) -> None:
        """Sizes of all shards, footers and checksums of all rows where the dataset is small, and the scale.

        Raises DatasetError or ShardError that names the file and the remedy.
        """
        sizes = self.store.sizes("shards")
        for entry in self.entries():
            self.check_size(entry, sizes.get(entry.file))
        if sum(sizes.values()) <= FULL_CHECK_BYTES:
            for entry in self.entries():
                self.check_shard(entry, read=True)
        self.check_scale()


def read_held_out(store: Store, split: str) -> TokenSequences:
    """The token sequences of a held-out split beside a dataset's shards. Raises ValueError if they are missing or
    damaged.
    """
    name = f"tokens/{split}.safetensors"
    if store.local:
        return TokenSequences.load(store.path(name))
    with tempfile.TemporaryDirectory() as folder:  # a mapped file outlives its name
        path = Path(folder) / f"{split}.safetensors"
        path.write_bytes(store.read(name))
        return TokenSequences.load(path)


def scale_of(rows_ND: torch.Tensor) -> float:
    """The scalar s for which mean ||row / s||^2 = 1."""
    return sum(float(part_ND.double().square().sum()) for part_ND in rows_ND.split(PART)) ** 0.5 / len(rows_ND) ** 0.5


def statistics_of(rows_ND: torch.Tensor) -> dict:
    """scale, mean, variance and norm_quantiles of a manifest, in fp64."""
    n, parts = len(rows_ND), rows_ND.split(PART)
    mean_D = sum(part_ND.double().sum(dim=0) for part_ND in parts) / n
    variance_D = sum((part_ND.double() - mean_D).square().sum(dim=0) for part_ND in parts) / n
    norms_N = torch.cat([part_ND.double().norm(dim=1) for part_ND in parts])
    return {
        "scale": scale_of(rows_ND),
        "mean": mean_D.tolist(),
        "variance": variance_D.tolist(),
        "norm_quantiles": {f"{q:g}": float(norms_N.quantile(q)) for q in QUANTILES},
    }


def _differences(have: dict, want: dict, prefix: str = ""):
    for name in sorted(have.keys() | want.keys()):
        a, b = have.get(name), want.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            yield prefix + name, a, b
