"""What MLflow's page shows of a sweep when it is opened by the addresses that the commands print.

MLflow keeps a shared view (its "Share" button makes one) as a tag of the experiment: which runs, which columns, which
charts. Two are written for each sweep, the list of its chains and their comparison, and the addresses name them. Knows
neither MLflow nor the store; the words of the state are those of MLflow 3's page.
"""

from __future__ import annotations

import base64
import json
import uuid
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from dmsae_ray.show.mlflow.chain_metrics import OF_CURVE, OF_CYCLE, OF_PAIRS

TAG = "mlflow.sharedViewState."
COLUMNS = (
    ("attributes.`Run Name`", 150),
    ("params.`seed`", 60),
    ("params.`k`", 50),
    ("params.`arm`", 80),
    ("metrics.`core/size`", 85),
    ("metrics.`agreement/pw_mcc`", 150),
    ("metrics.`agreement/null`", 125),
    ("metrics.`sae/l0`", 90),
    ("metrics.`sae/fvu`", 90),
    ("metrics.`sae/recovered`", 120),
    ("duration", 80),
    ("runDateAndNestInfo", 130),
)
"""Columns of the list, by what MLflow calls them, with their width in pixels"""
FIRST = "Cores: size and agreement"
"""The section with which the comparison opens; MLflow's own sections, one for each group of metrics, are closed."""


class Places(NamedTuple):
    """Addresses within MLflow's page, to stand behind a server's."""

    chains: str
    """the list of a sweep's chains"""
    compare: str
    """their charts"""
    page: str
    """report.html, among the artifacts of the sweep's run"""

    def words(self, label: str) -> str:
        """The description, in Markdown, of each run of a sweep."""
        return f"Sweep {label}: [chains]({self.chains}), [compare them]({self.compare}), [page of results]({self.page})"


def places(experiment: str, sweep: str, home: str, run_id: str) -> Places:
    """Of one sweep. sweep, home: its tags `dmsae.sweep` and `dmsae.home`; run_id: its run."""
    runs = f"#/experiments/{experiment}/runs"
    shown = f"{runs}?workflowType=machine_learning&viewStateShareKey={sweep}-{home}"
    return Places(f"{shown}-chains", f"{shown}-compare&compareRunsMode=CHART", f"{runs}/{run_id}/artifacts/report.html")


def shared_views(sweep: str, home: str) -> dict[str, str]:
    """Tags of the experiment that hold both views of a sweep."""
    which = {"kind": "chain", "sweep": sweep, "home": home}
    found = {
        "searchFilter": " and ".join(f"tags.`dmsae.{name}` = '{value}'" for name, value in which.items()),
        "orderByKey": "tags.`dmsae.place`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "runsHiddenMode": "SHOW_ALL",
        "selectedColumns": [name for name, _ in COLUMNS if name.startswith(("params", "metrics"))],
        "columnOrder": [name for name, _ in COLUMNS],
        "columnWidths": dict(COLUMNS),
    }
    charts, sections = _charts()
    compared = found | {"compareRunCharts": charts, "compareRunSections": sections}
    return {view_tag(sweep, home, name): _packed(view) for name, view in (("chains", found), ("compare", compared))}


def view_tag(sweep: str, home: str, which: str) -> str:
    """Tag of the experiment that holds a view: `chains` or `compare`."""
    return f"{TAG}{sweep}-{home}-{which}"


def _charts() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Charts and the sections they are in: ours open, then those that MLflow would make itself, closed."""
    both: dict[str, Any] = {"xaxis": _axis("core/size"), "yaxis": _axis("agreement/pw_mcc")}
    lines: dict[str, Any] = {
        "selectedParams": ["k"],
        "selectedMetrics": ["core/size", "agreement/pw_mcc", "sae/l0", "sae/fvu"],
    }
    charts = [
        _chart("BAR", FIRST, "core/size"),
        _chart("BAR", FIRST, "agreement/pw_mcc"),
        _chart("SCATTER", FIRST, "size against agreement", **both),
        _chart("PARALLEL", FIRST, "from k to agreement and quality", **lines, showAllRuns=True),
        _chart("LINE", FIRST, "core/size", "core size by cycle"),
        _chart("LINE", FIRST, "sae/fvu", "FVU by cycle"),
    ]
    sections = [_section(FIRST, open_=True)]
    for kind, names in (
        ("LINE", [*OF_CYCLE, *OF_CURVE, "attribution/coverage"]),
        ("BAR", [*OF_PAIRS, "agreement/partners"]),
    ):
        for group, members in _groups(names).items():
            sections.append(_section(group, open_=False))
            charts += [_chart(kind, group, name) for name in members]
    return charts, sections


def _groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Metrics by what stands before their slash."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition("/")[0], []).append(name)
    return groups


def _chart(type_: str, section: str, metric: str, title: str | None = None, **more: Any) -> dict[str, Any]:
    ours = section == FIRST
    chart = {
        "type": type_,
        "uuid": _id(type_, section, metric),
        "metricSectionId": _id(section),
        "metricKey": metric,
        "displayName": title or (metric if ours else metric.partition("/")[2]),
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": not ours,
    }
    return chart | more


def _section(name: str, open_: bool) -> dict[str, Any]:
    section = {"uuid": _id(name), "name": name, "display": open_, "isReordered": True, "deleted": False}
    return section | {"isGenerated": not open_} | ({"columns": 2, "cardHeight": 300} if open_ else {})


def _axis(metric: str) -> dict[str, str]:
    return {"key": metric, "type": "METRIC", "dataAccessKey": metric}


def _id(*words: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, "/".join(words)))


def _packed(view: dict[str, Any]) -> str:
    """As MLflow's page writes it: a tag is short."""
    return "deflate;" + base64.b64encode(zlib.compress(json.dumps(view).encode(), 9)).decode()
