"""One run of the export: SAEs of a sweep, or one from anywhere, in another package's format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dmsae_ray.interop import dictionary_learning, hub_folder, saelens
from dmsae_ray.interop.ours import about_of, plain_of
from dmsae_ray.interop.plain import PlainSAE
from dmsae_ray.interop.read import read_sae
from dmsae_ray.lm.source import local_folder
from dmsae_ray.results.saved_sweep import SavedChain, SavedSweep, is_sweep, load_sweep

MEASURED = {
    "l0": "L0, active latents per token",
    "fvu": "FVU",
    "loss_recovered_zero": "loss recovered, against zero",
    "kl": "KL of the model with the SAE spliced in, nats per token",
    "dead_share": "share of latents that are silent",
    "evaluation_tokens": "tokens measured on",
}
"""Fields of a cycle's record that a card names."""


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
    if is_sweep(place):
        sweep = load_sweep(place)
        chosen = {found.label: exported(sweep, found, cycle) for found in chains(sweep, chain)}
    else:
        if chain is not None:
            raise ValueError(f"--chain {chain}: {place} is no sweep's output folder")
        chosen = {"": Exported(read_sae(place), {}, None)}
    for label, one in chosen.items():
        check(one, to)
        if (out / label).exists() and any((out / label).iterdir()) and not ours(out / label):
            raise ValueError(f"--out {out / label}: has other files in it; give a new or empty folder")
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


def exported(sweep: SavedSweep, chain: SavedChain, cycle: int) -> Exported:
    """Raises ValueError if that cycle is not finished."""
    sae, known = chain.sae(cycle)
    record, model = chain.records[cycle], sweep.config.model
    measured = {words: float(value) for name, words in MEASURED.items() if (value := getattr(record, name)) is not None}
    name = Path(model.name).name if local_folder(model.name) else model.name  # a path is this machine's affair
    about = about_of(sae, known, chain.label)
    more = about.more | {
        "chain": chain.label,
        "key": chain.plan.key,
        "model_dtype": model.dtype,
        "model_revision": model.revision,
        "tokens": record.tokens,
        "data_digest": record.data_digest,
        "fvu": record.fvu,
    }
    about = replace(about, model=name, context=model.context, prepend_bos=True, l0=record.l0, more=more)
    return Exported(plain_of(sae, known, about), measured, known.get("density"))


def check(one: Exported, to: str) -> None:
    """Raises ValueError if the format has no place for this SAE."""
    if to == "dictionary_learning":
        dictionary_learning.check(one.sae)
    else:
        saelens.check(one.sae)


def write(one: Exported, to: str, folder: Path) -> None:
    if to == "dictionary_learning":
        dictionary_learning.write(folder, one.sae)
    elif to == "hub":
        hub_folder.write(folder, one.sae, one.measured, one.density_F)
    else:
        saelens.write(folder, one.sae, one.density_F)


def ours(folder: Path) -> bool:
    """Whether a folder has nothing but what an export writes."""
    written = {saelens.CONFIG, saelens.WEIGHTS, saelens.SPARSITY, hub_folder.CARD}
    written |= {dictionary_learning.CONFIG, dictionary_learning.WEIGHTS}
    return {path.name for path in folder.iterdir()} <= written
