"""The output folder: one driver, generations, completion records, what cleaning removes."""

import json
import subprocess
import sys

import pytest

from dmsae_ray.cluster import capacity
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


def holding(cpus: float, gpus: float = 0.0, store_mb: float = 1 << 20) -> dict[str, float]:
    """What Ray says of a cluster; object store in bytes, as there."""
    return {"CPU": cpus, "GPU": gpus, "object_store_memory": store_mb * 2**20}


def test_capacity_leaves_ray_data_a_cpu():
    config = Config()
    assert capacity(config, holding(2), chains=4, local=False).concurrent == 1
    assert capacity(config, holding(4), chains=4, local=False).concurrent == 3
    assert capacity(config, holding(64), chains=4, local=False).concurrent == 4
    with pytest.raises(ValueError, match=r"too small.*needs 2 CPUs.*it has 1.*--num-cpus=2"):
        capacity(config, holding(1), chains=4, local=False)


def test_capacity_counts_gpus():
    config = Config(cluster={"workers": 2, "gpus_per_worker": 1.0})
    assert capacity(config, holding(64, gpus=8), chains=9, local=False).concurrent == 4
    with pytest.raises(ValueError, match=r"2 GPUs .*it has 1"):
        capacity(config, holding(64, gpus=1), chains=9, local=False)


def test_capacity_names_the_worker_count_that_would_fit():
    config = Config(cluster={"workers": 4, "cpus_per_worker": 2.0})
    with pytest.raises(ValueError, match=r"cluster\.workers \(now 4; 2 would fit\)"):
        capacity(config, holding(5), chains=1, local=False)


def test_capacity_counts_the_object_store_that_the_streams_may_fill():
    config = Config(cluster={"workers": 2, "object_store_mb": 300})
    assert capacity(config, holding(64, store_mb=600), chains=9, local=False).concurrent == 1
    assert capacity(config, holding(64, store_mb=1900), chains=9, local=False).concurrent == 3
    with pytest.raises(ValueError, match=r"600 MB of object store \(cluster\.workers x cluster\.object_store_mb\), it has 599"):
        capacity(config, holding(64, store_mb=599), chains=9, local=False)
    with pytest.raises(ValueError, match=r"3 CPUs .* and 600 MB of object store .*it has 0"):
        capacity(config, {"CPU": 2.0}, chains=9, local=False)


def test_capacity_gives_harvest_actors_what_chains_do_not_hold_at_that_time():
    assert capacity(Config(), holding(8), chains=4, local=False).harvest_actors == 7
    assert capacity(Config(harvest={"actors": 3}), holding(8), chains=4, local=False).harvest_actors == 3
    assert capacity(Config(harvest={"gpus_per_actor": 0.5}), holding(64, gpus=2), chains=4, local=False).harvest_actors == 4
    assert capacity(Config(harvest={"gpus_per_actor": 2}), holding(64, gpus=8), chains=4, local=False).harvest_actors == 4
    with pytest.raises(ValueError, match="2 GPUs for a harvest actor, it has 1"):
        capacity(Config(harvest={"gpus_per_actor": 2}), holding(64, gpus=1), chains=4, local=False)


def test_a_stream_s_blocks_fit_into_its_share_of_the_object_store():
    # 10 row groups of 2048 rows, 2 bytes a number: 80 MiB at d = 2048, and no byte more.
    config = Config(cluster={"object_store_mb": 80})
    check_stream(config, 2048)
    with pytest.raises(ValueError, match=r"cluster\.object_store_mb 80: 10 row groups of harvest\.rows_per_group 2048 .*d = 2049 need 81"):
        check_stream(config, 2049)
