"""The page of a sweep: one HTML file, opened from disk, that needs no network.

`write_page` reads the sweep's folder; each view is a module of its own, made of charts (plotly), tables and the feature
browser.
"""

from __future__ import annotations

from pathlib import Path

from dmsae_ray.files import replacing
from dmsae_ray.show.page.artifacts import read
from dmsae_ray.show.page.document import document


def write_page(folder: Path, path: Path) -> None:
    """Write the page of the sweep in `folder` to `path`, whole or not at all.

    The folder holds of evaluation.json, comparison.json, consensus.json, features.json, expectations.json, data.json
    and config.yaml what could be made; in place of the rest the page says why there is nothing, after failed_parts.json
    if that names it. Raises ValueError, naming file and remedy, if there are no results at all or a file is not what it
    should be.
    """
    whole = document(read(Path(folder)))
    with replacing(Path(path)) as temporary:
        temporary.write_text(whole, encoding="utf-8")


__all__ = ["write_page"]
