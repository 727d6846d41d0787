"""Makes rayjob_schema.json, by which tests/unit/test_job_files.py checks jobs/rayjob.yaml, from KubeRay's own schema of
a RayJob (helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml, Apache-2.0; here that of 2026-08):

    python tests/data/rayjob_schema.py ray.io_rayjobs.yaml

As a JSON schema it keeps what decides whether a file is valid, with repeated parts written once. Kubernetes drops
fields that it does not know in silence; here they are errors.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

VERSION = "v1"
KEPT = ("type", "properties", "required", "items", "additionalProperties", "enum", "anyOf", "minimum", "pattern")
SHORT = 40
"""Characters: what is shorter is not worth a definition."""


def reduced(schema: dict[str, Any]) -> dict[str, Any]:
    """What decides validity, of a schema and those in it."""
    kept = {name: value for name, value in schema.items() if name in KEPT}
    if "properties" in kept:
        kept["properties"] = {name: reduced(value) for name, value in kept["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept["additionalProperties"] = False
    for name in ("items", "additionalProperties"):
        if isinstance(kept.get(name), dict):
            kept[name] = reduced(kept[name])
    return kept


def text(schema: object) -> str:
    return json.dumps(schema, sort_keys=True, separators=(",", ":"))


def parts(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The schemas directly within one."""
    inner = [schema.get("items"), schema.get("additionalProperties"), *schema.get("properties", {}).values()]
    return [part for part in inner if isinstance(part, dict)]


def count(schema: dict[str, Any], seen: Counter[str]) -> None:
    """How often each schema stands in it, where one that has been met is not looked into again."""
    seen[text(schema)] += 1
    if seen[text(schema)] == 1:
        for part in parts(schema):
            count(part, seen)


def shared(schema: dict[str, Any], names: dict[str, str], top: bool = False) -> dict[str, Any]:
    """The same with references to what has a name."""
    if not top and text(schema) in names:
        return {"$ref": f"#/$defs/{names[text(schema)]}"}
    result = dict(schema)
    if "properties" in schema:
        result["properties"] = {name: shared(part, names) for name, part in schema["properties"].items()}
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            result[name] = shared(schema[name], names)
    return result


def main(source: Path, target: Path) -> None:
    versions = yaml.safe_load(source.read_text())["spec"]["versions"]
    (whole,) = (version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == VERSION)
    del whole["properties"]["status"]  # the operator writes it
    schema = reduced(whole)
    seen: Counter[str] = Counter()
    count(schema, seen)
    repeated = [part for part, times in seen.items() if times > 1 and len(part) > SHORT]
    names = {part: f"s{number}" for number, part in enumerate(repeated)}
    of_schema = text(shared(schema, names))
    definitions = [f'"{name}":{text(shared(json.loads(part), names, top=True))}' for part, name in names.items()]
    target.write_text(f'{of_schema[:-1]},"$defs":{{\n' + ",\n".join(definitions) + "}}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).with_suffix(".json"))
