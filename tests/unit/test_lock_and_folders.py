"""The output folder: one driver, generations, completion records, what cleaning removes."""

import errno
import fcntl
import json
import os
import pickle
import subprocess
import sys
import threading

import pytest
from records import cycle_record

from dmsae_ray.config import Config
from dmsae_ray.distill import failure
from dmsae_ray.distill.folder import ChainFolder
from dmsae_ray.distill.record import RECORD_VERSION
from dmsae_ray.driver.preflight import check_stream
from dmsae_ray.lock import Lease, OutputBusy, OutputLock, OutputUnseen, Superseded


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib; from dmsae_ray.lock import OutputLock; lock = OutputLock(pathlib.Path(sys.argv[1])); "
            "print('held', flush=True); sys.stdin.read()",
            str(tmp_path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputBusy, match=str(holder.pid)):
            OutputLock(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    OutputLock(tmp_path).release()  # the lock went with its holder


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output folder .*file/x.*--output"):
        OutputLock(tmp_path / "file" / "x")


def test_a_worker_of_an_earlier_driver_cannot_commit(tmp_path):
    lock = OutputLock(tmp_path)
    old = lock.lease()
    old.check()
    new = lock.lease()
    new.check()
    with pytest.raises(Superseded, match="2 has taken over from 1"):
        old.check()
    Lease(old.path, 3).check()  # an older number, as a slow server may still show, takes nothing over
    lock.release()


@pytest.mark.parametrize(
    "content, words", [(None, "does not see the output folder"), ("", "cannot be read"), ("two\n", "cannot be read")]
)
def test_a_generation_that_cannot_be_read_is_asked_for_again_and_is_no_successor(tmp_path, monkeypatch, content, words):
    monkeypatch.setattr("dmsae_ray.lock.PATIENCE_S", 0.3)
    path = tmp_path / "generation"
    if content is not None:
        path.write_text(content)
    with pytest.raises(OutputUnseen, match=f"generation: .*{words}.*--output a folder that they share") as error:
        Lease(path, 1).check()
    assert failure.cause(error.value, failure.FINAL) is None, "a worker that raises it is tried again"
    travelled = pickle.loads(pickle.dumps(error.value))
    assert isinstance(travelled, OutputUnseen) and str(travelled) == str(error.value)
    timer = threading.Timer(0.1, path.write_text, ["1"])
    timer.start()
    Lease(path, 1).check()  # it came back in time
    timer.join()


def test_a_generation_that_holds_no_number_is_named_with_the_remedy(tmp_path):
    lock = OutputLock(tmp_path)
    (tmp_path / "generation").write_text("x")
    with pytest.raises(ValueError, match="generation: holds no number .*delete this file"):
        lock.lease()
    lock.release()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("argv", [[], ["--status"], ["--clean"]])
def test_a_file_system_without_locks_is_said_with_the_remedy(tmp_path, monkeypatch, capsys, code, argv):
    """No such file system can be mounted here: what one answers to flock stands for it."""
    from dmsae_ray.sweep import main

    OutputLock(tmp_path).release()

    def refuse(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert main(["--output", str(tmp_path), "--model.name", "tiny", *argv]) == 2
    said = capsys.readouterr().err
    assert (
        f"error: output folder {tmp_path}: its file system gives no lock" in said
        and "NFS" in said
        and "--output" in said
    )


def test_a_cycle_is_done_only_with_its_record(tmp_path):
    chain = ChainFolder(tmp_path)
    for cycle in (0, 2):
        chain.cycle(cycle).path.mkdir()
        chain.cycle(cycle).record.write_text(json.dumps(cycle_record(cycle=cycle)))
    chain.cycle(1).path.mkdir()
    assert [record.cycle for record in chain.records()] == [0]
    chain.cycle(1).record.write_text('{"format')
    with pytest.raises(ValueError, match="cycle_01/record.json.*delete"):
        chain.records()


def test_a_record_of_another_format_is_named(tmp_path):
    chain = ChainFolder(tmp_path)
    chain.cycle(0).path.mkdir()
    chain.cycle(0).record.write_text(json.dumps({"format_version": RECORD_VERSION - 1, "cycle": 0}))
    with pytest.raises(
        ValueError,
        match=rf"cycle_00/record.json: format version {RECORD_VERSION - 1}, this program reads {RECORD_VERSION}",
    ):
        chain.records()


def test_a_record_or_failure_that_is_not_whole_is_named_and_later_fields_are_passed_over(tmp_path):
    chain = ChainFolder(tmp_path)
    chain.cycle(0).path.mkdir()
    whole = cycle_record(core_out=7) | {"of_a_later_program": 1}
    early = {name: value for name, value in whole.items() if name not in ("fvu_all_rows", "rows_left_out")}
    for tree in (whole, early):
        chain.cycle(0).record.write_text(json.dumps(tree))
        (record,) = chain.records()
        assert record.core_out == 7 and list(record.to_json()) == list(cycle_record())
    del whole["l0"], whole["kl"]
    chain.cycle(0).record.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"cycle_00/record.json: damaged \(lacks 'l0' and 'kl'\); delete"):
        chain.records()
    chain.failed.write_text(json.dumps({"kind": "data"}))
    with pytest.raises(ValueError, match=r"failed.json: damaged \(lacks 'reason'\); delete it"):
        chain.failure()


def test_a_stream_s_blocks_fit_into_its_share_of_the_object_store():
    # 10 row groups of 2048 rows, 2 bytes a number: 80 MiB at d = 2048, and no byte more.
    config = Config(cluster={"object_store_mb": 80})
    check_stream(config, 2048)
    with pytest.raises(
        ValueError,
        match=r"cluster\.object_store_mb 80: 10 row groups of harvest\.rows_per_group 2048 .*d = 2049 need 81",
    ):
        check_stream(config, 2049)
