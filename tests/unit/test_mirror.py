"""An output at a URL, on a real S3 server: what is whole is there, what others changed is seen, nobody writes over
another. Two machines are two folders here that stand for the same place.
"""

from __future__ import annotations

import os
import pickle
import secrets
import signal
import threading
import time
from pathlib import Path

import pytest
from s3_server import BUCKET

from dmsae_ray import claim, files, mirror, store
from dmsae_ray.claim import read_claim
from dmsae_ray.config import ClusterConfig, Config
from dmsae_ray.distill.folder import ChainFolder
from dmsae_ray.lock import OutputBusy, OutputLock, Superseded
from dmsae_ray.mirror import Mirror, folder_for, mirror_of
from dmsae_ray.ownership import remove
from dmsae_ray.secret_url import SecretUrl
from dmsae_ray.store import StoreError

KEY = "0123456789ab"


@pytest.fixture
def forget(monkeypatch):
    """What this process takes to stand for a place elsewhere is forgotten after the test."""
    monkeypatch.setattr(files, "_elsewhere", {})
    monkeypatch.setattr(mirror, "_mirrors", {})


@pytest.fixture
def machines(s3, tmp_path, forget):
    """Two machines' folders for one place, and its name in the bucket."""
    prefix = f"mirror-{secrets.token_hex(4)}"
    url = SecretUrl(s3.url(prefix, proxy=True))
    s3.proxy.reset()
    a, b = (mirror_of(url, tmp_path / name) for name in "ab")
    return a.folder, b.folder, prefix


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as temporary:
        temporary.write_text(text)


def test_what_one_machine_wrote_the_other_reads(s3, machines):
    a, b, prefix = machines
    cycle = a / "chains" / KEY / "cycle_00"
    write(cycle / "record.json", "{}")
    write(cycle / "sae.safetensors", "large")
    assert s3.content(prefix) == {
        f"chains/{KEY}/cycle_00/record.json": b"{}",
        f"chains/{KEY}/cycle_00/sae.safetensors": b"large",
    }
    other = b / "chains" / KEY / "cycle_00"
    files.refresh(b)
    assert (other / "record.json").read_text() == "{}"
    assert not (other / "sae.safetensors").exists()  # it waits until it is read
    assert files.present(other / "sae.safetensors") and (other / "sae.safetensors").read_text() == "large"
    assert not files.present(other / "core.safetensors")


def test_what_was_changed_or_deleted_elsewhere_is_so_here(machines):
    a, b, _ = machines
    chain = Path("chains") / KEY
    for name, text in (("chain.json", "old"), ("failed.json", "gone"), ("cycle_00/checkpoint.pt", "step 8")):
        write(a / chain / name, text)
    files.refresh(b)
    assert files.present(b / chain / "cycle_00/checkpoint.pt")
    time.sleep(1.1)  # S3 tells times in seconds
    write(a / chain / "chain.json", "new")  # as long as before
    write(a / chain / "cycle_00/checkpoint.pt", "step 9")
    files.discard(a / chain / "failed.json")
    assert (b / chain / "chain.json").read_text() == "old"
    files.refresh(b / chain)
    assert (b / chain / "chain.json").read_text() == "new" and not (b / chain / "failed.json").exists()
    assert not (b / chain / "cycle_00/checkpoint.pt").exists()
    assert files.present(b / chain / "cycle_00/checkpoint.pt")
    assert (b / chain / "cycle_00/checkpoint.pt").read_text() == "step 9"


def test_nothing_is_fetched_again_that_is_the_same(s3, machines):
    a, b, _ = machines
    write(a / "chains" / KEY / "chain.json", "x")
    files.refresh(a)
    files.refresh(b)
    s3.proxy.reset()
    files.refresh(a)
    files.refresh(b)
    assert [request.method for request in s3.proxy.served if "chain.json" in request.path] == []


def test_a_write_that_fails_leaves_no_file_here_that_is_not_there(s3, machines, monkeypatch):
    a, _, prefix = machines
    path = a / "chains" / KEY / "chain.json"
    monkeypatch.setattr(mirror_of(SecretUrl(""), a).store, "attempts", 1)
    s3.proxy.reset(lambda request: request.method == "PUT")
    with pytest.raises(StoreError, match="1 attempts failed.*the same command again"):
        write(path, "x")
    assert not path.exists() and s3.content(prefix) == {} and list(a.rglob("*.tmp-*")) == []


def test_a_write_that_was_held_up_asks_for_its_right_again(s3, machines):
    """A machine that was cut off, and comes back while its chain runs elsewhere."""
    a, _, prefix = machines
    chain, asked = a / "chains" / KEY, []

    def lost() -> None:
        asked.append(1)
        s3.proxy.reset()  # the server is back
        raise Superseded("another has it")

    files.guard(chain, lost)
    s3.proxy.reset(lambda request: request.method == "PUT")
    with pytest.raises(Superseded):
        write(chain / "cycle_00" / "record.json", "x")
    assert asked == [1] and s3.content(prefix) == {}
    write(a / "chains" / ("f" * 12) / "chain.json", "x")  # another chain's


def test_a_file_that_another_process_of_the_machine_writes_meanwhile_stays(machines, monkeypatch):
    """The loop around the chains looks while a worker beside it commits: its list is older than the record."""
    a, _, _ = machines
    folder = a / "chains" / KEY
    write(folder / "chain.json", "x")
    time.sleep(0.1)
    of_mirror, listed = Mirror._stamps, threading.Event()

    def late(self, asked):
        found = of_mirror(self, asked)
        write(folder / "cycle_00" / "record.json", "{}")
        write(folder / "chain.json", "newer")
        listed.set()
        return found

    monkeypatch.setattr(Mirror, "_stamps", late)
    files.refresh(a)
    assert listed.is_set()
    assert (folder / "cycle_00" / "record.json").read_text() == "{}" and (folder / "chain.json").read_text() == "newer"


def test_a_folder_is_removed_here_and_there_but_not_what_is_not_ours(s3, machines):
    a, b, prefix = machines
    write(b / "chains" / KEY / "cycle_00" / "attribution" / "0a-00000.safetensors", "x")
    write(b / "chains" / KEY / "cycle_00" / "core.safetensors", "x")
    s3.upload(_file(a.parent / "up", "hers.txt"), f"{prefix}/chains/{KEY}/cycle_00/attribution")
    ChainFolder(a / "chains" / KEY).cycle(0).release()  # a machine that never saw the partial sums
    assert sorted(s3.content(prefix)) == [
        f"chains/{KEY}/cycle_00/attribution/hers.txt",
        f"chains/{KEY}/cycle_00/core.safetensors",
    ]
    files.refresh(a)
    assert remove(a / "chains" / KEY, "chains") == []
    assert sorted(s3.content(prefix)) == [f"chains/{KEY}/cycle_00/attribution/hers.txt"]


def _file(folder: Path, name: str) -> Path:
    folder.mkdir()
    (folder / name).write_text("hers")
    return folder


def test_names_that_lead_out_of_the_folder_are_passed_over(s3, machines):
    import boto3

    a, _, prefix = machines
    name = f"sweeps/small-{KEY}/../../../../made/evil"
    there = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3.port}", region_name="us-east-1")
    there.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=b"x")
    assert f"{prefix}/{name}" in [one["Key"] for one in there.list_objects_v2(Bucket=BUCKET)["Contents"]]
    write(a / "chains" / KEY / "chain.json", "x")
    files.refresh(a)
    files.present_below(a / "chains")
    assert [path.name for path in a.parents[1].rglob("*") if path.name in ("made", "evil")] == []


def test_an_upload_that_a_signal_meets_is_whole_or_not_at_all(machines, monkeypatch):
    a, b, _ = machines
    path, content = a / "chains" / KEY / "chain.json", "new" * 100

    class Slow:
        def __init__(self, name, mode):
            self.file = open(name, mode)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def read(self, size):
            time.sleep(0.05)
            return self.file.read(30)

    def interrupt(*_):
        raise KeyboardInterrupt

    write(path, "old")
    monkeypatch.setattr(store, "open", Slow, raising=False)
    known = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)  # in the middle of ten pieces
        with pytest.raises(KeyboardInterrupt):
            write(path, content)
    finally:
        signal.signal(signal.SIGALRM, known)
    assert files.current(path) == content


def test_a_file_that_goes_while_it_is_looked_at_is_no_error(machines, monkeypatch):
    a, _, _ = machines
    folder = a / "chains" / KEY / "cycle_00"
    write(folder / "attribution" / "0a-00000.safetensors", "x")
    of_mirror = Mirror._here

    def late(self, asked):
        for path in of_mirror(self, asked):
            path.unlink()
            yield path

    monkeypatch.setattr(Mirror, "_here", late)
    files.refresh(a)


def test_a_model_on_its_way_and_a_database_that_was_not_sent_stay(machines):
    a, _, _ = machines
    kept = [f"models/m-{KEY}/model.safetensors", f"models/n-{KEY}.tmp-12-abcdef/config.json", "mlflow.db"]
    for name in (*kept, f"chains/{KEY}/chain.json"):
        (a / name).parent.mkdir(parents=True, exist_ok=True)
        (a / name).write_text("x")
    time.sleep(0.1)
    files.refresh(a, alone=True)
    found = {path.relative_to(a).as_posix() for path in a.rglob("*") if path.is_file()}
    assert found == {*kept, "stands_for"}  # a chain that is not there is none


def test_the_folder_itself_is_no_output(machines, forget):
    a, _, _ = machines
    files._elsewhere.clear()
    with pytest.raises(ValueError, match="stands for what lies at s3://activations/mirror-.*give --output that"):
        OutputLock(a)


def test_a_moved_file_and_a_published_folder_are_there(s3, machines):
    a, _, prefix = machines
    results = a / "sweeps" / f"small-{KEY}"
    write(results / "features.json", "1")
    files.move(results / "features.json", results / "features.earlier.json")
    (a / "models" / f"m-{KEY}").mkdir(parents=True)
    (a / "models" / f"m-{KEY}" / "config.json").write_text("{}")
    files.publish(a / "models" / f"m-{KEY}")
    assert s3.content(prefix) == {
        f"sweeps/small-{KEY}/features.earlier.json": b"1",
        f"models/m-{KEY}/config.json": b"{}",
    }


# -- one driver -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(claim, "RENEW_S", 0.3)
    monkeypatch.setattr(claim, "WATCH_S", 3.0)
    monkeypatch.setattr(claim, "SETTLE_S", 0.2)


def test_two_machines_drivers_do_not_meet(machines, fast):
    a, b, _ = machines
    first = OutputLock(a)
    with pytest.raises(OutputBusy, match=f"in use by another driver .pid {os.getpid()} on "):
        OutputLock(b)
    first.release()
    OutputLock(b).release()
    assert read_claim(a / "claim") is None


def test_the_claim_of_a_driver_that_is_gone_is_taken_over(machines, fast, monkeypatch):
    a, b, _ = machines
    first = OutputLock(a)
    old = first.lease()
    first._claim._end.set()  # its machine is off
    first._claim._thread.join()
    second = OutputLock(b)
    new = second.lease()
    assert new.generation == old.generation + 1
    new.check()
    with pytest.raises(Superseded, match="generation 2 has taken over from 1"):
        old.check()
    second.release()


def test_of_two_drivers_that_claim_at_once_the_last_to_write_has_it(machines, fast, monkeypatch):
    a, b, _ = machines
    of_claim, other = claim.Claim._write, []

    def late(self):
        of_claim(self)
        if not other:
            other.append(None)  # before this one has waited
            other[0] = OutputLock(b)

    monkeypatch.setattr(claim.Claim, "_write", late)
    monkeypatch.setattr(claim, "gone", lambda path, holder: True)  # the other looked when there was no claim yet
    with pytest.raises(OutputBusy, match="began at the same time"):
        OutputLock(a)
    other[0].lease().check()
    other[0].release()


def test_a_worker_group_that_was_thought_lost_writes_no_more(machines, fast):
    a, b, _ = machines
    lock = OutputLock(a)
    lease = lock.lease()
    first = lease.of_group([a / "chains" / KEY])
    first.check()
    copy = type(lease)(b / "generation", lease.generation, lease.token)
    second = copy.of_group([b / "chains" / KEY])
    second.check()
    with pytest.raises(Superseded, match="another worker group has taken the chain over"):
        first.check()
    lock.release()


# -- the configuration ------------------------------------------------------------------------------------------------


def test_a_configuration_s_home_stands_for_its_url_in_every_process(s3, tmp_path, forget):
    url, other = (s3.url("home").replace("s3://", f"s3://{secret}@") for secret in ("key:hunter2", "key:other"))
    config = Config(output=url, cluster=ClusterConfig(scratch=tmp_path))
    assert config.home == folder_for(SecretUrl(other), tmp_path)  # a new secret, one place
    assert files.elsewhere(config.home / "chains") is not None
    assert config.place == "s3://activations/home"
    assert config.section_dict()["output"].startswith("s3://***@activations/home?")
    home, kept = config.home, pickle.dumps(files.elsewhere(config.home))
    files._elsewhere.clear()
    mirror._mirrors.clear()
    assert files.elsewhere(home) is None  # as in a process that has just begun
    assert pickle.loads(kept) is files.elsewhere(home) is files.elsewhere(config.home)


def test_an_output_without_a_scheme_is_a_path_whichever_characters_it_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(output="runs#lr=3")
    assert config.home == tmp_path / "runs#lr=3" and config.place == str(config.home)


def test_a_folder_of_somebody_else_s_is_not_taken(tmp_path, forget, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ValueError, match="belongs to another user.*--cluster.scratch"):
        mirror_of(SecretUrl("s3://bucket/x"), tmp_path / "x")


def test_a_place_with_somebody_s_own_data_is_refused(s3, machines):
    a, _, prefix = machines
    s3.upload(_file(a.parent / "up", "train.csv"), f"{prefix}/data")
    with pytest.raises(ValueError, match=r"holds data/train.csv, which this program did not make"):
        OutputLock(a)
    assert sorted(s3.content(prefix)) == ["data/train.csv"]
