"""The page as one document: views, styles, scripts and data in one file that asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from dmsae_ray.show.page.artifacts import Artifacts
from dmsae_ray.show.page.chart import templates
from dmsae_ray.show.page.view import View
from dmsae_ray.show.page.views import consensus, consistency, cores, coverage, density, features, quality, summary

VIEWS = (summary, consistency, consensus, cores, coverage, quality, density, features)
SCRIPTS = ("theme.js", "tables.js", "charts.js", "features.js", "views.js")
"""In the order in which they run: one module, whose parts know each other's names."""


def document(artifacts: Artifacts) -> str:
    """The whole HTML document."""
    views = [module.view(artifacts) for module in VIEWS]
    script, plotly = "\n".join(_asset(name) for name in SCRIPTS), get_plotlyjs()
    assert "</script" not in (script + plotly).lower(), "a script must not end its own element"
    return Template(_asset("page.html")).substitute(
        title=escape(artifacts.name),
        # Only these two scripts may run: a text of the corpus stays a text even if an escape were forgotten somewhere.
        scripts=f"'sha256-{_digest(script)}' 'sha256-{_digest(plotly)}'",
        style=_asset("page.css"),
        navigation="".join(f'<li><a href="#{view.id}">{escape(view.title)}</a></li>' for view in views),
        views="\n".join(view.html() for view in views),
        charts=embedded(_charts(views)),
        features=embedded(artifacts.features.get("features", [])),
        plotly=plotly,
        script=script,
    )


def _charts(views: list[View]) -> dict[str, Any]:
    return {"templates": templates(), "charts": {chart.id: chart.data() for view in views for chart in view.charts()}}


def embedded(value: Any) -> str:
    """JSON that can stand within a script element: no text in it can end the element or open a comment."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
