"""The feature browser: its fields and empty frames; features.js fills them from the data embedded in the page."""

from __future__ import annotations

from html import escape

from dmsae_ray.show.page.artifacts import Artifacts, unique
from dmsae_ray.show.page.view import Note, Part, Raw, View

LEAD = (
    "What do the features mean? Each stands with the held-out texts in which it is most active (the stronger its "
    "shade, the more active a token; the strongest is underlined), and with the tokens that the model predicts worse, "
    "or better, once the feature is removed."
)
SORTS = {
    "elsewhere": "Reproducibility",
    "score": "Attribution share",
    "density": "Density",
    "cosine": "Cosine",
    "id": "Id",
}
KINDS = {"": "all", "consensus": "consensus", "core": "single core"}


def view(artifacts: Artifacts) -> View:
    """The view; in place of what is missing stands why."""
    features = artifacts.features.get("features")
    parts: list[Part] = []
    if not features:
        parts.append(Note(f"There are no features to look at: {artifacts.reasons['features.json']}."))
    else:
        if artifacts.features.get("left_out"):
            parts.append(
                Note(
                    f"{artifacts.features['left_out']:,} latents of the smallest attribution are left out "
                    "(features.most)."
                )
            )
        parts.append(Raw(_browser(unique(chain for feature in features for chain in feature["chains"]))))
    return View("features", "Features", LEAD, parts)


def _browser(chains: list[str]) -> str:
    sorts = "".join(f'<option value="{value}">{words}</option>' for value, words in SORTS.items())
    kinds = "".join(f'<option value="{value}">{words}</option>' for value, words in KINDS.items())
    among = "".join(f"<option>{escape(chain)}</option>" for chain in sorted(chains))
    return f"""<div class="browser" id="browser">
<form class="filters" role="search" aria-label="Features">
<label class="wide">Search <input type="search" id="feature-search" autocomplete="off" spellcheck="false"
 aria-keyshortcuts="/" placeholder="text of a context, or an id"></label>
<label>Sort by <select id="feature-sort">{sorts}</select></label>
<label>Kind <select id="feature-kind">{kinds}</select></label>
<label>Chain <select id="feature-chain"><option value="">any</option>{among}</select></label>
<span class="label"><label for="feature-least">Reproducibility at least</label>
 <output id="feature-least-shown">0 %</output>
 <input type="range" id="feature-least" min="0" max="1" step="0.05" value="0"></span>
</form>
<p class="hint"><output id="feature-count" aria-live="polite"></output>
 <span>Keys: <kbd>j</kbd> <kbd>k</kbd> or arrows move, <kbd>/</kbd> searches, <kbd>Esc</kbd> clears.</span></p>
<div class="feature-columns" aria-hidden="true">
<span>Id</span><span>Most active on</span><span>Seeds</span><span id="feature-column"></span></div>
<ul class="feature-list" id="feature-list" role="listbox" tabindex="0" aria-label="Features"></ul>
<article class="feature-detail" id="feature-detail" aria-live="polite" aria-label="The chosen feature"></article>
</div>"""
