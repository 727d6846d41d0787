"""One run of the comparison of any SAEs: read, check that they can be compared, compare, show and write."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.driver.export_run import chains
from dmsae_ray.files import write_json
from dmsae_ray.interop.plain import PlainSAE
from dmsae_ray.interop.read import read_sae
from dmsae_ray.results.any_saes import Settings, check_comparable, choose, compare
from dmsae_ray.results.saved_sweep import sweep_at
from dmsae_ray.show.terminal.any_saes_tables import tables
from dmsae_ray.show.terminal.console import terminal_console
from dmsae_ray.show.terminal.tables import write_report

FILES = ("compare.json", "compare.txt", "consensus.safetensors")


def run(
    places: Sequence[str],
    data: str | None,
    rows: int,
    latents: int,
    cosine: float,
    out: Path | None,
    same_model: bool = False,
) -> int:
    """Raises ValueError on bad input, before anything is computed or written."""
    for flag, value, good in (("rows", rows, rows >= 2), ("latents", latents, latents >= 2)):
        if not good:
            raise ValueError(f"--{flag} {value}: needs at least 2")
    if not 0 < cosine <= 1:
        raise ValueError(f"--cosine {cosine}: needs a number above 0, at most 1")
    if out is not None and (out := out.expanduser()).exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is no folder")
    saes = [found for place in places for found in read(place)]
    if len(saes) < 2:
        raise ValueError(f"{', '.join(places)}: one SAE alone; give two or more to compare")
    check_comparable([sae for _, sae in saes], same_model)
    rows_RD = None if data is None else held_back(data, rows, [sae for _, sae in saes])
    settings = Settings(cosine=cosine, latents=latents)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    chosen = []
    for label, (_, sae) in zip(labels([name for name, _ in saes]), saes, strict=True):
        say(f"reading {label}: {sae.about.format}, {sae.width:,} latents")
        chosen.append(choose(label, sae, rows_RD, settings))
    found, consensus = compare(chosen, rows_RD, settings, say)
    shown = tables(found)
    terminal_console().print(shown)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "compare.json", found)
        write_report(out / "compare.txt", shown)
        (out / "consensus.safetensors").unlink(missing_ok=True)
        if consensus.core is not None:
            consensus.core.save(out / "consensus.safetensors")
        say(f"written: {', '.join(name for name in FILES if (out / name).exists())} in {out}")
    return 0


def read(place: str) -> list[tuple[str, PlainSAE]]:
    """The SAEs of a place, with names. Raises ValueError naming the place."""
    if (sweep := sweep_at(place)) is None:
        return [(Path(place).name if Path(place).exists() else place, read_sae(place))]
    return [(chain.label, chain.plain()[0]) for chain in chains(sweep, None)]


def labels(names: Sequence[str]) -> list[str]:
    """Names that occur more than once get a number."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name}#{seen[name]}" if names.count(name) > 1 else name)
    return found


def held_back(data: str, rows: int, saes: Sequence[PlainSAE]) -> torch.Tensor:
    """Rows of a data set that ours were not trained on, raw units. Raises ValueError if they are not what these SAEs
    read.
    """
    dataset = ActivationDataset(data)
    manifest = dataset.manifest
    for sae in saes:
        if sae.d != manifest.d:
            raise ValueError(f"--data {data}: has rows of {manifest.d} dimensions, {sae.about.place} reads {sae.d}")
        if sae.about.hook is not None and sae.about.hook != manifest.hook:
            raise ValueError(f"--data {data}: is of {manifest.hook}, {sae.about.place} reads {sae.about.hook}")
    return dataset.calibration_rows()[:rows].float()
