"""The places in a block whose activations can be studied and replaced, by their TransformerLens names.

All of them are as wide as the residual stream. A block adds to the stream twice: pre -> (+ attn_out) -> mid ->
(+ mlp_out) -> post; where attention and MLP read the same stream, there is no mid.
"""

from __future__ import annotations

import re

AFTER = ("hook_resid_post", "hook_out")
"""The stream after a block, under its two names: nothing of the block is needed to go on from here."""
BEFORE = ("hook_resid_pre",)
"""The stream before a block: after the block below, or, before block 0, after the embedding and its scaling."""
INSIDE = ("hook_resid_mid", "hook_attn_out", "hook_mlp_out")
"""To go on from one of these, the stream that enters the block is needed too."""
KINDS = (*BEFORE, *INSIDE, *AFTER)
HOOK = re.compile(rf"blocks\.(\d+)\.({'|'.join(KINDS)})")


def layer_of(hook: str, name: str, n_layers: int) -> int:
    """The block (0-based) that a hook belongs to, from the names alone.

    Whether model `name` has the place is known once it is loaded (some have no mid). Raises ValueError that lists the
    hooks.
    """
    match = HOOK.fullmatch(hook)
    if not match or int(match[1]) >= n_layers:
        raise ValueError(
            f"model.hook {hook}: {name} has blocks.0.hook_resid_post to blocks.{n_layers - 1}.hook_resid_post (the "
            "residual stream after a block), and in each block also "
            f"{', '.join(kind for kind in KINDS if kind != 'hook_resid_post')}"
        )
    return int(match[1])
