"""One run of the export: SAEs of a sweep, or one from anywhere, in another package's format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dmsae_ray.interop import dictionary_learning, hub_folder, saelens
from dmsae_ray.interop.plain import EXPORTED, PlainSAE
from dmsae_ray.interop.read import read_sae
from dmsae_ray.results.saved_sweep import SavedChain, SavedSweep, sweep_at

MEASURED = {
    "l0": "L0, active latents per token",
    "fvu": "FVU",
    "loss_recovered_zero": "loss recovered, against zero",
    "kl": "KL of the model with the SAE spliced in, nats per token",
    "dead_share": "share of latents that are silent",
    "evaluation_tokens": "tokens measured on",
}
"""Fields of a cycle's record that a card names."""


WRITTEN = frozenset(
    {saelens.CONFIG, saelens.WEIGHTS, saelens.SPARSITY, hub_folder.CARD}
    | {dictionary_learning.CONFIG, dictionary_learning.WEIGHTS}
)
"""Files of an export."""


@dataclass(frozen=True, eq=False)
class Exported:
    """An SAE on its way out."""

    sae: PlainSAE
    measured: dict[str, float]
    density_F: torch.Tensor | None


def run(place: str, to: str, out: Path, chain: str | None, cycle: int) -> int:
    """Raises ValueError on bad input, before anything is written: also where one of several SAEs has no place in the
    format.
    """
    out = out.expanduser()
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is no folder")
    if out.exists() and Path(place).expanduser().exists() and out.samefile(Path(place).expanduser()):
        raise ValueError(f"--out {out}: is the SAE itself; give another folder")
    if (sweep := sweep_at(place)) is not None:
        chosen = {found.label: exported(found, cycle) for found in chains(sweep, chain)}
    else:
        if chain is not None:
            raise ValueError(f"--chain {chain}: {place} is no sweep's output folder")
        chosen = {"": Exported(read_sae(place), {}, None)}
    for label, one in chosen.items():
        check(one, to)
        if (out / label).exists() and any((out / label).iterdir()) and not ours(out / label):
            raise ValueError(f"--out {out / label}: has files in it that no export wrote; give a new or empty folder")
    for label, one in chosen.items():
        write(one, to, out / label)
        print(f"{label or place}: {one.sae.about.format}, {one.sae.width:,} latents, in {out / label}")
    return 0


def chains(sweep: SavedSweep, label: str | None) -> list[SavedChain]:
    """The one of this label, or all that are finished. Raises ValueError if there is none."""
    if label is None:
        found = [chain for chain in sweep.chains.values() if chain.finished]
        if not found:
            raise ValueError(f"{sweep.folder}: none of its chains is finished")
        return found
    if label not in sweep.chains:
        raise ValueError(f"--chain {label}: {sweep.folder.name} has {', '.join(sweep.chains)}")
    return [sweep.chains[label]]


def exported(chain: SavedChain, cycle: int) -> Exported:
    """Raises ValueError if that cycle is not finished."""
    sae, known = chain.plain(cycle)
    record = chain.records[cycle]
    measured = {words: float(value) for name, words in MEASURED.items() if (value := getattr(record, name)) is not None}
    return Exported(sae, measured, known.get("density"))


def check(one: Exported, to: str) -> None:
    """Raises ValueError if the format has no place for this SAE."""
    if to == "dictionary_learning":
        dictionary_learning.check(one.sae)
    else:
        saelens.check(one.sae)


def write(one: Exported, to: str, folder: Path) -> None:
    """In place of what an earlier export left there, in whatever format."""
    for name in WRITTEN:
        (folder / name).unlink(missing_ok=True)
    if to == "dictionary_learning":
        dictionary_learning.write(folder, one.sae)
    elif to == "hub":
        hub_folder.write(folder, one.sae, one.measured, one.density_F)
    else:
        saelens.write(folder, one.sae, one.density_F)


def ours(folder: Path) -> bool:
    """Whether a folder has nothing but what an export wrote."""
    configs = [folder / name for name in (saelens.CONFIG, dictionary_learning.CONFIG) if (folder / name).exists()]
    return {path.name for path in folder.iterdir()} <= WRITTEN and all(EXPORTED in path.read_text() for path in configs)
