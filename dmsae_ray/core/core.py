"""The core: latents that a cycle selected, as the next cycle, and a comparison of chains, need them.

Shape letters: C core size, D model dimension.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from dmsae_ray.files import replacing

FORMAT_VERSION = 1

_TENSORS: dict[str, tuple[torch.dtype, str]] = {
    "W_enc_CD": (torch.float32, "CD"),
    "W_dec_CD": (torch.float32, "CD"),
    "b_enc_C": (torch.float32, "C"),
    "b_dec_D": (torch.float32, "D"),
    "scores_C": (torch.float64, "C"),
    "density_C": (torch.float64, "C"),
    "latent_ids_C": (torch.int64, "C"),
    "entered_C": (torch.int64, "C"),
}
_FIELDS: dict[str, type] = {
    "theta": float,
    "scale": float,
    "hook": str,
    "model": str,
    "cycle": int,
    "seed": int,
    "k": int,
    "selected": list,
}
_OPTIONAL: dict[str, Any] = {"selected_by": "attribution"}
"""Fields that a file holds only where they differ from this."""


@dataclass(frozen=True, eq=False)
class Core:
    """An immutable core. Tensors are copied in, to the CPU, in the dtypes below; do not write to them.

    Raises ValueError if shapes, values or provenance contradict each other.
    """

    W_enc_CD: torch.Tensor
    """encoder rows (fp32), in the scale `scale`: those of the cycle in which a member entered, or, where the core only
    starts its latents (core_transfer `init`), of the SAE in which the core was selected"""
    W_dec_CD: torch.Tensor
    """unit decoder rows (fp32) of the SAE in which the core was selected; for comparison only"""
    b_enc_C: torch.Tensor
    """encoder biases (fp32) of that SAE; for comparison only"""
    b_dec_D: torch.Tensor
    """decoder bias (fp32) of that SAE; for comparison only"""
    scores_C: torch.Tensor
    """attribution (fp64) of each member, by which it was selected unless `selected_by` says otherwise"""
    density_C: torch.Tensor
    """share of evaluation tokens (fp64) on which each member was active in that SAE"""
    latent_ids_C: torch.Tensor
    """latent id (int64, ascending) of each member in that SAE; member i is latent i of the next one"""
    theta: float
    """inference threshold of that SAE"""
    scale: float
    """divisor of the raw activations the encoder rows were learned on"""
    hook: str
    """name of the residual stream studied"""
    model: str
    """fingerprint of the language model"""
    cycle: int
    """cycle that selected this core"""
    seed: int
    """seed of the chain"""
    k: int
    """active latents per token of that SAE"""
    entered_C: torch.Tensor
    """cycle (int64) in which each member was first selected"""
    selected: tuple[tuple[int, ...], ...]
    """for each member all cycles in which it was selected, ascending"""
    selected_by: str = "attribution"
    """what the members were ranked by when they were selected; anything but attribution makes the core a placebo"""

    def __post_init__(self) -> None:
        for name, (dtype, _) in _TENSORS.items():
            tensor = torch.as_tensor(getattr(self, name))
            # A copy: the caller's tensor is often a view of live parameters.
            copy = tensor.detach().to("cpu", dtype, copy=True).contiguous()
            object.__setattr__(self, name, copy)
        object.__setattr__(self, "selected", tuple(tuple(int(t) for t in cycles) for cycles in self.selected))
        self._check()

    def _check(self) -> None:
        if self.W_enc_CD.ndim != 2:
            raise ValueError(f"W_enc_CD has shape {tuple(self.W_enc_CD.shape)}, needs two dimensions")
        sizes = dict(zip("CD", self.W_enc_CD.shape, strict=True))
        for name, (dtype, letters) in _TENSORS.items():
            tensor, shape = getattr(self, name), tuple(sizes[letter] for letter in letters)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, W_enc_CD asks for {shape}")
            if dtype.is_floating_point and not torch.isfinite(tensor).all():
                raise ValueError(f"{name} holds a value that is not finite")
        norms_C = self.W_dec_CD.double().norm(dim=1)
        if ((norms_C - 1).abs() > 1e-4).any():
            raise ValueError("W_dec_CD has a row whose norm is not 1")
        if (self.latent_ids_C < 0).any() or (self.latent_ids_C.diff() <= 0).any():
            raise ValueError("latent_ids_C is not an ascending list of different ids")
        if (self.scores_C < 0).any():
            raise ValueError("scores_C has a negative score")
        if (self.density_C < 0).any() or (self.density_C > 1).any():
            raise ValueError("density_C has a density outside 0 to 1")
        if not (math.isfinite(self.theta) and self.theta >= 0):
            raise ValueError(f"theta is {self.theta}, needs a finite number, at least 0")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale is {self.scale}, needs a finite number above 0")
        if self.cycle < 0:
            raise ValueError(f"cycle is {self.cycle}, needs at least 0")
        if len(self.selected) != self.size:
            raise ValueError(f"selected has {len(self.selected)} entries for {self.size} members")
        for member, (cycles, entered) in enumerate(zip(self.selected, self.entered_C.tolist(), strict=True)):
            ascending = all(early < late for early, late in zip(cycles, cycles[1:], strict=False))
            if not cycles or not ascending or cycles[0] != entered or cycles[-1] != self.cycle or entered < 0:
                raise ValueError(
                    f"member {member} entered in cycle {entered} and was selected in cycles {list(cycles)}: they must "
                    f"ascend from its entry to this core's cycle {self.cycle}"
                )

    @property
    def size(self) -> int:
        """Number of members C: the first reading of a core's size."""
        return self.W_enc_CD.shape[0]

    def repeated_C(self, cycles: int) -> torch.Tensor:
        """Members selected in at least `cycles` cycles, bool [C]: the second reading."""
        return torch.tensor([len(member) >= cycles for member in self.selected], dtype=torch.bool)

    def survivors_C(self) -> torch.Tensor:
        """Members selected in every cycle so far, cycle 0 included, bool [C]: the third reading."""
        return self.repeated_C(self.cycle + 1)

    def origins(self) -> dict[int, int]:
        """How many members entered in each cycle, for every cycle 0 to `cycle`."""
        counts = torch.bincount(self.entered_C, minlength=self.cycle + 1).tolist()
        return dict(enumerate(counts))

    @property
    def fingerprint(self) -> str:
        """sha256 of all it holds: equal for equal cores, while two files of one core may order their headers
        differently.
        """
        return _digest(*self._content())

    def _content(self) -> tuple[dict[str, torch.Tensor], str]:
        tensors = {name: getattr(self, name) for name in _TENSORS}
        named = {name: getattr(self, name) for name in _FIELDS}
        named |= {name: getattr(self, name) for name, usual in _OPTIONAL.items() if getattr(self, name) != usual}
        return tensors, json.dumps(named, sort_keys=True)

    def save(self, path: str | Path) -> None:
        """Write to `path` in one step: a reader finds the old file, the new one or none, never a part."""
        tensors, fields = self._content()
        metadata = {"format_version": str(FORMAT_VERSION), "core": fields, "sha256": _digest(tensors, fields)}
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(safetensors_bytes(tensors, metadata))

    @staticmethod
    def load(path: str | Path) -> Core:
        """Read a saved core.

        Raises ValueError that names the file if it is missing, truncated, altered, of another format version, or
        no core at all.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: no such core file; run the cycle that makes it")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path}: truncated or altered, not readable as safetensors ({error}); delete it and run its cycle "
                "again"
            ) from error
        if "format_version" not in metadata or "core" not in metadata:
            raise ValueError(f"{path}: not a core (its metadata has no format_version and core)")
        if metadata["format_version"] != str(FORMAT_VERSION):
            raise ValueError(
                f"{path}: core format version {metadata['format_version']}, this program reads {FORMAT_VERSION}; "
                "use the program version that wrote it, or make the core anew"
            )
        if metadata.get("sha256") != _digest(tensors, metadata["core"]):
            raise ValueError(
                f"{path}: altered (its content does not match its sha256); delete it and run its cycle again"
            )
        try:
            return Core(**_checked_types(tensors, json.loads(metadata["core"])))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _checked_types(tensors: dict[str, torch.Tensor], fields: Any) -> dict[str, Any]:
    """The constructor's arguments, after a check of names and types."""
    fields = _OPTIONAL | fields
    missing = sorted((_TENSORS.keys() - tensors.keys()) | (_FIELDS.keys() - fields.keys()))
    unknown = sorted((tensors.keys() - _TENSORS.keys()) | (fields.keys() - _FIELDS.keys() - _OPTIONAL.keys()))
    if missing or unknown:
        raise ValueError(f"missing fields {missing}, unknown fields {unknown}")
    for name, (dtype, _) in _TENSORS.items():
        if tensors[name].dtype != dtype:
            raise ValueError(f"{name} is {tensors[name].dtype}, needs {dtype}")
    for name, kind in (_FIELDS | {name: type(usual) for name, usual in _OPTIONAL.items()}).items():
        if type(fields[name]) is not kind:
            raise ValueError(f"{name} is {fields[name]!r}, needs a {kind.__name__}")
    return {**tensors, **fields}


def _digest(tensors: dict[str, torch.Tensor], fields: str) -> str:
    """sha256 over the fields' text and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(fields.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"|{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


assert {field.name for field in dataclasses.fields(Core)} == _TENSORS.keys() | _FIELDS.keys() | _OPTIONAL.keys()
