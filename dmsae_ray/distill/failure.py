"""Why a chain ended before its time: what counts as final, and what is written of it."""

from __future__ import annotations

import re
import time
import traceback

from dmsae_ray.activations.shard import ShardError
from dmsae_ray.activations.store import StoreError
from dmsae_ray.causes import causes
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.files import write_json
from dmsae_ray.sae.report import Diverged
from dmsae_ray.secret_url import scrub

FINAL = (Diverged, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError)
"""What trying again cannot mend. Anything else (a lost worker, a lost node, its peers' broken connections) Ray retries.
"""


def write_failure(plan: ChainPlan, kind: str, reason: str, cycle: int | None = None, step: int | None = None) -> None:
    """failed.json: kind `diverged` (final), `data` or `error` (tried again by the next sweep); cycle, step: where, as
    far as that is known.

    Raises Superseded.
    """
    assert plan.lease is not None, "who looks only writes nothing"
    plan.lease.check()
    write_json(
        plan.folder.failed,
        {
            "kind": kind,
            "reason": scrub(reason),
            "cycle": cycle,
            "step": step,
            "generation": plan.lease.generation,
            "at": time.time(),
            "traceback": scrub(traceback.format_exc()),
        },
    )


def _cause(error: BaseException, kinds: tuple[type[Exception], ...]) -> Exception | None:
    """The first of these kinds in a chain of causes, also where Ray wrapped what a task of its own raised."""
    links = causes(error, contexts=True)
    for link in links:
        # A read task's error reaches us only as the text of its traceback.
        if found := re.search(r"^[\w.]*(ShardError|StoreError|Missing): (.+)$", str(link), re.MULTILINE):
            return (ShardError if found[1] == "ShardError" else StoreError)(found[2])
    return next((link for link in links if isinstance(link, kinds)), None)
