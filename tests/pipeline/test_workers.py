"""What depends on Ray and must not depend on the number of workers."""

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import ray
import ray.train
import ray.train.torch
import torch
from conftest import HANGS, core_bytes
from ray_here import ray_here, train_here
from s3_server import CLIENT_GIVES_UP_S, Burst, Share

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.activations.order import Order
from dmsae_ray.activations.rowgroup import read_unit
from dmsae_ray.activations.shard import as_tensor
from dmsae_ray.activations.stream import MASK, Batches, Stream, StreamLimits
from dmsae_ray.attribution.aggregator import Account, Aggregator, Attribution
from dmsae_ray.attribution.gradients import AttributionSettings
from dmsae_ray.attribution.scores import ScoreSettings
from dmsae_ray.attribution.shards import score_shards
from dmsae_ray.config import Config
from dmsae_ray.distill.grid import plan_chains
from dmsae_ray.distill.plan import ChainPlan
from dmsae_ray.distill.trials import drive
from dmsae_ray.driver.options import SweepCommand, load
from dmsae_ray.lock import OutputLock
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.show.terminal.progress import ProgressBoard


@pytest.fixture(scope="module")
def cluster(s3):
    """Started after the S3 server, whose keys the cluster's processes have from their environment."""
    with ray_here(cpus=4, include_dashboard=True, dashboard_port=0):
        yield


def dataset_of(sweep) -> ActivationDataset:
    (folder,) = (sweep.output / "data").glob("*")
    return ActivationDataset(folder)


def attribute_in_group(rank: int, loop: dict) -> int:
    """A worker that does the attribution phase: how many shards were its own. Rank 1 may send a shard twice, and kill
    the actor once.
    """
    from dmsae_ray.lm.model import LanguageModel

    torch.set_num_threads(1)
    sae = MatryoshkaSAE.load(Path(loop["sae"]))[0]
    lm = LanguageModel.load("tiny", "blocks.2.hook_resid_post")
    batches = list(ActivationDataset(loop["dataset"]).held_out("attribution").first_tokens(2048).batches(2))
    (Path(loop["out"]) / f"ready-{rank}").touch()
    end = time.monotonic() + HANGS
    while len(list(Path(loop["out"]).glob("ready-*"))) < loop["workers"]:
        assert time.monotonic() < end, "a worker never came"
        time.sleep(0.01)
    settings, aggregator, account = AttributionSettings(), loop["aggregator"], loop["account"]
    trouble = loop["trouble"] and rank == 1

    def on_shard(done: int) -> None:
        if trouble and done == 1:
            from dmsae_ray.attribution import gradients as attribution

            ids, lengths = batches[0]
            again = attribution.attribute(sae, lm, ids, lengths, loop["scale"], settings)
            while 0 not in ray.get(aggregator.finished.remote(account)):
                pass
            ray.get(aggregator.give.remote(account, rank, 0, again))
            ray.kill(aggregator, no_restart=False)

    return score_shards(sae, lm, batches, loop["scale"], settings, aggregator, account, rank, on_shard)


def attribute_with(
    sweep, out: Path, settings: ScoreSettings, workers: int, trouble: bool
) -> tuple[Attribution, list[int]]:
    dataset = dataset_of(sweep)
    out.mkdir()
    sae = sweep.chains()["seed0-k8"] / "cycle_01" / "sae.safetensors"
    batches = list(dataset.held_out("attribution").first_tokens(2048).batches(2))
    aggregator = Aggregator.remote()
    account = Account(str(out / "ledger"), len(batches), "test", settings)
    loop = {
        "sae": str(sae),
        "dataset": dataset.store.url,
        "scale": dataset.manifest.scale,
        "aggregator": aggregator,
        "account": account,
        "out": str(out),
        "workers": workers,
        "trouble": trouble,
    }
    # Rank 0 is this process.
    others = [ray.remote(num_cpus=0.5)(attribute_in_group).remote(rank, loop) for rank in range(1, workers)]
    counts = [attribute_in_group(0, loop), *ray.get(others)]
    return ray.get(aggregator.total.remote(account)), counts


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(ScoreSettings(), id="mean_abs", marks=pytest.mark.slow),
        pytest.param(ScoreSettings("quantile", until_jaccard=0.95), id="quantile-in-stages"),
    ],
)
def test_attribution_is_bit_equal_for_one_and_three_workers_a_shard_sent_twice_and_a_dead_actor(
    cluster, small_sweep, tmp_path, settings
):
    alone, _ = attribute_with(small_sweep, tmp_path / "one", settings, 1, trouble=False)
    shared, counts = attribute_with(small_sweep, tmp_path / "three", settings, 3, trouble=True)
    assert sum(count > 0 for count in counts) >= 2, counts
    assert torch.equal(alone.scores_P, shared.scores_P)
    for name in ("tokens", "shards", "split_half_spearman", "split_half_jaccard"):
        assert getattr(alone, name) == getattr(shared, name), name


def planned_again(sweep, dataset: ActivationDataset, output: Path, cycles: int, workers: int = 1, **train) -> ChainPlan:
    """The sweep's first chain, on this dataset, in another output folder: ready to be run."""
    tree = load(SweepCommand, ["--config", str(sweep.output.parent / "small.yaml")]).section_dict()
    tree |= {"output": str(output), "sweep": {"seeds": [0], "k": [8], "cycles": cycles}}
    config = Config(**(tree | {"cluster": tree["cluster"] | {"workers": workers}, "train": tree["train"] | train}))
    (plan,) = plan_chains(config, dataset)
    plan.folder.describe(plan.key, plan.label, plan.fields)
    # The driver measures these before it starts chains; here they are the undisturbed sweep's.
    plan.references.mkdir(parents=True)
    for path in (sweep.output / "data" / plan.dataset_key).glob("references-*.json"):
        shutil.copy(path, plan.references)
    return plan


@ray.remote(num_cpus=0)
class Trial:
    """A process that drives chains, as Tune has them."""

    def drive(self, *given) -> None:
        drive(*given)


def run_chain(sweep, dataset: ActivationDataset, output: Path, cycles: int, workers: int = 1, **train) -> ChainPlan:
    """The sweep's first chain, again, on this dataset, into another output folder: a trial's work, without Tune."""
    plan = planned_again(sweep, dataset, output, cycles, workers, **train)
    lock, board = OutputLock(plan.config.home), ray.remote(num_cpus=0)(ProgressBoard).remote()
    try:
        scratch = str(output.parent / "scratch")
        ray.get(Trial.remote().drive.remote([plan], lock.lease(), Aggregator.remote(), board, scratch))
    finally:
        lock.release()
    return plan


def reading_tasks() -> list:
    """What the cluster itself says of the tasks that read rows; of each its last attempt comes last."""
    from ray.util.state import list_tasks

    # This cluster's address, since others may run on the machine.
    address = ray.get_runtime_context().gcs_address
    tasks = list_tasks(address, limit=10_000, raise_on_missing_output=False, detail=True)
    return [task for task in tasks if "read_units" in task.name and task.type == "NORMAL_TASK"]


def test_training_rows_come_through_a_ray_dataset(cluster, small_sweep, tmp_path):
    before = len(reading_tasks())
    plan = planned_again(small_sweep, dataset_of(small_sweep), tmp_path / "out", cycles=1)
    train_here([plan])
    assert plan.finished(), plan.folder.failure()
    done = reading_tasks()[before:]
    assert len(done) >= 1 and {task.state for task in done} == {"FINISHED"}
    again = core_bytes(tmp_path / "out")
    assert again and all(core_bytes(small_sweep.output)[place] == core for place, core in again.items())
    undisturbed = small_sweep.chains()["seed0-k8"] / "cycle_00" / "record.json"
    assert plan.folder.records()[0].data_digest == json.loads(undisturbed.read_text())["data_digest"]


@pytest.mark.slow
def test_a_byte_altered_after_the_start_fails_the_chain_by_name_and_saves_nothing(cluster, small_sweep, tmp_path):
    """Only the reading task can notice; what it found must reach the user."""
    shutil.copytree(dataset_of(small_sweep).store.local, tmp_path / "data")
    dataset = ActivationDataset(tmp_path / "data")
    path = dataset.store.local / dataset.manifest.shards[0].file
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    plan = run_chain(small_sweep, dataset, tmp_path / "out", cycles=1)
    failure = plan.folder.failure()
    assert failure.kind == "data" and str(path) in failure.reason and "dmsae_ray.harvest --repair" in failure.reason
    assert not plan.folder.cycle(0).sae.exists() and not plan.folder.records()


def expected(dataset: ActivationDataset, order: Order, step: int) -> torch.Tensor:
    """A global batch, taken from the shards by the order's own words. [B, D]"""
    m, units = dataset.manifest, dataset.units()
    round_, row = order.position(step)
    lanes = []
    for unit in order.units(round_):
        rows_ND = as_tensor(read_unit(dataset.store, units[unit], m.rows_per_group * m.row_bytes), m.d, m.dtype)
        lanes.append(rows_ND[torch.from_numpy(order.rows(round_, unit)[row : row + order.lane_rows])])
    return torch.cat(lanes).float() / m.scale


def open_streams(dataset: ActivationDataset, order: Order, world: int, start: int, stop: int) -> list[Batches]:
    limits = StreamLimits(object_store_mb=16)
    return [Stream(dataset, dataset.units(), rank, world, limits).open(order, start, stop) for rank in range(world)]


@pytest.mark.parametrize("start, stop", [(0, 40), (13, 40), (32, 35)])  # a pass has 32 steps, a round 8
def test_one_two_and_four_ranks_see_the_same_global_batches_from_any_step(cluster, small_sweep, start, stop):
    dataset = dataset_of(small_sweep)
    order = Order(n_units=len(dataset.units()), unit_rows=512, batch=512, lanes=8, data_seed=4, cycle=2)
    digests = set()
    for world in (1, 2, 4):
        streams = open_streams(dataset, order, world, start, stop)
        steps = 0
        for step, parts in enumerate(zip(*streams, strict=True), start):
            joined_BD = torch.empty(512, dataset.manifest.d)
            for rank, part_BD in enumerate(parts):
                joined_BD[torch.from_numpy(order.token_index(rank, world))] = part_BD
            assert torch.equal(joined_BD, expected(dataset, order, step)), (world, step)
            steps += 1
        assert steps == stop - start
        digests.add(sum(stream.digest for stream in streams) & MASK)
    assert len(digests) == 1 and digests != {0}


def test_digests_tell_batches_apart(cluster, small_sweep):
    """Neither other steps nor the same rows in another cycle's order have the digest of these."""
    dataset, digests = dataset_of(small_sweep), []
    for cycle, start in ((0, 0), (0, 8), (1, 0)):
        order = Order(n_units=len(dataset.units()), unit_rows=512, batch=512, lanes=8, data_seed=0, cycle=cycle)
        (stream,) = open_streams(dataset, order, 1, start, start + 8)
        assert sum(1 for _ in stream) == 8
        digests.append(stream.digest)
    assert len(set(digests)) == 3


def test_a_stream_outlives_a_server_that_is_away_for_seconds_and_refuses_every_fourth_read(cluster, small_sweep, s3):
    """Short form of the same under a whole sweep, in tests/faults/test_server_faults.py."""
    local = dataset_of(small_sweep)
    order = Order(n_units=len(local.units()), unit_rows=512, batch=512, lanes=8, data_seed=4, cycle=0)
    s3.upload(local.store.local, "stream")
    remote = ActivationDataset(s3.url("stream", proxy=True))

    def rows(request) -> bool:
        return request.reads_rows

    s3.proxy.reset(Burst(CLIENT_GIVES_UP_S + 2, rows, Share(0.25, 7, rows)))
    (stream,), (undisturbed,) = (open_streams(dataset, order, 1, 0, 32) for dataset in (remote, local))
    assert all(torch.equal(here, there) for here, there in zip(stream, undisturbed, strict=True))
    refused = s3.proxy.refused
    burst = [request for request in refused if request.at <= refused[0].at + CLIENT_GIVES_UP_S + 2]
    # Longer than the client asks for by itself, so our own attempts are what it took.
    assert burst[-1].at - burst[0].at > CLIENT_GIVES_UP_S and len(burst) < len(refused)
    assert stream.digest == undisturbed.digest != 0


def test_a_read_task_that_is_killed_is_read_again_and_changes_no_batch(cluster, small_sweep):
    dataset = dataset_of(small_sweep)
    order = Order(n_units=len(dataset.units()), unit_rows=512, batch=512, lanes=8, data_seed=1, cycle=0)
    # 200 MB in one task, through a share of 16 MB: the task is far from its end when it is struck.
    steps = 200 * order.batches_per_round

    def read(strike) -> tuple[str, int]:
        """Hash of all batches in their order, and the stream's own digest."""
        (stream,) = open_streams(dataset, order, 1, 0, steps)
        content = hashlib.blake2b()
        for step, x_BD in enumerate(stream):
            content.update(x_BD.numpy())
            if step == 10:
                strike()
        assert step + 1 == steps
        return content.hexdigest(), stream.digest

    undisturbed = read(lambda: None)
    known, victims = {task.task_id for task in reading_tasks()}, []

    def kill() -> None:
        (victim,) = wait_for_tasks(lambda task: task.task_id not in known and task.state == "RUNNING")
        assert (
            "read_units" in Path(f"/proc/{victim.worker_pid}/cmdline").read_text()
        )  # Ray names a process after its task
        os.kill(victim.worker_pid, signal.SIGKILL)
        victims.append(victim)

    assert read(kill) == undisturbed
    (victim,) = victims
    (again,) = wait_for_tasks(lambda task: task.task_id == victim.task_id and task.state == "FINISHED")
    assert again.attempt_number > victim.attempt_number and again.worker_pid != victim.worker_pid


def wait_for_tasks(wanted) -> list:
    """Reading tasks of this kind, as soon as the cluster, which learns of them with some delay, says there are any."""
    end = time.monotonic() + 600
    while not (found := [task for task in reading_tasks() if wanted(task)]):
        assert time.monotonic() < end, [(task.task_id, task.state, task.attempt_number) for task in reading_tasks()]
        time.sleep(0.1)
    return found


@pytest.mark.parametrize(
    "train",
    [
        pytest.param({"parallel": "ddp"}, id="ddp"),
        pytest.param({"parallel": "gather"}, id="gather", marks=pytest.mark.slow),
        pytest.param({"parallel": "latent", "micro_batch": 100}, id="latent", marks=pytest.mark.slow),
    ],
)
def test_two_workers_train_and_attribute_together(cluster, small_sweep, tmp_path, train):
    cycles = 2 if train["parallel"] == "latent" else 1  # a core is dealt over workers there
    plan = run_chain(small_sweep, dataset_of(small_sweep), tmp_path / "out", cycles=cycles, workers=2, **train)
    records = plan.folder.records()
    assert len(records) == cycles, plan.folder.failure()
    assert (records[0].parallel, records[0].micro_batch) == (train["parallel"], train.get("micro_batch"))
    cycle = small_sweep.chains()["seed0-k8"] / "cycle_00"
    alone = json.loads((cycle / "record.json").read_text())
    if train["parallel"] == "gather":  # to the last bit
        found = MatryoshkaSAE.load(plan.folder.cycle(0).sae)[0].state_dict()
        expected = MatryoshkaSAE.load(cycle / "sae.safetensors")[0].state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    # The same global batches and the same global gate; only the order of sums differs.
    assert records[0].data_digest == alone["data_digest"]
    assert records[0].fvu == pytest.approx(alone["fvu"], rel=0.02)
    assert records[0].l0 == pytest.approx(alone["l0"], rel=0.02)
