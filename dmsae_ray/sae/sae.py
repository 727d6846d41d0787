"""The parameters of a Matryoshka SAE with a core, its inference rule, and its file.

Shapes: B tokens, D = d, F = width, C core latents, P latents of a prefix. Latents 0..C-1 are the core.
"""

from __future__ import annotations

import json
import os
from itertools import accumulate
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dmsae_ray.files import present, replacing
from dmsae_ray.sae.settings import SAESettings, group_sizes

FORMAT_VERSION = 2
"""Raised when an older reader would misread the file."""

TRAINED = ("W_enc", "b_enc", "W_dec", "b_dec")
"""Names of the trained parameters, in the order in which they lie in memory."""

_TENSORS = (*TRAINED, "W_enc_core", "theta")


def active(p: Tensor, theta: Tensor) -> Tensor:
    """The inference rule: pre-activations p [..., N] where they exceed their thresholds theta [N], else 0."""
    return torch.where(p > theta, p, 0)


class MatryoshkaSAE(nn.Module):
    """p = (x - b_dec) @ W_enc^T + b_enc;  z = p where p > theta, 0 elsewhere;  x_hat = z @ W_dec + b_dec.

    x is a residual-stream vector divided by the dataset's scale. With core_transfer `frozen` or `random` the core's
    encoder rows are a buffer, W_enc_core, outside optimiser and clip; with `init` that buffer has no rows, and W_enc
    begins with the core's. Everything but the buffer is trained.
    """

    W_enc_core: Tensor
    """frozen encoder rows [n_frozen, D], a buffer"""
    theta: Tensor
    """inference threshold, 0-dim float64, a buffer"""

    def __init__(
        self,
        d: int,
        group_ends: list[int],
        core_size: int,
        core_gate: str,
        dtype: torch.dtype = torch.float32,
        core_transfer: str = "frozen",
    ) -> None:
        """Zero parameters; see `init` for those that training starts from.

        group_ends: cumulative ends of the prefixes in latents, [core + group 0, ..., width].
        """
        super().__init__()
        self.d = d
        self.group_ends = list(group_ends)
        self.width = self.group_ends[-1]
        self.core_size = core_size
        self.core_gate = core_gate
        self.core_transfer = core_transfer
        self.W_enc = nn.Parameter(torch.zeros(self.width - self.n_frozen, d, dtype=dtype))
        self.b_enc = nn.Parameter(torch.zeros(self.width, dtype=dtype))
        self.W_dec = nn.Parameter(torch.zeros(self.width, d, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d, dtype=dtype))
        self.register_buffer("W_enc_core", torch.zeros(self.n_frozen, d, dtype=dtype))
        self.register_buffer("theta", torch.zeros((), dtype=torch.float64))
        self._pack()

    def _pack(self) -> None:
        """Move all weights into one piece of memory: the frozen encoder rows, then all that is trained, in a fixed
        order.
        """
        with torch.no_grad():
            whole = torch.cat([tensor.detach().flatten() for tensor in (self.W_enc_core, *self._trained())])
            at = self.W_enc_core.numel()
            self.W_enc_core = whole[:at].view(self.W_enc_core.shape)
            for name in TRAINED:
                shape = getattr(self, name).shape
                setattr(self, name, nn.Parameter(whole[at : at + shape.numel()].view(shape)))
                at += shape.numel()
            self._whole = whole

    def _trained(self) -> list[Tensor]:
        return [getattr(self, name) for name in TRAINED]

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self._pack()  # moved or cast one by one
        return self

    def __deepcopy__(self, memo) -> MatryoshkaSAE:
        copy = MatryoshkaSAE(
            self.d, self.group_ends, self.core_size, self.core_gate, self.W_dec.dtype, self.core_transfer
        ).to(self.W_dec.device)
        copy.load_state_dict(self.state_dict())
        memo[id(self)] = copy
        return copy

    @property
    def n_frozen(self) -> int:
        """Latents, the first ones, whose encoder rows are not trained: the core, or none."""
        return 0 if self.core_transfer == "init" else self.core_size

    @property
    def flat(self) -> Tensor:
        """Everything that is trained as one vector, sharing the parameters' memory: W_enc, b_enc, W_dec, b_dec."""
        return self._whole[self.W_enc_core.numel() :]

    def views(self, flat: Tensor) -> list[Tensor]:
        """W_enc, b_enc, W_dec, b_dec in a vector laid out like `flat`."""
        pieces = flat.split([tensor.numel() for tensor in self._trained()])
        return [piece.view(tensor.shape) for piece, tensor in zip(pieces, self._trained(), strict=True)]

    def encoder_rows(self) -> Tensor:
        """All encoder rows, core first, [F, D], sharing the weights' memory and without gradient."""
        return self._whole[: self.width * self.d].view(self.width, self.d)

    @staticmethod
    def zeros(settings: SAESettings, core_size: int, dtype: torch.dtype = torch.float32) -> MatryoshkaSAE:
        """The SAE of these settings, with a core of this size, all zeros."""
        sizes = group_sizes(settings.width - core_size, settings.prefix_fractions)
        ends = [core_size + end for end in accumulate(sizes)]
        return MatryoshkaSAE(settings.d, ends, core_size, settings.core_gate, dtype, settings.core_transfer)

    @staticmethod
    def init(
        settings: SAESettings,
        core_W_enc_CD: Tensor | None,
        seed: int,
        dtype: torch.dtype = torch.float32,
        core_W_dec_CD: Tensor | None = None,
    ) -> MatryoshkaSAE:
        """Start of a cycle: random unit decoder rows, free encoder rows equal to theirs, biases 0, the core's rows
        copied.

        Drawn from a generator of its own, so that nothing but `seed` decides it, and alike for every core_transfer.
        b_dec becomes the geometric median of the first batch in the first training step. core_W_dec_CD: the core's unit
        decoder rows; only core_decoder_init `kept` uses them. Raises ValueError if the core does not fit.
        """
        core_size = 0 if core_W_enc_CD is None else len(core_W_enc_CD)
        if core_size >= settings.width:
            raise ValueError(
                f"a core of {core_size} latents leaves no free latent in a width of {settings.width}: "
                "raise sae.width, or lower attribution.tau or selection.size"
            )
        if core_W_enc_CD is not None and core_W_enc_CD.shape != (core_size, settings.d):
            raise ValueError(
                f"core encoder rows have shape {tuple(core_W_enc_CD.shape)}, expected [core size, d = {settings.d}]"
            )
        sae = MatryoshkaSAE.zeros(settings, core_size, dtype)
        generator = torch.Generator().manual_seed(seed)
        W_dec_FD = unit_rows(torch.randn(settings.width, settings.d, generator=generator, dtype=dtype))
        with torch.no_grad():
            sae.W_dec.copy_(W_dec_FD)
            W_enc_FD = sae.encoder_rows()
            W_enc_FD[core_size:] = W_dec_FD[core_size:]
            if core_W_enc_CD is not None:
                W_enc_FD[:core_size] = core_W_enc_CD
                core_CD = W_enc_FD[:core_size]
                if not (torch.isfinite(core_CD).all() and (core_CD != 0).any(dim=1).all()):
                    raise ValueError("the core has an encoder row that is zero or not finite")
                if settings.core_decoder_init == "encoder":
                    sae.W_dec[:core_size] = unit_rows(core_CD)
                elif settings.core_decoder_init == "kept":
                    assert core_W_dec_CD is not None, "whoever has the core's encoder rows has its decoder rows"
                    sae.W_dec[:core_size] = core_W_dec_CD
        return sae

    def encoder(self, upto: int | None = None) -> Tensor:
        """Encoder rows of the first `upto` latents (all by default), core first: [P, D]."""
        upto = self.width if upto is None else upto
        if upto <= self.n_frozen:
            return self.W_enc_core[:upto]
        trained = self.W_enc[: upto - self.n_frozen]
        return torch.cat([self.W_enc_core, trained]) if self.n_frozen else trained

    def pre(self, x_BD: Tensor, upto: int | None = None) -> Tensor:
        """Pre-activations p [..., P] of the first `upto` latents (all by default); x may have any leading
        dimensions.
        """
        return torch.nn.functional.linear(x_BD - self.b_dec, self.encoder(upto), self.b_enc[:upto])

    def encode(self, x_BD: Tensor, upto: int | None = None) -> Tensor:
        """Activations z [..., P] by the inference rule: p where p > theta, else 0; an exempt core has threshold 0."""
        return active(self.pre(x_BD, upto), self.thresholds(upto))

    def thresholds(self, upto: int | None = None) -> Tensor:
        """What each of the first `upto` latents (all by default) must exceed at inference, [P]: theta, or 0 for the
        latents of an exempt core.
        """
        theta_P = self.theta.detach().to(self.W_dec.dtype).repeat(self.width if upto is None else upto)
        if self.core_gate == "relu":
            theta_P[: self.core_size] = 0
        return theta_P

    def decode(self, z_BP: Tensor) -> Tensor:
        """Reconstruction [..., D] from the first P latents, bias included."""
        return z_BP @ self.W_dec[: z_BP.shape[-1]] + self.b_dec

    def save(self, path: str | os.PathLike, metadata: dict[str, Any]) -> None:
        """Write one safetensors file, in one piece: a reader finds the whole file or none.

        metadata: JSON types, stored as text; tensors among its values are stored as tensors of that name.
        """
        taken = [name for name, value in metadata.items() if name in _TENSORS and isinstance(value, Tensor)]
        assert not taken, f"metadata tensors {taken} bear the names of parameters"
        tensors = {
            **self.state_dict(),
            **{name: value for name, value in metadata.items() if isinstance(value, Tensor)},
        }
        header = {
            "format": "dmsae_ray.sae",
            "format_version": str(FORMAT_VERSION),
            "group_ends": json.dumps(self.group_ends),
            "core_size": str(self.core_size),
            "core_gate": self.core_gate,
            "core_transfer": self.core_transfer,
            "metadata": json.dumps({name: v for name, v in metadata.items() if not isinstance(v, Tensor)}),
        }
        content = safetensors.torch.save({n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}, header)
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(content)

    @staticmethod
    def load(path: str | os.PathLike) -> tuple[MatryoshkaSAE, dict[str, Any]]:
        """The SAE in a file written by `save`, and its metadata. Raises ValueError, naming the file, if it is not
        one.
        """
        try:
            present(Path(path))
            with safetensors.safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path}: cannot be read as a safetensors file ({error})") from error
        if header.get("format") != "dmsae_ray.sae":
            raise ValueError(f"{path}: is not an SAE written by dmsae_ray")
        if header.get("format_version") != str(FORMAT_VERSION):
            raise ValueError(
                f"{path}: has format version {header.get('format_version')}, this program reads version "
                f"{FORMAT_VERSION}: use the release that wrote it, or train again"
            )
        missing = [name for name in _TENSORS if name not in tensors]
        if missing:
            raise ValueError(f"{path}: lacks the tensors {', '.join(missing)}")
        sae = MatryoshkaSAE(
            tensors["W_dec"].shape[1],
            json.loads(header["group_ends"]),
            int(header["core_size"]),
            header["core_gate"],
            tensors["W_dec"].dtype,
            header["core_transfer"],
        )
        for name, expected in sae.state_dict().items():
            if tensors[name].shape != expected.shape:
                raise ValueError(
                    f"{path}: {name} has shape {tuple(tensors[name].shape)}, expected {tuple(expected.shape)}"
                )
        sae.load_state_dict({name: tensors.pop(name) for name in _TENSORS})
        return sae, {**json.loads(header["metadata"]), **tensors}


def unit_rows(W_ND: Tensor) -> Tensor:
    """Rows divided by their norm plus the dtype's epsilon, as dictionary-learning 0.1.0 does."""
    return W_ND / (torch.linalg.vector_norm(W_ND, dim=1, keepdim=True) + torch.finfo(W_ND.dtype).eps)
