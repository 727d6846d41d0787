"""A sweep on a cluster in a box, struck again and again, at moments drawn from a seed.

    make soak FAULTS=200 [SEED=1] [LOG=soak.jsonl]

Rounds of one sweep each, with several faults, until so many are in the log; it goes on where the last one stopped.
After each round: the cores, SAEs and rows of an undisturbed sweep, to the bit; a run and a completion record for each,
once; nothing done again but what followed a checkpoint; no actor, placement group, temporary file or unfinished run
left. A fault counts if its victim was alive in the phase that it was meant for.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from conftest import run_command  # noqa: E402 (not on the path before)
from s3_server import KEYS  # noqa: E402

from cluster.box import REPOSITORY, Box, missing  # noqa: E402
from cluster.ray_box import RayBox  # noqa: E402
from cluster.rounds import Place, Round, drawn  # noqa: E402
from cluster.s3_node import S3Node  # noqa: E402

FAULTS, ROUNDS = 8, 3
"""Faults of a round; rounds on one cluster, before another with another kind of output."""


def rows_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """One line."""
    faults = [row for row in rows if "fault" in row]
    struck = [row for row in faults if "recovered" in row]
    rounds = [row for row in rows if "fault" not in row]
    lost = [row for row in rounds if row["error"]]
    again = [row["done_again"] for row in struck if "done_again" in row]

    def count(what: str) -> str:
        return ", ".join(f"{name} {n}" for name, n in Counter(row[what] for row in struck).most_common())

    parts = [
        f"soak: {len(struck)} faults in {len(rounds)} rounds, seeds {sorted({row['seed'] for row in rows})}",
        f"by phase: {count('phase')}",
        f"by kind: {count('fault')}",
        f"overcome: {count('recovered')}",
        f"steps done again: {sum(again)}, at most {max(again, default=0)} after one of {len(again)} in training",
        f"{len(faults) - len(struck)} more missed their phase",
        f"losses {len(lost)}",
    ]
    return "; ".join(parts)


@contextmanager
def cluster(server: bool) -> Iterator[tuple[RayBox, S3Node | None]]:
    """A head, three workers and a client, with a shared folder or an S3 server."""
    with ExitStack() as stack:
        share = None if server else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-share-")))
        made = stack.enter_context(Box())
        s3 = S3Node(made) if server else None
        yield RayBox(made, 3, 1, share, **(KEYS if server else {})), s3


class Soak:
    """The rounds of one seed, which go on where its rows in the log end."""

    def __init__(self, seed: int, log: Path, temporary: Path):
        self.seed, self.log, self.temporary = seed, log, temporary
        tell = ["git", "rev-parse", "--short", "HEAD"]
        self.commit = subprocess.run(tell, cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()
        self.undisturbed = temporary / "undisturbed" / "out"

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for row in rows_of(self.log) if row["seed"] == self.seed]

    def run(self, faults: int, seconds: float) -> int:
        """Until so many faults are in the log, or after so long; returns how many rounds were lost."""
        end, lost = time.monotonic() + seconds, 0

        def left() -> bool:
            return sum("recovered" in row for row in self.rows) < faults and time.monotonic() < end

        if left():
            done = run_command(self.undisturbed)
            assert done.code == 0, done.out
        number = 1 + max((row["round"] for row in self.rows), default=-1)
        while left():
            with cluster(server=(number // ROUNDS + self.seed) % 2 == 1) as (ray_box, server):
                good = True
                while good and left():
                    good = self.round(number, ray_box, server)
                    lost += not good  # what it left on its cluster is not the next one's
                    number += 1
                    if number % ROUNDS == 0:
                        break
        return lost

    def round(self, number: int, ray_box: RayBox, server: S3Node | None) -> bool:
        """One round, with its lines in the log; whether all was as if nothing had happened."""
        rng, began, error, submits = random.Random(f"{self.seed} {number}"), time.monotonic(), "", 0
        faults = drawn(rng, server is not None, FAULTS)
        where = "a shared folder" if server is None else "S3"
        meant = "; ".join(f"{fault.strike} in {fault.stage}" for fault in faults)
        say(f"round {number} of seed {self.seed}, output in {where}: {meant}")
        place = Place(ray_box, server, f"round{self.seed}-{number}")
        try:
            struck = Round(ray_box, place, self.undisturbed, say)
            try:
                struck.run(faults, rng, self.temporary / f"round{number}")
            finally:
                submits = struck.submits
        except Exception as failed:  # whatever went wrong is a loss, and the log keeps it
            error = f"{type(failed).__name__}: {failed}"
            traceback.print_exc()
        about = {"seed": self.seed, "round": number, "commit": self.commit, "output": where}
        seconds = round(time.monotonic() - began)
        rows = [*(fault.row() for fault in faults), {"error": error, "submits": submits, "seconds": seconds}]
        with open(self.log, "a") as log:
            log.writelines(json.dumps(about | row) + "\n" for row in rows)
        say(f"round {number}: {'LOST: ' + error[:500] if error else 'as if nothing had happened'}, {seconds} s")
        return not error


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="so many of this seed in the log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("soak.jsonl"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further round after so long")
    args = parser.parse_args()
    if lacking := missing():
        say(f"NOT RUN: {lacking}")
        return 1
    os.environ.update(KEYS)
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        lost = Soak(args.seed, args.log, Path(temporary)).run(args.faults, args.minutes * 60)
    say(summary(rows_of(args.log)))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
