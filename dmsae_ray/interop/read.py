"""Any SAE, by its file or folder, or by its place on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from dmsae_ray.interop import dictionary_learning, gemma_scope, ours, saelens, sparsify
from dmsae_ray.interop.plain import PlainSAE

HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?::([\w./-]+))?")
"""owner/name, owner/name:folder, owner/name@revision:folder"""
KNOWN = (
    "a SAELens folder (sae_weights.safetensors), a dictionary_learning folder (ae.pt), a sparsify folder "
    "(cfg.json and sae.safetensors), a Gemma Scope folder (params.npz), or a cycle of ours (sae.safetensors)"
)


def read_sae(place: str) -> PlainSAE:
    """Raises ValueError naming the place if there is no SAE that can be read."""
    path = Path(place).expanduser()
    if not path.exists():
        path = _fetched(place)
    if path.is_file():
        return ours.read(path)
    for package in (saelens, dictionary_learning, gemma_scope):
        if package.found_in(path):
            return package.read(path)
    if sparsify.found_in(path):
        return sparsify.read(path)
    if (path / "sae.safetensors").is_file():
        return ours.read(path / "sae.safetensors")
    below = sorted(str(found.parent.relative_to(path)) for found in path.rglob("*") if found.name in FILES)
    hint = f"; there are SAEs below it: {', '.join(below[:8])}{', ...' if len(below) > 8 else ''}" if below else ""
    raise ValueError(f"{place}: holds no SAE; give {KNOWN}{hint}")


FILES = (saelens.WEIGHTS, dictionary_learning.WEIGHTS, gemma_scope.WEIGHTS, sparsify.WEIGHTS)


def _fetched(place: str) -> Path:
    """A folder of the hub, from its local cache where it is there."""
    found = HUB.fullmatch(place)
    if found is None or place.startswith((".", "/", "~")):
        raise ValueError(f"{place}: there is nothing; give {KNOWN}, or owner/name:folder of the hub")
    name, revision, folder = found.groups()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    # Of a repository with many SAEs none but the one that is asked for.
    within = "" if folder is None else f"{folder}/"
    wanted = [f"{within}{file}" for file in (*FILES, saelens.CONFIG, dictionary_learning.CONFIG)]
    try:
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (RepositoryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{place}: nothing here has this name, and the hub does not give it ({type(error).__name__}: {reason})"
        ) from error
    path = snapshot if folder is None else snapshot / folder
    if not any((path / file).exists() for file in FILES):
        raise ValueError(
            f"{place}: {name} has no SAE {'at its top' if folder is None else f'in {folder}'}; name the folder of one: "
            f"{name}:<folder>"
        )
    return path
