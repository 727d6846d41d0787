"""Training rows out of shards, through Ray Data, in the order of `order.py`.

A rank turns its units into one Ray Data pipeline with `preserve_order`: a small table of (file, offset, checksum), cut
into long read tasks that yield block after block into shared memory, wherever the cluster has a CPU. A block holds
whole rounds where they are small enough, and comes back as a view. Ray Data has no resume inside an epoch; here any
position is a start.
Letters: B batch in tokens, W workers, D model dimension.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
import xxhash

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.activations.order import Order
from dmsae_ray.activations.prefetch import Ahead
from dmsae_ray.activations.rowgroup import COLUMN, Unit, read_units
from dmsae_ray.activations.shard import DTYPES, as_tensor
from dmsae_ray.cluster.nodes import READ_CPUS

BLOCKS_IN_FLIGHT, BLOCKS_IN_PIPELINE = 10, 4
"""Blocks of one stream that its share of the object store has room for, and those of them that Ray Data is told of. It
does not count all that its read tasks hold back, what is on the way and what is in use: with a limit of 4, a consumer
that lags sees 8 or 9."""
LARGEST_BLOCK = 160 << 20
"""Each block costs some 14 ms of Ray's bookkeeping: at 151 MB (a round of 8 lanes at d = 2304) that is a third of its
reading time.
"""
TASK_BYTES = 8 << 30
"""Rows of one read task. Long, so that the gap between two tasks does not show; Ray reads a lost one again from its
start.
"""
CACHE_BYTES = 1 << 20
TASKS_PER_PIPELINE = 16
"""Each task is 10 to 25 ms of preparation before the first of them runs: a pass over terabytes is several pipelines,
one after the other.
"""
PAUSE_S = 0.01
"""Rest of Ray Data's scheduling loop between two rounds. While its output waits for a slower consumer the loop of Ray
2.60 spins without one, on the interpreter lock that training needs: measured, about 0.4 of a core per worker."""
MASK = (1 << 64) - 1


@dataclass(frozen=True)
class StreamLimits:
    """What one worker's stream may use."""

    object_store_mb: int = 1024
    read_tasks: int = 2
    """read tasks at the same time; the second one's first blocks are ready when the first one ends"""
    fetch_ahead: int = 8
    """row groups a read task fetches at the same time from a remote store"""


class Stream:
    """One rank's share of a cycle's global batches."""

    def __init__(
        self,
        dataset: ActivationDataset,
        units: list[Unit],
        rank: int,
        world: int,
        limits: StreamLimits = StreamLimits(),
        device: torch.device | str = "cpu",
    ):
        """units: the row groups that this chain's orders are over. device: where batches are wanted."""
        self.dataset, self.units, self.rank, self.world = dataset, units, rank, world
        self.limits, self.device = limits, torch.device(device)

    def open(self, order: Order, start: int, stop: int) -> Batches:
        """This rank's rows of global batches start .. stop - 1. Reading begins now, and rests when the store's share is
        full.
        """
        assert len(self.units) == order.n_units
        return Batches(self, order, start, stop)


class Batches:
    """An iterator over batches, each [B / W, D] fp32 on the stream's device, divided by the scale. On a CPU the next
    one may overwrite it.
    """

    def __init__(self, stream: Stream, order: Order, start: int, stop: int):
        self.order, self.start, self.stop = order, start, stop
        self.digest = 0
        """Of the rows given so far: the sum, modulo 2^64, over global batches and lanes of xxh3 of the lane's stored
        rows, seeded by step * lanes + lane. The sum over ranks does not depend on their number; it says exactly which
        rows were given, and in which batch and lane, whatever the way they came."""
        self._stream, self._lanes = stream, order.lanes_of(stream.rank, stream.world)
        self._files: deque[list[str]] = deque(maxlen=2)  # of the batches given last
        self._plan = self._rounds() if start < stop else []
        wanted = [stream.units[unit] for _, units in self._plan for unit in units]
        self._blocks = Ahead(functools.partial(_blocks, stream, order, wanted), depth=1)
        self._batches = self._on_cpu() if stream.device.type == "cpu" else self._on_device()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self._batches

    def shard_of(self, row: int, behind: int = 0) -> str:
        """The shard that this row of the batch given last came from, or of the one before (behind 1)."""
        return self._stream.dataset.store.where(self._files[-1 - behind][row // self.order.lane_rows])

    def close(self) -> None:
        """Stop reading; also done by reading to the end."""
        self._batches.close()
        self._blocks.close()

    def _rounds(self) -> list[tuple[int, np.ndarray]]:
        """(round, this rank's units in it), lane by lane."""
        first, last = self.order.position(self.start)[0], self.order.position(self.stop - 1)[0]
        return [(round_, self.order.units(round_)[self._lanes]) for round_ in range(first, last + 1)]

    def _picks(self) -> Iterator[list[Pick]]:
        """Every batch as one pick per lane of this rank."""
        order, manifest, step = self.order, self._stream.dataset.manifest, self.start
        first_row = order.position(self.start)[1] if self._plan else 0
        views = (view for block in self._blocks for view in _views(block, manifest))
        for round_, units in self._plan:
            lanes = [
                (lane, unit, next(views), torch.from_numpy(order.rows(round_, unit)))
                for lane, unit in zip(self._lanes, units, strict=True)
            ]
            for row in range(first_row, order.unit_rows, order.lane_rows):
                if step == self.stop:
                    return
                yield [
                    Pick(
                        step * order.lanes + lane,
                        self._stream.units[unit].file,
                        view_ND,
                        take_N[row : row + order.lane_rows],
                    )
                    for lane, unit, view_ND, take_N in lanes
                ]
                step += 1
            first_row = 0

    def _on_cpu(self) -> Generator[torch.Tensor, None, None]:
        manifest, n = self._stream.dataset.manifest, self.order.lane_rows
        # Some lanes at a time, as many as stay in a core's cache: gathered, hashed and converted without another pass
        # over memory.
        at_once = max(1, CACHE_BYTES // (n * manifest.row_bytes))
        stored_ND = torch.empty(min(at_once, len(self._lanes)) * n, manifest.d, dtype=torch.int16)
        as_float_ND = stored_ND.view(DTYPES[manifest.dtype])
        batch_BD = torch.empty(len(self._lanes) * n, manifest.d)
        for picks in self._picks():
            for first in range(0, len(picks), at_once):
                some = picks[first : first + at_once]
                # The last picks may be fewer than there are places.
                digest = sum(pick.gather(out_ND) for pick, out_ND in zip(some, stored_ND.split(n), strict=False))
                self.digest = (self.digest + digest) & MASK
                batch_BD[first * n : (first + len(some)) * n].copy_(as_float_ND[: len(some) * n]).div_(manifest.scale)
            self._files.append([pick.file for pick in picks])
            yield batch_BD

    def _on_device(self) -> Generator[torch.Tensor, None, None]:
        """Batches are gathered by a thread into pinned memory and copied beside the computation, one ahead of their
        use.
        """
        device = self._stream.device
        copies, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        gathered = Ahead(self._pinned, depth=1)
        try:
            pending = None
            for buffer_BD, copied, digest, files in gathered:
                with torch.cuda.stream(copies):
                    stored_BD = buffer_BD.to(device, non_blocking=True)
                    copied.record(copies)
                if pending is not None:
                    yield self._given(*pending, current)
                pending = stored_BD, copied, digest, files
            if pending is not None:
                yield self._given(*pending, current)
        finally:
            gathered.close()

    def _given(self, stored_BD: torch.Tensor, copied, digest: int, files: list[str], current) -> torch.Tensor:
        manifest = self._stream.dataset.manifest
        current.wait_event(copied)
        stored_BD.record_stream(current)
        self.digest = (self.digest + digest) & MASK
        self._files.append(files)
        return stored_BD.view(DTYPES[manifest.dtype]).float().div_(manifest.scale)

    def _pinned(self) -> Iterator[tuple]:
        n, d = self.order.lane_rows, self._stream.dataset.manifest.d
        # One being filled, one waiting, one being copied: a fourth is always free.
        ring = [
            (torch.empty(len(self._lanes) * n, d, dtype=torch.int16, pin_memory=True), torch.cuda.Event())
            for _ in range(4)
        ]
        for (buffer_BD, copied), picks in zip(itertools.cycle(ring), self._picks()):
            copied.synchronize()
            digest = sum(pick.gather(part_ND) for pick, part_ND in zip(picks, buffer_BD.split(n), strict=True))
            yield buffer_BD, copied, digest, [pick.file for pick in picks]


class Pick(NamedTuple):
    """One lane's rows of one batch."""

    number: int
    """step * lanes + lane"""
    file: str
    view_ND: torch.Tensor
    """the unit, as stored, int16 [unit_rows, D]"""
    take_N: torch.Tensor

    def gather(self, out_ND: torch.Tensor) -> int:
        """Copy the rows and return their digest."""
        torch.index_select(self.view_ND, 0, self.take_N, out=out_ND)
        return xxhash.xxh3_64_intdigest(out_ND.numpy(), seed=self.number)


def _views(block: pa.Table, manifest) -> Iterator[torch.Tensor]:
    """A block's units, each [unit_rows, D] int16, as views of Ray's memory."""
    for chunk in block[COLUMN].chunks:
        yield as_tensor(chunk, manifest.d, manifest.dtype).view(torch.int16)


def _blocks(stream: Stream, order: Order, wanted: list[Unit]) -> Iterator[pa.Table]:
    """The units through Ray Data, as blocks whose chunks are the units."""
    if not wanted:
        return
    import ray.data

    dataset, limits = stream.dataset, stream.limits
    unit_bytes = order.unit_rows * dataset.manifest.row_bytes
    per_round = len(order.lanes_of(stream.rank, stream.world))
    budget = limits.object_store_mb << 20
    largest = max(1, min(LARGEST_BLOCK, budget // BLOCKS_IN_FLIGHT) // unit_bytes)
    if largest > per_round:
        largest -= largest % per_round
    per_task = max(largest, TASK_BYTES // unit_bytes)
    table = pa.table(
        {"file": [u.file for u in wanted], "offset": [u.offset for u in wanted], "digest": [u.digest for u in wanted]}
    )
    context = ray.data.DataContext.get_current()
    context.use_datasource_v2 = False  # the V2 stage takes seconds to give a first batch
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    if _rest() not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(_rest())
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=BLOCKS_IN_PIPELINE * largest * unit_bytes
    )
    # A block is given on as soon as it exceeds the target and cut at one and a half of it: ours pass whole, each for
    # itself.
    context.target_max_block_size = int(0.9 * largest * unit_bytes)
    context._max_num_blocks_in_streaming_gen_buffer = 2  # one may be on its way while the next is made
    per_pipeline = TASKS_PER_PIPELINE * per_task
    for first in range(0, len(wanted), per_pipeline):
        part = table.slice(first, per_pipeline)
        # Not from_arrow: for each table's row count it starts a task that asks for a whole CPU, and there may be none
        # left.
        pipeline = ray.data.from_blocks([part.slice(i, per_task) for i in range(0, len(part), per_task)]).map_batches(
            read_units,
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            **_asking(),
            compute=ray.data.TaskPoolStrategy(size=limits.read_tasks),
            fn_kwargs={
                "store": dataset.store,
                "length": unit_bytes,
                "row_bytes": dataset.manifest.row_bytes,
                "per_block": largest,
                "fetch_ahead": limits.fetch_ahead,
            },
        )
        yield from pipeline.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _asking() -> dict:
    """What a read task asks Ray for: a sliver of a CPU anywhere. Where none is left, nothing, on this node: training
    workers that hold the last CPUs between them would else wait for their rows, and so for each other, for ever."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if ray.available_resources().get("CPU", 0.0) >= READ_CPUS:
        return {"num_cpus": READ_CPUS}
    here = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=True)}


@functools.cache
def _rest() -> type:
    """The class that rests; made here because importing Ray Data takes a second that not every user of this module
    needs.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Rest(ExecutionCallback):
        def on_execution_step(self, executor) -> None:
            time.sleep(PAUSE_S)

    return Rest
