"""A dataset of shards: its manifest, and the checks before anyone trains on it.

Layout of the folder: `manifest.json` (written last), `shards/train-00000.parquet` ..., `shards/calibration.parquet`,
`tokens/{train,attribution,evaluation}.safetensors`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dmsae_ray.activations.rowgroup import damaged
from dmsae_ray.activations.shard import file_sha256, open_shard, read_rows

FORMAT_VERSION = 1
FULL_CHECK_BYTES = 4 << 30
"""Up to this size every checksum is verified when a sweep starts (seconds); larger datasets are checked page by page as they are read."""


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
    shards: list[dict]
    """training shards: file, rows, bytes, sha256"""
    calibration: dict
    """the rows held back from training: file, rows, bytes, sha256"""
    fields: dict
    """the configuration fields that decided the bytes"""
    format_version: int = FORMAT_VERSION

    def save(self, folder: Path) -> None:
        write_json(folder / "manifest.json", asdict(self))


def write_json(path: Path, value: object) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + f".tmp-{os.getpid()}")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class ActivationDataset:
    """A finished dataset, opened for reading."""

    def __init__(self, folder: Path):
        """Raises DatasetError if there is no readable manifest in `folder`."""
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        try:
            tree = json.loads(path.read_text())
        except OSError as error:
            raise DatasetError(f"{path}: no finished dataset here ({error.strerror}); run `python -m dmsae_ray.harvest`") from error
        except ValueError as error:
            raise DatasetError(f"{path}: damaged ({error}); delete it and run `python -m dmsae_ray.harvest`") from error
        if tree.get("format_version") != FORMAT_VERSION:
            raise DatasetError(
                f"{path}: format version {tree.get('format_version')!r}, this program reads {FORMAT_VERSION}; "
                "harvest again with this version"
            )
        self.manifest = Manifest(**tree)

    def paths(self) -> list[Path]:
        return [self.folder / shard["file"] for shard in self.manifest.shards]

    @property
    def calibration_path(self) -> Path:
        return self.folder / self.manifest.calibration["file"]

    def units(self) -> list[tuple[str, int]]:
        """(file, row group) of every full row group of the training shards."""
        per_group = self.manifest.rows_per_group
        return [
            (str(path), group)
            for path, shard in zip(self.paths(), self.manifest.shards)
            for group in range(shard["rows"] // per_group)
        ]

    def calibration_rows(self) -> torch.Tensor:
        """Rows held back from training, [N, D], stored precision, raw units."""
        return read_rows(self.calibration_path, self.manifest.d, self.manifest.dtype)

    def tokens_path(self, split: str) -> Path:
        return self.folder / "tokens" / f"{split}.safetensors"

    def expect(self, asked: dict) -> None:
        """Check the fields that decided the bytes against those of a configuration.

        Raises DatasetError that names each field that differs.
        """
        differ = list(_differences(self.manifest.fields, asked))
        if differ:
            raise DatasetError(
                f"{self.folder}: these activations were made otherwise than the configuration asks for:\n  "
                + "\n  ".join(f"{name}: the dataset has {have!r}, the configuration asks for {want!r}" for name, have, want in differ)
                + "\nGive harvest.dataset another folder, or leave it empty to harvest anew"
            )

    def verify(self) -> None:
        """Sizes and footers of all shards, checksums where the dataset is small, and the scale.

        Raises DatasetError or ShardError that names the file and the remedy.
        """
        entries = list(zip(self.paths(), self.manifest.shards)) + [(self.calibration_path, self.manifest.calibration)]
        full = sum(entry["bytes"] for _, entry in entries) <= FULL_CHECK_BYTES
        for path, entry in entries:
            size = path.stat().st_size if path.exists() else None
            if size != entry["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise damaged(path, f"{found}, the manifest says {entry['bytes']}")
            if open_shard(path).metadata.num_rows != entry["rows"]:
                raise damaged(path, f"its row count is not the manifest's {entry['rows']}")
            if full and file_sha256(path) != entry["sha256"]:
                raise damaged(path, "its checksum is not the manifest's, it was altered")
        scale = scale_of(self.calibration_rows())
        if abs(scale - self.manifest.scale) > 1e-9 * scale:
            raise DatasetError(
                f"{self.folder / 'manifest.json'}: scale {self.manifest.scale!r} is not that of {self.calibration_path} "
                f"({scale!r}). Restore the manifest, or delete it and run `python -m dmsae_ray.harvest`"
            )


def scale_of(rows_ND: torch.Tensor) -> float:
    """The scalar s for which mean ||row / s||^2 = 1."""
    return float(rows_ND.double().square().sum(dim=1).mean().sqrt())


def _differences(have: dict, want: dict, prefix: str = ""):
    for name in sorted(have.keys() | want.keys()):
        a, b = have.get(name), want.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            yield prefix + name, a, b
