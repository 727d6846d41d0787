"""The short form of `make soak`: three faults, drawn from the commit, in one sweep on several machines.

`pytest --collect-only` does not say which; a failure does, and `soak.py` strikes all of them.
"""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

from cluster.box import REPOSITORY, Box
from cluster.ray_box import RayBox
from cluster.rounds import Place, Round, drawn


def commit() -> str:
    tell = ["git", "rev-parse", "HEAD"]
    return subprocess.run(tell, cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()


def test_a_sweep_on_several_machines_survives_three_faults(small_sweep, tmp_path):
    rng = random.Random(commit())
    faults = drawn(rng, at_url=False, faults=3)
    share = tmp_path / "share"
    share.mkdir()
    said: list[str] = []
    with Box() as box:
        ray_box = RayBox(box, workers=2, cpus=1, share=share)
        Round(ray_box, Place(ray_box, None, "out"), small_sweep.output, said.append).run(faults, rng, Path())
    struck = [fault for fault in faults if fault.struck]
    assert len(struck) >= 2, said
    assert all(fault.struck["alive"] and fault.struck["recovered"] for fault in struck), said
