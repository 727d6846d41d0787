"""The training step written down plainly from its definition, with autograd: slow, in any precision, and without a line
of `dmsae_ray.sae`. Tests compare the real one with it.

Shapes: B tokens, D = d, F = width; the first C latents are the core.
"""

from __future__ import annotations

import torch


def reference_mask(p_BF, k, core_size=0, core_gate="batchtopk", core_budget="counted"):
    """Kept pairs, by sorting all positive pairs of the batch as tuples (value descending, token, latent ascending)."""
    n_tokens, width = p_BF.shape
    exempt = core_size if core_gate == "relu" else 0
    mask = [[False] * width for _ in range(n_tokens)]
    rows = p_BF.detach().tolist()
    competing, n_core = [], 0
    for token, row in enumerate(rows):
        for latent, value in enumerate(row):
            if not value > 0:
                continue
            if latent < exempt:
                mask[token][latent] = True
                n_core += 1
            else:
                competing.append((-value, token, latent))
    budget = k * n_tokens
    if exempt and core_budget == "counted":
        budget = max(n_tokens, budget - n_core)
    competing.sort()
    for _, token, latent in competing[:budget]:
        mask[token][latent] = True
    smallest = -competing[:budget][-1][0] if competing else 0.0
    return torch.tensor(mask), smallest


def reference_loss(x_BD, W_enc_FD, b_enc_F, W_dec_FD, b_dec_D, group_ends, mask_BF, dead_F, auxk_alpha, auxk_k):
    """L = (1/G^2) sum_g mean ||x - x_hat_g||^2 + alpha L_aux, and its two parts."""
    relu_p = ((x_BD - b_dec_D) @ W_enc_FD.T + b_enc_F).relu()
    z = relu_p * mask_BF
    loss_rec = 0.0
    for end in group_ends:
        x_hat = z[:, :end] @ W_dec_FD[:end] + b_dec_D
        loss_rec = loss_rec + (x_BD - x_hat).pow(2).sum(dim=1).mean()
    loss_rec = loss_rec / len(group_ends) ** 2
    loss_aux = torch.zeros((), dtype=x_BD.dtype)
    if dead_F.any():
        residual = (x_BD - x_hat).detach()
        variance = (residual - residual.mean(dim=0)).pow(2).sum(dim=1).mean()
        chosen = torch.where(dead_F, relu_p, -1).topk(min(auxk_k, int(dead_F.sum())), dim=1).indices
        z_aux = relu_p * torch.zeros_like(relu_p).scatter(1, chosen, 1.0)
        if variance > 0:
            loss_aux = (residual - z_aux @ W_dec_FD).pow(2).sum(dim=1).mean() / variance
    return loss_rec + auxk_alpha * loss_aux, loss_rec, loss_aux


class ReferenceTrainer:
    """Whole updates of the parameters {W_enc [F, D] with the core's rows first, b_enc, W_dec, b_dec}."""

    def __init__(
        self,
        parameters,
        group_ends,
        core_size,
        k,
        lr,
        core_gate="batchtopk",
        core_budget="counted",
        dead_window=10_000_000,
        warmup=0,
        decay=0,
        total=0,
        auxk_alpha=1 / 32,
        auxk_k=None,
        clip=1.0,
        frozen=True,
        trains_decoder=True,
        l2=0.0,
    ):
        self.parameters = {name: tensor.clone() for name, tensor in parameters.items()}
        self.group_ends, self.core_size, self.k, self.lr, self.clip = group_ends, core_size, k, lr, clip
        self.core_gate, self.core_budget = core_gate, core_budget
        self.n_frozen = core_size if frozen else 0
        self.trains_decoder, self.l2 = trains_decoder, l2
        self.dead_window, self.warmup, self.decay, self.total = dead_window, warmup, decay, total
        self.auxk_alpha, self.auxk_k = auxk_alpha, auxk_k or parameters["b_dec"].numel() // 2
        self.silent = torch.zeros(len(parameters["b_enc"]), dtype=torch.int64)
        self.mean = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        self.square = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        self.steps = 0

    def gradients(self, x_BD):
        """(gradients by name, loss, mask, smallest kept value); the counters take in the batch."""
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in self.parameters.items()}
        p = (x_BD - leaves["b_dec"]) @ leaves["W_enc"].T + leaves["b_enc"]
        mask, smallest = reference_mask(p, self.k, self.core_size, self.core_gate, self.core_budget)
        self.silent = torch.where(mask.any(dim=0), 0, self.silent + len(x_BD))
        dead = (self.silent >= self.dead_window) & (torch.arange(len(self.silent)) >= self.core_size)
        loss, _, _ = reference_loss(
            x_BD,
            leaves["W_enc"],
            leaves["b_enc"],
            leaves["W_dec"],
            leaves["b_dec"],
            self.group_ends,
            mask,
            dead,
            self.auxk_alpha,
            self.auxk_k,
        )
        loss.backward()
        gradients = {name: leaf.grad for name, leaf in leaves.items()}
        gradients["W_enc"][: self.n_frozen] = 0
        return gradients, loss.item(), mask, smallest

    def update(self, x_BD):
        """One step; returns (loss, mask, smallest kept value)."""
        if self.steps == 0:
            self.parameters["b_dec"] = reference_median(x_BD)
        gradients, loss, mask, smallest = self.gradients(x_BD)
        gradients["W_enc"][self.n_frozen :] += 2 * self.l2 * self.parameters["W_enc"][self.n_frozen :]
        W_dec = self.parameters["W_dec"]
        unit = W_dec / (W_dec.norm(dim=1, keepdim=True) + 1e-6)
        gradients["W_dec"] -= (gradients["W_dec"] * unit).sum(dim=1, keepdim=True) * unit
        if not self.trains_decoder:
            gradients["W_dec"].zero_()
        norm = sum(gradient.pow(2).sum() for gradient in gradients.values()).sqrt()
        shrink = min(1.0, float(self.clip / (norm + 1e-6)))
        lr = self.lr
        if self.steps < self.warmup:
            lr = self.lr * self.steps / self.warmup
        elif self.decay and self.steps >= self.total - self.decay:
            lr = self.lr * (self.total - self.steps) / self.decay
        self.steps += 1
        for name, gradient in gradients.items():
            gradient = gradient * shrink
            self.mean[name] = 0.9 * self.mean[name] + 0.1 * gradient
            self.square[name] = 0.999 * self.square[name] + 0.001 * gradient**2
            mean = self.mean[name] / (1 - 0.9**self.steps)
            square = self.square[name] / (1 - 0.999**self.steps)
            self.parameters[name] = self.parameters[name] - lr * mean / (square.sqrt() + 1e-8)
        W_dec = self.parameters["W_dec"]
        self.parameters["W_dec"] = W_dec / (W_dec.norm(dim=1, keepdim=True) + torch.finfo(W_dec.dtype).eps)
        return loss, mask, smallest


def reference_median(points):
    """Weiszfeld's iteration from the mean, 100 times or until it moves by less than 1e-5."""
    guess = points.mean(dim=0)
    for _ in range(100):
        weights = 1 / (points - guess).norm(dim=1)
        new = (weights[:, None] * points).sum(dim=0) / weights.sum()
        moved, guess = (new - guess).norm(), new
        if moved < 1e-5:
            break
    return guess
