"""A Ray Train worker: chains in lockstep over one stream of rows."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.activations.order import Order
from dmsae_ray.activations.shard import ShardError
from dmsae_ray.activations.stream import MASK, Batches, Stream
from dmsae_ray.cluster.metrics import tell_of_held_up_requests
from dmsae_ray.distill.chain import Chain
from dmsae_ray.distill.cycle import Cycle
from dmsae_ray.distill.failure import final
from dmsae_ray.distill.mapping import stream_limits
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.distill.rank import Rank
from dmsae_ray.distill.training import first_step
from dmsae_ray.files import be_patient, guard, refresh
from dmsae_ray.lock import Lease, Superseded
from dmsae_ray.sae.ranks.collective import Alone, TorchCollective, gather_objects
from dmsae_ray.sae.step_report import Diverged

PREEMPTION = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") != "0"
"""Whether Ray tells of nodes that will be taken away; on a cluster of the command's own it does not, since none is."""


def train_chains(loop: dict) -> None:
    """What every Ray Train worker runs. loop: plans (ChainPlans with one lockstep_key), lease (the right to write),
    aggregator and board (actor handles).
    """
    every, lease, context = loop["plans"], loop["lease"], ray.train.get_context()
    be_patient(every[0].folder.path)
    tell_of_held_up_requests(every[0].config.name)
    superseded = False
    if context.get_world_rank() == 0:
        try:
            lease = lease.of_group([plan.folder.path for plan in every])
        except Superseded:
            superseded = True
        for plan in every:
            guard(plan.folder.path, lease.check)
    if context.get_world_size() > 1:  # nobody looks before that: an earlier group may have written until now
        superseded = ray.train.collective.broadcast_from_rank_zero(superseded)
    if superseded:
        return
    for plan in every:
        look(plan)
    # Failed ones are left out: a worker group may have been started again after the failure was written.
    plans = [plan for plan in every if not _failed(plan, lease)]
    if not plans:
        return
    try:
        Worker(plans, lease, loop["aggregator"], loop["board"]).run()
    except Superseded:
        return  # another driver has the folders: trying again cannot help, and nothing may be written


def _failed(plan: ChainPlan, lease: Lease) -> bool:
    failure = plan.folder.failure()
    return failure is not None and (failure.final or failure.generation == lease.generation)


def look(plan: ChainPlan) -> None:
    """See what other machines have written of a chain, and of what it needs."""
    for chain in (plan, *plan.needs()):
        chain.folder.refresh()
    refresh(plan.references)


class Worker:
    """One rank of the worker group: the stream, the language model, and the chains that share them."""

    def __init__(self, plans: list[ChainPlan], lease: Lease, aggregator: Any, board: Any):
        from dmsae_ray.lm.model import LanguageModel

        context, plan = ray.train.get_context(), plans[0]
        number, world, device = context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()
        comm = Alone() if world == 1 else TorchCollective(device)
        self.rank = Rank(number, world, comm, device, lease, aggregator, board)
        torch.set_num_threads(plan.config.train.threads)
        self.chains = [Chain(plan, self.rank) for plan in plans]
        """those that have not failed"""
        self._opened: Batches | None = None
        self._warned = False
        with self.failing(*self.chains):
            self.dataset = ActivationDataset(plan.dataset)
            self.stream = Stream(
                self.dataset, plan.units(self.dataset), number, world, stream_limits(plan.config), device
            )
            self.open(min(chain.cycle for chain in self.chains))  # reading starts beside loading the model
            self.lm = LanguageModel.of(plan.config.model, str(device))

    def run(self) -> None:
        try:
            for chain in self.chains:
                chain.tidy()
            for number in range(max(chain.plan.cycles for chain in self.chains) if self.chains else 0):
                chains = [chain for chain in self.chains if chain.cycle == number < chain.plan.cycles]
                if chains:
                    self.run_cycle(chains)
        finally:
            if self._opened is not None:
                self._opened.close()
        for chain in self.chains:
            chain.say(phase="done", fraction=1.0)

    def run_cycle(self, chains: list[Chain]) -> None:
        """Train all chains' SAEs, then finish the cycle of one after the other."""
        cycles = []
        for chain in chains:
            with self.failing(chain):
                cycles.append(Cycle(chain, self.dataset, self.lm))
        self.rank.comm.wait_for_all()  # models load at different speeds
        with self.failing(*chains):
            self.train(cycles)
        left = self._left(cycles)
        for cycle in left:
            with self.failing(cycle.chain):
                # Reading for the next cycle starts while the last one of this round is finished.
                open_next = functools.partial(self.open_next, cycle.number) if cycle is left[-1] else None
                cycle.finish(len(left), open_next)
        self.rank.comm.wait_for_all()  # rank 0 had a cycle to commit

    def _left(self, cycles: list[Cycle]) -> list[Cycle]:
        """Those whose chains have not failed."""
        return [cycle for cycle in cycles if cycle.chain in self.chains]

    def train(self, cycles: list[Cycle]) -> None:
        """Every batch of the cycle, read once. Cycles may go on from different steps: each takes its step on those
        batches that it does not have yet.
        """
        if not cycles:
            return
        start, steps = min(cycle.training.first for cycle in cycles), cycles[0].plan.steps
        batches = self._batches(cycles[0].training.order, start, steps)
        token_index_B = torch.from_numpy(batches.order.token_index(self.rank.number, self.rank.world)).to(
            self.rank.device
        )
        since = time.monotonic()
        for step, x_BD in enumerate(batches, start):
            waited = time.monotonic() - since
            for cycle in [cycle for cycle in cycles if cycle.training.first <= step]:
                with self.failing(cycle.chain):
                    try:
                        cycle.step(step, x_BD, token_index_B, waited)
                    except Diverged as error:  # all ranks come here together
                        cycle.chain.at_step = step - error.behind
                        raise self._diverged(error, cycle, batches, step - error.behind) from error
            cycles = self._left(cycles)
            if not cycles:
                return
            taking = [cycle for cycle in cycles if cycle.training.first <= step]
            due = cycles[0].training.checkpoint_due(step)
            # Before another cycle takes its first batch: the rows so far count for those that trained on them.
            if due or any(cycle.training.first == step + 1 for cycle in cycles):
                self.count_rows(batches, taking)
            if due:
                for cycle in taking:
                    cycle.training.checkpoint(step + 1)
                for cycle in taking:
                    cycle.chain.say_saved(step + 1)
            if step % cycles[0].plan.config.train.log_steps == 0 and self.node_goes():
                for cycle in cycles:
                    cycle.training.urgent = step + 1
            since = time.monotonic()

    def node_goes(self) -> bool:
        """Whether Ray has said, since this was last asked, that a node of the group will be taken away soon: what is
        trained until then shall not be lost. All ranks ask together, and hear the same.
        """
        if not PREEMPTION or self._warned:
            return False
        self._warned = ray.train.get_preemption_info() is not None
        return self._warned

    def count_rows(self, batches: Batches, cycles: list[Cycle]) -> None:
        """Add the digest of the rows given since the last call to the cycles that trained on them. All ranks call it
        together.
        """
        # Two halves, since a sum of signed 64-bit integers over ranks must not overflow.
        halves = torch.tensor([batches.digest >> 32, batches.digest & 0xFFFFFFFF], device=self.rank.device)
        high, low = self.rank.comm.all_reduce_sum(halves).tolist()
        for cycle in cycles:
            cycle.training.count(((high << 32) + low) & MASK)
        batches.digest = 0

    def open(self, cycle: int) -> None:
        """Start reading for a cycle, where its training stands: its first batch is then there when it begins."""
        starts = {}
        for chain in [chain for chain in self.chains if chain.cycle <= cycle < chain.plan.cycles]:
            with self.failing(chain):
                starts[chain] = first_step(chain.plan, cycle, self.dataset)
        if starts:
            plan = next(iter(starts)).plan
            self._opened = self.stream.open(plan.order(self.dataset, cycle), min(starts.values()), plan.steps)

    def _batches(self, order: Order, start: int, stop: int) -> Batches:
        """The batches opened ahead, or new ones if the chain that would have begun earliest has failed since."""
        if self._opened is None or (self._opened.order, self._opened.start) != (order, start):
            if self._opened is not None:
                self._opened.close()
            self._opened = self.stream.open(order, start, stop)
        return self._opened

    def open_next(self, cycle: int) -> None:
        """Start reading for the cycle after this one; later calls do nothing."""
        number = self.chains[0].plan.number(cycle)
        if self._opened is None or self._opened.order.cycle == number:
            self.open(cycle + 1)

    def _diverged(self, error: Diverged, cycle: Cycle, batches: Batches, step: int) -> Exception:
        """Tell bad data from a bad run."""
        everyone = gather_objects(self.rank.comm, [batches.shard_of(row, error.behind) for row in error.rows])
        shards = sorted({shard for some in everyone for shard in some})
        if shards:
            return ShardError(
                f"activation shard {' or '.join(shards)}: holds NaN or infinity (seen at step {step}), under a valid "
                "checksum. Delete it and run `python -m dmsae_ray.harvest`: only it is made again; no checkpoint was "
                "written from it"
            )
        return Diverged(f"cycle {cycle.number}, step {step}: {error}. Lower train.lr or raise train.warmup_share")

    @contextmanager
    def failing(self, *chains: Chain) -> Iterator[None]:
        """What trying again cannot mend ends these chains, marked failed; the others go on."""
        try:
            yield
        except Superseded:
            raise
        except Exception as error:
            known = final(error)
            if known is None:
                raise
            for chain in chains:
                if chain in self.chains:
                    chain.fail(known)
                    self.chains.remove(chain)
            if self.rank.world > 1 and not isinstance(known, Diverged):
                raise  # the other ranks do not know: let Ray end the group
