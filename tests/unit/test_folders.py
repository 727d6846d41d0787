"""The output folder: one driver, generations, completion records, what cleaning removes."""

import json
import subprocess
import sys

import pytest

from dmsae_ray.config import Config
from dmsae_ray.distill.folder import RECORD_VERSION, ChainFolder, Lease, Superseded
from dmsae_ray.lock import OutputBusy, OutputLock
from dmsae_ray.preflight import check_stream


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, pathlib; from dmsae_ray.lock import OutputLock; "
         "lock = OutputLock(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()", str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
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
    with pytest.raises(Superseded):
        Lease(tmp_path / "none", 1).check()
    lock.release()


def test_a_cycle_is_done_only_with_its_record(tmp_path):
    chain = ChainFolder(tmp_path)
    for cycle in (0, 2):
        chain.cycle(cycle).path.mkdir()
        chain.cycle(cycle).record.write_text(json.dumps({"format_version": RECORD_VERSION, "cycle": cycle}))
    chain.cycle(1).path.mkdir()
    assert [r["cycle"] for r in chain.records()] == [0]
    chain.cycle(1).record.write_text('{"format')
    with pytest.raises(ValueError, match="cycle_01/record.json.*delete"):
        chain.records()


def test_a_record_of_another_format_is_named(tmp_path):
    chain = ChainFolder(tmp_path)
    chain.cycle(0).path.mkdir()
    chain.cycle(0).record.write_text(json.dumps({"format_version": RECORD_VERSION - 1, "cycle": 0}))
    with pytest.raises(ValueError, match=rf"cycle_00/record.json: format version {RECORD_VERSION - 1}, this program reads {RECORD_VERSION}"):
        chain.records()


def test_a_stream_s_blocks_fit_into_its_share_of_the_object_store():
    # 10 row groups of 2048 rows, 2 bytes a number: 80 MiB at d = 2048, and no byte more.
    config = Config(cluster={"object_store_mb": 80})
    check_stream(config, 2048)
    with pytest.raises(ValueError, match=r"cluster\.object_store_mb 80: 10 row groups of harvest\.rows_per_group 2048 .*d = 2049 need 81"):
        check_stream(config, 2049)
