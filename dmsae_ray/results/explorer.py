"""One SAE and its language model, to look at: what latents are active on a text, what a latent's direction writes, and
what the model does without a latent or with more of it.

Shape letters: T tokens of a text, BOS included; F width; D model dimension; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmsae_ray.interop.plain import PlainSAE
from dmsae_ray.lm.model import LanguageModel
from dmsae_ray.results.features.token_text import TokenText
from dmsae_ray.results.saved_sweep import SavedSweep, load_sweep


@dataclass(frozen=True)
class Active:
    """A latent that is active at a token."""

    latent: int
    activation: float
    """raw units: the norm of what it adds to the stream"""
    position: int
    """of the token in the text; BOS is 0"""
    token: str


@dataclass(frozen=True, eq=False)
class Reading:
    """A text as the SAE reads it."""

    tokens: tuple[str, ...]
    """BOS first"""
    z_TF: torch.Tensor
    """activations, raw units; zeros at BOS, where nothing was trained"""

    def top(self, count: int = 10) -> list[Active]:
        """The latents with the largest activations, each where it is largest."""
        largest_F, position_F = self.z_TF.max(dim=0)
        chosen = largest_F.argsort(descending=True, stable=True)[:count].tolist()
        return [
            Active(latent, float(largest_F[latent]), int(position_F[latent]), self.tokens[int(position_F[latent])])
            for latent in chosen
            if largest_F[latent] > 0
        ]


@dataclass(frozen=True)
class Lens:
    """What a direction makes likelier, and less likely."""

    up: tuple[tuple[str, float], ...]
    """(token, logit added), the largest first"""
    down: tuple[tuple[str, float], ...]
    """the smallest first"""


@dataclass(frozen=True)
class Change:
    """What a change of the stream does to the model on a text."""

    loss: float
    """mean next-token cross-entropy of the undisturbed model, nats per token"""
    changed_loss: float
    next_token: tuple[tuple[str, float, float], ...]
    """(token, probability before, after) behind the text's end, those that change most first"""

    @property
    def effect(self) -> float:
        """changed_loss - loss."""
        return self.changed_loss - self.loss


class Explorer:
    """An SAE with its language model.

    lab = dmsae_ray.Explorer.of_sweep("~/dmsae_ray/quickstart", "seed0-k16")
    lab.read("Once upon a time").top(5)
    lab.logit_lens(12), lab.ablate("Once upon a time", 12), lab.steer("Once upon a time", 12, add=20.0)
    """

    def __init__(self, sae: PlainSAE, model: LanguageModel, sweep: SavedSweep | None = None):
        """Raises ValueError if the SAE is of another place or dimension."""
        if sae.about.hook not in (None, model.hook):
            raise ValueError(f"{sae.about.place}: reads {sae.about.hook}, the model was loaded with {model.hook}")
        if sae.d != model.d:
            raise ValueError(f"{sae.about.place}: reads rows of {sae.d} dimensions, {model.name} has {model.d}")
        self.sae, self.model, self.sweep = sae, model, sweep
        self._text = TokenText(model.tokenizer)

    @staticmethod
    def of_sweep(place: str | Path, chain: str, cycle: int = -1, device: str = "cpu") -> Explorer:
        """The SAE that a chain trained, by its label as in the tables. Raises ValueError if there is none, or the model
        cannot be had.
        """
        sweep = load_sweep(place)
        if chain not in sweep.chains:
            raise ValueError(f"{place}: has no chain {chain}; it has {', '.join(sweep.chains)}")
        return Explorer(sweep.chains[chain].plain(cycle)[0], LanguageModel.of(sweep.config.model, device), sweep)

    @torch.no_grad()
    def read(self, text: str) -> Reading:
        """Raises ValueError for a text without a token."""
        ids_1T = self._ids(text)
        x_TD = self.model.cut(ids_1T).value_BTD[0].cpu()
        z_TF = self.sae.encode(x_TD)
        z_TF[~self._counts(ids_1T)[0].cpu()] = 0
        return Reading(tuple(self._text.token(token) for token in ids_1T[0].tolist()), z_TF)

    @torch.no_grad()
    def logit_lens(self, latent: int, count: int = 10) -> Lens:
        """What the latent's decoder row says by the direct path alone: final norm and unembedding of the row, without
        the blocks between. Logits at the norm that the final norm gives.
        """
        row_D = self.sae.W_dec_FD[self._known(latent)]
        both_2V = self.model.unembed(torch.stack([row_D, torch.zeros_like(row_D)]) * self.sae.d**0.5).float().cpu()
        added_V = both_2V[0] - both_2V[1]
        order = added_V.argsort(descending=True, stable=True).tolist()
        up, down = (
            tuple((self._text.token(token), float(added_V[token])) for token in tokens)
            for tokens in (order[:count], order[::-1][:count])
        )
        return Lens(up, down)

    def ablate(self, text: str, latent: int | Sequence[int], count: int = 10) -> Change:
        """Without what these latents add to the stream at each token; all else of it stays, what the SAE does not
        explain included.
        """
        latents = [self._known(one) for one in ([latent] if isinstance(latent, int) else latent)]

        def without(x_TD: torch.Tensor) -> torch.Tensor:
            z_TF = self.sae.encode(x_TD)
            return x_TD - z_TF[:, latents] @ self.sae.W_dec_FD[latents]

        return self._changed(text, without, count)

    def steer(self, text: str, latent: int, add: float, count: int = 10) -> Change:
        """With `add` (raw units) more of the latent's decoder row at each token; negative: less."""
        row_D = self.sae.W_dec_FD[self._known(latent)]
        return self._changed(text, lambda x_TD: x_TD + add * row_D, count)

    def feature(self, name: str) -> dict[str, Any]:
        """A feature by its id on the page (f004, or seed0-k16.12): what features.json says of it, among that its
        `representative` and `partners` (chain and latent), and `contexts`. Raises ValueError if there is none, or no
        sweep.
        """
        if self.sweep is None:
            raise ValueError(f"feature {name}: this SAE is of no sweep; Explorer.of_sweep knows features")
        features = {feature["id"]: feature for feature in self.sweep.result("features")["features"]}
        if name not in features:
            raise ValueError(f"feature {name}: {self.sweep.folder / 'features.json'} has none of this id")
        return features[name]

    @torch.no_grad()
    def _changed(self, text: str, change: Callable[[torch.Tensor], torch.Tensor], count: int) -> Change:
        ids_1T = self._ids(text)
        lengths_1 = torch.tensor([ids_1T.shape[1]])
        counts_T = self._counts(ids_1T)[0].cpu()
        cut = self.model.cut(ids_1T)
        x_TD = cut.value_BTD[0].cpu()
        changed_TD = torch.where(counts_T[:, None], change(x_TD), x_TD)
        targets = max(1, int(counts_T[1:].sum()))
        losses, probabilities = [], []
        for value_TD in (x_TD, changed_TD):
            losses.append(float(self.model.loss(cut, value_TD[None], ids_1T, lengths_1)) / targets)
            probabilities.append(self.model.logits(cut, value_TD[None])[0, -1].float().softmax(dim=-1).cpu())
        before_V, after_V = probabilities
        moved = (after_V - before_V).abs().argsort(descending=True, stable=True)[:count].tolist()
        next_token = tuple((self._text.token(one), float(before_V[one]), float(after_V[one])) for one in moved)
        return Change(losses[0], losses[1], next_token)

    def _ids(self, text: str) -> torch.Tensor:
        tokens = self.model.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise ValueError("a text without a token has no latents")
        return torch.tensor([[self.model.bos_id, *tokens]])

    def _counts(self, ids_1T: torch.Tensor) -> torch.Tensor:
        return self.model.rows(ids_1T, torch.tensor([ids_1T.shape[1]]))

    def _known(self, latent: int) -> int:
        if not 0 <= latent < self.sae.width:
            raise ValueError(f"latent {latent}: this SAE has latents 0 to {self.sae.width - 1}")
        return latent
