"""The update of one training step: parallel component out, clip, Adam, decoder rows to unit length.

As dictionary-learning 0.1.0 does it (`set_decoder_norm_to_unit_norm`, `remove_gradient_parallel_to_decoder_directions`,
clip by the norm of the whole gradient, Adam), in two passes over the weights: one that takes the norm, one that does
the rest.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dmsae_ray.sae.ops.pairs import AdamStep
from dmsae_ray.sae.ops.torch_ops import TorchPairs
from dmsae_ray.sae.ranks.collective import Alone, Collective
from dmsae_ray.sae.sae import TRAINED, MatryoshkaSAE
from dmsae_ray.sae.screen import Screen
from dmsae_ray.sae.settings import SAESettings


class Adam:
    """Adam's state for one SAE: running means of gradient and square, laid out like `sae.flat`."""

    def __init__(
        self, sae: MatryoshkaSAE, settings: SAESettings, ops: TorchPairs, screen: Screen, latents: Collective = Alone()
    ) -> None:
        """latents: the ranks that hold the other latents, with the same b_dec."""
        self.sae = sae
        self.settings = settings
        self.ops = ops
        self.screen = screen
        self.latents = latents
        self.mean = torch.zeros_like(sae.flat)
        self.square = torch.zeros_like(sae.flat)
        self.steps = 0
        self.trains_decoder = settings.decoder == "learned"
        """else its rows, and their state, stay as they are; the rows' gradient is made and not used"""

    @torch.no_grad()
    def update(self, gradient: Tensor, lr: float) -> float:
        """Apply a gradient laid out like `sae.flat`; returns the norm of the whole one, before clipping. If that is not
        finite, nothing is changed."""
        self.penalise(gradient)
        squares, parallel_F = self.squares(gradient)
        norm = math.sqrt(squares.item())
        if math.isfinite(norm):
            self.apply(gradient, parallel_F, min(1.0, self.settings.clip / (norm + 1e-6)), lr)
        return norm

    def penalise(self, gradient: Tensor) -> None:
        """Add the gradient of l2 times the summed squares of the trained encoder rows, in place. (Those of decoder rows
        are constant.)
        """
        if self.settings.l2:
            self.sae.views(gradient)[0].add_(self.sae.W_enc.detach(), alpha=2 * self.settings.l2)

    def squares(self, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sum of squares (0-dim, float64) of the gradient without what is parallel to decoder rows, and that as factors
        of them [F]; without the decoder, and None, where that is not trained.
        """
        W_enc, b_enc, W_dec, b_dec = self.sae.views(gradient)
        squares, parallel_F = torch.zeros((), dtype=torch.float64, device=b_dec.device), None
        if self.trains_decoder:
            squares, parallel_F = self.ops.gradient_squares(W_dec, self.sae.W_dec.detach())
        squares = squares + self.ops.gradient_squares(W_enc, None)[0] + b_enc.double().square().sum()
        return self.latents.all_reduce_sum(squares) + b_dec.double().square().sum(), parallel_F

    def apply(
        self, gradient: Tensor, parallel_F: Tensor | None, clip: float | Tensor, lr: float, **where: Tensor
    ) -> None:
        """The pass that changes weights and state. where: `go` of `TritonPairs.adam`."""
        sae, ops, settings = self.sae, self.ops, self.settings
        self.steps += 1
        step = AdamStep(
            settings.beta1,
            settings.beta2,
            settings.eps,
            lr / (1 - settings.beta1**self.steps),
            1 / math.sqrt(1 - settings.beta2**self.steps),
        )
        rounded = self.screen.trained_latents()
        for name, W, g, m, v in zip(
            TRAINED, sae.views(sae.flat), sae.views(gradient), sae.views(self.mean), sae.views(self.square), strict=True
        ):
            decoder = name == "W_dec"
            if decoder and not self.trains_decoder:
                continue
            ops.adam(
                W,
                g,
                m,
                v,
                parallel_F if decoder else None,
                clip,
                step,
                decoder,
                rounded if name == "W_enc" else None,
                **where,
            )
        torch.autograd.graph.increment_version(sae.flat)  # kernels write behind torch's back
        self.screen.updated()

    def state_dict(self) -> dict[str, Any]:
        """The live tensors: save or copy them before the next update."""
        return {"mean": self.mean, "square": self.square, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean.copy_(state["mean"])
        self.square.copy_(state["square"])
        self.steps = state["steps"]
