"""What one training step costs on a GPU, beside its lower bounds and the other systems:
`jobs/bench/bench_step.py --device cuda`.

The step cannot be faster than the bf16 encoder product alone, nor than moving what it has to move: every trained
number's gradient is written and read once, the number itself and both of Adam's means are read and written once, and
the encoder's bf16 copy is read and written once. The bandwidth for the latter is that of copying 1 GiB on the same
device. The larger of the two is the roofline.

Other systems run under bf16 autocast, which their training loops offer. Every row is measured alone, after a warm-up,
as blocks of steps from an idle device to an idle device. Outlier rows are OUTLIER times as long as the others, not
fifteen times as in the CPU's shapes: at this width a few such rows would take most of a batch's pairs. The profile
names the kernels that take most of the device's time, how long the device had nothing to do, and every call that made
the host wait.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable

import bench_step
import torch
from bench_step import Shape, Step

SHAPES = tuple(f"2304/65536/{batch}/{k}" for batch in (2048, 4096, 8192) for k in (40, 80, 320))
PRODUCT = "bf16 encoder product alone"
OURS = "ours, bf16 screen"
ROWS: dict[str, Callable[[Shape, str], Step]] = {
    PRODUCT: lambda shape, device: bench_step.product(shape, torch.bfloat16, device),
    OURS: lambda shape, device: bench_step.ours(shape, "bf16", dead=False, device=device),
    "ours, bf16 screen, a tenth dead": lambda shape, device: bench_step.ours(shape, "bf16", dead=True, device=device),
    "ours, bf16 screen, plain torch": lambda shape, device: bench_step.ours(
        shape, "bf16", dead=False, kernels="torch", device=device
    ),
    "dictionary-learning, autocast": lambda shape, device: bench_step.dictionary_learning(
        shape, dead=False, device=device
    ),
    "sae-lens, autocast": lambda shape, device: bench_step.sae_lens(shape, dead=False, device=device),
}
BLOCK = 5
"""Steps that are timed together."""
NOT_MEASURED = "not measured"
OUTLIER = 3
WAITS = ("Synchronize", "cudaMemcpy", "cudaFree", "cudaMalloc", "cudaHostAlloc")
"""Calls of the CUDA runtime that may wait for the device (copies that do not are told apart in `waits`)."""


def report(shapes: tuple[str, ...], repeats: int, device: str = "cuda") -> str:
    """Markdown: a table for each shape, and the profile of the last one of batch 4096 and k 80 (else the last one).

    Every cell says "not measured" where there is no such device.
    """
    there = device != "cuda" or torch.cuda.is_available()
    name = "no GPU here" if not there else torch.cuda.get_device_name() if device == "cuda" else device
    parts = [f"{name}; {bench_step.versions()}. Medians of {repeats} blocks of {BLOCK} steps."]
    profiled = next((text for text in shapes if text.endswith("/4096/80")), shapes[-1])
    title = f"### Profile of {OURS}, d/width/batch/k = {profiled}"
    if not there:
        return "\n\n".join([*parts, not_measured(shapes), title, NOT_MEASURED])
    bandwidth = copied_per_second(device)
    parts.append(f"A copy moves {bandwidth / 1e9:,.0f} GB/s, read and written.")
    parts += [table(Shape.parse(text), repeats, device, bandwidth) for text in shapes]
    return "\n\n".join([*parts, title, profile(Shape.parse(profiled), device)])


HEAD = "| step | ms | tokens/s | ratio to the roofline | candidates per kept pair | scans beyond the first | peak GiB |"


def not_measured(shapes: tuple[str, ...]) -> str:
    names = ("roofline", *ROWS)
    lines = [f"| {text} |" + f" {NOT_MEASURED} |" * len(names) for text in shapes]
    return "\n".join(["| d/width/batch/k | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names), *lines])


def table(shape: Shape, repeats: int, device: str, bandwidth: float) -> str:
    xs = [x.to(device) for x in bench_step.batches(shape, outlier=OUTLIER)]
    milliseconds, extras, peaks, missing = {}, {}, {}, []
    for name, build in ROWS.items():
        try:
            milliseconds[name], extras[name], peaks[name] = measure(build, shape, xs, repeats, device)
        except ImportError as error:
            missing.append(f"{name} ({error})")
        except torch.cuda.OutOfMemoryError:
            missing.append(f"{name} (out of memory)")
    moved = bytes_moved(shape) / bandwidth * 1e3
    roofline = max(milliseconds[PRODUCT], moved)
    lines = [
        f"| roofline (moving {bytes_moved(shape) / 1e9:.1f} GB alone: {moved:.2f}) | {roofline:.2f} |  | 1.00 |  |  "
        "|  |"
    ]
    for name, ms in milliseconds.items():
        extra = extras[name] or {}
        lines.append(
            f"| {name} | {ms:.2f} | {shape.batch / ms * 1e3:,.0f} | {ms / roofline:.2f} | "
            + (f"{extra['candidates']:.2f} | {extra['retries']:.0f}" if extra else " | ")
            + f" | {peaks[name]} |"
        )
    text = "\n".join([f"### d/width/batch/k = {shape}", "", HEAD, "|---|" + "---:|" * 6, *lines])
    return text + ("\n\nNOT RUN: " + "; ".join(missing) if missing else "")


def measure(
    build: Callable[[Shape, str], Step], shape: Shape, xs: list[torch.Tensor], repeats: int, device: str
) -> tuple[float, dict | None, str]:
    """Milliseconds per step, what the step says of itself, and the peak of memory, the batches included."""
    free(device)
    step = build(shape, device)
    getattr(step, "prepare", lambda xs: None)(xs)
    ms = seconds(lambda: [step(xs[n % len(xs)]) for n in range(BLOCK)], repeats, device) / BLOCK * 1e3
    extra = step.extra(xs[0]) if hasattr(step, "extra") else None
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if device == "cuda" else ""
    return ms, extra, peak


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def profile(shape: Shape, device: str, steps: int = 2 * BLOCK, shown: int = 12) -> str:
    """A Markdown table of what takes the device's time in a step, and a line on idleness and waiting."""
    free(device)
    xs = [x.to(device) for x in bench_step.batches(shape, outlier=OUTLIER)]
    step = ROWS[OURS](shape, device)
    for n in range(2 * BLOCK):
        step(xs[n % len(xs)])
    on_device = device == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_device
    wait(device)
    with torch.profiler.profile(activities=kinds) as recorded:
        start = time.perf_counter()
        for n in range(steps):
            step(xs[n % len(xs)])
        wait(device)
        elapsed = time.perf_counter() - start
    spent: Counter[str] = Counter()
    for event in recorded.events():
        if not on_device:
            spent[event.name] += event.self_cpu_time_total
        elif (
            event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        ):  # a kernel, not what launched it
            spent[event.name] += event.self_device_time_total
    total = sum(spent.values())
    lines = ["| kernel | ms a step | share |", "|---|---:|---:|"]
    lines += [
        f"| `{name[:90]}` | {us / steps / 1e3:.3f} | {us / total:.0%} |" for name, us in spent.most_common(shown) if us
    ]
    lines += [
        "",
        f"Busy for {total / 1e6 / elapsed:.0%} of {elapsed / steps * 1e3:.2f} ms a step (the profiler's own cost "
        "included).",
    ]
    if on_device:
        lines.append(
            "Calls a step that make the host wait (one `cudaEventSynchronize`, for the step before, is meant): "
            + (", ".join(waits(recorded, steps)) or "none")
            + "."
        )
    return "\n".join(lines)


def waits(recorded: torch.profiler.profile, steps: int) -> list[str]:
    """Calls that may have waited, with how often in a step; ours at the end of the profile and the profiler's own are
    not a step's.
    """
    found = Counter(
        event.name
        for event in recorded.events()
        if any(wait in event.name for wait in WAITS) and "Async" not in event.name
    )
    found["cudaDeviceSynchronize"] -= 2
    return [f"{name} {count / steps:.1f}" for name, count in found.items() if count > 0]


def bytes_moved(shape: Shape) -> int:
    """At least so many of weights, gradients and Adam's state in one step; biases do not count."""
    trained = 2 * shape.width * shape.d
    return trained * 4 * (2 + 2 + 4) + shape.width * shape.d * 2 * 2


def copied_per_second(device: str) -> float:
    """Bytes read and written, together, of a copy."""
    source = torch.zeros(1 << 28 if device == "cuda" else 1 << 24, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 * BLOCK / seconds(lambda: [target.copy_(source) for _ in range(BLOCK)], 10, device)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(block: Callable[[], object], repeats: int, device: str, warmup: int = 3) -> float:
    """Median of calls, from an idle device to an idle device."""
    times = []
    for repeat in range(-warmup, repeats):
        wait(device)
        start = time.perf_counter()
        block()
        wait(device)
        if repeat >= 0:
            times.append(time.perf_counter() - start)
    return statistics.median(times)
