"""The tables a sweep ends with, for a terminal (rich) and for report.txt (the same, plain)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dmsae_ray.compare.pair import MATCHED_COMPUTE
from dmsae_ray.files import replacing
from dmsae_ray.show.columns import ChainRow, null_of, null_value, standard_error_words
from dmsae_ray.show.terminal.consensus_text import consensus_text
from dmsae_ray.show.terminal.console import WIDTH
from dmsae_ray.show.terminal.empty_table import table_of
from dmsae_ray.show.terminal.functional_lines import functional_lines
from dmsae_ray.show.terminal.verdicts import EXPECTATIONS_NOTE, expectations_table


def number(value: float | None, digits: int = 2) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def recovered(zero: float | None, mean: float | None) -> str:
    """Loss recovered against zero and against mean ablation."""
    return f"{number(zero, 3)}/{number(mean, 3)}" if mean is not None else number(zero, 3)


def fvus(fvu: float | None, all_rows: float | None) -> str:
    """FVU of the rows that count and, where others were left out (harvest.outlier_norm), of all."""
    return number(fvu, 3) + ("" if all_rows is None else f"/{number(all_rows, 3)}")


def rate(tokens_per_s: float | None) -> str:
    if tokens_per_s is None:
        return "n/a"
    return f"{tokens_per_s / 1000:.1f}k" if tokens_per_s >= 1000 else f"{tokens_per_s:.0f}"


def chains_table(rows: Sequence[ChainRow]) -> Table:
    """One line per chain."""
    table = table_of(
        "Chains",
        ["chain", "core sizes"],
        ["jaccard", "L0", "core L0", "FVU", "loss rec.", "dead", "tokens/s", "status"],
    )
    for row in rows:
        cells = [
            row.label,
            ">".join(map(str, row.sizes)) or "-",
            ">".join(number(value) for value in row.jaccard[-2:]) or "n/a",
            number(row.l0, 1),
            number(row.core_l0, 1),
            fvus(row.fvu, row.fvu_all_rows),
            recovered(row.loss_recovered, row.loss_recovered_mean),
            number(row.dead, 3),
            rate(row.tokens_per_s),
            row.status,
        ]
        table.add_row(*map(Text, cells), style="red" if row.status == "failed" else None)
    return table


CHAINS_NOTE = (
    "Core sizes: latents in the core after cycle 0, 1, ...; jaccard: the last two cycles' cores, each against the one "
    "before; the rest is the last finished cycle on held-out text (loss recovered, twice: 1 is the model's own loss; 0 "
    "its loss with the stream set to zero and, after the stroke, to its mean row; FVU after a stroke: with the rows "
    "that harvest.outlier_norm leaves out)."
)


def pairs_table(pairs: Sequence[dict[str, Any]]) -> RenderableType:
    """One line per pair of chains, each agreement beside its nulls. pairs: PairResults of comparison.json."""
    if not pairs:
        return Text("Pairs: consistency is not available; it needs two finished chains.", style="bold")
    table = table_of(
        "Pairs of cores",
        ["a", "b", "differs"],
        "sizes,overlap,PW-MCC,covar. p99,density p99,cycle 0,plain,activ.,MMCS,dict.".split(","),
    )
    for pair in pairs:
        sizes = "/".join("?" if pair.get(name) is None else str(pair[name]) for name in ("size_a", "size_b"))
        above = [null_value(pair, name) for name in ("covariance", "matched_density")]
        value = pair.get("pw_mcc")
        stands_out = value is not None and all(null is not None and value > null for null in above)
        cells = [
            pair["a"],
            pair["b"],
            pair.get("differs") or "-",
            sizes,
            number(pair.get("overlap")),
            number(value),
            number(above[0]),
            _density(pair),
            number(null_value(pair, "cycle0")),
            number(_plain_saes(pair)),
            number(pair.get("activation")),
            number(_mmcs(pair)),
            number(pair.get("pw_mcc_dictionary")),
        ]
        table.add_row(
            *(Text(cell, style="bold" if stands_out and position == 5 else "") for position, cell in enumerate(cells))
        )
    return table


def _mmcs(pair: dict[str, Any]) -> float | None:
    """Mean of both directions; pairs.json in MLflow has the two."""
    there, back = pair.get("mmcs_ab"), pair.get("mmcs_ba")
    return None if there is None or back is None else (there + back) / 2


def _density(pair: dict[str, Any]) -> str:
    """The matched-density null, or how far apart the densities of the nearest free latents are (a factor)."""
    null = null_of(pair, "matched_density")
    if null.get("available"):
        return number(null.get("p99"))
    gap = null.get("density_gap")
    return "n/a" if gap is None else f"n/a (x{gap:.1f})"


def _plain_saes(pair: dict[str, Any]) -> float | None:
    """The mean of the matched-compute null; None if it is not available."""
    null = null_of(pair, MATCHED_COMPUTE)
    return null["mean"] if null.get("available") else None


def pairs_note(comparison: dict[str, Any]) -> Text:
    """How to read the pairs, and how many chains they are over."""
    compared, failed = len(comparison["chains"]), comparison.get("failed", [])
    lines = []
    if comparison["pairs"]:
        lines.append(
            "Cores agree beyond chance where PW-MCC (mean decoder cosine of matched latents) exceeds both p99 columns. "
            "Distillation adds something where it also exceeds the same-size sets of cycle 0 and, since a chain reads "
            "more tokens than its cycle 0, those of plain SAEs on as many (plain). n/a (xG): no null, since "
            "the free latents nearest in density differ by a factor of G. Activ.: mean "
            "correlation of matched latents' activations on held-out rows."
        )
        nulls = [null_of(pair, MATCHED_COMPUTE) for pair in comparison["pairs"]]
        draws = sorted({null["draws"] for null in nulls if null["available"]})
        if draws:
            lines.append(f"Plain: the mean of {' or '.join(map(str, draws))} pairs of plain SAEs.")
        elif "reason" in nulls[0]:
            pair = comparison["pairs"][0]
            lines.append(f"Plain is not available; of {pair['a']} and {pair['b']}: {nulls[0]['reason']}.")
    lines.append(f"Compared: {compared} of {compared + len(failed)} chains" + ("." if not failed else "; failed:"))
    lines += [f"  {entry['label']}: {entry['reason']}" for entry in failed]
    return Text("\n".join(lines), style="dim")


def groups_table(groups: dict[str, dict[str, Any]]) -> Table:
    """One line per group of pairs: means over its pairs, with the interval over seeds where there is one."""
    table = table_of(
        "Agreement by what differs",
        ["group"],
        ["pairs", "PW-MCC", "interval", "covar. p99", "density p99", "cycle 0", "plain", "excess", "overlap", "activ."],
    )
    for name, group in groups.items():
        nulls = [
            (group["nulls"][null].get("p99") or {}).get("mean") for null in ("covariance", "matched_density", "cycle0")
        ]
        plain = group["nulls"].get(MATCHED_COMPUTE) or {}
        excess = _mean(plain.get("excess") or {}, "pw_mcc")
        interval = (group.get("pw_mcc") or {}).get("interval")
        cells = [
            name,
            str(group["pairs"]),
            number(_mean(group, "pw_mcc")),
            "n/a" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}",
            *map(number, nulls),
            number(_mean(plain, "mean")),
            "n/a" if excess is None else f"{excess:+.2f}",
            number(_mean(group, "overlap")),
            number(_mean(group, "activation")),
        ]
        table.add_row(*map(Text, cells))
    return table


GROUPS_NOTE = (
    "base/seed: pairs of the arm base that differ in the seed; base~random/arm: pairs across two arms of equal seed "
    "and k. Nulls are means over the pairs that have them. Plain: same-size top sets of plain SAEs on a whole chain's "
    "tokens; excess: what the cores' PW-MCC exceeds these by, pair by pair. The interval, of 95 %, is over seeds; "
    "below four seeds there is none."
)


def _mean(group: dict[str, Any], score: str) -> float | None:
    return (group.get(score) or {}).get("mean")


MANY_PAIRS = 20
"""Pairs beyond which only their groups are shown: the page and comparison.json have them all."""


def report(
    rows: Sequence[ChainRow],
    comparison: dict[str, Any] | None,
    consensus: dict[str, Any] | None = None,
    expectations: Sequence[dict[str, Any]] = (),
    failed: Mapping[str, str] = MappingProxyType({}),
) -> Group:
    """All tables with their notes. comparison, consensus: what their files hold; None: not made. failed: parts that
    could not be made, or not all of them, and why."""
    parts: list[RenderableType] = [chains_table(rows), Text(CHAINS_NOTE, style="dim")]
    if (sure := standard_error_words(row.standard_errors for row in rows)) is not None:
        parts.append(Text(sure, style="dim"))
    parts.append(Text(""))
    if comparison is not None:
        if len(comparison["pairs"]) <= MANY_PAIRS:
            parts += [pairs_table(comparison["pairs"]), pairs_note(comparison)]
        else:
            parts += [
                groups_table(comparison["summary"]["groups"]),
                Text(GROUPS_NOTE, style="dim"),
                pairs_note(comparison),
            ]
        if (used := functional_lines(comparison.get("summary", {}).get("groups", {}))) is not None:
            parts.append(used)
    if consensus is not None and consensus["groups"]:
        parts += [Text(""), consensus_text(consensus)]
    if expectations:
        parts += [Text(""), expectations_table(expectations), Text(EXPECTATIONS_NOTE, style="dim")]
    if failed:
        lines = [f"  {name}: {reason}" for name, reason in failed.items()]
        words = [
            "Of these results some could not be made, or not all of it; the same command makes only that again:",
            *lines,
        ]
        parts += [Text(""), Text("\n".join(words), style="red")]
    return Group(*parts)


SIDE_BY_SIDE = ("evaluation.", "consensus.", "chains.")
"""Numbers of two sweeps that are shown beside each other; those of agreement are compared as cores."""


def across_tables(
    names: tuple[str, str], comparison: dict[str, Any], ours: dict[str, float], theirs: dict[str, float]
) -> Group:
    """Two sweeps: how far their cores agree, and the numbers that both have."""
    table = table_of("Numbers of both sweeps", ["number"], [*names, "difference"])
    for name in (name for name in ours if name in theirs and name.startswith(SIDE_BY_SIDE)):
        table.add_row(name, f"{ours[name]:.4g}", f"{theirs[name]:.4g}", f"{ours[name] - theirs[name]:+.3g}")
    groups = comparison["summary"]["groups"]
    agreement: list[RenderableType] = [groups_table(groups), Text(GROUPS_NOTE, style="dim")]
    if not groups:
        agreement = [Text(f"Agreement across the two sweeps is not available: {comparison['summary']['reason']}.")]
    return Group(*agreement, Text(""), table)


def evaluation_tables(rows: Sequence[dict[str, Any]]) -> Group:
    """What `python -m dmsae_ray.evaluate` measured, a line per SAE: the whole one, then its prefixes. rows:
    evaluation-<tokens>.json.
    """
    whole = table_of(
        "SAEs on held-out text",
        ["chain", "cycle"],
        ["tokens", "core size", "L0", "core L0", "FVU", "loss rec.", "KL", "core expl.", "dead"],
    )
    prefixes = table_of(
        "Prefixes: core alone, if any, then core + groups 0..g", ["chain", "cycle"], ["FVU", "loss rec. (mean)", "KL"]
    )
    for row in rows:
        core_size = next((entry["latents"] for entry in row["prefixes"] if entry["name"] == "core"), 0)
        whole.add_row(
            row["label"],
            str(row["cycle"]),
            f"{row['evaluation_tokens']:,}",
            str(core_size),
            number(row["l0"], 1),
            number(row["core_l0"], 1),
            fvus(row["fvu"], row["fvu_all_rows"] if row.get("rows_left_out") else None),
            recovered(row["loss_recovered_zero"], row["loss_recovered_mean"]),
            number(row["kl"], 3),
            number(row["core_explained"]),
            number(row["dead_share"], 3),
        )
        # Without the zero before the point six prefixes of three measures fit on a line.
        cells = (
            ">".join(number(entry[name]).removeprefix("0") for entry in row["prefixes"])
            for name in ("fvu", "loss_recovered_mean", "kl")
        )
        prefixes.add_row(row["label"], str(row["cycle"]), *cells)
    sure = standard_error_words(row.get("standard_errors") for row in rows)
    notes = [Text(note, style="dim") for note in (EVALUATION_NOTE, sure) if note is not None]
    return Group(whole, *notes, Text(""), prefixes)


EVALUATION_NOTE = (
    "Loss rec.: 1 is the model's own loss, 0 its loss with zeros at the hook and, after the stroke (of prefixes "
    "alone), with the mean row there; KL: nats a token by which its predictions move; core expl.: explained variance "
    "of the core alone as a share of the whole SAE's. FVU: of the rows within the data's bound on norms and, after the "
    "stroke, of all rows, where some are beyond it."
)


def plain_text(renderable: RenderableType, width: int = WIDTH) -> str:
    """The same without colour, for a file. Trailing blanks are cut."""
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, force_terminal=False).print(renderable)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def write_report(path: Path, *renderables: RenderableType) -> None:
    """Write report.txt; a reader never sees half of it."""
    with replacing(path) as temporary:
        temporary.write_text(plain_text(Group(*renderables)), encoding="utf-8")
