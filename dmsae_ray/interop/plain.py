"""An SAE as anybody may have trained it, in the raw units of the activations that it reads.

Shape letters: B rows, D model dimension, F width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

EXPORTED = "dmsae_ray_export"
"""Key, in the configurations that are written, by which they are known again."""
UNIT = 1e-5
"""Decoder rows whose norms differ from 1 by no more are left as they are."""


@dataclass(frozen=True, eq=False)
class Threshold:
    """A latent is active where its pre-activation exceeds its threshold (JumpReLU; BatchTopK at inference); with
    threshold 0 that is ReLU.
    """

    theta_F: Tensor


@dataclass(frozen=True, eq=False)
class TopK:
    """Of each row the k latents with the largest p * rank are active, as far as they are above 0."""

    k: int
    rank_F: Tensor
    """ones where latents are ranked by what they add to the reconstruction"""


@dataclass(frozen=True, eq=False)
class Gated:
    """A latent is active where its gate, p - b_enc + gate, exceeds 0; its activation is
    ReLU((p - b_enc) * exp(log_magnitude) + magnitude) (Rajamanoharan et al., arXiv 2404.16014).
    """

    gate_F: Tensor
    log_magnitude_F: Tensor
    magnitude_F: Tensor


@dataclass(frozen=True)
class Unknown:
    """Activations that cannot be told from the file."""

    reason: str


Gate: TypeAlias = Threshold | TopK | Gated | Unknown


@dataclass(frozen=True)
class About:
    """What is known of an SAE. None: its file does not say."""

    place: str
    """where it was read"""
    format: str
    """whose format it is in, and which kind of SAE"""
    model: str | None = None
    """the language model's name"""
    hook: str | None = None
    """place in it, by its TransformerLens name"""
    context: int | None = None
    """tokens per sequence"""
    prepend_bos: bool | None = None
    k: float | None = None
    """active latents per token that it was trained for"""
    l0: float | None = None
    """active latents per token as measured"""
    prefixes: tuple[int, ...] = ()
    """cumulative widths of a Matryoshka SAE, the whole width last"""
    more: dict[str, Any] = field(default_factory=dict)
    """further facts, as plain JSON"""


@dataclass(frozen=True, eq=False)
class PlainSAE:
    """p = (x - b_in) @ W_enc^T + b_enc;  z = gate(p);  x_hat = z @ W_dec + b_dec.  Rows of W_dec have norm 1.

    Raises ValueError if the shapes are not of one SAE, or a value is not finite.
    """

    W_enc_FD: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor
    b_dec_D: Tensor
    b_in_D: Tensor
    """what is taken from a row before it is encoded: b_dec or nothing"""
    gate: Gate
    about: About

    def __post_init__(self) -> None:
        if self.W_dec_FD.ndim != 2:
            raise ValueError(f"{self.about.place}: W_dec has shape {tuple(self.W_dec_FD.shape)}, needs two dimensions")
        width, d = self.W_dec_FD.shape
        tensors = {
            "W_enc": (self.W_enc_FD, (width, d)),
            "b_enc": (self.b_enc_F, (width,)),
            "W_dec": (self.W_dec_FD, (width, d)),
            "b_dec": (self.b_dec_D, (d,)),
            "b_in": (self.b_in_D, (d,)),
        }
        match self.gate:
            case Threshold(theta_F):
                tensors["threshold"] = theta_F, (width,)
            case TopK(k, rank_F):
                tensors["rank"] = rank_F, (width,)
                if not 0 < k <= width:
                    raise ValueError(f"{self.about.place}: k is {k}, with {width} latents")
            case Gated(gate_F, log_F, magnitude_F):
                tensors |= {"gate": (gate_F, (width,)), "r_mag": (log_F, (width,)), "b_mag": (magnitude_F, (width,))}
        for name, (tensor, shape) in tensors.items():
            if tuple(tensor.shape) != shape:
                has = f"{name} has shape {tuple(tensor.shape)}"
                raise ValueError(f"{self.about.place}: {has}, W_dec asks for {shape}: not of one SAE")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{self.about.place}: {name} holds a value that is not finite")

    @property
    def width(self) -> int:
        return self.W_dec_FD.shape[0]

    @property
    def d(self) -> int:
        return self.W_dec_FD.shape[1]

    def pre(self, x_BD: Tensor) -> Tensor:
        """Pre-activations p [..., F]."""
        return torch.nn.functional.linear(x_BD - self.b_in_D, self.W_enc_FD, self.b_enc_F)

    def encode(self, x_BD: Tensor) -> Tensor:
        """Activations z [..., F] of rows in raw units. Raises ValueError if the file does not tell them."""
        p_BF = self.pre(x_BD.to(self.W_enc_FD.dtype))
        match self.gate:
            case Threshold(theta_F):
                return torch.where(p_BF > theta_F, p_BF, 0).relu()
            case TopK(k, rank_F):
                chosen = (p_BF * rank_F).topk(k, dim=-1).indices
                return torch.zeros_like(p_BF).scatter(-1, chosen, p_BF.gather(-1, chosen).relu())
            case Gated(gate_F, log_F, magnitude_F):
                bare_BF = p_BF - self.b_enc_F
                z_BF = (bare_BF * log_F.exp() + magnitude_F).relu()
                return torch.where(bare_BF + gate_F > 0, z_BF, 0)
            case Unknown(reason):
                raise ValueError(f"{self.about.place}: its activations cannot be computed: {reason}")

    def decode(self, z_BF: Tensor) -> Tensor:
        """Reconstruction [..., D] in raw units."""
        return z_BF @ self.W_dec_FD + self.b_dec_D

    def unit(self) -> PlainSAE:
        """The same SAE with decoder rows of norm 1: each latent's activation takes its row's norm, and TopK ranks as
        before. Rows of zeros stay.
        """
        norm_F = self.W_dec_FD.norm(dim=1)
        if bool(((norm_F - 1).abs() <= UNIT).all()):
            return self
        norm_F = torch.where(norm_F > 0, norm_F, 1)
        gate = self.gate
        match gate:
            case Threshold(theta_F):
                gate = Threshold(theta_F * norm_F)
            case TopK(k, rank_F):
                gate = TopK(k, rank_F / norm_F)
            case Gated(gate_F, log_F, magnitude_F):
                gate = Gated(gate_F * norm_F, log_F, magnitude_F * norm_F)
        return replace(
            self,
            W_enc_FD=self.W_enc_FD * norm_F[:, None],
            b_enc_F=self.b_enc_F * norm_F,
            W_dec_FD=self.W_dec_FD / norm_F[:, None],
            gate=gate,
        )
