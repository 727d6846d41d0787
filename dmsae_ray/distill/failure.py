"""Why a chain ended before its time: what counts as final, and what is written of it."""

from __future__ import annotations

import re
import time
import traceback

from dmsae_ray.activations.shard import ShardError
from dmsae_ray.causes import causes, disk_full
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.distill.record import Failure
from dmsae_ray.lock import Lease
from dmsae_ray.sae.step_report import Diverged
from dmsae_ray.secret_url import scrub
from dmsae_ray.store import StoreError

FINAL = (Diverged, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)
"""What trying again cannot mend. Anything else (a lost worker, a lost node, its peers' broken connections) Ray retries.
"""


class DiskFull(OSError):
    """A disk is full, or must not be written to: trying again at once cannot mend that. The message has the remedy."""


def write_failure(
    plan: ChainPlan, lease: Lease, kind: str, reason: str, cycle: int | None = None, step: int | None = None
) -> None:
    """failed.json. kind: see Failure; cycle, step: where, as far as that is known. Raises Superseded."""
    lease.check()
    Failure(kind, scrub(reason), cycle, step, lease.generation, time.time(), scrub(traceback.format_exc())).write(
        plan.folder.failed
    )


def final(error: BaseException) -> Exception | None:
    """What is behind an error, if trying again cannot mend it; None if it may."""
    if (why := disk_full(error)) is not None:
        return DiskFull(why)
    return cause(error, FINAL)


def cause(error: BaseException, kinds: tuple[type[Exception], ...]) -> Exception | None:
    """The first of these kinds in a chain of causes, also where Ray wrapped what a task of its own raised."""
    links = causes(error, contexts=True)
    for link in links:
        # A read task's error reaches us only as the text of its traceback.
        if found := re.search(r"^[\w.]*(ShardError|StoreError|Missing): (.+)$", str(link), re.MULTILINE):
            return (ShardError if found[1] == "ShardError" else StoreError)(found[2])
    for link in links:
        if isinstance(link, kinds):
            return link
    return None
