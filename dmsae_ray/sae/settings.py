"""What decides one SAE's mathematics, as plain numbers already resolved to one run.

`SAESettings` is handed down by the layers above; `schedule` turns the lengths of the published recipe (steps and tokens
for a run of 500 M tokens) into those of a run of any length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite


@dataclass(frozen=True)
class SAESettings:
    """One SAE and its training. Raises ValueError, naming the field, if a value makes no sense."""

    d: int
    """length of one residual-stream vector"""
    width: int
    """latents, core included"""
    k: int
    """kept pairs per token, on average over a batch"""
    batch: int
    """tokens in a global batch, over all workers"""
    prefix_fractions: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
    """sizes of the prefix groups as shares of the free latents; the rest is the last group"""
    prefixes: str = "fixed"
    """prefixes that must reconstruct: those of the groups (`fixed`), or as many `sampled` anew in every step"""
    prefix_seed: int = 0
    """seed of the sampled ones"""
    core_gate: str = "batchtopk"
    """`batchtopk`: core latents compete like all others; `relu`: the core is exempt from the gate"""
    core_budget: str = "counted"
    """with core_gate relu: whether active core pairs count against k (`counted`) or not (`exempt`)"""
    core_transfer: str = "frozen"
    """the core's encoder rows are not trained (`frozen`), nor are the random ones in their place (`random`), or they
    only start the core latents (`init`)
    """
    core_decoder_init: str = "encoder"
    """a core latent's decoder row starts as its encoder row's direction (`encoder`), at random (`random`) or as that of
    the SAE in which the core was selected (`kept`)
    """
    decoder: str = "learned"
    """decoder rows are trained (`learned`), or stay as they start, at random (`frozen_random`)"""
    auxk_alpha: float = 1 / 32
    """weight of the loss that revives dead latents"""
    auxk_k: int | None = None
    """dead latents used per token; None: d // 2"""
    lr: float = 3e-4
    """peak learning rate of Adam"""
    beta1: float = 0.9
    """Adam's decay of the mean gradient"""
    beta2: float = 0.999
    """Adam's decay of the mean squared gradient"""
    eps: float = 1e-8
    """Adam's epsilon"""
    clip: float = 1.0
    """largest norm of the whole gradient"""
    l2: float = 0.0
    """weight of the trained encoder rows' summed squares in the loss"""
    warmup_steps: int = 1000
    """steps of linear warm-up; the first step has learning rate 0"""
    decay_steps: int = 0
    """steps at the end of the run over which the learning rate falls linearly to 0"""
    dead_window_tokens: int = 10_000_000
    """a free latent silent for so many tokens is dead"""
    total_steps: int = 0
    """steps of the run; only the decay needs it"""
    threshold_beta: float = 0.999
    """decay of the running mean of the smallest kept value"""
    threshold_start_step: int = 1000
    """that mean takes in the steps after this one"""
    screen: str = "auto"
    """precision of the product that finds candidates: `bf16`, `fp32`, or `auto`, the faster one here. Never changes a
    result
    """
    kernels: str = "auto"
    """`compiled`: C kernels on a CPU, Triton's on a CUDA device; `torch`: plain torch; `auto`: compiled where possible.
    Differ in the order of sums"""
    parallel: str = "ddp"
    """what several ranks share: `ddp`, each computes its rows' gradient, which are summed; `gather`, each computes the
    whole gradient from all rows and kept pairs; `latent`, each has a part of the latents and all rows. Differ in the
    order of sums"""
    micro_batch: int | None = None
    """most rows whose prefix errors a rank holds at a time; None: all it computes with. Changes the order of sums"""

    def __post_init__(self) -> None:
        problems = []
        for name in ("d", "width", "k", "batch", "dead_window_tokens"):
            if getattr(self, name) < 1:
                problems.append(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("warmup_steps", "decay_steps", "total_steps", "threshold_start_step", "auxk_alpha", "l2"):
            if getattr(self, name) < 0:
                problems.append(f"{name} {getattr(self, name)} must not be negative")
        for name in ("lr", "eps", "clip"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) > 0):
                problems.append(f"{name} {getattr(self, name)} must be above 0")
        for name in ("beta1", "beta2", "threshold_beta"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name} {getattr(self, name)} must be at least 0 and below 1")
        for name, choices in (
            ("prefixes", ("fixed", "sampled")),
            ("core_gate", ("batchtopk", "relu")),
            ("core_budget", ("counted", "exempt")),
            ("core_transfer", ("frozen", "init", "random")),
            ("core_decoder_init", ("encoder", "random", "kept")),
            ("decoder", ("learned", "frozen_random")),
            ("screen", ("auto", "bf16", "fp32")),
            ("kernels", ("auto", "compiled", "torch")),
            ("parallel", ("ddp", "gather", "latent")),
        ):
            if getattr(self, name) not in choices:
                problems.append(f"{name} {getattr(self, name)!r} must be one of {', '.join(choices)}")
        if self.micro_batch is not None and self.micro_batch < 1:
            problems.append(f"micro_batch {self.micro_batch} must be at least 1, or None for whole batches")
        if self.auxk_k is not None and self.auxk_k < 1:
            problems.append(f"auxk_k {self.auxk_k} must be at least 1, or None for d // 2")
        if self.k > self.width:
            problems.append(f"k {self.k} exceeds width {self.width}")
        fractions = self.prefix_fractions
        if not fractions or min(fractions) <= 0 or sum(fractions) >= 1:
            problems.append(f"prefix_fractions {fractions} must all be above 0 and together below 1")
        if self.decoder == "frozen_random" and self.core_decoder_init == "encoder":
            problems.append("decoder frozen_random needs core_decoder_init kept or random: encoder rows are trained")
        if self.decay_steps > self.total_steps:
            problems.append(f"decay_steps {self.decay_steps} exceeds total_steps {self.total_steps}")
        if problems:
            raise ValueError("SAE settings: " + "; ".join(problems))

    @property
    def aux_latents(self) -> int:
        """Most dead latents used per token by AuxK."""
        return max(self.d // 2, 1) if self.auxk_k is None else self.auxk_k

    def learning_rate(self, step: int) -> float:
        """Learning rate of step `step` (0 is the first): linear warm-up from 0, constant, linear decay to 0.

        As `get_lr_schedule` of dictionary-learning 0.1.0, where warm-up wins over decay.
        """
        if step < self.warmup_steps:
            return self.lr * (step / self.warmup_steps)
        if self.decay_steps and step >= self.total_steps - self.decay_steps:
            return self.lr * max(self.total_steps - step, 0) / self.decay_steps
        return self.lr


def group_sizes(n_free: int, fractions: Sequence[float]) -> list[int]:
    """Latents in each prefix group: int(fraction * n_free), the remainder in one more, last group."""
    sizes = [int(fraction * n_free) for fraction in fractions]
    return [*sizes, n_free - sum(sizes)]


def schedule(
    total_steps: int,
    batch: int,
    warmup_steps: int = 1000,
    warmup_share: float = 0.05,
    dead_window_tokens: int = 10_000_000,
    dead_window_share: float = 0.10,
    decay_share: float = 0.20,
) -> dict[str, int]:
    """Lengths for a run of `total_steps` batches of `batch` tokens, as keywords of `SAESettings`.

    Warm-up and dead window are the recipe's, with a share of the run as ceiling; the decay is a share of the run. The
    running mean behind the threshold starts when the warm-up ends, at the latest after 1000 steps.
    """
    warmup = min(warmup_steps, int(warmup_share * total_steps))
    return {
        "total_steps": total_steps,
        "warmup_steps": warmup,
        "decay_steps": int(decay_share * total_steps),
        "dead_window_tokens": max(1, min(dead_window_tokens, int(dead_window_share * total_steps * batch))),
        "threshold_start_step": min(1000, warmup),
    }
