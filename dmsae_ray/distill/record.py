"""What a chain's folder says of a finished cycle (record.json) and of a chain that ended before its time (failed.json).

Keys of the files are the fields, in their order.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from dmsae_ray.files import write_json

RECORD_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class CycleRecord:
    """A finished cycle: written last, so the cycle is done if and only if its file exists.

    L0 in latents per token, losses in nats per token, shares and FVU as parts of 1. Definitions: METHOD.md.
    """

    chain: str
    """its key"""
    label: str
    cycle: int
    generation: int
    """of the driver that wrote it"""
    seed: int
    k: int

    core_in: int
    """latents of the core it was trained on"""
    core_out: int
    """latents of the core it selected: `kept` of those and `entered` new ones; `left` were not selected again"""
    kept: int
    entered: int
    left: int
    decoder_drift: dict[str, float | None] | None
    """cosines of the core's decoder rows in the SAE that selected them to those learned in this one, see core/drift.py;
    None without a core. `before` and `gap_closed` are not there where the record is older than they are
    """
    jaccard: float | None
    """overlap of the cores before and after; None where no core came before"""
    origins: dict[str, int]
    """cycle -> members of the core that entered in it"""

    steps: int
    tokens: int
    resumes: list[dict[str, Any]]
    """times that training went on from a checkpoint: step, generation, workers, parallel"""
    workers: int
    parallel: str
    micro_batch: int | None
    lockstep: int
    """chains that shared the stream"""
    data_digest: str
    """of all rows trained on, 16 hexadecimal digits"""
    rows_dropped: int
    """tokens asked for that fill no batch"""
    tokens_per_s: float | None
    data_wait_share: float | None
    first_batch_s: float | None
    theta_training: float
    """threshold as training left it"""
    theta: float
    """threshold as calibrated"""

    l0: float
    core_l0: float
    free_l0: float
    fvu: float
    fvu_all_rows: float | None = None
    """of rows beyond the bound on norms, too; None: written before there was one"""
    dead_share: float
    loss_clean: float
    loss_zero: float
    loss_mean: float
    loss_spliced: float
    loss_recovered_zero: float | None
    loss_recovered_mean: float | None
    kl: float
    core_explained: float | None
    prefixes: list[dict[str, Any]]
    """the same for the core alone and each Matryoshka prefix"""
    evaluation_tokens: int
    rows_left_out: int | None = None
    """tokens beyond the bound on norms; None: written before there was one"""
    standard_errors: dict[str, float] | None = None
    """of fvu, kl and loss recovered over evaluation sequences, see evaluation/standard_error.py; None: written before
    they were measured
    """

    core_share: float
    """attribution carried by the core it was trained on"""
    coverage: float
    """attribution carried by the core it selected"""
    selection: dict[str, Any]
    """by, size, candidates"""
    seconds: dict[str, float]
    """by phase, and in total"""
    attribution: dict[str, Any]
    """tokens, shards, workers, resent, split_half_spearman, split_half_jaccard"""
    finished_at: float
    """Unix time"""

    def to_json(self) -> dict[str, Any]:
        return {"format_version": RECORD_VERSION} | asdict(self)

    @staticmethod
    def read(path: Path) -> CycleRecord:
        """Raises ValueError naming the file if it is damaged or of another version."""
        remedy = "delete this cycle's folder to have it computed again"
        tree = _tree(path, remedy)
        if tree.get("format_version") != RECORD_VERSION:
            raise ValueError(
                f"{path}: format version {tree.get('format_version')!r}, this program reads {RECORD_VERSION}"
            )
        return _made(CycleRecord, tree, path, remedy)


@dataclass(frozen=True)
class Failure:
    """Why a chain ended before its time."""

    kind: str
    """`diverged` (final); `data` or `error`: tried again by the next sweep"""
    reason: str
    cycle: int | None = None
    step: int | None = None
    """where, as far as it is known"""
    generation: int = 0
    """of the driver under which it failed"""
    at: float | None = None
    """Unix time"""
    traceback: str = ""

    @property
    def final(self) -> bool:
        """Whether trying again gives the same."""
        return self.kind == "diverged"

    def text(self) -> str:
        """Where and why, as far as it is known where."""
        where = "" if self.cycle is None else f"cycle {self.cycle}"
        if where and self.step is not None:
            where += f", step {self.step}"
        # What diverged says itself where.
        return self.reason if not where or self.reason.startswith(f"{where}:") else f"{where}: {self.reason}"

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @staticmethod
    def read(path: Path) -> Failure:
        """Raises ValueError naming the file if it is damaged."""
        remedy = "delete it to have the chain tried again"
        return _made(Failure, _tree(path, remedy), path, remedy)


Kind = TypeVar("Kind")


def _tree(path: Path, remedy: str) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); {remedy}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: damaged (not a JSON object); {remedy}")
    return tree


def _made(kind: type[Kind], tree: dict[str, Any], path: Path, remedy: str) -> Kind:
    """From the file's keys; those of a later program that has more to say are passed over."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]  # of both dataclasses here
    try:
        return kind(**{name: value for name, value in tree.items() if name in known})
    except TypeError as error:
        lacks = str(error).partition("argument")[2].strip("s: ")
        raise ValueError(f"{path}: damaged (lacks {lacks}); {remedy}") from error
