"""Computing shards: token sequences -> residual stream at one or several hooks -> rows -> shards.

The bytes of a shard depend on its plan, the model and the configuration alone: every forward pass has one fixed padded
shape and thread count, and nothing is drawn but from seeds. Letters: N sequences, T context, D model dimension, R rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from dmsae_ray.activations.shard import DTYPES, ShardEntry, ShardError, ShardWriter, first_not_finite, inspect_shard
from dmsae_ray.activations.shard_plan import ShardPlan
from dmsae_ray.cluster.metrics import tell_of_held_up_requests
from dmsae_ray.config import Config
from dmsae_ray.corpus.tokens import TokenSequences
from dmsae_ray.files import refresh
from dmsae_ray.lm.model import LanguageModel
from dmsae_ray.store import Store

MAX_NORM = "max_norm"
"""Key in a shard's footer: the norm beyond which rows were dropped, where a bound was set."""


@dataclass(frozen=True)
class Target:
    """One hook's dataset in the making."""

    hook: str
    store: Store
    about: dict
    """facts for the footers of its shards; `dataset` is the dataset's key"""

    def finished(self, plan: ShardPlan) -> ShardEntry | None:
        """The plan's shard, if it is there: written whole (a file gets its name last), by this configuration."""
        try:
            entry, about = inspect_shard(self.store, plan.file)
        except ShardError:
            return None
        same = (entry.rows, about.get("dataset"), about.get("shard")) == (plan.rows, self.about["dataset"], plan.name)
        return entry if same else None


class ShardMaker:
    """A Ray Data actor: holds the language model, makes the shards of one row of plans after the other.

    While one shard is encoded and written, the next is computed.
    """

    def __init__(self, config: Config, targets: list[Target], tokens: str, calibration: ShardPlan):
        """tokens: key of the splits' token sequences. calibration: plan of the shard whose median norm the bound on
        outliers is a multiple of, in every shard.
        """
        torch.set_num_threads(config.harvest.threads)
        tell_of_held_up_requests(config.name)
        self.config, self.targets, self.calibration = config, targets, calibration
        self._tokens, self._sequences = config.home / "tokens" / tokens, dict[str, TokenSequences]()
        refresh(self._tokens)  # there may be more of them than this node knows
        self.lm = LanguageModel.of(config.model, "cuda" if config.harvest.gpus_per_actor else "cpu")
        self._writers = {target.hook: ShardWriter() for target in targets}
        self._bounds: dict[str, float] = {}
        self._pool = ThreadPoolExecutor(1)

    def __call__(self, batch: dict) -> Iterator[dict]:
        """One batch row holds a JSON list of plans; yields a row per plan: its name, and JSON of hook -> manifest
        entry.
        """
        before: tuple[ShardPlan, Future] | None = None
        for tree in (tree for text in batch["plans"] for tree in json.loads(text)):
            plan = ShardPlan.from_dict(tree)
            after = plan, self._start(plan)
            if before is not None:
                yield _row(*before)
            before = after
        if before is not None:
            yield _row(*before)

    def _start(self, plan: ShardPlan) -> Future:
        """Compute what is missing of a shard and hand it to the writing thread."""
        # A task that died and is tried again finds what it had finished.
        known = {target.hook: entry for target in self.targets if (entry := target.finished(plan)) is not None}
        missing = [target for target in self.targets if target.hook not in known]
        kept = self.kept(plan, [target.hook for target in missing]) if missing else {}

        def write() -> dict[str, ShardEntry]:
            harvest, made = self.config.harvest, {}
            for target in missing:
                rows_RD, positions, max_norm = kept.pop(target.hook)
                bound = {} if max_norm is None else {MAX_NORM: max_norm}
                made[target.hook] = self._writers[target.hook].write(
                    target.store,
                    plan.file,
                    rows_RD[torch.from_numpy(plan.permutation(harvest.seed))],
                    harvest.rows_per_group,
                    target.about | {"shard": plan.name} | bound,
                    positions,
                )
            return known | made

        return self._pool.submit(write)

    def kept(self, plan: ShardPlan, hooks: list[str]) -> dict[str, tuple[torch.Tensor, dict[str, int], float | None]]:
        """The shard's rows at each hook, [rows, D] in the order of its sequences, the positions that are none, and the
        bound on norms.

        Spare sequences are computed, one forward pass at a time, where rows were dropped and their places are to be
        filled; what a hook's shard holds does not depend on the other hooks. Raises ValueError if they do not suffice.
        """
        harvest, found = self.config.harvest, {}
        rows, positions = self.rows(plan, plan.sequences, hooks)
        bounds = {hook: self._bound(plan, hook, rows[hook]) for hook in hooks}
        spare: list[tuple[dict[str, torch.Tensor], dict[str, int]]] = []
        for hook in hooks:
            kept_RD, dropped = drop(rows.pop(hook), bounds[hook])
            none, used = Counter(positions), 0
            first = 0
            while len(kept_RD) < plan.rows and first < len(plan.spare):
                if used == len(spare):
                    part = plan.spare[first : first + harvest.sequences_per_forward]
                    spare.append(self.rows(plan, part, hooks))
                more, none_of_more = spare[used]
                more_RD, dropped_of_more = drop(more[hook], bounds[hook])
                kept_RD, dropped = torch.cat([kept_RD, more_RD]), dropped + dropped_of_more
                none, used, first = none + Counter(none_of_more), used + 1, first + harvest.sequences_per_forward
            if len(kept_RD) < plan.rows:
                raise ValueError(
                    f"shard {plan.name}, {hook}: harvest.outlier_norm {harvest.outlier_norm:g} drops {dropped} rows "
                    f"and leaves {len(kept_RD)} of {plan.rows}; raise harvest.outlier_reserve (now "
                    f"{harvest.outlier_reserve:g}) or harvest.outlier_norm, give corpus.source more text, or set "
                    "harvest.outlier_norm to null, which keeps all rows"
                )
            reasons = {
                "bos": none["bos"],
                "padding": none["padding"],
                "outlier": dropped,
                "unused": len(kept_RD) - plan.rows,
            }
            found[hook] = kept_RD[: plan.rows], reasons, bounds[hook]
        return found

    def _bound(self, plan: ShardPlan, hook: str, rows_RD: torch.Tensor) -> float | None:
        """Norm beyond which rows are dropped, one for all shards of a hook: a multiple of the median norm of all the
        calibration sequences' rows. rows_RD: the plan's own."""
        multiple = self.config.harvest.outlier_norm
        if multiple is None:
            return None
        if plan.name == self.calibration.name:
            self._bounds[hook] = multiple * median_norm(rows_RD)
        elif hook not in self._bounds:
            target = next(target for target in self.targets if target.hook == hook)
            if target.finished(self.calibration) is None:
                # Made here where no actor has yet: its bytes are the same whoever makes it, and nobody has to wait for
                # another.
                self._start(self.calibration).result()
            self._bounds[hook] = inspect_shard(target.store, self.calibration.file)[1][MAX_NORM]
        return self._bounds[hook]

    def rows(
        self, plan: ShardPlan, chosen: Sequence[int], hooks: list[str]
    ) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """All rows of these sequences of the plan's split at each hook, [R, D] as stored, and the positions that are
        none (bos, padding).

        Raises ValueError naming the token if a value does not fit the stored dtype.
        """
        dtype, per_forward = DTYPES[self.config.harvest.dtype], self.config.harvest.sequences_per_forward
        found: dict[str, list[torch.Tensor]] = {hook: [] for hook in hooks}
        real, positions, pending = 0, 0, None
        if plan.split not in self._sequences:
            self._sequences[plan.split] = TokenSequences.load(self._tokens / f"{plan.split}.safetensors")
        sequences, name = self._sequences[plan.split], plan.name
        for first in range(0, len(chosen), per_forward):
            picked = np.array(chosen[first : first + per_forward])
            # The last batch is padded with copies of its first sequence: the forward shape never changes.
            shape = np.concatenate([picked, np.repeat(picked[:1], per_forward - len(picked))])
            ids_NT = torch.from_numpy(sequences.ids[shape].astype(np.int64))
            lengths_N = torch.from_numpy(sequences.lengths[shape].astype(np.int64))
            lengths_N[len(picked) :] = 0
            keep_NT = self.lm.rows(ids_NT, lengths_N)
            index_R = keep_NT.flatten().nonzero().flatten()
            real, positions = real + int(lengths_N.sum()), positions + ids_NT.shape[1] * len(picked)
            resid = self.lm.sites(ids_NT, hooks)
            stored = {hook: x_NTD.flatten(0, 1)[index_R.to(x_NTD.device)].to(dtype) for hook, x_NTD in resid.items()}
            # The rows of the pass before are fetched only now: a GPU is already at work on this one.
            self._collect(pending, found, name)
            pending = stored, ids_NT, index_R
        self._collect(pending, found, name)
        rows = {hook: torch.cat(parts) for hook, parts in found.items()}
        kept = len(rows[hooks[0]])
        return rows, {"bos": real - kept, "padding": positions - real}

    def _collect(self, pending: tuple | None, found: dict[str, list[torch.Tensor]], name: str) -> None:
        if pending is None:
            return
        stored, ids_NT, index_R = pending
        for hook, rows_RD in stored.items():
            rows_RD = rows_RD.cpu()
            if first_not_finite(rows_RD) is not None:
                self._check_too_large(name, hook, ids_NT, index_R, rows_RD)
            found[hook].append(rows_RD)

    def _check_too_large(
        self, name: str, hook: str, ids_NT: torch.Tensor, index_R: torch.Tensor, rows_RD: torch.Tensor
    ) -> None:
        """rows_RD holds values that are not finite as stored. That will do if it is their size alone and outliers are
        left out: norms beyond the dtype are beyond every bound. Raises ValueError naming the token otherwise."""
        value_RD = self.lm.sites(ids_NT, [hook])[hook].flatten(0, 1).cpu()[index_R]
        fits_R = torch.isfinite(value_RD).all(dim=1)
        if self.config.harvest.outlier_norm is None:
            fits_R &= torch.isfinite(rows_RD).all(dim=1)
        if not bool(fits_R.all()):
            bad = int((~fits_R).nonzero()[0])
            raise self._not_finite(name, hook, ids_NT, int(index_R[bad]), value_RD[bad])

    def _not_finite(self, name: str, hook: str, ids_NT: torch.Tensor, place: int, value_D: torch.Tensor) -> ValueError:
        n, t = divmod(place, ids_NT.shape[1])
        piece = self.lm.tokenizer.decode(ids_NT[n, max(0, t - 8) : t + 1])
        why = (
            "the model gives NaN or infinity there"
            if not bool(torch.isfinite(value_D).all())
            else (
                f"its largest value {float(value_D.abs().max()):.3g} does not fit; use harvest.dtype bfloat16, or "
                "set harvest.outlier_norm, which leaves such rows out"
            )
        )
        return ValueError(
            f"shard {name}, {hook}, harvest.dtype {self.config.harvest.dtype}: activation of the token at the end of "
            f"{piece!r}: {why}"
        )


def median_norm(rows_RD: torch.Tensor) -> float:
    """Median (of an even number the lower one) of the rows' norms."""
    return float(_norms(rows_RD).median())


def drop(rows_RD: torch.Tensor, max_norm: float | None) -> tuple[torch.Tensor, int]:
    """The rows whose norm is at most max_norm (None: all), in their order, and how many are not among them."""
    if max_norm is None:
        return rows_RD, 0
    good_R = _norms(rows_RD) <= max_norm
    dropped = int((~good_R).sum())
    return rows_RD[good_R] if dropped else rows_RD, dropped


def _norms(rows_RD: torch.Tensor) -> torch.Tensor:
    return torch.cat([part_RD.float().norm(dim=1) for part_RD in rows_RD.split(4096)])


def _row(plan: ShardPlan, writing: Future) -> dict:
    entries = {hook: entry.to_dict() for hook, entry in writing.result().items()}
    return {"plan": np.array([plan.name]), "entries": np.array([json.dumps(entries)])}
