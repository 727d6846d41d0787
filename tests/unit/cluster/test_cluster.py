"""Which cluster is joined, what fits on its nodes, and what is said where it does not."""

import inspect
import itertools
import os
import random
import re
import socket
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from dmsae_ray.cluster import connection
from dmsae_ray.cluster.capacity import capacity
from dmsae_ray.cluster.connection import check_fits_here, keep_logs
from dmsae_ray.cluster.nodes import Bundle, Node, fitting, missing, slots
from dmsae_ray.config import Config
from dmsae_ray.distill.trials import process_group
from dmsae_ray.harvest import main as harvest
from dmsae_ray.sweep import main

PLENTY = 1 << 20


def holding(cpus: float, gpus: float = 0.0, store_mb: float = PLENTY) -> list[Node]:
    """A cluster of one node."""
    return [Node(cpus, gpus, store_mb)]


def refusal(config: Config, nodes: list[Node], chains: int = 9, local: bool = False) -> str:
    with pytest.raises(ValueError) as refused:
        capacity(config, nodes, chains, local)
    return str(refused.value)


def test_capacity_leaves_a_cpu():
    config = Config()
    assert capacity(config, holding(2), chains=4, local=False).concurrent == 1
    assert capacity(config, holding(4), chains=4, local=False).concurrent == 3
    assert capacity(config, holding(64), chains=4, local=False).concurrent == 4
    assert re.search(r"too small.*needs 2 CPUs.*it has 1\..*--num-cpus=2", refusal(config, holding(1)))


def test_what_our_own_error_asks_for_is_enough():
    config = Config(cluster={"cpus_per_worker": 3, "workers": 2, "gpus_per_worker": 2, "object_store_mb": 700})
    said = refusal(config, holding(1, store_mb=64))
    cpus, store = (int(re.search(rf"--{option}=(\d+)", said)[1]) for option in ("num-cpus", "object-store-memory"))
    gpus = int(re.search(r"machine with (\d+) GPUs", said)[1])
    assert capacity(config, holding(cpus, gpus, store / 2**20), chains=1, local=False).concurrent == 1


def test_capacity_counts_gpus():
    config = Config(cluster={"workers": 2, "gpus_per_worker": 1.0})
    assert capacity(config, holding(64, gpus=8), chains=9, local=False).concurrent == 4
    said = refusal(config, holding(64, gpus=1))
    assert re.search(r"2 GPUs .*it has 1\.", said)
    # More CPUs and a smaller store would not help; one worker would.
    assert "cluster.workers (now 2; 1 would fit)" in said and "--num-cpus" not in said and "object_store" not in said
    assert "workers" not in refusal(Config(cluster={"gpus_per_worker": 1}), holding(64)).split("To mend it")[1]


def test_a_worker_lies_on_one_node():
    """Two nodes of two CPUs are four, and have none for a worker that wants three; nor have eight nodes of a GPU two
    for one.
    """
    said = refusal(Config(cluster={"cpus_per_worker": 3}), 2 * holding(2))
    assert re.search(
        r"3 CPUs on one node for each of 1 training worker, its 2 nodes have room for 0 \(the largest has 2\)", said
    )
    assert "lower cluster.cpus_per_worker" in said
    said = refusal(Config(cluster={"gpus_per_worker": 2}), 8 * holding(8, gpus=1))
    assert re.search(r"2 GPUs on one node for each of 1 training worker.*8 nodes have room for 0", said)
    assert (
        capacity(Config(cluster={"gpus_per_worker": 2}), 4 * holding(8, gpus=2), chains=9, local=False).concurrent == 4
    )
    config = Config(harvest={"gpus_per_actor": 2})
    assert "2 GPUs on one node for each of 1 harvest actor" in refusal(config, 8 * holding(8, gpus=1))
    # CPUs here and GPUs there are of no use to a worker that wants both.
    said = refusal(Config(cluster={"gpus_per_worker": 1}), [Node(8, 0, PLENTY), Node(0, 8, PLENTY)])
    assert "1 CPU, 1 GPU and 512 MB of object store on one node" in said
    # Nodes that differ: what one cannot hold others do.
    mixed = [Node(2, 0, PLENTY), Node(5, 0, PLENTY), Node(1, 0, PLENTY)]
    assert capacity(Config(cluster={"cpus_per_worker": 2}), mixed, chains=9, local=False).concurrent == 3


def test_a_head_without_cpus_lends_no_object_store():
    config = Config(cluster={"workers": 2, "object_store_mb": 600})
    said = refusal(config, [Node(0, 0, PLENTY), Node(8, 0, 700)])
    assert re.search(r"1,200 MB of object store \(2 training workers of 600\), it has 700", said)
    # Two stores that together would do, each too small for two workers, hold one each.
    assert capacity(config, 2 * holding(4, store_mb=700), chains=9, local=False).concurrent == 1
    assert "600 MB of object store on one node for each" in refusal(config, 4 * holding(4, store_mb=500))


def test_capacity_names_the_worker_count_that_would_fit():
    config = Config(cluster={"workers": 4, "cpus_per_worker": 2.0})
    assert re.search(r"cluster\.workers \(now 4; 2 would fit\)", refusal(config, holding(5)))
    # Three would fit, but train.lanes 8 are not dealt to three.
    assert re.search(r"cluster\.workers \(now 4; 2 would fit\)", refusal(config, holding(7)))


def test_capacity_counts_the_object_store_that_the_streams_may_fill():
    config = Config(cluster={"workers": 2, "object_store_mb": 300})
    assert capacity(config, holding(64, store_mb=600), chains=9, local=False).concurrent == 1
    assert capacity(config, holding(64, store_mb=1900), chains=9, local=False).concurrent == 3
    assert re.search(
        r"600 MB of object store \(2 training workers of 300\), it has 599", refusal(config, holding(64, store_mb=599))
    )
    assert re.search(r"3 CPUs .* and 600 MB of object store .*it has 0", refusal(config, [Node(2)]))


def test_capacity_gives_harvest_actors_what_chains_do_not_hold_at_that_time():
    assert capacity(Config(), holding(8), chains=4, local=False).harvest_actors == 7
    assert capacity(Config(harvest={"actors": 3}), holding(8), chains=4, local=False).harvest_actors == 3
    assert (
        capacity(Config(harvest={"gpus_per_actor": 0.5}), holding(64, gpus=2), chains=4, local=False).harvest_actors
        == 4
    )
    assert (
        capacity(Config(harvest={"gpus_per_actor": 2}), holding(64, gpus=8), chains=4, local=False).harvest_actors == 4
    )
    assert re.search(
        "2 GPUs .*1 harvest actor.*it has 1", refusal(Config(harvest={"gpus_per_actor": 2}), holding(64, gpus=1))
    )


def test_what_only_runs_the_language_model_needs_no_room_for_chains():
    config = Config(cluster={"gpus_per_worker": 1, "workers": 4})
    assert capacity(config, holding(1), chains=0, local=False).harvest_actors == 1


def test_a_machine_that_is_too_small_is_known_before_ray_is_started(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = Config(cluster={"address": "local", "gpus_per_worker": 64})
    with pytest.raises(ValueError, match=r"this machine is too small for one chain. It needs 64 GPUs.*gpus_per_worker"):
        check_fits_here(config, chains=1)
    with pytest.raises(ValueError, match=r"MB of object store.*lower cluster.object_store_mb"):
        check_fits_here(Config(cluster={"address": "local", "object_store_mb": 1 << 30}), chains=1)
    check_fits_here(Config(cluster={"address": "local"}), chains=4)


@pytest.mark.parametrize(
    "args, said",
    [
        (
            ("--cluster.workers", "2", "--cluster.gpus_per_worker", "0.5"),
            "two workers of a chain would share a GPU, which NCCL refuses",
        ),
        (("--cluster.gpus_per_worker", "1.5"), "cluster.gpus_per_worker 1.5: Ray gives out whole GPUs"),
        (("--harvest.gpus_per_actor", "2.5"), "harvest.gpus_per_actor 2.5: Ray gives out whole GPUs"),
    ],
)
def test_gpus_that_ray_or_nccl_would_refuse_are_known_from_the_configuration(capfd, tmp_path, args, said):
    assert main(["--output", str(tmp_path / "out"), *args]) == 2
    assert said in capfd.readouterr().err
    Config(cluster={"workers": 2, "gpus_per_worker": 2}), Config(cluster={"gpus_per_worker": 0.25})


def test_gpu_workers_can_add_up_on_both_devices():
    assert process_group(1).backend == "cpu:gloo,cuda:nccl" and process_group(0).backend == "gloo"
    assert process_group(1).timeout_s > 3600 < process_group(0).timeout_s


def test_logs_that_cannot_be_kept_do_not_hide_what_ended_the_run(tmp_path, caplog):
    session, file = tmp_path / "session", tmp_path / "file"
    session.mkdir(), file.touch()
    (session / "raylet.out").write_text("said\n")
    (session / "runtime_env_agent.log").write_text("key\n")
    keep_logs(session, tmp_path / "kept")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["raylet.out"]
    keep_logs(session, file / "logs")
    assert f"not kept in {file / 'logs'} (Not a directory); they lie in {session}" in caplog.text
    os.mkfifo(session / "pipe")
    keep_logs(session, tmp_path / "again")
    assert "1 files, the first: " in caplog.text and "named pipe" in caplog.text


def packed(nodes: list[Node], bundle: Bundle) -> int:
    """Plain reference: bundles placed one after the other where there is room, GPU by GPU."""
    count = 0
    for node in nodes:
        cpus, store, gpus = node.cpus, node.store_mb if node.cpus else 0, [1.0] * int(node.gpus)
        while cpus >= bundle.cpus - 1e-9 and store >= bundle.store_mb - 1e-9:
            if 0 < bundle.gpus < 1:
                room = [i for i, left in enumerate(gpus) if left >= bundle.gpus - 1e-9]
                if not room:
                    break
                gpus[room[0]] -= bundle.gpus
            elif bundle.gpus:
                if len(gpus) < bundle.gpus:
                    break
                del gpus[: int(bundle.gpus)]
            cpus, store, count = cpus - bundle.cpus, store - bundle.store_mb, count + 1
    return count


def test_as_many_fit_as_can_be_placed_one_after_the_other():
    draw = random.Random(0)
    for _ in range(500):
        nodes = [
            Node(draw.randint(0, 9), draw.choice((0, 0, 1, 2, 4)), draw.choice((0, 700, 3000)))
            for _ in range(draw.randint(1, 5))
        ]
        bundle = Bundle(draw.choice((1, 2, 3)), draw.choice((0, 0, 0.1, 0.5, 1, 2)), draw.choice((64, 512, 1000)))
        assert sum(slots(node, bundle) for node in nodes) == packed(nodes, bundle), (nodes, bundle)
        count = fitting(nodes, bundle, spare_cpus=1)
        assert count <= packed(nodes, bundle) and count * bundle.cpus + 1 <= max(sum(n.cpus for n in nodes), 1)
        # Whatever does not fit has a reason, and what fits has none.
        assert not missing(nodes, bundle, count, "worker", 1) and missing(nodes, bundle, count + 1, "worker", 1)
        # The order of nodes is nothing.
        for other in itertools.islice(itertools.permutations(nodes), 6):
            assert fitting(other, bundle, 1) == count


@contextmanager
def server(answer: bytes | None):
    """Listens and says this to whoever speaks to it; None: nothing, for ever."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        held = []

        def serve():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                held.append(connection)
                if answer is not None:
                    connection.recv(64)
                    connection.sendall(answer)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        for connection in held:
            connection.close()


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch):
    monkeypatch.setattr("dmsae_ray.cluster.address.PAUSE_S", 0.01)


def sweep_error(capsys, tmp_path, *args: str) -> str:
    """What the command says, which must not take it long, nor begin with the tokens."""
    began = time.process_time()
    assert main(["--output", str(tmp_path / "out"), *args]) == 2
    assert time.process_time() - began < 45
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert "tokens" not in out and not list((tmp_path / "out").glob("tokens/*"))
    return err


def test_an_address_where_nobody_listens_costs_seconds(capfd, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", dead)
    said = sweep_error(capfd, tmp_path)
    assert (
        f"RAY_ADDRESS {dead}: nothing that could be joined answers there (Connection refused" in said
        and "--cluster.address local" in said
    )


def test_an_address_that_makes_no_sense_is_refused_at_once(capfd, tmp_path):
    for address, why in (
        ("nowhere.invalid:6379", "no machine of the name nowhere.invalid"),
        ("ray://127.0.0.1:10001", "Ray Client"),
        ("127.0.0.1", "is not <host>:<port>"),
        ("127.0.0.1:port", "is not <host>:<port>"),
    ):
        said = sweep_error(capfd, tmp_path, "--cluster.address", address)
        assert why in said and address in said


def test_a_server_that_is_not_ray_is_known_as_such(capfd, tmp_path, monkeypatch):
    with server(b"SSH-2.0-OpenSSH_9.2\r\n") as address:
        said = sweep_error(capfd, tmp_path, "--cluster.address", address)
        assert f"cluster.address {address}: what listens there is not Ray (it answers b'SSH" in said
    monkeypatch.setattr("dmsae_ray.cluster.address.ANSWER_S", 0.2)
    with server(None) as address:
        said = sweep_error(capfd, tmp_path, "--cluster.address", address)
        assert f"cluster.address {address}: what listens there does not answer as Ray does (timed out)" in said


def test_another_port_than_the_head_s_is_known_as_such(capfd, tmp_path):
    """Ray's own other servers, such as the one for Ray Client, talk gRPC, too; Ray would ask them for minutes."""
    other = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{other.add_insecure_port('127.0.0.1:0')}"
    other.start()
    try:
        said = sweep_error(capfd, tmp_path, "--cluster.address", address)
    finally:
        other.stop(None)
    assert f"cluster.address {address}: what listens there is not the head of a Ray cluster" in said


def test_the_harvest_alone_asks_first_too(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "nowhere.invalid:6379")
    assert harvest(["--output", str(tmp_path / "out")]) == 2
    assert "no machine of the name nowhere.invalid" in capfd.readouterr().err and not list(
        (tmp_path / "out").glob("tokens/*")
    )


def test_a_machine_that_is_too_small_ends_the_command_before_the_tokens(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    said = sweep_error(capfd, tmp_path, "--cluster.gpus_per_worker", "64")
    assert "this machine is too small for one chain. It needs 64 GPUs" in said
    assert harvest(["--output", str(tmp_path / "out"), "--harvest.gpus_per_actor", "64"]) == 2
    assert "It needs 64 GPUs (1 harvest actor of 64)" in capfd.readouterr().err


def test_what_ray_start_left_behind_is_named(capfd, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{free.getsockname()[1]}"
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(dead)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    said = sweep_error(capfd, tmp_path)
    assert dead in said and "`ray start` noted" in said and "ray stop" in said


# -- a machine too busy for Ray's own limit of time
# ------------------------------------------------------------------------


def starting(monkeypatch, *errors: str) -> tuple[list[str], list[dict]]:
    """Lines said, and options given, when Ray fails to start with these errors one after the other."""
    left, lines, options = list(errors), [], []

    def init(**given):
        options.append(given)
        if left:
            raise Exception(left.pop(0))  # what Ray raises

    monkeypatch.setattr("ray.init", init)
    connection._start(lines.append, num_cpus=3)
    return lines, options


LATE = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


def test_a_ray_that_its_machine_was_too_busy_to_start_is_started_again(monkeypatch):
    lines, options = starting(monkeypatch, LATE)
    assert len(lines) == 1 and "trying again" in lines[0]
    assert options == 2 * [{"address": "local", "num_cpus": 3}]


def test_a_machine_that_stays_too_busy_is_named_and_other_errors_are_raised_as_they_are(monkeypatch):
    with pytest.raises(ValueError, match="could not start.*tried 3 times.*very busy.*--cluster.address"):
        starting(monkeypatch, LATE, LATE, LATE)
    with pytest.raises(Exception, match="^anything else$"):
        starting(monkeypatch, "anything else")


def test_a_ray_of_our_own_asks_for_a_token_and_keeps_all_where_no_other_user_comes(tmp_path, monkeypatch):
    """Whatever the environment says of other clusters; what it is asked by others is in cluster/test_closed.py."""
    for name in ("TMPDIR", "RAY_AUTH_TOKEN", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_worker_niceness"):
        monkeypatch.setenv(name, "")  # so that it is as before at the end, whatever is set meanwhile
        monkeypatch.delenv(name)
    for name, value in {"RAY_TMPDIR": str(tmp_path), "RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled"}.items():
        monkeypatch.setenv(name, value)
    found = {}

    def init(**given):
        (folder,) = tmp_path.iterdir()
        found.update(
            inside=Path(given["_temp_dir"]).parent == folder,
            mode=stat.S_IMODE(folder.stat().st_mode),
            asks="RAY_AUTH_MODE" not in os.environ,  # left out, Ray asks where it starts a cluster itself
            token=len(os.environ["RAY_AUTH_TOKEN"]),
        )
        raise RuntimeError("far enough")

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(RuntimeError, match="far enough"):
        connection.connect(Config(), chains=1, verbose=False)
    assert found == {"inside": True, "mode": 0o700, "asks": True, "token": 64} and not list(tmp_path.iterdir())


def test_ray_s_words_for_it_are_still_those():
    """They are Ray's own, in no interface: another version may say it otherwise."""
    import ray._private.node

    assert connection.TOO_SLOW in inspect.getsource(ray._private.node)
