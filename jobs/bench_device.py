"""What one training step costs on a GPU, beside its two lower bounds: `jobs/bench_step.py --device cuda`.

The step cannot be faster than the bf16 encoder product alone, nor than moving what it has to move: every trained number's gradient
is written and read once, the number itself and both of Adam's means are read and written once, and the encoder's bf16 copy is read
and written once. The bandwidth for the latter is that of copying 1 GiB on the same device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from bench_step import Shape, batches, settings_of

from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.step import Trainer

SHAPES = tuple(f"2304/65536/{batch}/{k}" for batch in (2048, 4096, 8192) for k in (40, 80, 320))
HEAD = (
    "| d/width/batch/k | ours, ms | tokens/s | bf16 product, ms | bytes moved, ms | ours / larger bound "
    "| candidates per kept pair | peak GiB |"
)


def report(shapes: tuple[str, ...], repeats: int, device: str = "cuda") -> str:
    """A Markdown table; "not measured" in every cell where there is no such device."""
    there = device != "cuda" or torch.cuda.is_available()
    name = torch.cuda.get_device_name() if there and device == "cuda" else "no GPU here" if not there else device
    lines = [f"{name}; torch {torch.__version__}; medians of {repeats}", "", HEAD, "|---|" + "---:|" * 7]
    bandwidth = copied_per_second(device) if there else 0.0
    for text in shapes:
        cells = row(Shape.parse(text), repeats, device, bandwidth) if there else ["not measured"] * 7
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def row(shape: Shape, repeats: int, device: str, bandwidth: float) -> list[str]:
    xs = [x.to(device) for x in batches(shape)]
    settings = settings_of(shape, screen="bf16", kernels="compiled")
    trainer = Trainer(MatryoshkaSAE.init(settings, None, seed=0).to(device), settings)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    count = 0

    def step():
        nonlocal count
        trainer.step(xs[count % len(xs)])
        count += 1

    ours = seconds(step, repeats, device)
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if device == "cuda" else ""
    found = trainer.step(xs[0], log=True)
    low, low_W = xs[0].bfloat16(), trainer.sae.encoder_rows().bfloat16()
    out = torch.empty(shape.batch, shape.width, dtype=torch.bfloat16, device=device)
    product = seconds(lambda: torch.mm(low, low_W.t(), out=out), repeats, device)
    moved = bytes_moved(shape) / bandwidth
    return [
        f"{ours * 1e3:.2f}", f"{shape.batch / ours:,.0f}", f"{product * 1e3:.2f}", f"{moved * 1e3:.2f}",
        f"{ours / max(product, moved):.2f}", f"{found.candidates:.2f}", peak,
    ]  # fmt: skip


def bytes_moved(shape: Shape) -> int:
    """At least so many of weights, gradients and Adam's state in one step; biases do not count."""
    trained = 2 * shape.width * shape.d
    return trained * 4 * (2 + 2 + 4) + shape.width * shape.d * 2 * 2


def copied_per_second(device: str) -> float:
    """Bytes read and written, together, of a copy."""
    source = torch.zeros(1 << 28 if device == "cuda" else 1 << 24, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / seconds(lambda: target.copy_(source), 20, device)


def seconds(step: Callable[[], object], repeats: int, device: str, warmup: int = 5) -> float:
    """Median of single calls, from an idle device to an idle device."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for repeat in range(-warmup, repeats):
        wait()
        start = time.perf_counter()
        step()
        wait()
        if repeat >= 0:
            times.append(time.perf_counter() - start)
    return statistics.median(times)
