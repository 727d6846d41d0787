"""An object store that refuses or goes away while a sweep reads from it. Short form: a stream of rows, in
tests/pipeline/test_workers.py.
"""

import json
import shutil
import time

import pytest
from conftest import HANGS, run_command, same_results, start, wait_for
from s3_server import CLIENT_GIVES_UP_S, Burst, Request, Share

from dmsae_ray.store import Missing, Store

ONE_CHAIN = ("--sweep.seeds", "0")


def data_folder(sweep):
    (folder,) = (sweep.output / "data").glob("*")
    return folder


def with_references(sweep, output):
    """The output folder of a sweep that has measured its reference losses, to spend the test's time on training."""
    (output / "data" / data_folder(sweep).name).mkdir(parents=True)
    for path in data_folder(sweep).glob("references-*.json"):
        shutil.copy(path, output / "data" / data_folder(sweep).name)
    return output


@pytest.mark.slow
def test_training_outlives_a_server_that_is_away_for_seconds_and_refuses_every_fourth_read(small_sweep, s3, tmp_path):
    s3.upload(data_folder(small_sweep), "flaky")

    def training(request: Request) -> bool:
        return request.phase == "training" and request.reads_rows

    s3.proxy.reset(Burst(CLIENT_GIVES_UP_S + 2, training, Share(0.25, 7, training)))
    output = with_references(small_sweep, tmp_path / "out")
    url = s3.url("flaky", proxy=True)
    process, log = start(output, *ONE_CHAIN, "--sweep.cycles", "1", "--harvest.dataset", url)
    wait_for(
        lambda: any(output.glob("chains/*/chain.json")), process
    )  # the dataset is verified, workers have yet to start
    s3.proxy.phase = "training"
    assert process.wait(timeout=HANGS) == 0, log.read_text()
    refused = s3.proxy.refused
    burst = [r for r in refused if r.at <= refused[0].at + CLIENT_GIVES_UP_S + 2]
    # Longer than the client asks for by itself, so our own attempts are what it took.
    assert burst[-1].at - burst[0].at > CLIENT_GIVES_UP_S
    later = refused[len(burst) :]
    assert later and all(training(request) for request in later)
    same_results(output, small_sweep.output, cycles=1)


@pytest.mark.slow
def test_a_server_that_stays_away_fails_the_chain_by_name_and_the_same_command_goes_on_later(small_sweep, s3, tmp_path):
    s3.upload(data_folder(small_sweep), "away")
    reads, gone = [], []

    def rule(request: Request) -> bool:
        """The first cycle reads its 32 row groups; with the next one's first request the server goes away."""
        if request.phase == "training" and request.reads_rows:
            reads.append(request)
            if len(reads) > 32:
                gone.append(request)
        return bool(gone)

    s3.proxy.reset(rule)
    output = with_references(small_sweep, tmp_path / "out")
    arguments = (*ONE_CHAIN, "--harvest.dataset", s3.url("away", proxy=True))
    process, log = start(output, *arguments)
    wait_for(lambda: any(output.glob("chains/*/chain.json")), process)
    s3.proxy.phase = "training"
    assert process.wait(timeout=HANGS) == 1, log.read_text()
    assert gone
    (failed,) = output.glob("chains/*/failed.json")
    failure = json.loads(failed.read_text())
    assert failure["kind"] == "data" and failure["cycle"] == 1
    for word in (
        "s3://activations/away/shards/train-",
        "7 attempts failed",
        "HTTP status 503",
        "run the same command again",
    ):
        assert word in failure["reason"], failure["reason"]
    assert failure["reason"] in log.read_text() and "Traceback" not in log.read_text()
    (record,) = output.glob("chains/*/cycle_*/record.json")
    finished = {path: path.read_bytes() for path in record.parent.iterdir()}
    s3.proxy.reset()
    again = run_command(output, *arguments)
    assert again.code == 0, again.out
    assert {path: path.read_bytes() for path in finished} == finished
    same_results(output, small_sweep.output, cycles=2)


@pytest.mark.slow
@pytest.mark.parametrize("module, option", [("sweep", "--harvest.dataset"), ("harvest", "--harvest.store")])
def test_a_server_that_is_away_at_the_start_ends_the_command_with_one_message(s3, tmp_path, module, option):
    s3.proxy.reset(lambda request: True)
    run = run_command(tmp_path / "out", option, s3.url("nowhere", proxy=True), module=module)
    assert run.code == 2 and "Traceback" not in run.out, run.out
    (line,) = [line for line in run.out.splitlines() if line.startswith("error: ")]
    for word in (
        "s3://activations/nowhere/",
        "manifest.json",
        "7 attempts failed",
        "HTTP status 503",
        "Check the address",
    ):
        assert word in line
    assert s3.proxy.refused and not s3.proxy.served


@pytest.mark.slow
def test_our_own_attempts_begin_where_the_clients_end(s3):
    store = Store(s3.url("attempts", proxy=True))
    s3.proxy.reset()
    store.write("a", b"bytes")
    s3.proxy.reset(lambda request: True)
    system, prefix = store._remote()
    start = time.monotonic()
    with pytest.raises(OSError, match="503"):
        system.get_file_info(f"{prefix}/a")
    assert CLIENT_GIVES_UP_S <= time.monotonic() - start < CLIENT_GIVES_UP_S + 2
    calls = (
        lambda: store.read("a"),
        lambda: store.read_range("a", 1, 2),
        lambda: store.write("b", b"more"),
        lambda: store.sizes(""),
    )
    for call in calls:
        end = time.monotonic() + CLIENT_GIVES_UP_S + 1
        s3.proxy.reset(lambda request, end=end: request.at < end)
        call()
        assert len(s3.proxy.refused) > CLIENT_GIVES_UP_S / 0.25
    assert store.read("b") == b"more"
    s3.proxy.reset()
    with pytest.raises(Missing, match="s3://activations/attempts/c: no such file"):
        store.read("c")  # an answer, not asked again
    assert len(s3.proxy.served) < 5
