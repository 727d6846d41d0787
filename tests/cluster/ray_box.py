"""A Ray cluster whose nodes are machines of a box.

The head has no CPUs, so that the work is done by the workers; jobs are submitted from a machine that is no node of the
cluster. It asks for a token. All nodes of the cluster have the folder that is handed over, if one is, at /share.
"""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_head import SLOW

from cluster.box import BIN, REPOSITORY, Box, Node

PORT, DASHBOARD = 6379, 8265
STARTS_S, HANGS = 600.0, 3600.0
HEAD_STORE, WORKER_STORE = 200_000_000, 600_000_000
"""Bytes of shared memory for Ray's objects, at most; in /dev/shm, of which each machine has its own. A sweep refuses a
cluster none of whose nodes has room for `cluster.object_store_mb`, 512 by default.
"""
STARTED = "Ray runtime started"
NO_AGENT = "No available agent to submit job"
"""The head takes jobs some seconds after it said that it has started."""
CHECKOUT = "/root/checkout"


@dataclass
class Job:
    """A submitted job; `ray job submit` follows it from the client."""

    id: str
    log: Path
    """what the client prints: what Ray says of the job, and all that the job does"""
    client: Node
    process: subprocess.Popen[bytes]
    env: dict[str, str] = field(repr=False)
    address: str

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait(self, seconds: float = HANGS) -> int:
        """Until it has ended: the client's exit status, which is 0 if the job succeeded or was stopped."""
        return self.process.wait(seconds)

    def ask(self, verb: str) -> subprocess.CompletedProcess[str]:
        """`ray job <verb>` from the client: status, stop, logs."""
        return self.client.run([BIN / "ray", "job", verb, "--address", self.address, self.id], env=self.env)

    def stop(self) -> None:
        done = self.ask("stop")
        assert done.returncode == 0, done.stdout + done.stderr


class RayBox:
    """A head, workers and a client in this box.

    workers: how many at first, each with so many CPUs. share: what they and the head have at /share, if anything.
    variables: of their environment.
    """

    def __init__(self, box: Box, workers: int, cpus: int, share: Path | None, **variables: str):
        self.box, self.cpus, self.share = box, cpus, share
        self.token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        # Ray runs workers at niceness 15 by default: beside other work on the machine a test would stand still.
        self.env = self.token | {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"} | variables
        self._raylets: dict[str, subprocess.Popen[bytes]] = {}
        self._jobs = 0
        self.head = box.node("head", share)
        self.client = box.node("client")
        self.workers: dict[str, Node] = {}
        self.dashboard = f"http://{self.head.address}:{DASHBOARD}"
        self.start_head()
        for number in range(workers):
            self.add_worker(f"worker{number}")

    def start_head(self) -> None:
        """Also after `kill_head`. It knows nothing of the one before, whose workers are to be killed, too."""
        if not self.head.running:
            self.head.boot()
        how = [
            "--head",
            "--num-cpus=0",
            f"--port={PORT}",
            f"--dashboard-host={self.head.address}",
            f"--dashboard-port={DASHBOARD}",
            f"--object-store-memory={HEAD_STORE}",
        ]
        self._start(self.head, how)

    def kill_head(self) -> None:
        self.head.kill()

    def add_worker(self, name: str) -> Node:
        node = self.workers[name] = self.box.node(name, self.share)
        self.start_worker(node)
        return node

    def start_worker(self, node: Node) -> None:
        """Ray on a node that runs already, or whose power had gone."""
        if not node.running:
            node.boot()
        join = [f"--address={self.head.address}:{PORT}", f"--num-cpus={self.cpus}"]
        self._start(node, [*join, f"--object-store-memory={WORKER_STORE}"])

    def kill_worker(self, name: str) -> Node:
        """Its power goes; the node can be started again with its disk, by `start_worker`."""
        node = self.workers.pop(name)
        node.kill()
        return node

    def restart_lost(self) -> list[str]:
        """Starts Ray again on nodes where it has ended, as on one that was given up, and says on which."""
        lost = [name for name, node in self.workers.items() if self._raylets[name].poll() is not None]
        for name in lost:
            self.start_worker(self.workers[name])
        return lost

    def ask(self, code: str) -> Any:
        """What Python says on the head, connected to the cluster, as the last line of its output: as JSON."""
        code = f"import json, ray; ray.init(address='{self.head.address}:{PORT}', log_to_driver=False)\n{code}"
        done = self.head.run([BIN / "python", "-c", code], env=self.env)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def id_of(self, node: Node) -> str:
        """As Ray calls the node that it has at this address now."""
        ids: dict[str, str] = self.ask(
            "print(json.dumps({n['NodeManagerAddress']: n['NodeID'] for n in ray.nodes() if n['Alive']}))"
        )
        return ids[node.address]

    def log_of(self, node: Node) -> Path:
        return node.disk / "ray.log"

    def _start(self, node: Node, how: list[str]) -> None:
        """`ray start`, and once more where Ray gave its own processes up: it gives them 30 s, however busy the machine
        is.
        """
        log = self.log_of(node)
        command = [BIN / "ray", "start", "--block", "--disable-usage-stats", f"--node-ip-address={node.address}", *how]
        end, process = time.monotonic() + STARTS_S, None
        log.unlink(missing_ok=True)
        while process is None or STARTED not in log.read_text():
            ended = process is not None and process.poll() is not None
            if process is None or (ended and SLOW in log.read_text()):
                log.write_bytes(b"")
                process = node.popen(command, env=self.env, log=log)
            else:
                assert not ended and time.monotonic() < end, f"{node.name}: {log.read_text()}"
            time.sleep(0.1)
        self._raylets[node.name] = process

    def submit(self, argv: Sequence[object], client: Node | None = None, env: Mapping[str, str] | None = None) -> Job:
        """`ray job submit` of a command, in a copy of the checkout that Ray makes; returns when the job is accepted.

        env: of the job, handed over as its runtime environment.
        """
        node = client or self.client
        end = time.monotonic() + STARTS_S
        while True:
            job = self.try_to_submit(argv, node, self.token, env)
            while "submitted successfully" not in job.said:
                ended = job.process.poll() is not None
                assert time.monotonic() < end, job.said
                if ended and "submitted successfully" not in job.said:
                    break
                time.sleep(0.1)
            else:
                return job
            assert NO_AGENT in job.said, job.said
            time.sleep(1)

    def try_to_submit(
        self, argv: Sequence[object], client: Node, token: Mapping[str, str], env: Mapping[str, str] | None = None
    ) -> Job:
        """The same, whatever comes of it; the token is one's own."""
        self.check_out(client)
        self._jobs += 1
        name = f"job{self._jobs}"
        submit = [BIN / "ray", "job", "submit", "--address", self.dashboard, "--submission-id", name]
        if env:
            variables = json.dumps({"env_vars": dict(env)})
            submit += ["--runtime-env-json", variables]
        log = client.disk / f"{name}.log"
        process = client.popen([*submit, "--working-dir", CHECKOUT, "--", *argv], env=token, log=log)
        return Job(name, log, client, process, dict(token), self.dashboard)

    def check_out(self, client: Node) -> None:
        """A copy of the checkout on the client's disk, as it lies here, without what git ignores."""
        folder = client.disk / CHECKOUT.lstrip("/")
        if folder.exists():
            return
        tell = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        told = subprocess.run(tell, cwd=REPOSITORY, capture_output=True, check=True, text=True).stdout
        for name in filter(None, told.split("\0")):
            if (REPOSITORY / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPOSITORY / name, folder / name)
