"""What one training step costs: ours, its parts' lower bound, dictionary-learning's and SAELens's.

    make bench                                          all shapes, writes jobs/bench/bench_step.md
    .venv-peers/bin/python jobs/bench/bench_step.py --shapes 256/4096/1024/32 --repeats 15
    python jobs/bench/bench_step.py --device cuda --output jobs/bench/bench_step_gpu.md      (bench_device.py)

One process, the same batches, threads and shapes for every row; repetitions are interleaved and medians shown, so the
ratios hold where a shared machine's speed drifts. Batches are sparse mixtures of directions with log-normal norms and a
few outlier rows. All steps run at a learning rate so small that the weights stay what they are. "A tenth dead": every
tenth latent is marked dead and its encoder row shrunk, so that it stays silent and AuxK has work to do. Peak memory is
that of a fresh process that does this row only.

Needs dictionary-learning 0.1.0 and sae-lens in an environment of their own (`make .venv-peers/.ready`); rows whose
package is missing are left out and named.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dense_step import DenseTrainer

from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.settings import SAESettings, group_sizes
from dmsae_ray.sae.trainer import Trainer

SHAPES = ("256/4096/1024/32", "768/16384/2048/40", "2304/16384/1024/80")
TINY_LR = 1e-9
NEVER = 10**9
SLOW_S = 1.5
"""A step that takes longer is repeated a third as often."""


@dataclass(frozen=True)
class Shape:
    d: int
    width: int
    batch: int
    k: int

    @staticmethod
    def parse(text: str) -> Shape:
        return Shape(*(int(part) for part in text.split("/")))

    def __str__(self) -> str:
        return f"{self.d}/{self.width}/{self.batch}/{self.k}"


def batches(shape: Shape, count: int = 4, outlier: float = 15) -> list[torch.Tensor]:
    """Mean squared norm 1; norms are log-normal, and one row in 500 is `outlier` times as long."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4 * shape.d, shape.d, generator=generator), dim=1)
    result = []
    for _ in range(count):
        on = torch.rand(shape.batch, 4 * shape.d, generator=generator) < 0.02
        x = (torch.rand(shape.batch, 4 * shape.d, generator=generator) * on) @ directions
        norms = torch.exp(0.3 * torch.randn(shape.batch, 1, generator=generator))
        norms[torch.rand(shape.batch, 1, generator=generator) < 0.002] *= outlier
        x = x * norms + 0.3 * directions[0]
        result.append(x / x.square().sum(dim=1).mean().sqrt())
    return result


Step = Callable[[torch.Tensor], dict | None]


def product(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Step:
    """x @ W_enc^T alone, in memory that is there already."""
    W = torch.nn.functional.normalize(torch.randn(shape.width, shape.d), dim=1).to(device, dtype)
    out = torch.empty(shape.batch, shape.width, dtype=dtype, device=device)
    cast = {}

    def step(x):
        torch.mm(cast[id(x)], W.t(), out=out)

    step.prepare = lambda xs: cast.update({id(x): x.to(dtype) for x in xs})
    return step


def settings_of(shape: Shape, **fields) -> SAESettings:
    return SAESettings(
        d=shape.d,
        width=shape.width,
        k=shape.k,
        batch=shape.batch,
        lr=TINY_LR,
        warmup_steps=0,
        dead_window_tokens=NEVER,
        **fields,
    )


def shrink_dead(W_enc: torch.Tensor) -> None:
    """Every tenth latent's encoder row, given as rows."""
    with torch.no_grad():
        W_enc[::10] *= 0.01


def ours(shape: Shape, screen: str, dead: bool, kernels: str = "compiled", device: str = "cpu") -> Step:
    settings = settings_of(shape, screen=screen, kernels=kernels)
    sae = MatryoshkaSAE.init(settings, None, seed=0)
    if dead:
        shrink_dead(sae.W_enc)
    trainer = Trainer(sae.to(device), settings)
    if dead:
        trainer.silent_F[::10] = NEVER  # and so they stay: they never fire

    def step(x):
        trainer.step(x)

    def extra(x):
        report = trainer.step(x, log=True)
        assert round(report.dead_share * shape.width) == (len(range(0, shape.width, 10)) if dead else 0)
        return {"candidates": report.candidates, "retries": report.retries}

    step.extra = extra
    return step


def dense(shape: Shape) -> Step:
    settings = settings_of(shape)
    trainer = DenseTrainer(MatryoshkaSAE.init(settings, None, seed=0), settings)
    return lambda x: trainer.step(x) and None


def autocast(device: str) -> torch.autocast:
    """As both systems' training loops have it; on CPUs they run in full precision."""
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu")


def dictionary_learning(shape: Shape, dead: bool, device: str = "cpu") -> Step:
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    sizes = group_sizes(shape.width, SAESettings.__dataclass_fields__["prefix_fractions"].default)
    trainer = MatryoshkaBatchTopKTrainer(
        steps=10**6,
        activation_dim=shape.d,
        dict_size=shape.width,
        k=shape.k,
        layer=0,
        lm_name="none",
        warmup_steps=0,
        group_fractions=[size / shape.width for size in sizes],
        lr=TINY_LR,
        threshold_start_step=NEVER,
        seed=0,
        device=device,
    )
    trainer.dead_feature_threshold = NEVER
    if dead:
        shrink_dead(trainer.ae.W_enc.data.t())
    count = 0

    def step(x):
        nonlocal count
        if dead:
            trainer.num_tokens_since_fired[::10] = NEVER
        with autocast(device):
            trainer.update(count, x)
        count += 1

    return step


def sae_lens(shape: Shape, dead: bool, device: str = "cpu") -> Step:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    widths = list(accumulate(group_sizes(shape.width, SAESettings.__dataclass_fields__["prefix_fractions"].default)))
    config = MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=shape.d, d_sae=shape.width, k=shape.k, matryoshka_widths=widths, device=device
    )
    sae = MatryoshkaBatchTopKTrainingSAE(config)
    if dead:
        shrink_dead(sae.W_enc.data.t())
    optimizer = torch.optim.Adam(sae.parameters(), lr=TINY_LR)
    mask = torch.zeros(shape.width, dtype=torch.bool, device=device)
    mask[::10] = dead
    silent = torch.zeros(shape.width, device=device)
    scaler = torch.amp.GradScaler(device, enabled=device != "cpu")
    count = 0

    def step(x):  # as SAETrainer._train_step
        nonlocal count
        sae.train()
        with autocast(device):
            output = sae.training_forward_pass(TrainStepInput(x, {}, mask, count, False))
        with torch.no_grad():
            fired = output.feature_acts.bool().float().sum(-2).bool()
            silent.add_(1)
            silent[fired] = 0
        scaler.scale(output.loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        count += 1

    return step


ROWS: dict[str, Callable[[Shape], Step]] = {
    "fp32 encoder product alone": lambda shape: product(shape, torch.float32),
    "bf16 encoder product alone": lambda shape: product(shape, torch.bfloat16),
    "ours, bf16 screen": lambda shape: ours(shape, "bf16", dead=False),
    "ours, bf16 screen, a tenth dead": lambda shape: ours(shape, "bf16", dead=True),
    "ours, fp32 screen": lambda shape: ours(shape, "fp32", dead=False),
    "ours, fp32 screen, a tenth dead": lambda shape: ours(shape, "fp32", dead=True),
    "ours, bf16 screen, plain torch": lambda shape: ours(shape, "bf16", dead=False, kernels="torch"),
    "dense reference": dense,
    "dictionary-learning": lambda shape: dictionary_learning(shape, dead=False),
    "dictionary-learning, a tenth dead": lambda shape: dictionary_learning(shape, dead=True),
    "sae-lens": lambda shape: sae_lens(shape, dead=False),
    "sae-lens, a tenth dead": lambda shape: sae_lens(shape, dead=True),
}


@dataclass
class Result:
    """One row's figures."""

    ms: float
    spread: float
    """(largest - smallest) / median of the repetitions"""
    extra: dict


def measure(shape: Shape, names: list[str], repeats: int, warmup: int = 3) -> tuple[dict[str, Result], list[str]]:
    """Medians of interleaved repetitions, and rows that could not be built."""
    xs = batches(shape)
    steps, missing = {}, []
    for name in names:
        try:
            steps[name] = ROWS[name](shape)
        except ImportError as error:
            missing.append(f"{name} ({error})")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    extras: dict[str, list[dict]] = {name: [] for name in steps}
    for step in steps.values():
        getattr(step, "prepare", lambda xs: None)(xs)
    slow = set()
    for repeat in range(-warmup, repeats):
        for name, step in steps.items():
            if name in slow and (repeat < 0 or repeat % 3):
                continue  # a third of the repetitions, one to warm up
            x = xs[repeat % len(xs)]
            start = time.perf_counter()
            step(x)
            elapsed = time.perf_counter() - start
            if elapsed > SLOW_S:
                slow.add(name)
            if repeat >= 0:
                seconds[name].append(elapsed)
                if hasattr(step, "extra"):  # of another step, which need not be timed
                    extras[name].append(step.extra(x))
    results = {}
    for name, times in seconds.items():
        extra = {
            key: statistics.mean(e[key] for e in extras[name]) for key in (extras[name][0] if extras[name] else {})
        }
        middle = statistics.median(times)
        results[name] = Result(middle * 1e3, (max(times) - min(times)) / middle, extra)
    return results, missing


def peak_memory(shape: Shape, name: str, threads: int) -> float:
    """Largest resident memory, in MiB, of a process that takes three steps of this row and no other."""
    command = [sys.executable, __file__, "--shapes", str(shape), "--memory-of", name, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])["peak_mib"] if done.returncode == 0 else math.nan


def high_water() -> float:
    """Largest resident memory of this process so far, in MiB (Linux: of this program, not of the one that started
    it).
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(shape: Shape, results: dict[str, Result], memory: dict[str, float]) -> str:
    base = results["fp32 encoder product alone"].ms
    lines = [
        f"### d/width/batch/k = {shape}",
        "",
        "| step | ms | tokens/s | ratio to the fp32 product | spread | candidates per kept pair | retries per step | "
        "peak MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, result in results.items():
        candidates = f"{result.extra['candidates']:.2f}" if result.extra else ""
        retries = f"{result.extra['retries']:.2f}" if result.extra else ""
        peak = f"{memory[name]:,.0f}" if not math.isnan(memory.get(name, math.nan)) else ""
        lines.append(
            f"| {name} | {result.ms:.1f} | {shape.batch / result.ms * 1e3:,.0f} | {result.ms / base:.2f} | "
            f"{result.spread:.0%} | {candidates} | {retries} | {peak} |"
        )
    return "\n".join(lines)


def machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags")).split()
    except (OSError, StopIteration):
        model, flags = platform.processor(), []
    features = ", ".join(flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags)
    return f"{model} ({features})"


def versions() -> str:
    found = []
    for package in ("torch", "dictionary-learning", "sae-lens"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", nargs="+", metavar="D/WIDTH/BATCH/K")
    parser.add_argument(
        "--rows", nargs="+", default=list(ROWS), metavar="ROW", help="rows to measure; the fp32 product always is"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out: one process per row less")
    parser.add_argument("--output", type=Path, help="Markdown file to write the tables to")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    command = ("python jobs/bench/bench_step.py " + " ".join(sys.argv[1:])).strip()
    if arguments.device == "cuda":
        import bench_device  # imports this module

        text = bench_device.report(tuple(arguments.shapes or bench_device.SHAPES), arguments.repeats)
        print(text)
        if arguments.output:
            arguments.output.write_text(f"# Cost of one training step on a GPU\n\nMade by `{command}`.\n\n{text}\n")
        return
    torch.set_num_threads(arguments.threads)
    shapes = [Shape.parse(text) for text in arguments.shapes or SHAPES]
    if arguments.memory_of:
        measure(shapes[0], [arguments.memory_of], repeats=1, warmup=2)
        print(json.dumps({"peak_mib": high_water()}))
        return

    names = list(dict.fromkeys(["fp32 encoder product alone", *arguments.rows]))
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        parser.error(f"unknown rows {unknown}; there are {list(ROWS)}")
    parts = [
        "# Cost of one training step",
        "",
        f"Made by `{command}` (`make bench` prepares the environment).",
        "",
        f"{machine()}, {arguments.threads} threads; {versions()}. Medians of {arguments.repeats} interleaved "
        f"repetitions (a third of them where a step takes over {SLOW_S:g} s); spread = (largest - smallest) / median.",
    ]
    for shape in shapes:
        results, missing = measure(shape, names, arguments.repeats)
        memory = {} if arguments.no_memory else {name: peak_memory(shape, name, arguments.threads) for name in results}
        part = table(shape, results, memory)
        if missing:
            part += "\n\nNOT RUN: " + "; ".join(missing)
        print(part, flush=True)
        print()
        parts += ["", part]
    if arguments.output:
        before = arguments.output.read_text() if arguments.output.exists() else ""
        marker = "<!-- below: kept by hand -->"
        kept = before[before.index(marker) :] if marker in before else marker + "\n"
        arguments.output.write_text("\n".join(parts) + "\n\n" + kept)


if __name__ == "__main__":
    main()
