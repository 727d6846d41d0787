"""A cluster that our command starts is closed to others: to other users of the machine, and to the network."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import psutil
import pytest
from conftest import environment

STARTED = """
import json, sys
from pathlib import Path
from dmsae_ray.cluster.connection import connect, disconnect
from dmsae_ray.config import Config

there = connect(Config(name="closed"), chains=1, verbose=False)
import ray
from ray._private.worker import global_worker

@ray.remote(num_cpus=0)
class Actor:
    def ready(self): pass

actor = Actor.remote()
ray.get(actor.ready.remote())
session, gcs = global_worker.node.get_session_dir_path(), global_worker.gcs_client.address
print(json.dumps({"folder": str(there.folder), "session": session, "gcs": gcs}), flush=True)
sys.stdin.read()
disconnect(there, Path(sys.argv[1]))
"""
SERVICES = (
    "NodeInfoGcsService/CheckAlive",
    "CoreWorkerService/KillActor",
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Pull",
    "ReporterService/GetTraceback",
)
"""One question for each kind of Ray's processes that takes any."""
METRICS = b"# HELP "


class Started(NamedTuple):
    """A cluster of the command's own."""

    folder: Path
    session: Path
    gcs: str
    process: psutil.Process


@pytest.fixture(scope="module", params=["", "disabled"])
def started(request, tmp_path_factory) -> Iterator[Started]:
    """Also where the environment says that clusters want no token: that is said of others."""
    of_user = {"RAY_AUTH_MODE": request.param} if request.param else {}
    folder = tmp_path_factory.mktemp("closed")
    with open(folder / "errors", "w") as errors:
        process = psutil.Popen(
            [sys.executable, "-c", STARTED, str(folder / "ray")],
            env=environment(**of_user),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    line = process.stdout.readline()
    assert line, (folder / "errors").read_text()
    said = json.loads(line)
    yield Started(Path(said["folder"]), Path(said["session"]), said["gcs"], process)
    process.communicate()
    assert not Path(said["folder"]).exists(), "nothing of it is left"


def listening(started: Started) -> list[Any]:
    ours = {process.pid for process in started.process.children(recursive=True)} | {started.process.pid}
    return [one for one in psutil.net_connections("inet") if one.status == "LISTEN" and one.pid in ours]


def http(address: str) -> bytes | int | None:
    """What is answered without a token: content, a status, or nothing that is HTTP."""
    try:
        return urllib.request.urlopen(f"http://{address}/", timeout=10).read(1000)
    except urllib.error.HTTPError as error:
        return error.code
    except Exception:
        return None


def said_to(address: str) -> dict[str, Any]:
    """The status that each question without a token is answered with; OK if it is answered."""
    found = {}
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        for service in SERVICES:
            try:
                channel.unary_unary(f"/ray.rpc.{service}")(b"", timeout=10)
                found[service] = "OK"
            except grpc.RpcError as error:
                found[service] = error.code().name
    return found


def test_every_port_asks_for_a_token(started: Started):
    """But for three that show figures to Prometheus, which nothing can be asked for."""
    figures, refused = [], []
    for one in listening(started):
        anywhere = one.laddr.ip in ("::", "0.0.0.0")
        address = f"{'127.0.0.1' if anywhere else one.laddr.ip}:{one.laddr.port}"
        answer = http(address)
        if isinstance(answer, bytes):
            assert answer.startswith(METRICS), (address, answer)
            figures.append(address)
        elif answer is not None:
            assert answer == 401, (address, answer)
            refused.append(address)
        else:
            answers = said_to(address)
            if one not in listening(started):
                continue  # Ray has ended an idle worker
            assert "UNAUTHENTICATED" in answers.values() and "OK" not in answers.values(), (address, answers)
            refused.append(address)
    assert len(figures) <= 3 and len(refused) >= 8, (figures, refused)
    assert started.gcs.rpartition(":")[2] in {address.rpartition(":")[2] for address in refused}


def test_a_driver_without_the_token_is_refused(started: Started):
    join = f"import ray; ray.init(address={started.gcs!r}, logging_level='ERROR'); print('joined')"
    for of_user in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        env = environment(**of_user)
        del env["RAY_ADDRESS"]
        done = subprocess.run([sys.executable, "-c", join], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode != 0 and "joined" not in done.stdout and "uthenticat" in done.stderr, done


def test_another_user_cannot_enter_its_folder(started: Started):
    """In which Ray lets everybody read and write: sockets, logs, what it unpacks."""
    assert started.session.is_relative_to(started.folder) and any(started.session.glob("sockets/*"))
    as_another = "setpriv --reuid=65534 --regid=65534 --clear-groups --".split()
    for command in (["ls", started.session], ["touch", started.session / "sockets" / "mine"]):
        done = subprocess.run([*as_another, *command], capture_output=True, text=True)
        assert done.returncode != 0 and "Permission denied" in done.stderr, done


def test_the_token_stands_in_no_argument_and_in_no_file(started: Started):
    token = started.process.children()[0].environ()["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    for process in (started.process, *started.process.children(recursive=True)):
        assert token not in " ".join(process.cmdline())
    files = [path for path in started.folder.rglob("*") if path.is_file()]
    assert files and not [path for path in files if token.encode() in path.read_bytes()]
