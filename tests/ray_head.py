"""A Ray head that tests start and end without touching any other on the machine."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
from conftest import HANGS, Run, environment, free_port, wait_for

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PATH = f"{BIN}:/usr/bin:/bin"

SLOW = "timed out during startup"
"""Ray gives its own processes 30 s to start, whatever else keeps the machine busy: then it is started once more."""


@contextmanager
def ray_head(
    cpus: int,
    dashboard: int | None = None,
    metrics: int | None = None,
    scaled: Mapping[str, Any] | None = None,
    **variables: str,
) -> Iterator[tuple[str, psutil.Process, dict[str, str]]]:
    """A cluster with so many logical CPUs that lasts longer than its drivers: its address, its process, a driver's
    environment.

    It asks for a token. dashboard: a port for Ray's dashboard, which takes jobs; None: there is none. metrics: port of
    its Prometheus endpoint; None: any. scaled: of an autoscaler that starts further nodes on this machine,
    `autoscaler`'s. variables: of its environment.

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
        *([] if metrics is None else [f"--metrics-export-port={metrics}"]),
        f"--temp-dir={folder}",
        # Fixed by default, and another head on this machine may have them: jobs would wait for an agent in vain.
        *(f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "dashboard-agent-grpc-port")),
    ]
    if scaled is not None:
        variables |= scaled["variables"]
        provider = scaled["config"]["provider"] | {"gcs_address": f"127.0.0.1:{port}"}
        (Path(folder) / "scaled.json").write_text(json.dumps(scaled["config"] | {"provider": provider}))
        start.append(f"--autoscaling-config={folder}/scaled.json")
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


def autoscaler(version: int, most: int, resources: Mapping[str, float], labels: Mapping[str, str]) -> dict[str, Any]:
    """For `ray_head`: Ray's own autoscaler, of this version, over nodes that are processes of this machine: `most` of
    them at most, each with these resources and labels.
    """
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    empty = ("auth", "file_mounts", "docker")
    none = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands")
    none += ("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    head, variables = "ray.head.default", {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    if version == 2:
        named = dict.fromkeys(("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING"), FAKE_HEAD_NODE_ID)
        variables |= {"RAY_enable_autoscaler_v2": "1"} | named
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
    }
    config = {
        "cluster_name": "test",
        "max_workers": most,
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": 5.0,
        "provider": provider,
        "available_node_types": {
            head: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": dict(resources), "labels": dict(labels), "node_config": {}, "max_workers": most},
        },
        "head_node_type": head,
        "file_mounts_sync_continuously": False,
        **{name: {} for name in empty},
        **{name: [] for name in none},
    }
    return {"config": config, "variables": variables}


@contextmanager
def ray_node(address: str, env: dict[str, str], cpus: int, *options: str) -> Iterator[tuple[psutil.Popen, str]]:
    """A further node of a cluster, with these CPUs and options of `ray start`: its process, and its id."""
    known = nodes_of(address, env)
    with tempfile.TemporaryDirectory(prefix="node-") as folder:
        ports = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port")
        start = [str(BIN / "ray"), "start", f"--address={address}", f"--num-cpus={cpus}", "--block", *options]
        process = psutil.Popen(
            [*start, f"--temp-dir={folder}", *(f"--{name}={free_port()}" for name in ports)],
            env=environment(**env, RAY_worker_niceness="0"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for(lambda: nodes_of(address, env) - known, process)
            (own,) = nodes_of(address, env) - known
            yield process, own
        finally:
            end(process)


def end(process: psutil.Popen) -> None:
    """As its machine's power would."""
    with suppress(psutil.NoSuchProcess):
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def nodes_of(address: str, env: dict[str, str]) -> set[str]:
    """Ids of the cluster's nodes."""
    code = "import json, ray; ray.init(); print(json.dumps([n['NodeID'] for n in ray.nodes() if n['Alive']]))"
    found = subprocess.run(
        [BIN / "python", "-c", code],
        env=environment(**env, RAY_ADDRESS=address),
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert found.returncode == 0, found.stderr
    return set(json.loads(found.stdout.splitlines()[-1]))


def actors(title: str, *of: psutil.Process) -> list[psutil.Process]:
    """Processes of actors of this name, on these nodes."""
    found = []
    for one in (one for node in of for one in node.children(recursive=True)):
        with suppress(psutil.Error):
            if one.cmdline()[:1] == [f"ray::{title}"]:
                found.append(one)
    return found


@contextmanager
def scraped(address: str, into: Path) -> Iterator[None]:
    """While open, what a Prometheus endpoint gives is kept in a file: the first sample of each series, and of our own
    every other value too. address: <host>:<port>.
    """
    seen: set[str] = set()

    def scrape() -> None:
        while not over.wait(0.5):
            # The endpoint of a busy node may take many seconds, that of a node that is cut off does not answer.
            with suppress(OSError, HTTPException):
                with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
                    text = answer.read().decode()
                with open(into, "a") as file:
                    for line in text.splitlines(keepends=True):
                        known = line if line.startswith("ray_dmsae_") else line.rpartition(" ")[0]
                        if known not in seen:
                            file.write(line)
                            seen.add(known)

    over = threading.Event()
    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def submitted(command: list[str], metrics: Path) -> Run:
    """`ray start --head --num-cpus=3` and `ray job submit` of this command, with token authentication; the job runs in
    a copy of the checkout that Ray makes. metrics: file for what the head's Prometheus endpoint gives meanwhile.
    """
    port, exported, began = free_port(), free_port(), time.monotonic()
    often = {"RAY_metrics_report_interval_ms": "1000"}  # every 10 s by default, in which a small sweep's phases pass
    with (
        ray_head(3, port, exported, PATH=PATH, **often) as (address, _, env),
        scraped(f"127.0.0.1:{exported}", metrics),
    ):
        done = submitted_to(port, env | {"RAY_ADDRESS": address, "PATH": PATH}, command[1:], "--working-dir", ".")
    return Run(done.returncode, done.stdout + done.stderr, time.monotonic() - began)


def submitted_to(
    port: int, env: Mapping[str, str], python: list[str], *options: str
) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, to the head whose dashboard has this port, of Python with these arguments; options: its own."""
    submit = [BIN / "ray", "job", "submit", "--address", f"http://127.0.0.1:{port}", *options, "--", "python", *python]
    end = time.monotonic() + 600
    while True:
        done = subprocess.run(
            submit, cwd=REPOSITORY, env=environment(**env), text=True, capture_output=True, timeout=HANGS
        )
        if "No available agent to submit job" not in done.stderr or time.monotonic() > end:
            return done  # the head takes jobs some seconds after it said that it has started
        time.sleep(1)
