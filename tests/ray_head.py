"""A Ray head that tests start and end without touching any other on the machine."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from conftest import HANGS, Run, environment, free_port

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PATH = f"{BIN}:/usr/bin:/bin"

SLOW = "timed out during startup"
"""Ray gives its own processes 30 s to start, whatever else keeps the machine busy: then it is started once more."""


@contextmanager
def ray_head(
    cpus: int, dashboard: int | None = None, **variables: str
) -> Iterator[tuple[str, psutil.Process, dict[str, str]]]:
    """A cluster with so many logical CPUs that lasts longer than its drivers: its address, its process, a driver's
    environment.

    It asks for a token. dashboard: a port for Ray's dashboard, which takes jobs; None: there is none. variables: of its
    environment.

    It has a temporary folder of its own, so that nobody else's command on this machine takes it for theirs, and it is
    ended by process id: `ray stop` ends every Ray process of the machine.
    """
    folder, port = tempfile.mkdtemp(prefix="ray-"), free_port()  # short: sockets in it have names of at most 107 bytes
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    start = [
        str(BIN / "ray"),
        "start",
        "--head",
        "--block",
        f"--num-cpus={cpus}",
        f"--port={port}",
        *(["--include-dashboard=false"] if dashboard is None else [f"--dashboard-port={dashboard}"]),
        f"--temp-dir={folder}",
        # Fixed by default, and another head on this machine may have them: jobs would wait for an agent in vain.
        *(f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "dashboard-agent-grpc-port")),
    ]
    # Ray runs workers at niceness 15 by default: beside other work on the machine a test would stand still.
    of_head = environment(**env, RAY_worker_niceness="0", **variables)
    del of_head["RAY_ADDRESS"]  # it starts what others are to find
    log = Path(folder) / "head.log"
    end = time.monotonic() + 600
    head = None
    try:
        while head is None or "Ray runtime started" not in log.read_text():
            ended = head is not None and head.poll() is not None
            if head is None or (ended and SLOW in log.read_text()):
                with open(log, "w") as file:
                    head = psutil.Popen(
                        start, env=of_head, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                    )
            else:
                assert not ended and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield f"127.0.0.1:{port}", psutil.Process(head.pid), env
    finally:
        processes = [*head.children(recursive=True), head]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


def submitted(command: list[str]) -> Run:
    """`ray start --head --num-cpus=3` and `ray job submit` of this command, with token authentication; the job runs in
    a copy of the checkout that Ray makes.
    """
    port, began = free_port(), time.monotonic()
    with ray_head(cpus=3, dashboard=port, PATH=PATH) as (address, _, env):
        submit = [BIN / "ray", "job", "submit", "--address", f"http://127.0.0.1:{port}", "--working-dir", ".", "--"]
        client = environment(**env, RAY_ADDRESS=address, PATH=PATH)
        end = time.monotonic() + 600
        while True:
            job = [*submit, "python", *command[1:]]
            done = subprocess.run(job, cwd=REPOSITORY, env=client, text=True, capture_output=True, timeout=HANGS)
            if "No available agent to submit job" not in done.stderr or time.monotonic() > end:
                break  # the head takes jobs some seconds after it said that it has started
            time.sleep(1)
    return Run(done.returncode, done.stdout + done.stderr, time.monotonic() - began)
