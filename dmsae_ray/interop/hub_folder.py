"""A folder for the Hugging Face hub: the SAE in SAELens' format, with a card that says what it is and how good."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from dmsae_ray.files import replacing
from dmsae_ray.interop import saelens
from dmsae_ray.interop.plain import PlainSAE

CARD = "README.md"


def write(folder: Path, sae: PlainSAE, measured: Mapping[str, float], density_F: torch.Tensor | None) -> None:
    """measured: what is known of its quality, by name. Raises ValueError as `saelens.write` does."""
    saelens.write(folder, sae, density_F)
    with replacing(folder / CARD) as temporary:
        temporary.write_text(card(sae, measured))


def card(sae: PlainSAE, measured: Mapping[str, float]) -> str:
    """The model card, in Markdown with the hub's header."""
    about = sae.about
    rows = [
        ("language model", about.model),
        ("hook", about.hook),
        ("width", f"{sae.width:,} latents, of {sae.d:,} dimensions"),
        ("Matryoshka prefixes", ", ".join(f"{end:,}" for end in about.prefixes) or None),
        ("k in training", about.k),
        ("context", f"{about.context} tokens" if about.context else None),
        *((name.replace("_", " "), value) for name, value in about.more.items()),
    ]
    facts = "\n".join(f"| {name} | {value} |" for name, value in rows if value is not None)
    figures = "\n".join(f"| {name} | {value:.4g} |" for name, value in measured.items())
    header = "---\nlibrary_name: saelens\ntags:\n- sparse-autoencoder\n- matryoshka\n"
    if about.model and "/" in about.model:  # the hub takes names of its own alone
        header += f"base_model: {about.model}\n"
    parts = [
        f"{header}---\n# Matryoshka sparse autoencoder of {about.model or 'a language model'}, {about.hook}",
        "Trained and distilled by dmsae_ray. It reads raw activations: the scale of training is in its biases and "
        "thresholds.",
        f"| | |\n|---|---|\n{facts}",
    ]
    if figures:
        parts.append(f"## Measured on held-out text\n\n| | |\n|---|---|\n{figures}")
    parts.append(
        "## Use\n\n```python\nfrom sae_lens import SAE\n\n"
        'sae = SAE.load_from_disk("this folder")\nlatents = sae.encode(activations)\n```\n\n'
        "z = p where p > threshold, else 0, with p = (x - b_dec) @ W_enc + b_enc; x_hat = z @ W_dec + b_dec."
    )
    return "\n\n".join(parts) + "\n"
