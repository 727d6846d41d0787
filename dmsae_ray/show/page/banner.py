"""What a reader of the summary must see first: parts of the results that could not be made, and rows that decide too
much.
"""

from __future__ import annotations

from html import escape

from dmsae_ray.show.page.artifacts import Artifacts
from dmsae_ray.show.page.view import Raw


def banners(artifacts: Artifacts) -> list[Raw]:
    """From failed_parts.json and from the warning of data.json; none when all is well."""
    found = []
    if artifacts.failed_parts:
        items = "".join(
            f"<li><b>{escape(str(part['part']))}</b>: {escape(str(part['reason']))}</li>"
            for part in artifacts.failed_parts
        )
        words = (
            "Not every part of the results could be made whole; the same command, given again, makes what is missing:"
        )
        found.append(_banner("failed-parts", f"<p>{words}</p><ul>{items}</ul>"))
    if artifacts.data.get("warning"):
        found.append(_banner("data-warning", f"<p>{escape(str(artifacts.data['warning']))}</p>"))
    return found


def _banner(id: str, markup: str) -> Raw:
    return Raw(f'<div class="banner" id="banner-{id}" role="alert">{markup}</div>')
