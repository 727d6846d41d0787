"""What the nodes of a cluster have, and how many equal bundles of resources fit on them.

A bundle (one training worker, one harvest actor) lies on one node, as with Ray: three CPUs on one node are another
thing than two here and one there. A worker group is several of them, on nodes that its strategy allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

READ_CPUS = 0.01
"""A read task asks for a sliver: Ray Data would hand out a whole share of its CPUs, of which many chains on one machine
leave none.
"""

SLACK = 1e-9
"""Of divisions: ten bundles of a tenth of a GPU fit on one."""


@dataclass(frozen=True)
class Bundle:
    """What has to be had on one node at the same time."""

    cpus: float
    gpus: float = 0.0
    store_mb: float = 0.0

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} {plural('CPU', self.cpus)}"] if self.cpus else []
        parts += [f"{self.gpus:g} {plural('GPU', self.gpus)}"] if self.gpus else []
        parts += [f"{self.store_mb:,.0f} MB of object store"] if self.store_mb else []
        return listed(parts) or "nothing"


NOTHING = Bundle(0)


@dataclass(frozen=True)
class Node:
    """What one node has, and what of it nobody holds at the moment."""

    cpus: float
    gpus: float = 0.0
    store_mb: float = 0.0
    """object store"""
    free_cpus: float = 0.0
    free_gpus: float = 0.0
    others: Bundle = NOTHING
    """what is held at the moment, and not by this command's worker groups"""
    labels: Mapping[str, str] = field(default_factory=dict)
    accelerators: frozenset[str] = frozenset()

    def beside_others(self) -> Node:
        """What others leave of it."""
        cpus, gpus, store_mb = self.cpus, self.gpus, self.store_mb
        return replace(
            self,
            cpus=max(0.0, cpus - self.others.cpus),
            gpus=max(0.0, gpus - self.others.gpus),
            store_mb=max(0.0, store_mb - self.others.store_mb),
        )


@dataclass(frozen=True)
class WorkerGroup:
    """The workers of one chain, or of several in lockstep."""

    worker: Bundle
    workers: int
    strategy: str = "PACK"
    """as Ray's placement groups have it"""


def slots(node: Node, bundle: Bundle) -> int:
    """Bundles of this kind that one node holds."""
    return min(cpu_slots(node, bundle), gpu_slots(node, bundle), store_slots(node, bundle))


def cpu_slots(node: Node, bundle: Bundle) -> int:
    return _times(node.cpus, bundle.cpus)


def gpu_slots(node: Node, bundle: Bundle) -> int:
    """Ray puts what asks for less than a whole GPU on one GPU, never on parts of two."""
    if 0 < bundle.gpus < 1:
        return int(node.gpus) * _times(1.0, bundle.gpus)
    return _times(node.gpus, bundle.gpus)


def store_slots(node: Node, bundle: Bundle) -> int:
    """A node without a CPU runs no read task, so that nobody puts rows into its store."""
    return _times(node.store_mb if node.cpus else 0.0, bundle.store_mb)


def fitting(nodes: Iterable[Node], bundle: Bundle, spare_cpus: float = 0.0) -> int:
    """Bundles of this kind that all nodes together hold, with so many CPUs left over anywhere.

    Placing one after the other on any node that has room comes to the same number, so this is what Ray's PACK reaches.
    """
    nodes = list(nodes)
    left = sum(node.cpus for node in nodes) - spare_cpus
    return min(sum(slots(node, bundle) for node in nodes), _times(left, bundle.cpus))


def groups_fitting(nodes: Iterable[Node], group: WorkerGroup, spare_cpus: float = 0.0) -> int:
    """Worker groups that all nodes together hold, with so many CPUs left over anywhere.

    With STRICT_SPREAD it is the most that can be placed; Ray, which places one after the other, may come to fewer at
    once where nodes differ.
    """
    nodes, workers = list(nodes), group.workers
    most = fitting(nodes, group.worker, spare_cpus) // workers
    each = [slots(node, group.worker) for node in nodes]
    if group.strategy == "STRICT_PACK":
        return min(most, sum(held // workers for held in each))
    if group.strategy == "STRICT_SPREAD":
        # So many groups have a node for each worker if the nodes hold as many, none more than one for each group.
        while sum(min(held, most) for held in each) < most * workers:
            most -= 1
    return most


def missing(nodes: Sequence[Node], bundle: Bundle, count: int, whose: str, spare_cpus: float = 0.0) -> list[str]:
    """Why so many bundles do not fit: a sentence part for each kind of resource that lacks; none if they fit.

    whose: what one bundle is for, such as "training worker".
    """
    if fitting(nodes, bundle, spare_cpus) >= count:
        return []
    found = []
    stores = [node.store_mb for node in nodes if node.cpus]
    for unit, each, spare, have, fits in (
        (lambda n: plural("CPU", n), bundle.cpus, spare_cpus, [node.cpus for node in nodes], cpu_slots),
        (lambda n: plural("GPU", n), bundle.gpus, 0.0, [node.gpus for node in nodes], gpu_slots),
        (lambda n: "MB of object store", bundle.store_mb, 0.0, stores, store_slots),
    ):
        if not each:
            continue
        need, total, placed = count * each + spare, sum(have), sum(fits(node, bundle) for node in nodes)
        if total < need - SLACK:
            parts = f"{count} {plural(whose, count)} of {figure(each)}{f', {figure(spare)} kept free' if spare else ''}"
            found.append(f"{figure(need)} {unit(need)} ({parts}), it has {figure(total)}")
        elif placed < count:
            found.append(
                f"{figure(each)} {unit(each)} on one node for each of {count} {plural(whose, count)}, its {len(nodes)} "
                f"nodes have room for {placed} (the largest has {figure(max(have, default=0.0))})"
            )
    apart = f"{bundle} on one node for each of {count} {plural(whose, count)}, its nodes have them apart"
    return found or [apart]


def misplaced(nodes: Sequence[Node], group: WorkerGroup) -> list[str]:
    """Why a group whose workers all fit does not fit by its strategy: as `missing`."""
    if groups_fitting(nodes, group):
        return []
    held = [slots(node, group.worker) for node in nodes]
    named = f"(cluster.placement_strategy {group.strategy})"
    if group.strategy == "STRICT_PACK":
        return [
            f"one node for all {group.workers} training workers {named}, {group.worker} for each, its nodes hold "
            f"{max(held)} of them at most"
        ]
    return [
        f"{group.workers} nodes for as many training workers {named}, {group.worker} on each, "
        f"{sum(count > 0 for count in held)} of its nodes {'has' if sum(c > 0 for c in held) == 1 else 'have'} that"
    ]


def figure(amount: float) -> str:
    """To the hundredth below: 599.9996 MB are not 600."""
    return f"{math.floor(amount * 100 + 1e-6) / 100:,.10g}"


def listed(parts: Sequence[str]) -> str:
    """As in a sentence: a, b and c."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def plural(word: str, count: float) -> str:
    return word if count == 1 else f"{word}s"


def _times(have: float, each: float) -> int:
    """How often `each` is contained; a need of nothing fits ever so often."""
    return max(0, int(have / each + SLACK)) if each else 1 << 30
