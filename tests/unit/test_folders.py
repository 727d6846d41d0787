"""The output folder: one driver, generations, completion records, what cleaning removes."""

import json
import subprocess
import sys

import pytest

from dmsae_ray.cluster import capacity
from dmsae_ray.config import Config
from dmsae_ray.distill.folder import ChainFolder, Lease, Superseded
from dmsae_ray.lock import OutputBusy, OutputLock


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
        chain.cycle(cycle).record.write_text(json.dumps({"format_version": 1, "cycle": cycle}))
    chain.cycle(1).path.mkdir()
    assert [r["cycle"] for r in chain.records()] == [0]
    chain.cycle(1).record.write_text('{"format')
    with pytest.raises(ValueError, match="cycle_01/record.json.*delete"):
        chain.records()


def test_capacity_leaves_ray_data_a_cpu():
    config = Config()
    assert capacity(config, {"CPU": 2.0}, chains=4, local=False).concurrent == 1
    assert capacity(config, {"CPU": 8.0}, chains=4, local=False).concurrent == 4
    assert capacity(config, {"CPU": 64.0}, chains=4, local=False).concurrent == 4
    with pytest.raises(ValueError, match=r"too small.*needs 2 CPUs.*it has 1.*--num-cpus=2"):
        capacity(config, {"CPU": 1.0}, chains=4, local=False)


def test_capacity_counts_gpus():
    config = Config(cluster={"workers": 2, "gpus_per_worker": 1.0})
    assert capacity(config, {"CPU": 64.0, "GPU": 8.0}, chains=9, local=False).concurrent == 4
    with pytest.raises(ValueError, match=r"2 GPUs .*it has 1"):
        capacity(config, {"CPU": 64.0, "GPU": 1.0}, chains=9, local=False)


def test_capacity_names_the_worker_count_that_would_fit():
    config = Config(cluster={"workers": 4, "cpus_per_worker": 2.0})
    with pytest.raises(ValueError, match=r"cluster\.workers \(now 4; 2 would fit\)"):
        capacity(config, {"CPU": 5.0}, chains=1, local=False)
