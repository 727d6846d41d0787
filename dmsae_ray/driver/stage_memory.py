"""What each stage of a chain needs of a GPU, in bytes, before anything is loaded: a bound from the shapes that the code
makes there.

A bound on what is alive at the largest moment, not a measurement: attention is counted as the eager implementation that
lm/model.py asks for, kernels without workspace of their own. Letters: N sequences, T context, R rows, D model
dimension, F width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dmsae_ray.config import Config
from dmsae_ray.distill.grid import grid
from dmsae_ray.distill.mapping import sae_settings
from dmsae_ray.distill.plan import BASE, ChainPlan
from dmsae_ray.lm.divergence import LOGITS_AT_ONCE
from dmsae_ray.lm.site import AFTER
from dmsae_ray.lm.source import ModelInfo, load_config
from dmsae_ray.sae.cost.memory import footprint

GB = 10**9
HEADROOM = 0.92
"""Share of a GPU that can be counted on: its context, libraries and fragments take the rest."""
LASTING = ("weights", "Adam", "screen's copy", "counters", "gradient")
"""What of a trainer's footprint stays while its cycle is evaluated."""


@dataclass(frozen=True)
class ModelShape:
    """Of a language model, what its memory depends on."""

    parameters: int
    d: int
    heads: int
    inner: int
    """width inside an MLP"""
    vocab: int
    blocks: int
    size: int
    """bytes of a number"""

    @staticmethod
    def of(config: Config, info: ModelInfo) -> ModelShape:
        """From the model's configuration alone: its tensors are made on the meta device. Raises ValueError with the
        remedy.
        """
        from transformers import AutoModelForCausalLM

        whole = load_config(config.model.name, config.model.revision)
        text = whole.get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(whole, trust_remote_code=False)
        parameters = sum(tensor.numel() for tensor in model.parameters())
        size = 4 if config.model.dtype == "float32" else 2
        return ModelShape(
            parameters,
            info.d,
            text.num_attention_heads,
            getattr(text, "intermediate_size", None) or 4 * info.d,
            info.vocab,
            info.n_layers,
            size,
        )

    @property
    def weights(self) -> int:
        return self.parameters * self.size

    def forward(self, sequences: int, context: int) -> int:
        """Alive within one block, without gradient: scores as they are, masked and in fp32; or the MLP's three wide
        tensors.
        """
        rows = sequences * context
        scores = sequences * self.heads * context**2 * (3 * self.size + 4)
        return max(scores, 3 * rows * self.inner * self.size) + 8 * rows * self.d * max(self.size, 4)

    def kept_for_backward(self, sequences: int, context: int, blocks: int) -> int:
        """What so many blocks keep for their gradient."""
        rows = sequences * context
        scores = sequences * self.heads * context**2 * (2 * self.size + 4)
        return blocks * (scores + rows * (4 * self.inner * self.size + self.d * (8 * self.size + 8)))


@dataclass(frozen=True)
class Stage:
    """A stage's need, and what to lower if that is too much."""

    name: str
    bytes: int
    remedy: str


def harvest_stage(config: Config, shape: ModelShape) -> Stage:
    """One forward pass, ended at the last hook; what stands at each hook, in the model's precision, fp32 and as stored,
    of two passes.
    """
    h, rows = config.harvest, config.harvest.sequences_per_forward * config.model.context
    hooks = len(config.hooks) * rows * shape.d * (shape.size + 4 + 2 * 2)
    need = shape.weights + shape.forward(h.sequences_per_forward, config.model.context) + hooks
    return Stage("harvest", need, f"harvest.sequences_per_forward (now {h.sequences_per_forward})")


def chain_stages(config: Config, shape: ModelShape, plans: list[ChainPlan], device: str = "cuda") -> list[Stage]:
    """Training, evaluation and attribution in one worker, with as many chains beside each other as advance in lockstep.
    plans: the grid's.
    """
    sweep = config.sweep
    alike = len(sweep.k) * (1 if sweep.data_seed is None else len(sweep.seeds))  # arms may join those
    together = config.cluster.lockstep if config.study.arms else min(config.cluster.lockstep, alike)
    first = max(plans, key=lambda plan: plan.k)
    parts = footprint(
        sae_settings(first.config, first.k, shape.d),
        0,
        config.cluster.fewest_workers,
        dead=config.sae.width // 20,
        fused=device == "cuda",
        low_screen=config.train.screen != "fp32",
    )
    lasting = together * sum(parts[name] for name in LASTING)
    step = sum(parts.values()) - sum(parts[name] for name in LASTING)
    beside = f", or cluster.lockstep (now {together})" if together > 1 else ""
    resident, e, a, context = shape.weights + lasting, config.evaluate, config.attribution, config.model.context
    return [
        Stage(
            "training",
            resident + together * step,
            f"train.micro_batch (now {config.train.micro_batch or 'all rows'}) or sae.width{beside}",
        ),
        Stage(
            "evaluation",
            resident + evaluation(config, shape, e.sequences_per_batch, context, device),
            f"evaluate.sequences_per_batch (now {e.sequences_per_batch}){beside}",
        ),
        Stage(
            "attribution",
            resident + attribution(config, shape, a.sequences_per_shard, context),
            f"attribution.sequences_per_shard (now {a.sequences_per_shard}){beside}",
        ),
    ]


def evaluation(config: Config, shape: ModelShape, sequences: int, context: int, device: str = "cuda") -> int:
    """`tally_batch`: activations and their mask while they are made; then, beside them, each prefix's stream after the
    last block, a prefix in the making (reconstruction, its error in fp64, the spliced stream) and the logits of a few
    rows."""
    rows, prefixes = (
        sequences * context,
        len(config.sae.prefix_fractions) + 3,
    )  # the last group, the core alone, the clean one
    encode = rows * config.sae.width * (4 + 4 + 1)
    streams = prefixes * rows * shape.d * shape.size + rows * shape.d * (2 * 4 + 4 * 4 + 2 * 8)
    logits = min(LOGITS_AT_ONCE[device], rows * shape.vocab) * (6 * 4 + shape.size)
    return 3 * rows * shape.d * 4 + max(
        encode, rows * config.sae.width * 4 + streams + max(logits, shape.forward(sequences, context))
    )


def attribution(config: Config, shape: ModelShape, sequences: int, context: int) -> int:
    """`gradients`: the upper blocks with what they keep, every logit of the batch in fp32 with its gradient, and the
    activations.
    """
    rows, part = sequences * context, config.attribution
    whole = part.candidates == "all" or part.splice == "keep_error"
    width = config.sae.width if whole else int(config.sae.width * config.sae.prefix_fractions[0]) + 1
    kind, layer = config.model.hook.rpartition(".")[2], int(config.model.hook.split(".")[1])
    above = shape.blocks - layer - (kind in AFTER)
    # As the model gives them, capped or not; in fp32; log-softmax; and both gradients.
    logits = rows * shape.vocab * (3 * shape.size + 3 * 4)
    return (
        9 * rows * width
        + 8 * rows * shape.d * 4
        + shape.kept_for_backward(sequences, context, above)
        + max(logits, shape.forward(sequences, context))
    )


def features_stage(config: Config, shape: ModelShape, device: str = "cuda") -> Stage:
    """`remove_latents`: pairs of latent and sequence, each with its own stream, and the logits of a few rows."""
    f = config.features
    rows = f.sequences_per_batch * config.model.context
    latents = rows * f.most * (4 + 4 + 1)
    need = shape.weights + latents + 8 * rows * shape.d * 4 + shape.forward(f.sequences_per_batch, config.model.context)
    need += min(LOGITS_AT_ONCE[device], rows * shape.vocab) * (3 * 4 + shape.size)
    return Stage(
        "features", need, f"features.sequences_per_batch (now {f.sequences_per_batch}) or features.most (now {f.most})"
    )


def gpu_bytes(config: Config) -> int | None:
    """Memory of one GPU: cluster.gpu_gb, else that of the first of this machine; None where there is neither."""
    if config.cluster.gpu_gb is not None:
        return int(config.cluster.gpu_gb * GB)
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def check_memory(config: Config, info: ModelInfo) -> str | None:
    """What the stages that run on GPUs need of them, in a line; None if none does.

    Raises ValueError naming stage, field and remedy where one needs more than the GPUs of its process have.
    """
    harvest, worker = config.harvest.gpus_per_actor, config.cluster.gpus_per_worker
    if not harvest and not worker:
        return None
    shape = ModelShape.of(config, info)
    stages = [
        (stage, harvest, "harvest.gpus_per_actor")
        for stage in (harvest_stage(config, shape), features_stage(config, shape))
        if harvest
    ]
    stages += [
        (stage, worker, "cluster.gpus_per_worker")
        for stage in (chain_stages(config, shape, grid(config, BASE, "", "")) if worker else ())
    ]
    have, problems = gpu_bytes(config), []
    for stage, gpus, field in stages:
        if have is not None and stage.bytes > HEADROOM * have * gpus:
            problems.append(
                f"{stage.name}: needs up to {stage.bytes / GB:,.1f} GB, of {field} {gpus:g} x {have / GB:,.1f} GB of "
                f"GPU memory {HEADROOM:.0%} can be counted on; lower {stage.remedy}, raise {field}, or, if the GPUs of "
                "the cluster are larger, set cluster.gpu_gb"
            )
    if problems:
        raise ValueError("\n".join(problems))
    said = ", ".join(f"{stage.name} {stage.bytes / GB:,.1f}" for stage, _, _ in stages)
    return f"GPU memory, at most, GB: {said}" + (
        "" if have is not None else " (no GPU here to compare with; cluster.gpu_gb says what the cluster's have)"
    )
