"""Does a core carry more of what a probe needs than other latents, as many of them?

    pip download --no-deps --dest DIR sae-probes==0.4.2       # MIT; 113 of its 165 labelled text sets have two labels
    python jobs/probe/run.py --sweep OUTPUT --data DIR/sae_probes-0.4.2-py3-none-any.whl --k 16

Each text is read once by the sweep's language model, up to its context. A latent's feature is its activation, by the
SAE's inference rule, averaged over the text's tokens (`--pool max`: the largest), without BOS and without positions
that the sweep leaves out. Logistic probes are fitted on half the texts, on the `--sparse` features that tell the labels
apart best and on all; what counts is the AUC on the other half. Every set of latents has the core's size, and every one
the same texts. Sets that are drawn (matched in density, matched in the norm of encoder rows, random) are drawn
`--draws` times, and their AUC averaged; `cycle0` and plain SAEs give their latents of largest attribution. `residual`
is a probe on the mean activation itself. Writes probe.json and probe.md to the sweep's results folder, or to --output.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from probe_fit import Mean, auc_of, mean_over
from probe_sets import KINDS, Chain, chains_of
from probe_texts import Labelled, read_all

from dmsae_ray.activations.outliers import counted
from dmsae_ray.corpus.tokens import pad_id_of
from dmsae_ray.files import replacing, write_json
from dmsae_ray.lm.model import LanguageModel
from dmsae_ray.results.saved_sweep import load_sweep

FORMAT_VERSION = 1
TOGETHER = 32
"""Texts of a forward pass, of about the same length."""


@torch.no_grad()
def pooled(
    lm: LanguageModel, texts: list[str], chains: list[Chain], context: int, max_norm: float | None, pool: str
) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """Mean activation of each text [N, D] and, by chain and source, its latents' pooled activations [N, F].

    A text without a token that counts has zeros.
    """
    encoded = lm.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    ids = [[lm.bos_id, *one[: context - 1]] for one in encoded]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    mean_ND = np.zeros((len(texts), lm.d))
    found = [[np.zeros((len(texts), source.latents.size)) for source in chain.sources] for chain in chains]
    for first in range(0, len(order), TOGETHER):
        some = order[first : first + TOGETHER]
        longest = max(len(ids[i]) for i in some)
        pad_id = pad_id_of(lm.tokenizer)
        ids_BT = torch.tensor([ids[i] + [pad_id] * (longest - len(ids[i])) for i in some], device=lm.device)
        lengths_B = torch.tensor([len(ids[i]) for i in some], device=lm.device)
        value_BTD = lm.cut(ids_BT).value_BTD
        rows_BT = counted(lm.rows(ids_BT, lengths_B), value_BTD, max_norm)
        x_RD, text_R = value_BTD[rows_BT], rows_BT.nonzero()[:, 0]
        count_B1 = rows_BT.sum(dim=1, keepdim=True).clamp(min=1)

        def by_text(row_RF: torch.Tensor, how: str) -> np.ndarray:
            into_BF = row_RF.new_zeros(len(some), row_RF.shape[1])
            if how == "max":
                index_RF = text_R[:, None].expand_as(row_RF)
                return into_BF.scatter_reduce(0, index_RF, row_RF, "amax").double().cpu().numpy()
            return (into_BF.index_add(0, text_R, row_RF) / count_B1).double().cpu().numpy()

        mean_ND[some] = by_text(x_RD, "mean")
        for chain, matrices in zip(chains, found, strict=True):
            for source, z_NF in zip(chain.sources, matrices, strict=True):
                z_NF[some] = by_text(source.latents.encode(x_RD / source.scale), pool)
    return mean_ND, found


def probe_one(
    data: Labelled, mean_ND: np.ndarray, found: list[list[np.ndarray]], chains: list[Chain], ks: list[int | None]
) -> dict[tuple[str, int | None], list[float]]:
    """AUC by kind and k, one for each chain, NaN where a chain lacks the kind."""
    residual = auc_of(mean_ND, data.positive_N, data.train_N, None)
    values: dict[tuple[str, int | None], list[float]] = {("residual", None): [residual] * len(chains)}
    for kind in dict.fromkeys(kind for chain in chains for kind in chain.sets):
        for k in ks:
            values[kind, k] = [
                float(
                    np.mean([auc_of(matrices[source][:, at], data.positive_N, data.train_N, k) for source, at in draws])
                )
                if (draws := chain.sets.get(kind))
                else float("nan")
                for chain, matrices in zip(chains, found, strict=True)
            ]
    return values


def summary(values: dict[tuple[str, int | None], np.ndarray]) -> list[dict]:
    """One entry per kind and k: its AUC, and the core's less its, over the chains that have both. values: [S, D]."""
    entries = []
    for (kind, k), auc_SD in values.items():
        core_SD = values["core", k]
        has_S = ~np.isnan(auc_SD).any(axis=1)
        if not has_S.any():
            continue
        less = None if kind == "core" else mean_over((core_SD - auc_SD)[has_S])
        entries.append({"kind": kind, "k": k, "auc": mean_over(auc_SD[has_S], 0, 1), "core_less_this": less})
    return entries


def table(entries: list[dict], lacks: dict[str, str], about: str) -> str:
    """Markdown."""

    def said(value: Mean | None, digits: str) -> str:
        if value is None:
            return ""
        low_high = "" if value.interval is None else f" ({value.interval[0]:{digits}} to {value.interval[1]:{digits}})"
        return f"{value.mean:{digits}}{low_high}"

    lines = [
        about,
        "",
        "| set | features | seeds | AUC | core less this | the core carries |",
        "|---|---:|---:|---|---|---|",
    ]
    for entry in entries:
        auc, less = entry["auc"], entry["core_less_this"]
        lines.append(
            f"| {entry['kind']} | {entry['k'] or 'all'} | {auc.seeds} | {said(auc, '.3f')} | {said(less, '+.3f')} | "
            f"{'' if less is None else less.verdict()} |"
        )
    named = [f"- {kind}: {words}" for kind, words in KINDS.items()]
    return (
        "\n".join([*lines, "", *named, *(f"- not compared, or not fair: {kind}: {why}" for kind, why in lacks.items())])
        + "\n"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", required=True, help="output folder of a finished sweep, or its results folder")
    parser.add_argument("--data", required=True, nargs="+", type=Path, help="CSV files, folders, wheels")
    parser.add_argument("--arm", default="base", help="whose cores are probed")
    parser.add_argument("--k", type=int, help="sparsity of the chains; left out: the first of the sweep's")
    parser.add_argument("--sparse", type=int, nargs="*", default=[1, 5], help="features of the sparse probes")
    parser.add_argument("--texts", type=int, default=1000, help="texts of a data set, at most")
    parser.add_argument("--draws", type=int, default=5, help="draws of each set that is drawn")
    parser.add_argument("--pool", choices=["mean", "max"], default="mean", help="of a latent's activations in a text")
    parser.add_argument("--seed", type=int, default=0, help="of draws and of the choice of texts")
    parser.add_argument("--output", type=Path, help="folder for probe.json and probe.md")
    command = parser.parse_args(argv)
    try:
        sweep = load_sweep(command.sweep)
        data, left_out = read_all(command.data, command.texts, command.seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        k = sweep.config.sweep.k[0] if command.k is None else command.k
        chains = chains_of(sweep, command.arm, k, command.draws, command.seed, device)
        lm = LanguageModel.of(sweep.config.model, device)
        max_norm = sweep.dataset().manifest.max_norm
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    ks: list[int | None] = [*command.sparse, None]
    columns: list[dict[tuple[str, int | None], list[float]]] = []
    for number, one in enumerate(data, 1):
        mean_ND, found = pooled(lm, one.texts, chains, sweep.config.model.context, max_norm, command.pool)
        columns.append(probe_one(one, mean_ND, found, chains, ks))
        core = np.mean(columns[-1]["core", None])
        print(f"{number}/{len(data)} {one.name}: {len(one.texts)} texts, AUC of the cores {core:.3f}", flush=True)
    values = {key: np.array([column[key] for column in columns]).T for key in columns[0]}
    entries = summary(values)
    lacks = {kind: why for chain in chains for kind, why in chain.lacks.items()}
    about = (
        f"Probes on {len(data)} labelled text sets, {command.pool} over tokens, cores of arm {command.arm}, k {k}, "
        f"sizes {', '.join(str(chain.size) for chain in chains)}. AUC on held-out texts: mean and 95 % interval over "
        "seeds and data sets."
    )
    folder = command.output or sweep.folder
    folder.mkdir(parents=True, exist_ok=True)
    written = [
        entry | {name: entry[name] and entry[name].to_dict() for name in ("auc", "core_less_this")} for entry in entries
    ]
    write_json(
        folder / "probe.json",
        {
            "format_version": FORMAT_VERSION,
            "sweep": sweep.folder.name,
            "settings": {
                "arm": command.arm,
                "k": k,
                "pool": command.pool,
                "draws": command.draws,
                "seed": command.seed,
            },
            "chains": [{"label": chain.label, "size": chain.size, "lacks": chain.lacks} for chain in chains],
            "data": [
                {"name": one.name, "texts": len(one.texts), "positive": int(one.positive_N.sum())} for one in data
            ],
            "left_out": left_out,
            "results": written,
            "values": [
                {"kind": kind, "k": k, "auc": np.where(np.isnan(auc_SD), None, auc_SD).tolist()}
                for (kind, k), auc_SD in values.items()
            ],
        },
    )
    with replacing(folder / "probe.md") as temporary:
        temporary.write_text(table(entries, lacks, about))
    print(table(entries, lacks, about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
