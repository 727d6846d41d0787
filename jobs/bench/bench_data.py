"""What the data plane costs, each as a ratio taken in one run.

    python jobs/bench/bench_data.py --output jobs/bench/bench_data.md            all parts
    python jobs/bench/bench_data.py --parts stream --gigabytes 8

harvest   shards against the bare forward pass of the same model to the same block, over the same sequences
stream    rows through Ray Data against a raw pyarrow read of the same row groups in the same order, taking turns
chain     one chain of the quickstart: share of training spent waiting for data, time to the first batch of each cycle

The stream is measured twice: as blocks handed over (what a raw read gives, though every byte of ours is hashed), and as
the fp32 batches that training takes (gathered in the order's permutation, hashed again, converted, scaled). "Raw" is
`ParquetFile(memory_map=True).read_row_group(use_threads=False)` in one thread.
Everything is in the page cache: the disk is not what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import torch

from dmsae_ray.activations.dataset import ActivationDataset, Manifest, statistics_of
from dmsae_ray.activations.order import Order
from dmsae_ray.activations.shard import ShardWriter
from dmsae_ray.activations.shard_maker import ShardMaker, Target
from dmsae_ray.activations.shard_plan import ShardPlan, plan_shards, rows_for_plan
from dmsae_ray.activations.stream import Stream, StreamLimits, _blocks, _views
from dmsae_ray.cluster.connection import QUIET
from dmsae_ray.corpus.prepare import prepare_tokens
from dmsae_ray.corpus.split import UNDEALT
from dmsae_ray.driver.options import SweepCommand, load
from dmsae_ray.lm.model import load_tokenizer
from dmsae_ray.store import Store

D, ROWS_PER_GROUP, ROWS_PER_SHARD = 2304, 4096, 131_072  # Gemma-2-2B's residual stream


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" + "---:|" * (len(columns) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def peak_rss_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


# -- stream ------------------------------------------------------------------------------------------------------------


def random_dataset(folder: Path, gigabytes: float) -> ActivationDataset:
    """Shards of normal bf16 rows: a read does not depend on the values."""
    store, writer = Store(folder), ShardWriter()
    rows_ND = torch.randn(ROWS_PER_SHARD, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    shards = max(1, round(gigabytes * 1e9 / (rows_ND.nbytes)))
    about, positions = {"dataset": "bench"}, {"bos": 0, "padding": 0, "outlier": 0, "unused": 0}
    entries = [
        writer.write(store, f"shards/train-{i:05d}.parquet", rows_ND.roll(i, 0), ROWS_PER_GROUP, about, positions)
        for i in range(shards)
    ]
    held_ND = rows_ND[: 2 * ROWS_PER_GROUP]
    calibration = writer.write(store, "shards/calibration.parquet", held_ND, ROWS_PER_GROUP, about, positions)
    Manifest(
        key="bench",
        model="random",
        model_fingerprint="",
        corpus_fingerprint="",
        hook="",
        d=D,
        dtype="bfloat16",
        context=0,
        seed=0,
        rows_per_group=ROWS_PER_GROUP,
        positions=positions,
        shards=entries,
        calibration=calibration,
        fields={},
        **statistics_of(held_ND),
    ).save(store)
    return ActivationDataset(store)


class StorePeak:
    """Largest use of this node's object store while the block runs, by the raylet's own count."""

    def __enter__(self) -> StorePeak:
        self.mb, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        import ray
        from ray._private.internal_api import node_stats

        (node,) = ray.nodes()
        while not self._stop.wait(0.05):
            stats = node_stats(
                node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False
            ).store_stats
            self.mb = max(self.mb, stats.object_store_bytes_used >> 20)


def read_raw(dataset: ActivationDataset, order: Order) -> float:
    """Bytes per second of reading a pass's row groups with pyarrow alone."""
    files = [str(dataset.store.local / shard.file) for shard in dataset.manifest.shards]
    per_shard = ROWS_PER_SHARD // ROWS_PER_GROUP
    start, size = time.perf_counter(), 0
    for round_ in range(order.rounds_per_pass):
        for unit in order.units(round_):
            file = pq.ParquetFile(files[unit // per_shard], memory_map=True)
            size += file.read_row_group(unit % per_shard, use_threads=False)["activation"].nbytes
    return size / (time.perf_counter() - start)


def read_blocks(stream: Stream, order: Order) -> tuple[float, float, float]:
    """(bytes/s of the whole pass, bytes/s after the first block, seconds to the first block) of blocks handed over."""
    wanted = [stream.units[unit] for round_ in range(order.rounds_per_pass) for unit in order.units(round_)]
    start, size, first, before = time.perf_counter(), 0, None, 0
    for block in _blocks(stream, order, wanted):
        size += sum(view_ND.nbytes for view_ND in _views(block, stream.dataset.manifest))
        if first is None:
            first, before = time.perf_counter() - start, size
    seconds = time.perf_counter() - start
    return size / seconds, (size - before) / max(1e-9, seconds - first), first


def read_batches(stream: Stream, order: Order, rest_s: float = 0.0) -> tuple[float, float, float]:
    """As read_blocks, of fp32 batches; bytes are the stored rows'. rest_s: pause after each batch, as of a slow
    training step.
    """
    steps = order.rounds_per_pass * order.batches_per_round
    batch_bytes = order.batch * stream.dataset.manifest.row_bytes
    start, first = time.perf_counter(), None
    for _ in stream.open(order, 0, steps):
        first = time.perf_counter() - start if first is None else first
        if rest_s:
            time.sleep(rest_s)
    seconds = time.perf_counter() - start
    return steps * batch_bytes / seconds, (steps - 1) * batch_bytes / (seconds - first), first


def bench_stream(arguments: argparse.Namespace) -> str:
    import ray

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        dataset = random_dataset(Path(folder), arguments.gigabytes)
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        stream = Stream(dataset, dataset.units(), 0, 1, StreamLimits(arguments.object_store_mb))

        def order(cycle: int) -> Order:
            return Order(
                n_units=len(stream.units), unit_rows=ROWS_PER_GROUP, batch=2048, lanes=8, data_seed=0, cycle=cycle
            )

        # Warm: page cache, read processes, and the store's memory, which the system gives out page by page at first
        # use.
        read_raw(dataset, order(0))
        cold = read_blocks(stream, order(0))[2]
        read_blocks(stream, order(1))
        found: dict[str, list] = {"raw": [], "blocks": [], "batches": []}
        for turn in range(arguments.repeats):
            found["raw"].append((read_raw(dataset, order(turn)), None, None))
            found["blocks"].append(read_blocks(stream, order(turn)))
            found["batches"].append(read_batches(stream, order(turn)))
        with StorePeak() as busy:
            read_batches(stream, order(9))
        with StorePeak() as slow:
            read_batches(stream, order(9), rest_s=0.02)
        ray.shutdown()
        size = sum(entry.bytes for entry in dataset.manifest.shards)

    def median(name: str, place: int) -> float:
        return statistics.median(entry[place] for entry in found[name])

    raw = median("raw", 0)
    ratios = {
        name: statistics.median(e[0] / r[0] for e, r in zip(found[name], found["raw"], strict=True)) for name in found
    }
    steady = {
        name: statistics.median(e[1] / r[0] for e, r in zip(found[name], found["raw"], strict=True))
        for name in ("blocks", "batches")
    }
    rows = [["raw pyarrow read, one thread", f"{raw / 1e9:.2f}", "1.00", "", ""]]
    for name, text in (("blocks", "stream, blocks of stored rows"), ("batches", "stream, fp32 batches")):
        spread = (max(e[0] for e in found[name]) - min(e[0] for e in found[name])) / median(name, 0)
        rows.append(
            [
                text,
                f"{median(name, 0) / 1e9:.2f}",
                f"{ratios[name]:.2f}",
                f"{steady[name]:.2f}",
                f"{median(name, 2):.2f} ({spread:.0%})",
            ]
        )
    return "\n\n".join(
        [
            f"### Stream: a pass of {size / 1e9:.1f} GB, d = {D}, row groups of {ROWS_PER_GROUP}, batch 2048, 8 lanes, "
            f"{arguments.object_store_mb} MB of object store",
            table(
                [
                    "",
                    "GB/s of the whole pass",
                    "ratio to raw",
                    "ratio after the first block",
                    "first block or batch, s (spread of GB/s)",
                ],
                rows,
            ),
            f"First block of a cold cluster, whose read processes have yet to start: {cold:.1f} s. Peak of the object "
            f"store {busy.mb} MB, with a consumer that rests 20 ms a batch {slow.mb} MB, of "
            f"{arguments.object_store_mb} MB allowed; peak resident memory of the reading process, shared memory that "
            f"it has touched included, {peak_rss_mb()} MB. On disk a row takes "
            f"{size / (len(stream.units) * ROWS_PER_GROUP):.1f} bytes, {2 * D} of them values.",
        ]
    )


# -- harvest -----------------------------------------------------------------------------------------------------------


def bench_harvest(arguments: argparse.Namespace) -> str:
    parts = [harvest_ratio("the small shipped model, CPU, one thread", [], "cpu", arguments.repeats, arguments.scratch)]
    if torch.cuda.is_available():
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
            random_gemma(Path(folder))
            flags = [
                "--model.name",
                folder,
                "--model.hook",
                "blocks.12.hook_resid_post",
                "--model.dtype",
                "bfloat16",
                "--model.context",
                "1024",
                "--harvest.dtype",
                "bfloat16",
                "--harvest.gpus_per_actor",
                "1",
                "--harvest.sequences_per_forward",
                "16",
                "--harvest.rows_per_group",
                "4096",
                "--harvest.rows_per_shard",
                "131072",
                "--harvest.tokens",
                "1048576",
                "--corpus.packing",
                "concatenate",
            ]
            parts.append(
                harvest_ratio(
                    f"Gemma-2-2B, random weights, {torch.cuda.get_device_name()}",
                    flags,
                    "cuda",
                    arguments.repeats,
                    arguments.scratch,
                )
            )
    else:
        parts.append(["Gemma-2-2B, random weights, on a GPU", "not measured", "not measured", "not measured", ""])
    return "### Harvest: rows written against the bare forward pass to the same block\n\n" + table(
        ["", "bare forward, rows/s", "harvest, rows/s", "ratio", "bytes per row on disk"], parts
    )


def random_gemma(folder: Path) -> None:
    """Gemma-2-2B's configuration with random weights, and the small model's tokenizer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    tokenizer = load_tokenizer("tiny")
    Gemma2ForCausalLM(Gemma2Config(dtype="bfloat16")).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def harvest_ratio(name: str, flags: list[str], device: str, repeats: int, scratch: Path | None) -> list[str]:
    """Steady state, in one process, shards and forward passes taking turns; loading is left out of both."""
    config = load(SweepCommand, flags)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        home = Path(folder)
        tokenizer, harvest = load_tokenizer(config.model.name), config.harvest
        wanted = rows_for_plan(harvest, UNDEALT, config.model.context)  # as much text as a harvest reads
        made = prepare_tokens(config.corpus, tokenizer, config.model.context, home / "tokens", wanted)
        sequences = made["train"]
        plans = plan_shards({"train": sequences.rows}, harvest, UNDEALT)[1:]
        target = Target(config.model.hook, Store(home / "data"), {"dataset": "bench"})
        maker = ShardMaker(config, [target], str(home / "tokens"), plans[0])
        bare = bare_forward(maker, sequences, device)

        def halves(plan: ShardPlan) -> list[ShardPlan]:
            """Two shards a turn, so that one can be written while the next is computed, as an actor does."""
            rows = plan.rows // 2 - 2 * config.model.context
            return [ShardPlan(f"{plan.name}-{i}", plan.number, plan.sequences[i::2], rows) for i in range(2)]

        def rate(make: Callable[[list[ShardPlan]], None], plan: ShardPlan) -> float:
            """Rows per second that the halves' sequences give, whatever becomes of them."""
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            make(halves(plan))
            if device == "cuda":
                torch.cuda.synchronize()
            return int(sequences.rows[list(plan.sequences)].sum()) / (time.perf_counter() - start)

        def shards(parts: list[ShardPlan]) -> None:
            list(maker({"plans": [json.dumps([part.to_dict() for part in parts])]}))
            for part in parts:
                target.store.delete(part.file)

        def forward(parts: list[ShardPlan]) -> None:
            for part in parts:
                bare(part)

        shards(halves(plans[0]))
        forward(halves(plans[0]))
        found = []
        for turn in range(repeats):
            plan = plans[turn % len(plans)]
            found.append((rate(forward, plan), rate(shards, plan)))
        list(maker({"plans": [json.dumps([plans[0].to_dict()])]}))
        entry = target.finished(plans[0])
        per_row = entry.bytes / entry.rows
    ratio = statistics.median(made / bare for bare, made in found)
    alone, with_shards = (statistics.median(rates) for rates in zip(*found, strict=True))
    return [name, f"{alone:,.0f}", f"{with_shards:,.0f}", f"{ratio:.2f}", f"{per_row:.1f}"]


def bare_forward(maker: ShardMaker, sequences, device: str) -> Callable[[ShardPlan], None]:
    """The transformers model cut after the hook's block, over the plan's sequences in the same batches; results are
    dropped.
    """
    from transformers import AutoModelForCausalLM

    from dmsae_ray.lm.source import local_folder

    model = maker.config.model
    bare = AutoModelForCausalLM.from_pretrained(
        local_folder(model.name),
        dtype=getattr(torch, model.dtype),
        attn_implementation="eager",
        trust_remote_code=False,
    )
    bare.model.layers = bare.model.layers[: maker.lm.layer + 1]
    bare.model.norm = torch.nn.Identity()
    bare = bare.to(device).eval().requires_grad_(False)
    per_forward = maker.config.harvest.sequences_per_forward

    @torch.no_grad()
    def forward(plan: ShardPlan) -> None:
        for first in range(0, len(plan.sequences), per_forward):
            picked = list(plan.sequences[first : first + per_forward])
            picked += picked[:1] * (per_forward - len(picked))
            bare.model(torch.from_numpy(sequences.ids[picked].astype("int64")).to(device), use_cache=False)

    return forward


# -- chain -------------------------------------------------------------------------------------------------------------


def bench_chain(arguments: argparse.Namespace) -> str:
    """The quickstart's own command, once with one chain and once with two at a time, as the sweep runs them."""
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        for seeds in ("0", "0,1"):
            home = Path(folder) / seeds
            command = [
                sys.executable,
                "-m",
                "dmsae_ray.sweep",
                "--output",
                str(home),
                "--sweep.seeds",
                seeds,
                "--sweep.k",
                "16",
                "--sweep.cycles",
                "3",
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            for cycle in range(3):
                records = [
                    json.loads(path.read_text())
                    for path in sorted(home.glob(f"chains/*/cycle_{cycle:02d}/record.json"))
                ]
                waits, firsts = [r["data_wait_share"] for r in records], [r["first_batch_s"] for r in records]
                name = f"{len(records)} chain(s), cycle {cycle}" + (" (cold)" if cycle == 0 else "")
                rows.append(
                    [name, f"{max(waits):.1%}", f"{max(firsts):.3f}", f"{min(r['tokens_per_s'] for r in records):,.0f}"]
                )
    return "### Quickstart: waiting for data (the worse chain of each row)\n\n" + table(
        ["", "share of the training phase", "first batch, s", "tokens/s"], rows
    )


PARTS = {"harvest": bench_harvest, "stream": bench_stream, "chain": bench_chain}


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    import pyarrow
    import ray

    return (
        f"{model}, {len(os.sched_getaffinity(0))} cores; ray {ray.__version__}, pyarrow {pyarrow.__version__}, torch "
        f"{torch.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of the stream's pass")
    parser.add_argument("--object-store-mb", type=int, default=1536, help="what the stream may fill")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="folder for what is written and deleted again")
    parser.add_argument("--output", type=Path, help="Markdown file to write the tables to")
    arguments = parser.parse_args()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    command = "python jobs/bench/bench_data.py " + " ".join(sys.argv[1:])
    parts = [
        "# Cost of the data plane",
        f"Made by `{command.strip()}`.",
        f"{machine()}. Medians of {arguments.repeats} repetitions that take turns.",
    ]
    for name in arguments.parts:
        parts.append(PARTS[name](arguments))
        print(parts[-1], end="\n\n", flush=True)
    if arguments.output:
        before = arguments.output.read_text() if arguments.output.exists() else ""
        marker = "<!-- below: kept by hand -->"
        kept = before[before.index(marker) :] if marker in before else marker + "\n"
        arguments.output.write_text("\n\n".join(parts) + "\n\n" + kept)


if __name__ == "__main__":
    main()
