"""Distilled Matryoshka sparse autoencoders on Ray: which features of a language model are really there.

What is exported here is imported when it is first used, so that `import dmsae_ray` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmsae_ray.activations.dataset import ActivationDataset as ActivationDataset
    from dmsae_ray.core.core import Core as Core
    from dmsae_ray.interop.plain import PlainSAE as PlainSAE
    from dmsae_ray.interop.read import read_sae as read_sae
    from dmsae_ray.results.explorer import Explorer as Explorer
    from dmsae_ray.results.saved_sweep import load_core as load_core
    from dmsae_ray.results.saved_sweep import load_sae as load_sae
    from dmsae_ray.results.saved_sweep import load_sweep as load_sweep
    from dmsae_ray.sae.sae import MatryoshkaSAE as MatryoshkaSAE

__version__ = "0.1.0"

_EXPORTED = {
    "ActivationDataset": "dmsae_ray.activations.dataset",
    "Core": "dmsae_ray.core.core",
    "Explorer": "dmsae_ray.results.explorer",
    "MatryoshkaSAE": "dmsae_ray.sae.sae",
    "PlainSAE": "dmsae_ray.interop.plain",
    "load_core": "dmsae_ray.results.saved_sweep",
    "load_sae": "dmsae_ray.results.saved_sweep",
    "load_sweep": "dmsae_ray.results.saved_sweep",
    "read_sae": "dmsae_ray.interop.read",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_EXPORTED[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTED})
