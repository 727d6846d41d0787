"""What pipeline and fault tests share: a small sweep through the front door."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

FIRST = (
    "pipeline/test_mlflow_server.py",
    "pipeline/test_outliers.py",
    "pipeline/test_streams.py",
    "pipeline/test_object_store.py",
    "faults/test_kills.py",
    "cluster/test_soak.py",
)
"""Where several processes share the tests by file: one makes the small sweep and the study, which the first of these
needs, while another has what needs neither; then the longest.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = f"{item.path.parent.name}/{item.path.name}"
        return FIRST.index(name) if name in FIRST else len(FIRST)

    items.sort(key=place)


# A sweep that takes seconds once Ray is up, and is real in every part.
SMALL = """
name: small
harvest: {tokens: 16_384, calibration_tokens: 2048, rows_per_group: 512, rows_per_shard: 8192, actors: 1}
sae: {width: 256}
train: {tokens: 16_384, batch: 512, lr: 3.0e-3, checkpoint_steps: 8, log_steps: 4}
attribution: {tokens: 2048, sequences_per_shard: 4}
evaluate: {tokens: 1024}
features: {tokens: 1024, contexts: 3, spread: 1, most: 12}
sweep: {seeds: [0, 1], k: [8], cycles: 2}
compare: {draws: 100}
"""


HANGS = 1200.0
"""Seconds after which a command hangs: many times what the longest takes on an idle machine, since a busy one is no
fault.
"""


@dataclass
class Run:
    """One finished command."""

    code: int
    out: str
    seconds: float


def environment(**extra: str) -> dict[str, str]:
    """A user's environment: nothing that a test process left behind, and a cluster of one's own, whatever else runs
    here. Python keeps what it compiled, as it does for users: else each of a command's processes compiles us anew.
    """
    ours = ("RAY_", "TUNE_", "MLFLOW_", "DMSAE_", "PYTEST_", "PYTHONDONTWRITEBYTECODE")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return kept | {"PYTHONUNBUFFERED": "1", "RAY_ADDRESS": "local"} | extra


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def command(output: Path, *args: str, module: str = "sweep") -> list[str]:
    config = output.parent / "small.yaml"
    if not config.exists():
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(SMALL)
    return [sys.executable, "-m", f"dmsae_ray.{module}", "--config", str(config), "--output", str(output), *args]


def run_command(output: Path, *args: str, module: str = "sweep", timeout: float = HANGS, **env: str) -> Run:
    start = time.monotonic()
    done = subprocess.run(
        command(output, *args, module=module),
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return Run(done.returncode, done.stdout, time.monotonic() - start)


def wait_for(condition, process: subprocess.Popen, seconds: float = HANGS) -> None:
    """Until the condition holds; the process must be alive all the while."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the victim ended before it could be struck"
        assert time.monotonic() < end, "the phase to strike in never came"
        time.sleep(0.05)


def start(output: Path, *args: str, **env: str) -> tuple[subprocess.Popen, Path]:
    """A sweep that runs beside the test, and the file with all it says."""
    log = open(output.parent / "driver.log", "w")
    process = subprocess.Popen(
        command(output, *args), env=environment(**env), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    return process, output.parent / "driver.log"


@dataclass
class Sweep:
    """A finished sweep."""

    output: Path
    run: Run
    made: Path
    """its output folder when it ran; `output` is a copy, in which it was moved"""

    def chains(self) -> dict[str, Path]:
        """label -> folder of every chain."""
        return {
            json.loads((f / "chain.json").read_text())["label"]: f for f in sorted((self.output / "chains").glob("*"))
        }


def made_once(tmp_path_factory, name: str, make: Callable[[Path], Run]) -> Sweep:
    """A copy for this process of a sweep that the session's processes (`pytest -n`) share.

    Whoever asks first makes it, while the others wait: make(folder) is to write folder/out.
    """
    root = tmp_path_factory.getbasetemp()
    shared = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / f"shared-{name}"
    shared.mkdir(exist_ok=True)
    with open(shared / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "run.json").exists():
            shutil.rmtree(shared / "made", ignore_errors=True)
            (shared / "made").mkdir()
            run = make(shared / "made")
            assert run.code == 0, run.out
            (shared / "run.json").write_text(json.dumps(asdict(run)))
    copy = tmp_path_factory.mktemp(name)
    shutil.copytree(shared / "made", copy, dirs_exist_ok=True)
    run = Run(**json.loads((shared / "run.json").read_text()))
    return Sweep(copy / "out", run, shared / "made" / "out")


@pytest.fixture(scope="session")
def small_sweep(tmp_path_factory) -> Sweep:
    """The undisturbed sweep that others are compared with. It is a job that was submitted to a Ray head, see
    pipeline/test_job.py; all others are plain commands, and come to the same bits.
    """
    from ray_head import submitted

    return made_once(
        tmp_path_factory, "undisturbed", lambda folder: submitted(command(folder / "out"), folder / "metrics")
    )


ARMS = """
cluster: {lockstep: 2}
study:
  arms:
    random: {fields: {selection.by: random, selection.size: match}, seeds: [0], k: [8]}
    transfer: {core: distilled, cycles: 1, seeds: [0], k: [8, 16, 24]}
    plain: {cycles: 1, seeds: [100], k: [8]}
    plain-long: {cycles: 1, seeds: [100, 101], k: [8], fields: {train.tokens: whole_chain}}
  expect:
    - {claim: total L0 is k, value: evaluation.base.k8.l0, above: 7, below: 9}
    - {claim: plain SAEs have a core, value: evaluation.plain.k8.core_in, above: 0.5}
    - {claim: intervals need four seeds, value: consistency.base.seed.pw_mcc.low, above: 0}
"""


def study_config(small_sweep, folder, more: str = ARMS):
    """The small sweep's configuration with arms, beside a copy of its output folder."""
    output = folder / "out"
    shutil.copytree(
        small_sweep.output, output, ignore=shutil.ignore_patterns("mlflow.db", "mlartifacts", "mlflow_home", "sweeps")
    )
    (folder / "small.yaml").write_text((small_sweep.output.parent / "small.yaml").read_text() + more)
    return output


@pytest.fixture(scope="session")
def study(small_sweep, tmp_path_factory):
    """A small study that goes on from the small sweep: its output folder and the run of the command.

    The command trains the transfers, two chains in lockstep; the arms that need only the small sweep are trained
    before it by the worker's loop in this process, which saves four trials of a dozen processes each.
    """

    def make(folder: Path) -> Run:
        from ray_here import ray_here, train_here

        from dmsae_ray.activations.dataset import ActivationDataset
        from dmsae_ray.config import Config
        from dmsae_ray.distill.grid import plan_chains
        from dmsae_ray.driver.options import SweepCommand, load

        output = study_config(small_sweep, folder)
        (dataset,) = (output / "data").iterdir()
        config = Config(**load(SweepCommand, command(output)[3:]).sections())
        with ray_here(cpus=2, include_dashboard=False):
            for plan in plan_chains(config, ActivationDataset(dataset)):
                if plan.label.endswith(("-random", "-plain", "-plain-long")):
                    plan.folder.describe(plan.key, plan.label, plan.fields)
                    train_here([plan])
        return run_command(output)

    sweep = made_once(tmp_path_factory, "study", make)
    return sweep.output, sweep.run


def results(output: Path) -> Path:
    """The only sweep's results folder."""
    (folder,) = (output / "sweeps").iterdir()
    return folder


@pytest.fixture(scope="session")
def s3():
    """An S3 server, see s3_server.py; its keys are in the environment, as users have theirs."""
    from s3_server import KEYS, S3

    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        server = S3()
        yield server
        server.stop()


def core_bytes(output: Path) -> dict[str, bytes]:
    """Every core of every chain, by its place."""
    from dmsae_ray.core.core import Core

    cores = {}
    for path in sorted((output / "chains").glob("*/cycle_*/core.safetensors")):
        core = Core.load(path)
        cores[str(path.relative_to(output))] = core.W_enc_CD.numpy().tobytes() + core.scores_C.numpy().tobytes()
    return cores


def sae_tensors(output: Path) -> dict[str, bytes]:
    """Every tensor of every SAE of every chain, by its place."""
    from safetensors.numpy import load_file

    found = {}
    for path in sorted((output / "chains").glob("*/cycle_*/sae.safetensors")):
        found |= {f"{path.relative_to(output)} {name}": tensor.tobytes() for name, tensor in load_file(path).items()}
    return found


def same_results(output: Path, undisturbed: Path, cycles: int) -> None:
    """Chains of so many cycles, seen on the same rows, came to the same weights and cores, bit for bit."""
    for what in (core_bytes, sae_tensors, data_digests):
        found = what(output)
        assert len({place.split()[0] for place in found}) == cycles, sorted(found)
        assert found.items() <= what(undisturbed).items(), what.__name__


def digest_of_rows(output: Path, cycle: int, steps: int, batch: int, lanes: int, data_seed: int = 0) -> str:
    """What `data_digest` must be if exactly rows 0 .. steps * batch - 1 of the cycle's order were trained on, each
    once.

    The shards of the only dataset are read here without the stream, one row group of 512 rows at a time.
    """
    import pyarrow.parquet as pq
    import xxhash

    from dmsae_ray.activations.order import Order

    (folder,) = (output / "data").glob("*")
    groups = [
        (path, group)
        for path in sorted(folder.glob("shards/train-*.parquet"))
        for group in range(pq.ParquetFile(path).num_row_groups)
        if pq.ParquetFile(path).metadata.row_group(group).num_rows == 512
    ]
    order = Order(n_units=len(groups), unit_rows=512, batch=batch, lanes=lanes, data_seed=data_seed, cycle=cycle)
    n, total, taken = batch // lanes, 0, set()
    for step in range(steps):
        round_, row = order.position(step)
        for lane, unit in enumerate(order.units(round_)):
            path, group = groups[unit]
            rows = pq.ParquetFile(path).read_row_group(group).column(0).to_pylist()
            wanted = order.rows(round_, unit)[row : row + n].tolist()
            taken.update((unit, place) for place in wanted)
            total += xxhash.xxh3_64_intdigest(b"".join(rows[place] for place in wanted), seed=step * lanes + lane)
    assert len(taken) == steps * batch
    return f"{total % 2**64:016x}"


def data_digests(output: Path) -> dict[str, str]:
    """Which rows each cycle of each chain was trained on, by its place."""
    records = sorted((output / "chains").glob("*/cycle_*/record.json"))
    return {str(path.relative_to(output)): json.loads(path.read_text())["data_digest"] for path in records}
