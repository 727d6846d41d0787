"""The short form of `make soak`: processes killed in three phases, drawn from the commit, of one chain on several
machines. A failure says which; `soak.py` strikes all that there is.
"""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

from cluster.box import REPOSITORY, Box
from cluster.ray_box import RayBox
from cluster.rounds import Place, Round, drawn
from cluster.stages import CHAINS


def commit() -> str:
    tell = ["git", "rev-parse", "HEAD"]
    return subprocess.run(tell, cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()


def test_a_chain_on_several_machines_survives_three_faults(small_sweep, tmp_path):
    rng, chains = random.Random(commit()), CHAINS[:1]
    faults = drawn(rng, at_url=False, faults=3, chains=chains, quick=True)
    share = tmp_path / "share"
    share.mkdir()
    said: list[str] = []
    with Box() as box:
        ray_box = RayBox(box, workers=2, cpus=1, share=share)
        place = Place(ray_box, None, "out")
        Round(ray_box, place, small_sweep.output, said.append, chains).run(faults, rng, Path())
    struck = [fault for fault in faults if fault.struck]
    assert struck, said  # one whose phase is over in a moment may be missed
    assert all(fault.struck["alive"] and fault.struck["recovered"] for fault in struck), said
