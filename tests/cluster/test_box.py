"""The box itself: nodes are as far from each other as machines are, and the faults of machines can be made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from s3_server import BUCKET, KEYS

from cluster.box import BIN, REPOSITORY, Box, Node, cannot_slow, clean
from cluster.s3_node import S3Node

PORT = 8000
HANGS = 120.0


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < end, "never came"
        time.sleep(0.05)


def reaches(a: Node, b: Node, seconds: float = 3.0) -> bool:
    """A connection from one to the other's server is made; a busy machine gets some tries."""
    code = f"import socket; socket.create_connection(('{b.address}', {PORT}), {seconds})"
    return a.run([BIN / "python", "-c", code], timeout=HANGS).returncode == 0


def serve(node: Node) -> None:
    """Its /srv, over HTTP."""
    node.popen([BIN / "python", "-m", "http.server", str(PORT), "--directory", "/srv"])
    until(lambda: reaches(node, node))


def fetch(a: Node, b: Node, name: str) -> tuple[int, float]:
    """A file that the other serves: its bytes, and the seconds that they took."""
    code = (
        "import time, urllib.request; t = time.monotonic(); "
        f"n = len(urllib.request.urlopen('http://{b.name}:{PORT}/{name}').read()); print(n, time.monotonic() - t)"
    )
    n, seconds = a.run([BIN / "python", "-c", code], timeout=HANGS).stdout.split()
    return int(n), float(seconds)


def test_nodes_have_names_disks_and_processes_of_their_own(box: Box, tmp_path: Path):
    (tmp_path / "for-all").write_text("shared")
    one, two, apart = box.node("one", share=tmp_path), box.node("two", share=tmp_path), box.node("apart")
    assert one.run(["hostname"]).stdout == "one\n"
    for folder in ("/srv", "/tmp", "/var/tmp", "/root", "/dev/shm"):
        assert one.run(["sh", "-c", f"echo mine > {folder}/file"]).returncode == 0, folder
        assert one.run(["cat", f"{folder}/file"]).stdout == "mine\n"
        assert two.run(["cat", f"{folder}/file"]).returncode != 0, folder
        assert not Path(folder, "file").exists()
    assert (one.disk / "srv/file").read_text() == "mine\n"

    with tempfile.NamedTemporaryFile(dir="/tmp") as of_this_machine:
        assert one.run(["cat", of_this_machine.name]).returncode != 0
    for folder in ("/", "/etc", "/usr", "/var", str(REPOSITORY), sys.prefix, sys.base_prefix):
        done = one.run(["touch", f"{folder}/file"])
        assert done.returncode != 0 and "Read-only" in done.stderr, folder
        assert not Path(folder, "file").exists()

    assert one.run(["sh", "-c", "cat /share/for-all && echo back > /share/file"]).stdout == "shared"
    assert two.run(["cat", "/share/file"]).stdout == (tmp_path / "file").read_text() == "back\n"
    assert apart.run(["ls", "/share"]).returncode != 0

    two.popen(["sleep", "1000"])
    until(lambda: "sleep" in two.run(["ps", "-A"]).stdout)
    assert "sleep" not in one.run(["ps", "-A"]).stdout


def test_a_node_has_the_environment_and_the_checkout(box: Box):
    node = box.node("one")
    found = node.run([BIN / "python", "-c", "import dmsae_ray, sys; print(dmsae_ray.__file__, sys.prefix)"])
    assert found.stdout.split() == [str(REPOSITORY / "dmsae_ray/__init__.py"), sys.prefix], found.stderr
    assert node.run(["cat", REPOSITORY / "README.md"]).stdout == (REPOSITORY / "README.md").read_text()


def test_two_boxes_do_not_meet(box: Box):
    with Box() as other:
        a, b = box.node("one"), other.node("one")
        serve(b)
        assert a.address != b.address and not reaches(a, b)
        folder, bridge = other.folder, other.bridge
    assert not folder.exists() and not Path("/sys/class/net", bridge).exists()
    assert a.run(["true"]).returncode == 0


def test_a_cut_node_is_out_of_reach_until_it_is_mended(box: Box):
    one, two, three = box.node("one"), box.node("two"), box.node("three")
    serve(one)
    serve(two)
    assert reaches(two, one)
    one.cut()
    assert not reaches(two, one) and not reaches(one, two) and reaches(three, two)
    one.mend()
    until(lambda: reaches(two, one))
    assert reaches(one, two)


def test_a_slow_cable_carries_what_it_is_said_to_in_either_direction(box: Box):
    if lacking := cannot_slow():
        pytest.skip(f"NOT RUN: {lacking}")
    one, two, n, rate = box.node("one"), box.node("two"), 4_000_000, 1_000_000
    for node in (one, two):
        (node.disk / "srv/file").write_bytes(os.urandom(n))
        serve(node)
    fast = fetch(two, one, "file")[1]
    one.slow(rate)
    for a, b in ((two, one), (one, two)):
        got, seconds = fetch(a, b, "file")
        assert got == n and 0.8 * n / rate < seconds < 4 * n / rate, seconds
    one.slow(None)
    again = fetch(two, one, "file")[1]
    assert max(fast, again) < 0.5 * n / rate, (fast, again)


def test_a_stopped_node_stands_still_and_goes_on(box: Box):
    node = box.node("one")
    ticks = node.disk / "srv/ticks"
    process = node.popen(["sh", "-c", "while sleep 0.02; do echo >> /srv/ticks; done"])
    until(ticks.exists)
    node.stop()
    assert node.pids() and all(psutil.Process(pid).status() == "stopped" for pid in node.pids())
    before = ticks.stat().st_size
    time.sleep(1)
    assert ticks.stat().st_size == before
    node.cont()
    until(lambda: ticks.stat().st_size > before)
    assert node.end(process) == -signal.SIGKILL and node.pids() == []


@pytest.mark.parametrize("stopped", [False, True])
def test_a_killed_node_leaves_no_process_and_keeps_its_disk(box: Box, stopped: bool):
    node, other = box.node("one"), box.node("two")
    process = node.popen(["sh", "-c", "echo kept > /srv/file; sleep 1000 & setsid sleep 1000 & nohup sleep 1000"])
    until(lambda: len(node.pids()) == 4)
    pids = node.pids()
    if stopped:
        node.stop()
    node.kill()
    assert node.pids() == [] and not any(map(psutil.pid_exists, pids)) and process.poll() is not None
    assert other.run(["true"]).returncode == 0
    node.boot()
    assert node.run(["cat", "/srv/file"]).stdout == "kept\n" and node.pids() == []
    serve(node)
    assert reaches(other, node)
    node.drop()
    assert not node.disk.exists() and not reaches(other, node)


@pytest.mark.parametrize("stopped", [False, True])
def test_what_a_killed_process_leaves_behind_ends_and_is_removed(stopped: bool):
    code = (
        "import time; from cluster.box import Box; box = Box().__enter__(); node = box.node('one'); "
        "node.popen(['sh', '-c', 'touch /srv/file; sleep 1000'])\n"
        "while not (node.disk / 'srv/file').exists(): time.sleep(0.1)\n"
        "pids = node.pids()\n"
        f"if {stopped}: node.stop()\n"
        "print(box.folder, box.bridge, *pids, flush=True); time.sleep(1000)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY / "tests", stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout is not None
        folder, bridge, *pids = owner.stdout.readline().split()
        clean()
        untouched = Path(folder).exists() and all(psutil.pid_exists(int(pid)) for pid in pids)
        owner.kill()
    assert untouched and len(pids) == 2

    def gone() -> bool:
        return not any(psutil.pid_exists(int(pid)) for pid in pids)

    if not stopped:
        until(gone)
    done = subprocess.run(
        [sys.executable, REPOSITORY / "tests/cluster/box.py", "clean"], text=True, capture_output=True, check=True
    )
    until(gone)
    assert Path(folder).name in done.stdout
    assert not Path(folder).exists() and not Path("/sys/class/net", bridge).exists()


def test_an_s3_server_is_frozen_and_goes_on_and_loses_all_with_its_power(box: Box, monkeypatch, tmp_path: Path):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    server, client = S3Node(box), box.node("client")
    (tmp_path / "file").write_text("content")
    server.upload(tmp_path, "some")
    code = (
        "from pyarrow import fs; "
        f"s3 = fs.S3FileSystem(endpoint_override='{server.address}', scheme='http', region='us-east-1', "
        "request_timeout=2, connect_timeout=2, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1)); "
        f"print(s3.open_input_file('{BUCKET}/some/file').read().decode())"
    )

    def read() -> subprocess.CompletedProcess[str]:
        return client.run([BIN / "python", "-c", code], env=KEYS, timeout=HANGS)

    assert read().stdout == "content\n"
    server.freeze()
    assert read().returncode != 0
    server.thaw()
    until(lambda: read().stdout == "content\n")
    server.kill()
    assert read().returncode != 0
    server.restart()
    assert server.content("") == {} and read().returncode != 0
