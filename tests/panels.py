"""What the panels of jobs/grafana_dashboard.json ask Prometheus for."""

from __future__ import annotations

import json
import re
from pathlib import Path

DASHBOARD = Path(__file__).parents[1] / "jobs" / "grafana_dashboard.json"
METRIC = re.compile(r"\bray_\w+")


def queries() -> list[str]:
    """Of every panel, and of the list of sweeps."""
    tree = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in tree["panels"] for target in panel["targets"]]
    return asked + [one["query"]["query"] for one in tree["templating"]["list"] if one["type"] == "query"]


def asked_metrics() -> set[str]:
    return {name for query in queries() for name in METRIC.findall(query)}


def exported(text: str) -> dict[str, set[str]]:
    """Names of the metrics that a Prometheus endpoint gave, each with its labels."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if (sample := re.match(r"(\w+)\{(.*)\} \S+$", line)) is not None:
            found.setdefault(sample[1], set()).update(re.findall(r'(\w+)="', sample[2]))
    return found
