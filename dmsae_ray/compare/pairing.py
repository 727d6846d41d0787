"""Which chains are compared, and what two of them do not have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal

from dmsae_ray.compare.chain_result import ChainIdentity

Differs = Literal["seed", "init", "data", "k", "both", "arm"]


@dataclass(frozen=True)
class Pairing:
    """Two chains to be compared."""

    a: ChainIdentity
    b: ChainIdentity
    differs: Differs
    """`seed`: initialisation and data; `init`: initialisation alone; `data`: order or part of the data alone; `k`;
    `both`: k and a seed;
    `arm`: a field that is none of these"""
    differences: tuple[str, ...]
    """everything that differs, of seed, data_seed, part, k, rest"""
    group: str
    """with which other pairs it is summed up: `<arm>/<differs>`, or `<arm>~<arm>/<differs>` across arms"""


def differences(a: ChainIdentity, b: ChainIdentity) -> tuple[str, ...]:
    """Names of the fields in which two chains differ. Raises ValueError if there is none."""
    names = tuple(name for name in ("seed", "data_seed", "part", "k", "rest") if getattr(a, name) != getattr(b, name))
    if not names:
        raise ValueError(
            f"chains {a.label} and {b.label} are the same in seed, data, k and all other fields: comparing them says "
            "nothing"
        )
    return names


def differs(a: ChainIdentity, b: ChainIdentity) -> Differs:
    """What two chains do not have in common, in one word. Raises ValueError if they have everything."""
    names = set(differences(a, b))
    if "rest" in names:
        return "arm"
    if "k" in names:
        return "k" if names == {"k"} else "both"
    if "seed" not in names:
        return "data"
    return "init" if names == {"seed"} else "seed"


def paired(a: ChainIdentity, b: ChainIdentity) -> Pairing:
    """Raises ValueError if the two have everything in common."""
    what = differs(a, b)
    arms = a.arm if a.arm == b.arm else f"{a.arm}~{b.arm}"
    return Pairing(a, b, what, differences(a, b), f"{arms}/{what}")


def pairs_within(chains: Sequence[ChainIdentity]) -> list[Pairing]:
    """All pairs of an arm, and across arms those of equal seed and k, in the order of the chains.

    Across arms everything else would mix what the arm changes with what a seed or k does. Raises ValueError if two
    chains bear one label or have everything in common.
    """
    _check_labels(chains)
    return [paired(a, b) for a, b in combinations(chains, 2) if a.arm == b.arm or (a.seed, a.k) == (b.seed, b.k)]


def pairs_across(left: Sequence[ChainIdentity], right: Sequence[ChainIdentity]) -> list[Pairing]:
    """Between two sweeps: pairs of one arm and one k, of equal or of different seeds.

    A chain that both sweeps have is not compared with itself. Raises ValueError if two chains bear one label.
    """
    _check_labels([*left, *right])
    return [paired(a, b) for a, b in product(left, right) if (a.arm, a.k) == (b.arm, b.k) and _differ(a, b)]


def sample(pairs: Sequence[Pairing], count: int, seed: int) -> list[Pairing]:
    """At most `count` pairs of every group, in the order given.

    Drawn by a hash of seed and labels: which pairs come does not depend on the order of the chains, and a further chain
    puts few of them out, so that most results can be used again.
    """
    by_group: dict[str, list[Pairing]] = {}
    for pair in pairs:
        by_group.setdefault(pair.group, []).append(pair)
    taken = {
        (p.a.label, p.b.label)
        for members in by_group.values()
        for p in sorted(members, key=lambda p: _lot(p, seed))[:count]
    }
    return [pair for pair in pairs if (pair.a.label, pair.b.label) in taken]


def _lot(pair: Pairing, seed: int) -> str:
    first, second = sorted((pair.a.label, pair.b.label))
    return hashlib.sha256(f"{seed}|{first}|{second}".encode()).hexdigest()


def _differ(a: ChainIdentity, b: ChainIdentity) -> bool:
    return any(getattr(a, name) != getattr(b, name) for name in ("seed", "data_seed", "part", "k", "rest"))


def _check_labels(chains: Sequence[ChainIdentity]) -> None:
    labels = [chain.label for chain in chains]
    if twice := next(_repeated(labels), None):
        raise ValueError(f"two chains are called {twice}: give every chain to be compared a label of its own")


def _repeated(labels: Sequence[str]) -> Iterator[str]:
    return (label for place, label in enumerate(labels) if label in labels[:place])
