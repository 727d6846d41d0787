"""`ray up jobs/cluster.yaml` from a client that reaches three machines by ssh: a job there comes to the bits of one
machine, and `ray down` leaves nothing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import SMALL, same_results

from cluster.box import BIN, REPOSITORY, Box, Node
from cluster.ray_box import HEAD_STORE, NO_AGENT, STARTS_S, WORKER_STORE

PACKAGES = {"openssh-server": "/usr/sbin/sshd", "openssh-client": "ssh", "rsync": "rsync"}
FILE = "/share/cluster.yaml"
ENV = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "TERM": "dumb", "RAY_UP_enable_autoscaler_v2": "0"}
ADDRESS = "http://127.0.0.1:8265"


@dataclass
class Machines:
    share: Path
    client: Node
    head: Node
    workers: tuple[Node, Node]

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (self.head, *self.workers)

    def ray(self, *args: object) -> subprocess.CompletedProcess[str]:
        """A command of Ray's, given on the client in the repository's root."""
        return self.client.run(["env", f"--chdir={REPOSITORY}", BIN / "ray", *args], env=ENV)


@pytest.fixture
def machines(tmp_path) -> Iterator[Machines]:
    """With sshd on all but the client, whose key they take."""
    without = [package for package, command in PACKAGES.items() if not shutil.which(command)]
    if without:
        pytest.skip(f"NOT RUN: apt-get install {' '.join(without)}")
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it, and a node sees this machine's
    with Box() as box:
        client, head, one, two = (box.node(name, tmp_path) for name in ("client", "head", "worker1", "worker2"))
        made = Machines(tmp_path, client, head, (one, two))
        make_key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f"]
        for node in box.nodes.values():
            (node.disk / "root/.ssh").mkdir(mode=0o700)
        assert client.run([*make_key, "/root/.ssh/id_ed25519"]).returncode == 0
        for node in made.nodes:
            shutil.copy(client.disk / "root/.ssh/id_ed25519.pub", node.disk / "root/.ssh/authorized_keys")
            assert node.run([*make_key, "/srv/host_key"]).returncode == 0
            serve = ["/usr/sbin/sshd", "-D", "-e", "-h", "/srv/host_key", "-o", "PidFile=none", "-o", "UsePAM=no"]
            node.popen(serve, log=node.disk / "sshd.log")
        yield made


def filled_in(machines: Machines) -> str:
    """jobs/cluster.yaml with these machines; instead of installing, the nodes have this environment."""
    text = (REPOSITORY / "jobs" / "cluster.yaml").read_text()
    one, two = machines.workers
    words = {"HEAD": machines.head.address, "WORKER1": one.address, "WORKER2": two.address, "USER": "root"}
    for word, value in words.items():
        text = re.sub(rf"\b{word}\b", value, text)
    instead = {
        "make -C ~/dmsae_ray setup": f"ln -sfn {sys.prefix} ~/dmsae_ray/.venv",
        "ray start --head": f"ray start --object-store-memory={HEAD_STORE} --head",
        "ray start --address": f"ray start --num-cpus=2 --object-store-memory={WORKER_STORE} --address",
    }
    for what, other in instead.items():
        assert text.count(what) == 1
        text = text.replace(what, other)
    return text


def of_ray(machines: Machines) -> list[bytes]:
    found = []
    for pid in (pid for node in machines.nodes for pid in node.pids()):
        with suppress(OSError):  # it has ended
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes())
    return [line for line in found if b"ray" in line]


def test_ray_up_makes_a_cluster_that_takes_jobs(small_sweep, machines: Machines):
    (machines.share / "cluster.yaml").write_text(filled_in(machines))
    (machines.share / "small.yaml").write_text(SMALL)
    make_token = f"umask 077; {BIN}/ray get-auth-token --generate"
    assert machines.client.run(["bash", "-c", make_token], env=ENV).returncode == 0
    up = machines.ray("up", "-y", FILE)
    assert up.returncode == 0, up.stdout + up.stderr

    tunnel = ["env", f"--chdir={REPOSITORY}", BIN / "ray", "dashboard", FILE]
    machines.client.popen(tunnel, env=ENV, log=machines.client.disk / "tunnel.log")
    sweep = ["python", "-m", "dmsae_ray.sweep", "--config", "/share/small.yaml", "--output", "/share/out"]
    end = time.monotonic() + STARTS_S
    while True:
        job = machines.ray("job", "submit", "--address", ADDRESS, "--working-dir", ".", "--", *sweep)
        said = job.stdout + job.stderr
        assert time.monotonic() < end, said
        if job.returncode == 0 or not any(word in said for word in (NO_AGENT, "Failed to connect", "too small")):
            break  # neither the tunnel nor the head's agent nor the workers are there at once
        time.sleep(2)
    assert job.returncode == 0 and "chains: 2 to run" in said, said
    same_results(machines.share / "out", small_sweep.output, cycles=4)

    for node in machines.nodes:
        assert oct((node.disk / "root/.ray/auth_token").stat().st_mode)[-3:] == "600"
    down = machines.ray("down", "-y", FILE)
    assert down.returncode == 0, down.stdout + down.stderr
    end = time.monotonic() + STARTS_S
    while left := of_ray(machines):  # a worker gives its head a minute to come back
        assert time.monotonic() < end, left
        time.sleep(1)
