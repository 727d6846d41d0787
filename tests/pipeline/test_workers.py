"""What depends on Ray and must not depend on the number of workers."""

import json
import shutil
from pathlib import Path

import pytest
import ray
import ray.train
import ray.train.torch
import torch
from conftest import core_bytes

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.activations.stream import Stream
from dmsae_ray.config import Config, SweepCommand, load
from dmsae_ray.corpus.tokens import TokenSequences
from dmsae_ray.distill.aggregator import Aggregator
from dmsae_ray.distill.attribution import AttributionSettings
from dmsae_ray.distill.chain import score_shards
from dmsae_ray.distill.plan import plan_chains
from dmsae_ray.distill.scores import ScoreSettings
from dmsae_ray.distill.trials import run_chains
from dmsae_ray.lock import OutputLock
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.track.progress import ProgressBoard


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        # Workers import the loop below from this file.
        here = {"env_vars": {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"}}
        ray.init(num_cpus=4, include_dashboard=True, dashboard_port=0, log_to_driver=False, runtime_env=here)
        yield
        ray.shutdown()


def dataset_of(sweep) -> ActivationDataset:
    (folder,) = (sweep.output / "data").glob("*")
    return ActivationDataset(folder)


def attribute_in_group(loop: dict) -> None:
    """A Ray Train worker that does the attribution phase; rank 1 may send a shard twice, and kill the actor once."""
    from dmsae_ray.lm.model import LanguageModel

    torch.set_num_threads(1)
    rank = ray.train.get_context().get_world_rank()
    sae = MatryoshkaSAE.load(Path(loop["sae"]))[0]
    lm = LanguageModel.load("tiny", "blocks.2.hook_resid_post")
    batches = list(TokenSequences.load(Path(loop["tokens"])).first_tokens(4096).batches(4))
    torch.distributed.barrier()
    settings, aggregator, ledger = AttributionSettings(), loop["aggregator"], tuple(loop["ledger"])
    trouble = loop["trouble"] and rank == 1

    def on_shard(done: int) -> None:
        if trouble and done == 1:
            from dmsae_ray.distill import attribution

            ids, lengths = batches[0]
            again = attribution.attribute(sae, lm, ids, lengths, loop["scale"], settings)
            while 0 not in ray.get(aggregator.finished.remote(ledger)):
                pass
            ray.get(aggregator.give.remote(ledger, rank, 0, again))
            ray.kill(aggregator, no_restart=False)

    ours = score_shards(sae, lm, batches, loop["scale"], settings, aggregator, ledger, rank, on_shard)
    (Path(loop["out"]) / f"worker-{rank}").write_text(str(ours))


def attribute_with(sweep, out: Path, settings: ScoreSettings, workers: int, trouble: bool) -> tuple[dict, list[int]]:
    dataset = dataset_of(sweep)
    out.mkdir()
    sae = sweep.chains()["seed0-k8"] / "cycle_01" / "sae.safetensors"
    batches = list(TokenSequences.load(dataset.tokens_path("attribution")).first_tokens(4096).batches(4))
    aggregator = Aggregator.remote(settings)
    ledger = [str(out / "ledger"), len(batches), "test"]
    ray.train.torch.TorchTrainer(
        attribute_in_group,
        train_loop_config={"sae": str(sae), "tokens": str(dataset.tokens_path("attribution")), "scale": dataset.manifest.scale,
                           "aggregator": aggregator, "ledger": ledger, "out": str(out), "trouble": trouble},
        scaling_config=ray.train.ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(name="attribution", storage_path=str(out / "train")),
    ).fit()  # fmt: skip
    counts = [int((out / f"worker-{rank}").read_text()) for rank in range(workers)]
    return ray.get(aggregator.select.remote(tuple(ledger))), counts


@pytest.mark.parametrize("settings", [ScoreSettings(), ScoreSettings("quantile", until_jaccard=0.95)], ids=["mean_abs", "quantile-in-stages"])
def test_attribution_is_bit_equal_for_one_and_three_workers_a_shard_sent_twice_and_a_dead_actor(cluster, small_sweep, tmp_path, settings):
    alone, _ = attribute_with(small_sweep, tmp_path / "one", settings, 1, trouble=False)
    shared, counts = attribute_with(small_sweep, tmp_path / "three", settings, 3, trouble=True)
    assert sum(count > 0 for count in counts) >= 2, counts
    assert torch.equal(alone["scores"], shared["scores"])
    assert torch.equal(alone["ids"], shared["ids"])
    for name in ("tokens", "shards", "split_half_spearman", "split_half_jaccard"):
        assert alone[name] == shared[name], name


def test_training_rows_come_through_a_ray_dataset(cluster, small_sweep, tmp_path):
    """One chain on the sweep's dataset. The cluster itself says which tasks read the rows."""
    from ray.util.state import list_tasks

    source = load(SweepCommand, ["--config", str(small_sweep.output.parent / "small.yaml")])
    config = Config(**(source.section_dict() | {"output": str(tmp_path / "out"), "sweep": {"seeds": [0], "k": [8], "cycles": 1}}))
    dataset = dataset_of(small_sweep)
    lock = OutputLock(config.home)
    plans = plan_chains(config, dataset, lock.lease())
    for plan in plans:
        plan.folder.describe(plan.key, plan.label, plan.fields)
    before = len(reads(list_tasks))
    board = ray.remote(num_cpus=0)(ProgressBoard).remote()
    run_chains(plans, 1, board, tmp_path / "scratch")
    lock.release()
    assert all(plan.finished() for plan in plans)
    # 32 units of 512 rows, 8 lanes, one task a round: 4 tasks a cycle.
    done = reads(list_tasks)
    assert len(done) - before == 4
    again = core_bytes(tmp_path / "out")
    assert again and all(core_bytes(small_sweep.output)[place] == core for place, core in again.items())


@pytest.mark.slow
def test_a_byte_altered_after_the_start_fails_the_chain_by_name_and_saves_nothing(cluster, small_sweep, tmp_path):
    """Only the reading task can notice; what it found must reach the user."""
    source = dataset_of(small_sweep).folder
    shutil.copytree(source, tmp_path / "data")
    dataset = ActivationDataset(tmp_path / "data")
    path = dataset.paths()[0]
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    small = load(SweepCommand, ["--config", str(small_sweep.output.parent / "small.yaml")])
    config = Config(**(small.section_dict() | {"output": str(tmp_path / "out"), "sweep": {"seeds": [0], "k": [8], "cycles": 1}}))
    lock = OutputLock(config.home)
    (plan,) = plan_chains(config, dataset, lock.lease())
    plan.folder.describe(plan.key, plan.label, plan.fields)
    board = ray.remote(num_cpus=0)(ProgressBoard).remote()
    run_chains([plan], 1, board, tmp_path / "scratch")
    lock.release()
    failure = plan.folder.failure()
    assert failure["kind"] == "data" and str(path) in failure["reason"] and "dmsae_ray.harvest" in failure["reason"]
    assert not plan.folder.cycle(0).sae.exists() and not plan.folder.records()


def reads(list_tasks) -> list:
    tasks = list_tasks(limit=10_000, raise_on_missing_output=False)
    return [task for task in tasks if "read_units" in task.name and task.state == "FINISHED" and task.type == "NORMAL_TASK"]


@pytest.mark.parametrize("start", [0, 7])
def test_the_stream_gives_the_rows_of_the_order_from_any_step(cluster, small_sweep, start):
    from dmsae_ray.activations.order import Order
    from dmsae_ray.activations.shard import COLUMN, as_tensor, read_group

    dataset = dataset_of(small_sweep)
    manifest, units = dataset.manifest, dataset.units()
    order = Order(n_units=len(units), unit_rows=512, batch=512, lanes=8, data_seed=4, cycle=2)
    steps = 40  # more than the 32 of one pass
    whole = [x for x in Stream(dataset, order, 0, 1).batches(start, steps)]
    halves = [Stream(dataset, order, rank, 2).batches(start, steps) for rank in range(2)]
    assert len(whole) == steps - start
    for step, x_BD, parts in zip(range(start, steps), whole, zip(*halves)):
        round_, row = order.position(step)
        expected = torch.cat(
            [
                as_tensor(read_group(*units[unit])[COLUMN], manifest.d, manifest.dtype)[torch.from_numpy(order.rows(round_, unit)[row : row + 64])]
                for unit in order.units(round_)
            ]
        )
        assert torch.equal(x_BD, expected.float() / manifest.scale)
        joined = torch.empty_like(x_BD)
        for rank, part in enumerate(parts):
            joined[torch.from_numpy(order.token_index(rank, 2))] = part
        assert torch.equal(joined, x_BD)


def test_two_ddp_workers_train_and_attribute_together(cluster, small_sweep, tmp_path):
    source = load(SweepCommand, ["--config", str(small_sweep.output.parent / "small.yaml")])
    tree = source.section_dict() | {"output": str(tmp_path / "out"), "sweep": {"seeds": [0], "k": [8], "cycles": 2}}
    config = Config(**(tree | {"cluster": tree["cluster"] | {"workers": 2}}))
    lock = OutputLock(config.home)
    (plan,) = plan_chains(config, dataset_of(small_sweep), lock.lease())
    plan.folder.describe(plan.key, plan.label, plan.fields)
    board = ray.remote(num_cpus=0)(ProgressBoard).remote()
    run_chains([plan], 1, board, tmp_path / "scratch")
    lock.release()
    records = plan.folder.records()
    assert len(records) == 2, plan.folder.failure()
    alone = json.loads((small_sweep.chains()["seed0-k8"] / "cycle_00" / "record.json").read_text())
    # The same global batches and the same global gate; only the order of sums differs.
    assert records[0]["fvu"] == pytest.approx(alone["fvu"], rel=0.02)
    assert records[0]["l0"] == pytest.approx(alone["l0"], rel=0.02)
