"""Imports go one way: read from the syntax trees, so that imports within functions count, too."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmsae_ray

ROOT = Path(dmsae_ray.__file__).parent
LAW = (
    "causes claim config_checks draws files held_up hub kept_log labels lock mirror ownership place secret_url stop "
    "store yaml_file",
    "config",
    "identity",
    "cluster corpus sae",
    "core interop lm",
    "activations",
    "attribution compare",
    "evaluation",
    "distill",
    "show",
    "results",
    "driver",
    "evaluate export harvest report sweep ui",
)
"""A line may import from the lines above it, never from those below; folders of one line do not know each other."""
TORCH_FREE = ("store.py", "activations/rowgroup.py")
"""Read tasks import these alone: torch would cost each of their processes two seconds and 200 MB."""
HEAVY = {"torch", "ray", "mlflow", "transformers", "datasets", "pandas", "pyarrow"}


LONGEST = 350
LONG = {
    "config.py": "the whole experiment as one tree, read from top to bottom",
    "lm/model.py": "one class: every way of going on from a cut is checked when the model is loaded",
    "sae/ops/cuda_ops.py": "one class: what launches each kernel, with its tile sizes",
}
"""Files of more than LONGEST lines, and why."""


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__").replace("__init__", "")


MODULES = {module(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(path: Path, at_import: bool = False) -> Iterator[str]:
    """What a file imports, but for its annotations alone. at_import: only what is imported with it."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def ours(path: Path, at_import: bool = False) -> set[str]:
    """Our modules among them."""
    found = set()
    for name in imports(path, at_import):
        if name.startswith("dmsae_ray."):
            inner = name.removeprefix("dmsae_ray.")
            found.add(inner if inner in MODULES else inner.rpartition(".")[0])
    return found & set(MODULES)


def level(name: str) -> int:
    """Of a module or its folder. What is run as a command is one, wherever it lies."""
    top = "sweep" if name.endswith("__main__") else name.partition(".")[0]
    (place,) = [place for place, line in enumerate(LAW) if top in line.split()]
    return place


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_no_import_goes_up(name):
    for other in ours(MODULES[name]):
        a, b = name if name.endswith("__main__") else name.split(".")[0], other.split(".")[0]
        if a != b:
            same = level(a) == level(b) == 0  # the lowest files know each other, without a circle
            assert level(b) < level(a) or same, f"{name} imports {other}"
        elif name.startswith("sae.ops."):
            assert other.startswith("sae.ops."), f"{name} imports {other}: operations know nothing of what uses them"


def test_no_two_files_import_each_other():
    """Nor more than two in a circle."""
    left = {name: ours(path) - {name} for name, path in MODULES.items()}
    while True:
        free = {name for name, others in left.items() if not others & set(left)}
        if not free:
            break
        left = {name: others for name, others in left.items() if name not in free}
    assert not left, f"among {', '.join(sorted(left))} there is a circle"


def test_the_sae_knows_nothing_of_ray():
    for name, path in MODULES.items():
        if name.partition(".")[0] in ("sae", "core", "compare", "interop"):
            assert not {other for other in imports(path) if other.split(".")[0] == "ray"}, name


def check_without(start: str, heavy: set[str]) -> None:
    """None of these packages comes with a module, nor with what comes with it."""
    seen, todo = set(), {start}
    while todo:
        name = todo.pop()
        seen.add(name)
        assert not heavy & {other.split(".")[0] for other in imports(MODULES[name], at_import=True)}, name
        todo |= ours(MODULES[name], at_import=True) - seen


@pytest.mark.parametrize("place", TORCH_FREE)
def test_read_tasks_need_no_torch(place):
    check_without(module(ROOT / place), {"torch"})


def test_the_doors_import_nothing_heavy():
    """`--help` and a refused option are answered at once: torch, Ray and MLflow come with the work."""
    for door in LAW[-1].split():
        check_without(door, HEAVY)


def test_a_sweep_s_status_imports_nothing_heavy():
    """It is asked for often, and answered at once."""
    check_without("driver.status", HEAVY | {"numpy", "scipy", "safetensors"})


def test_a_trial_imports_no_torch():
    """It only waits for its workers; the import takes seconds of processor time and 100 MB, for every chain."""
    check_without("distill.trials", {"torch", "transformers", "transformer_lens", "mlflow", "matplotlib", "plotly"})


def test_no_name_of_a_file_stands_for_two_things():
    """A file bears another's name only where one mirrors the other: a command and the folder that does its work, an
    artifact and the view or the table that shows it.
    """
    names: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        if path.name != "__init__.py":
            names.setdefault(path.stem, []).append(name)
    mirrored = "comparison consensus coverage density evaluation features latents summary".split()
    twice = {stem: where for stem, where in names.items() if len(where) > 1 and stem not in mirrored}
    assert not twice, twice


def test_no_file_is_long_without_a_reason():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES.values()}
    assert {name for name, count in lines.items() if count > LONGEST} == set(LONG)


CALLED_FROM_OUTSIDE = {
    "_create_placement_group": "Ray Train calls it",
    "_initialize_and_run_controller": "Ray Train calls it",
    "_load_pyfunc": "MLflow's loader of a core as a model must have it",
    "Counting": "jobs and tests count what ranks send each other",
    "bytes_per_step": "jobs: the table of what ranks send",
    "backend_cls": "Ray Train calls it",
    "consensus_core": "the public face",
    "emit": "logging calls it",
    "get_field_value": "pydantic's sources must have it",
    "on_execution_step": "Ray Data calls it",
    "on_shutdown": "Ray Train calls it",
    "on_start": "Ray Train calls it",
    "make_decision_for_non_running_worker_group": "Ray Train calls it",
    "make_decision_for_running_worker_group": "Ray Train calls it",
    "on_trial_error": "Ray Tune calls it",
    "save_to_dir": "Ray Tune calls it",
    "survivors_C": "of the public Core",
}


def test_nothing_is_dead():
    """Every function, method and class is named somewhere else in the package; what pydantic finds by its decorator
    aside.
    """
    texts = {name: path.read_text() for name, path in MODULES.items()}
    words = Counter(word for text in texts.values() for word in re.findall(r"\w+", text))
    defined = {
        node.name
        for text in texts.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("__")
        and not any("validator" in ast.dump(decorator) for decorator in node.decorator_list)
    }
    assert {name for name in defined if words[name] == 1} - {"main"} == set(CALLED_FROM_OUTSIDE)
