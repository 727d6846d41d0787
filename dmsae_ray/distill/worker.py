"""A Ray Train worker: chains in lockstep over one stream of rows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import ray.train
import ray.train.torch
import torch

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.activations.order import Order
from dmsae_ray.activations.shard import ShardError
from dmsae_ray.activations.stream import MASK, Batches, Stream
from dmsae_ray.distill.chain import Chain
from dmsae_ray.distill.failure import FINAL, _cause
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.distill.training import first_step
from dmsae_ray.lock import Superseded
from dmsae_ray.sae.ranks.collective import Alone, TorchCollective, gather_objects
from dmsae_ray.sae.report import Diverged


def train_chains(loop: dict) -> None:
    """What every Ray Train worker runs. loop: plans (ChainPlans of one order of data), aggregator and board (actor
    handles).
    """
    # Failed ones are left out: a worker group may have been started again after the failure was written.
    plans = [plan for plan in loop["plans"] if not _failed(plan)]
    if not plans:
        return
    try:
        Worker(plans, loop["aggregator"], loop["board"]).run()
    except Superseded:
        return  # another driver has the folders: trying again cannot help, and nothing may be written


def _failed(plan: ChainPlan) -> bool:
    failure = plan.folder.failure()
    return failure is not None and (failure["kind"] == "diverged" or failure["generation"] == plan.lease.generation)


class Worker:
    """One rank of the worker group: the stream, the language model, and the chains that share them."""

    def __init__(self, plans: list[ChainPlan], aggregator, board):
        from dmsae_ray.lm.model import LanguageModel

        context, plan = ray.train.get_context(), plans[0]
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device, self.aggregator = ray.train.torch.get_device(), aggregator
        self.comm = Alone() if self.world == 1 else TorchCollective(self.device)
        torch.set_num_threads(plan.config.train.threads)
        self.chains = [Chain(plan, self, board) for plan in plans]
        """those that have not failed"""
        self._opened: Batches | None = None
        with self.failing(*self.chains):
            self.dataset = ActivationDataset(plan.dataset)
            self.stream = Stream(
                self.dataset, plan.units(self.dataset), self.rank, self.world, plan.stream_limits, self.device
            )
            self.open(min(chain.cycle for chain in self.chains))  # reading starts beside loading the model
            self.lm = LanguageModel.of(plan.config.model, str(self.device))

    def run(self) -> None:
        try:
            for chain in self.chains:
                chain.tidy()
            for cycle in range(max(chain.plan.cycles for chain in self.chains) if self.chains else 0):
                members = [chain for chain in self.chains if chain.cycle == cycle < chain.plan.cycles]
                if members:
                    self.run_cycle(members)
        finally:
            if self._opened is not None:
                self._opened.close()
        for chain in self.chains:
            chain.say(phase="done", fraction=1.0)

    def run_cycle(self, members: list[Chain]) -> None:
        """Train all members' SAEs, then finish the cycle of one after the other."""
        for chain in members:
            with self.failing(chain):
                chain.begin()
        self.comm.wait_for_all()  # models load at different speeds
        with self.failing(*members):
            self.train([chain for chain in members if chain in self.chains])
        left = [chain for chain in members if chain in self.chains]
        for chain in left:
            with self.failing(chain):
                chain.finish(len(left), opens_next=chain is left[-1])
        self.comm.wait_for_all()  # rank 0 had a cycle to commit

    def train(self, members: list[Chain]) -> None:
        """Every batch of the cycle, read once: each member that does not have it yet takes its step on it."""
        if not members:
            return
        start, steps = min(chain.training.first for chain in members), members[0].plan.steps
        batches = self._batches(members[0].training.order, start, steps)
        token_index_B = torch.from_numpy(batches.order.token_index(self.rank, self.world)).to(self.device)
        since = time.monotonic()
        for step, x_BD in enumerate(batches, start):
            waited = time.monotonic() - since
            for chain in [chain for chain in members if chain.training.first <= step]:
                with self.failing(chain):
                    try:
                        chain.step(step, x_BD, token_index_B, waited)
                    except Diverged as error:  # all ranks come here together
                        chain.at_step = step - error.behind
                        raise self._diverged(error, chain, batches, step - error.behind) from error
            members = [chain for chain in members if chain in self.chains]
            if not members:
                return
            taking = [chain for chain in members if chain.training.first <= step]
            due = members[0].training.checkpoint_due(step)
            # Rows are counted for those that trained on them, so before another member takes its first batch.
            if due or any(chain.training.first == step + 1 for chain in members):
                self.count_rows(batches, taking)
            if due:
                for chain in taking:
                    chain.training.checkpoint(step + 1)
            since = time.monotonic()

    def count_rows(self, batches: Batches, members: list[Chain]) -> None:
        """Add the digest of the rows given since the last call to the members that trained on them. All ranks call it
        together.
        """
        # Two halves, since a sum of signed 64-bit integers over ranks must not overflow.
        halves = torch.tensor([batches.digest >> 32, batches.digest & 0xFFFFFFFF], device=self.device)
        high, low = self.comm.all_reduce_sum(halves).tolist()
        for chain in members:
            chain.training.count(((high << 32) + low) & MASK)
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
        """Those opened ahead; opened anew where a chain that failed since would have begun earlier."""
        if self._opened is None or (self._opened.order, self._opened.start) != (order, start):
            if self._opened is not None:
                self._opened.close()
            self._opened = self.stream.open(order, start, stop)
        return self._opened

    def open_next(self, cycle: int) -> None:
        """The same for the cycle after this one, once."""
        number = self.chains[0].plan.number(cycle)
        if self._opened is None or self._opened.order.cycle == number:
            self.open(cycle + 1)

    def _diverged(self, error: Diverged, chain: Chain, batches: Batches, step: int) -> Exception:
        """Tell bad data from a bad run."""
        everyone = gather_objects(self.comm, [batches.shard_of(row, error.behind) for row in error.rows])
        shards = sorted({shard for some in everyone for shard in some})
        if shards:
            return ShardError(
                f"activation shard {' or '.join(shards)}: holds NaN or infinity (seen at step {step}), under a valid "
                "checksum. Delete it and run `python -m dmsae_ray.harvest`: only it is made again; no checkpoint was "
                "written from it"
            )
        return Diverged(f"cycle {chain.cycle}, step {step}: {error}. Lower train.lr or raise train.warmup_share")

    @contextmanager
    def failing(self, *chains: Chain) -> Iterator[None]:
        """What trying again cannot mend ends these chains, marked failed; the others go on."""
        try:
            yield
        except Superseded:
            raise
        except Exception as error:
            known = _cause(error, FINAL)
            if known is None:
                raise
            for chain in chains:
                if chain in self.chains:
                    chain.fail(known)
                    self.chains.remove(chain)
            if self.world > 1 and not isinstance(known, Diverged):
                raise  # the other ranks do not know: let Ray end the group
