"""Whether every node of a joined cluster sees the folders that the work needs: asked of each before any work, in
bounded time.

A node that does not would hold chains that nobody finds, or fail after the harvest.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from dmsae_ray.config import Config
from dmsae_ray.files import Elsewhere, discard, elsewhere, replacing

ANSWER_S = 60.0
"""Longest wait for all nodes: a worker process has to start there, and imports this package."""
REMEDY = "give --output a folder that all nodes share, or a URL such as s3://bucket/prefix"
APPEARS_S = 10.0
"""How long a node waits for a file that was just written: network file systems remember for some seconds what was not
there.
"""


def check_nodes(config: Config) -> None:
    """To be called once connected. Raises ValueError naming each node, and each folder that it does not see."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {
        node["NodeID"]: node["NodeManagerHostname"]
        for node in ray.nodes()
        if node["Alive"] and _works(node["Resources"])
    }
    token, path = secrets.token_hex(8), config.home / "probe.json"
    place = elsewhere(path)
    with replacing(path) as temporary:
        temporary.write_text(token)
    look = ray.remote(num_cpus=0, max_retries=0)(unseen)
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            str(path), token, needed(config), place
        ): name
        for node, name in nodes.items()
    }
    done, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
    problems = [
        f"node {asked[task]} does not answer within {ANSWER_S:.0f} s; is it well, and can it start Ray's workers?"
        for task in silent
    ]
    for task in done:
        try:
            problems += [f"node {asked[task]} {line}" for line in ray.get(task)]
        except ray.exceptions.RayError as error:
            why = str(error).strip().splitlines()[-1]
            problems.append(f"node {asked[task]} cannot run this program ({why}); install the same version there")
    for task in silent:
        ray.cancel(task, force=True)
    discard(path)
    if problems:
        raise ValueError("the Ray cluster's nodes must see what is worked in:\n  " + "\n  ".join(problems))


def _works(resources: dict[str, float]) -> bool:
    """A head without CPUs and GPUs gets nothing to do."""
    return resources.get("CPU", 0) > 0 or resources.get("GPU", 0) > 0


def needed(config: Config) -> dict[str, str]:
    """Further folders and files on disk that workers open, by the field that names them."""
    harvest, model = config.harvest, config.model.name
    places = {
        "harvest.store": None if harvest.store is None or harvest.store.is_url else str(harvest.store),
        "harvest.dataset": None if harvest.dataset is None or harvest.dataset.is_url else str(harvest.dataset),
        "model.name": model if os.path.isabs(model) and elsewhere(Path(model)) is None else None,
        "sae.core": None if config.sae.core is None else str(config.sae.core),
    }
    return {field: place for field, place in places.items() if place is not None and os.path.exists(place)}


def unseen(path: str, token: str, places: dict[str, str], place: Elsewhere | None = None) -> list[str]:
    """On a node: what it does not see, a line each. token: what the file `path` holds. place: what the output folder
    stands for; the file is then read there, and written there as it is.
    """
    lines = [
        f"does not see {field} {where}: put it where all nodes see it"
        for field, where in places.items()
        if not os.path.exists(where)
    ]
    if place is not None:
        return [*_out_of_reach(Path(path), token, place), *lines]
    end, found, why = time.monotonic() + APPEARS_S, None, ""
    while found != token and time.monotonic() < end:
        try:
            found, why = Path(path).read_text(), f"is another folder there: {REMEDY}"
        except OSError as error:
            why = f"cannot be read there ({error.strerror}): mount it there, or {REMEDY}"
        if found != token:
            time.sleep(0.2)
    home = os.path.dirname(path)
    if found != token:
        return [f"does not see the output folder {home}: it {why}"]
    if not os.access(home, os.W_OK):
        lines.insert(0, f"may not write to the output folder {home}: mount it there so that it can be written")
    return lines


def _out_of_reach(path: Path, token: str, place: Elsewhere) -> list[str]:
    """The same of an output at a URL."""
    try:
        found = place.current(path)
        if found != token:
            return ["reads another file at the output's URL than the driver wrote: is it the same server there?"]
        with replacing(path) as temporary:
            temporary.write_text(token)
    except (OSError, ValueError) as error:
        return [f"cannot read and write the output ({error}); give the credentials in the environment of its Ray"]
    return []
