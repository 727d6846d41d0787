"""Training rows out of shards, through Ray Data, in the order of `order.py`.

A rank turns its units into one Ray Data pipeline with `preserve_order`: a small table of (file, row group), read by
`map_batches` tasks wherever the cluster has a CPU, blocks coming back as shared memory. Ray Data has no resume inside an
epoch; here any (round, row) is a start.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.activations.order import Order
from dmsae_ray.activations.rowgroup import COLUMN, read_units
from dmsae_ray.activations.shard import as_tensor

BLOCK_BYTES = 48 << 20
"""Rows one read task returns; Ray splits blocks above 128 MB, and small blocks cost a task each."""
READ_CPUS = 0.25
PAUSE_S = 0.01
"""Rest of Ray Data's scheduling loop between two rounds. While its output waits for a slower consumer the loop of Ray 2.60 spins
without one, on the interpreter lock that training needs: measured, about 0.4 of a core per worker."""


class Stream:
    """One rank's share of a cycle's global batches."""

    def __init__(self, dataset: ActivationDataset, order: Order, rank: int, world: int, object_store_mb: int = 512, read_tasks: int = 2):
        self.dataset, self.order, self.rank, self.world = dataset, order, rank, world
        self.object_store_bytes = object_store_mb << 20
        self.read_tasks = read_tasks
        self._units = dataset.units()
        assert len(self._units) == order.n_units
        self._lanes = order.lanes_of(rank, world)
        self._lane_shards: list[str] = []

    def shard_of(self, row: int) -> str:
        """The shard that this row of the batch given last came from."""
        return self._lane_shards[row // self.order.lane_rows]

    def batches(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """This rank's rows of global batches start .. stop - 1, each [B / W, D] fp32, divided by the scale."""
        if start >= stop:
            return
        order, manifest = self.order, self.dataset.manifest
        first_round, first_row = order.position(start)
        last_round = order.position(stop - 1)[0]
        plan = [order.units(round_)[self._lanes] for round_ in range(first_round, last_round + 1)]
        rows = self._rows(self._pipeline([int(unit) for units in plan for unit in units]))
        step = start
        for round_, units in enumerate(plan, first_round):
            self._lane_shards = [self._units[unit][0] for unit in units]
            # Lane by lane: the unit's rows as a view of Ray's memory, and the order to take them in.
            lanes = [(next(rows), torch.from_numpy(order.rows(round_, unit))) for unit in units]
            for row in range(first_row if round_ == first_round else 0, order.unit_rows, order.lane_rows):
                if step == stop:
                    return
                picked = [view[take[row : row + order.lane_rows]] for view, take in lanes]
                yield torch.cat(picked).float().div_(manifest.scale)
                step += 1

    def _pipeline(self, units: list[int]):
        """A ray.data.Dataset whose rows are those of the units, in this order."""
        import ray.data

        context = ray.data.DataContext.get_current()
        context.use_datasource_v2 = False  # the V2 stage takes seconds to give a first batch
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        if _rest() not in context.custom_execution_callback_classes:
            context.custom_execution_callback_classes.append(_rest())
        context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=self.object_store_bytes)
        unit_bytes = self.order.unit_rows * 2 * self.dataset.manifest.d
        per_task = int(np.clip(BLOCK_BYTES // unit_bytes, 1, len(self._lanes)))
        table = pa.table(
            {"file": [self._units[u][0] for u in units], "row_group": [self._units[u][1] for u in units]},
        )
        slices = [table.slice(i, per_task) for i in range(0, len(units), per_task)]
        return ray.data.from_arrow(slices).map_batches(
            read_units, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, num_cpus=READ_CPUS,
            concurrency=self.read_tasks,
        )

    def _rows(self, pipeline) -> Iterator[torch.Tensor]:
        """The pipeline's blocks cut into units again, each [unit_rows, D]; blocks may hold several, or split one."""
        manifest, left = self.dataset.manifest, None
        for block in pipeline.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
            view = as_tensor(block[COLUMN], manifest.d, manifest.dtype)
            left = view if left is None or not len(left) else torch.cat([left, view])
            while len(left) >= self.order.unit_rows:
                yield left[: self.order.unit_rows]
                left = left[self.order.unit_rows :]
        assert left is None or not len(left), "a unit came back incomplete"


@functools.cache
def _rest() -> type:
    """The class that rests; made here because importing Ray Data takes a second that not every user of this module needs."""
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Rest(ExecutionCallback):
        def on_execution_step(self, executor) -> None:
            time.sleep(PAUSE_S)

    return Rest
