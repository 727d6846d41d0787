"""The tables of python -m dmsae_ray.compare."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from dmsae_ray.show.terminal.empty_table import table_of
from dmsae_ray.show.terminal.tables import number


def tables(found: dict[str, Any]) -> Group:
    """found: compare.json."""
    parts: list[RenderableType] = [_saes(found), _pairs(found), Text(_PAIRS_NOTE), _features(found)]
    parts.append(Text(_features_note(found)))
    for sae in found["saes"]:
        if sae["activations"]:
            parts.append(Text(f"{sae['label']}: its activations are not compared: {sae['activations']}."))
    return Group(*parts)


def _saes(found: dict[str, Any]) -> RenderableType:
    table = table_of("SAEs", ["SAE", "format"], ["width", "compared", "k", "L0", "FVU", "dead"])
    for sae in found["saes"]:
        quality = sae["quality"] or {}
        table.add_row(
            sae["label"],
            sae["format"],
            f"{sae['width']:,}",
            f"{sae['compared']:,}",
            "n/a" if sae["k"] is None else f"{sae['k']:g}",
            number(quality.get("l0"), 1),
            number(quality.get("fvu"), 3),
            number(quality.get("dead_share"), 3),
        )
    return table


def _pairs(found: dict[str, Any]) -> RenderableType:
    """A line for each measure of each pair, with chance beside it."""
    names = list(found["pairs"][0]["nulls"])
    table = table_of("Pairs", ["pair", "measure"], ["value", *names, "permuted"])
    for pair in found["pairs"]:
        nulls, activation = pair["nulls"], pair["activation"]
        lines: list[tuple[str, float | None, list[float | None], float | None]] = [
            ("PW-MCC", pair["pw_mcc"], [nulls[name]["pw_mcc"] for name in names], None),
            ("overlap", pair["overlap"], [nulls[name]["overlap"] for name in names], None),
            ("MMCS", (pair["mmcs_ab"] + pair["mmcs_ba"]) / 2, [nulls[name]["mmcs"] for name in names], None),
        ]
        if activation is not None:
            lines.append(("activation", activation["mean"], [None for _ in names], activation["permuted"]))
        for place, (measure, value, chance, permuted) in enumerate(lines):
            cells = ["" if one is None else number(one) for one in (*chance, permuted)]
            table.add_row("" if place else f"{pair['a']} {pair['b']}", measure, number(value), *cells)
    return table


_PAIRS_NOTE = (
    "PW-MCC: mean cosine of one-to-one matched decoder rows; overlap: latents that both matchings, of encoders and of "
    "decoders, pair with both cosines at the bar, as a share of both SAEs; MMCS: mean largest decoder cosine; "
    "activation: mean correlation of matched latents on the rows. Beside each what chance gives: random directions "
    "(isotropic; covariance: of the activations' covariance), partners dealt out anew (permuted)."
)


def _features(found: dict[str, Any]) -> RenderableType:
    others = len(found["saes"]) - 1
    counts = [f"in {n}" for n in range(others + 1)]
    table = table_of(f"Latents, by how many of the other {others} SAEs have them", ["SAE"], [*counts, "mean share"])
    for row in found["reproducibility"]:
        table.add_row(row["label"], *(f"{count:,}" for count in row["in_others"]), number(row["mean"]))
    return table


def _features_note(found: dict[str, Any]) -> str:
    several = [feature for feature in found["features"] if feature["in_chains"] > 1]
    rows = f"{found['rows']:,} rows" if found["rows"] else "no rows: by weights alone"
    return (
        f"{len(several):,} features are in more than one SAE, {found['core_size']:,} in at least "
        f"{found['settings']['share']:.0%} of them (the consensus core); cosine {found['settings']['cosine']:g}; "
        f"{rows}. Shares take the SAEs for independent: of one seed they are not."
    )
