"""Write memory_table.md: what one GPU holds and sends in a training step of the paper's configuration.

    python jobs/bench/memory_table.py [--config configs/gemma2_2b_l12_65k.yaml] [--output jobs/bench/memory_table.md]

Computed from the code's own allocation (dmsae_ray/sae/cost/memory.py) and from the formula that tests compare with
counted bytes (dmsae_ray/sae/cost/traffic.py). Nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from dmsae_ray.driver.options import SweepCommand, load
from dmsae_ray.sae.cost.memory import footprint
from dmsae_ray.sae.cost.traffic import StepFacts, bytes_per_step
from dmsae_ray.sae.settings import SAESettings

D = 2304
"""Length of Gemma-2-2B's residual stream."""
CORE = 197
"""Size of the paper's core."""
DEAD = 0.05
"""Share of dead latents for which AuxK's part is given."""
GPUS = (1, 2, 4, 8)
COLUMNS = {
    "weights": ("weights",),
    "Adam": ("Adam",),
    "gradient": ("gradient",),
    "bf16 copy": ("screen's copy",),
    "prefix errors": ("prefix errors",),
    "rows": ("rows",),
    "pairs": ("screened product", "pairs"),
    "AuxK, rest": ("AuxK", "counters"),
}


def settings_of(config: Path) -> SAESettings:
    tree = load(SweepCommand, ["--config", str(config)])
    sae, train = tree.sae, tree.train
    return SAESettings(
        d=D,
        width=sae.width,
        k=max(tree.sweep.k),
        batch=train.batch,
        prefix_fractions=sae.prefix_fractions,
        core_gate=sae.core_gate,
        core_budget=sae.core_budget,
        core_transfer=sae.core_transfer,
    )


def table(settings: SAESettings) -> list[str]:
    """Lines of a Markdown table, one row for every mode, number of GPUs and micro-batch."""
    lines = [
        "| train.parallel | GPUs | train.micro_batch | " + " | ".join(COLUMNS) + " | sum, GB | sent a step, MB |",
        "|---|---:|---:|" + "---:|" * (len(COLUMNS) + 2),
    ]
    dead = int(DEAD * settings.width)
    for parallel in ("ddp", "gather", "latent"):
        for world in GPUS if parallel == "ddp" else GPUS[1:]:
            for micro_batch in (None, 256):
                chosen = dataclasses.replace(settings, parallel=parallel, micro_batch=micro_batch)
                held = footprint(chosen, CORE, world, dead=dead // world if parallel == "latent" else dead, fused=True)
                trained, n_groups = trained_numbers(settings), len(settings.prefix_fractions) + 1
                facts = StepFacts(pairs=settings.k * settings.batch // world, dead=0)
                sent = sum(bytes_per_step(chosen, world, trained, n_groups, facts).values())
                assert set(held) == {name for names in COLUMNS.values() for name in names}
                cells = [f"{sum(held[name] for name in names) / 1e9:.2f}" for names in COLUMNS.values()]
                mode = "any" if world == 1 else parallel
                lines.append(
                    f"| {mode} | {world} | {micro_batch or ''} | "
                    + " | ".join(cells)
                    + f" | {sum(held.values()) / 1e9:.2f} | {sent / 1e6:,.1f} |"
                )
    return lines


def trained_numbers(settings: SAESettings) -> int:
    """As in `MatryoshkaSAE`: both matrices but for frozen encoder rows, and both biases."""
    frozen = CORE if settings.core_transfer == "frozen" else 0
    return (2 * settings.width - frozen) * settings.d + settings.width + settings.d


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=here.parents[1] / "configs" / "gemma2_2b_l12_65k.yaml")
    parser.add_argument("--output", type=Path, default=here / "memory_table.md")
    arguments = parser.parse_args()
    settings = settings_of(arguments.config)
    text = "\n".join(
        [
            f"# Memory and traffic of one GPU: {arguments.config.stem}",
            "",
            f"d {settings.d}, width {settings.width:,}, batch {settings.batch:,}, k {settings.k}, a core of {CORE} "
            "latents, fp32 weights, bf16 screen;",
            "GB (10^9 bytes). Computed by `python jobs/bench/memory_table.py`, not measured. AuxK is given for "
            f"{DEAD:.0%} dead latents, traffic for",
            "none (ring algorithms; bytes that one GPU sends). Intermediates of plain torch, which copies where "
            "kernels need not, come on top.",
            "",
            *table(settings),
            "",
        ]
    )
    arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
