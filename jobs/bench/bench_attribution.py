"""What scoring a shard costs, as a ratio to passes of the language model that cannot be done without.

    python jobs/bench/bench_attribution.py --output jobs/bench/bench_attribution.md

The unit, 1, is one forward of the whole model plus one forward and backward of the blocks above the hook, on the same
tokens.
The bound is 1.3: attribution needs the lower blocks once and the upper ones forward and backward, so an SAE may cost
the upper blocks' second forward and 0.3 more. Repetitions take turns in one process and medians are shown, so that the
ratio holds where a shared machine's speed drifts. Two models: the small one that is shipped, as the quickstart uses it,
and a random one of Gemma-2's architecture at GPT-2's size, with an SAE of width 16 384. SAEs are untrained, with the
threshold at which k latents per token are active: what is timed depends on their number, not on what they mean.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dmsae_ray.attribution.gradients import AttributionSettings, attribute, candidates_of
from dmsae_ray.corpus.documents import load_documents
from dmsae_ray.lm.model import LanguageModel
from dmsae_ray.lm.source import TINY
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.settings import SAESettings
from dmsae_ray.sae.threshold import calibrate

BOUND = 1.3
VARIANTS = {
    "default": AttributionSettings(),
    "keep_error": AttributionSettings(splice="keep_error"),
    "candidates all": AttributionSettings(candidates="all"),
}


@dataclass(frozen=True)
class Case:
    """A model with its hook in the middle, an SAE and a shard."""

    name: str
    layer: int
    width: int
    k: int
    sequences: int
    context: int


CASES = [Case("tiny, quickstart", 2, 2048, 16, 32, 128), Case("Gemma-2 of 12 layers, d = 768", 5, 16_384, 40, 4, 256)]


def folder_of(case: Case, scratch: Path) -> str:
    """The case's model: shipped, or made at random with the shipped tokenizer."""
    if case.name.startswith("tiny"):
        return "tiny"
    from transformers import AutoModelForCausalLM, Gemma2Config

    torch.manual_seed(0)
    shape = Gemma2Config(
        hidden_size=768,
        num_hidden_layers=12,
        intermediate_size=3072,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=96,
        vocab_size=4096,
    )
    AutoModelForCausalLM.from_config(shape, trust_remote_code=False).save_pretrained(scratch)
    for file in TINY.glob("token*"):
        shutil.copy(file, scratch)
    return str(scratch)


def shard_of(case: Case, lm: LanguageModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Full sequences of the shipped text."""
    rows = []
    for document in load_documents("embedded"):
        ids = lm.tokenizer(document.text[: 20 * case.context], add_special_tokens=False)["input_ids"][
            : case.context - 1
        ]
        if len(ids) == case.context - 1:
            rows.append([lm.bos_id, *ids])
        if len(rows) == case.sequences:
            break
    return torch.tensor(rows), torch.full((len(rows),), case.context)


def sae_of(case: Case, rows_RD: torch.Tensor) -> tuple[MatryoshkaSAE, float]:
    """An untrained SAE with k latents per token active, and the rows' scale."""
    scale = float(rows_RD.double().square().sum(dim=1).mean().sqrt())
    settings = SAESettings(d=rows_RD.shape[1], width=case.width, k=case.k, batch=512)
    sae = MatryoshkaSAE.init(settings, None, seed=0)
    sae.theta.fill_(calibrate(sae, lambda: (rows_RD / scale).split(512), case.k, settings))
    return sae, scale


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(case: Case, repeats: int, scratch: Path) -> list[list[str]]:
    """Rows of the table: the unit, then every variant."""
    lm = LanguageModel.load(folder_of(case, scratch), f"blocks.{case.layer}.hook_resid_post")
    ids_NT, lengths_N = shard_of(case, lm)
    cut = lm.cut(ids_NT)
    sae, scale = sae_of(case, cut.value_BTD[lm.rows(ids_NT, lengths_N)])

    def whole_forward() -> None:
        with torch.no_grad():
            lm.bridge(ids_NT, return_type="logits")

    def upper_forward_and_backward() -> None:
        value_NTD = cut.value_BTD.clone().requires_grad_(True)
        torch.autograd.grad(lm.loss(cut, value_NTD, ids_NT, lengths_N), value_NTD)

    parts: dict[str, Callable[[], object]] = {
        "whole forward": whole_forward,
        "upper forward and backward": upper_forward_and_backward,
    }
    for name, settings in VARIANTS.items():
        parts[name] = lambda settings=settings: attribute(sae, lm, ids_NT, lengths_N, scale, settings)
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(repeats + 1):
        for name, work in parts.items():
            took = timed(work)
            if repeat:  # the first round warms up
                seconds[name].append(took)
    unit = [a + b for a, b in zip(seconds["whole forward"], seconds["upper forward and backward"], strict=True)]
    table = [[case.name, "unit", "", f"{1000 * statistics.median(unit):.0f}", "1.00", ""]]
    for name, settings in VARIANTS.items():
        ratios = sorted(took / one for took, one in zip(seconds[name], unit, strict=True))
        row = [case.name, name, str(candidates_of(sae, settings)), f"{1000 * statistics.median(seconds[name]):.0f}"]
        table.append([*row, f"{statistics.median(ratios):.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}"])
        print(
            " | ".join(table[-1]),
            "" if statistics.median(ratios) <= BOUND else f"over the bound of {BOUND}",
            flush=True,
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, help="write the table there; what stands below the marker in that file is kept"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            table += measure(case, args.repeats, Path(scratch))
    if args.output is not None:
        columns = ["model", "what", "candidates", "ms", "ratio", "ratios of single rounds"]
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * 2 + "---:|" * 4]
        lines += ["| " + " | ".join(row) + " |" for row in table]
        write(args.output, lines, args)


MARKER = "<!-- below: kept by hand -->"


def write(path: Path, lines: list[str], args: argparse.Namespace) -> None:
    kept = path.read_text().partition(MARKER)[2] if path.exists() else "\n"
    said = (
        f"{args.threads} thread(s), torch {torch.__version__}, CPU. Medians of {args.repeats} interleaved rounds; a "
        "ratio is taken within its round."
    )
    command = f"Made by `python jobs/bench/bench_attribution.py --output {path}`."
    path.write_text("\n".join(["# Cost of scoring a shard", "", command, "", said, "", *lines, "", MARKER]) + kept)


if __name__ == "__main__":
    main()
