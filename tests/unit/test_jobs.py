"""Programs of jobs/: what they take from the package is there. They run by hand, so nothing else would tell."""

import ast
import importlib.util
from pathlib import Path

import pytest

JOBS = Path(__file__).parents[2] / "jobs"
TAKEN = sorted(
    {
        (node.module, name.name, str(path.relative_to(JOBS)))
        for path in JOBS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "dmsae_ray"
        for name in node.names
    }
)


@pytest.mark.parametrize("module", sorted({module for module, _, _ in TAKEN}))
def test_what_jobs_import_is_there(module):
    found = importlib.import_module(module)
    missing = [(name, job) for where, name, job in TAKEN if where == module and not hasattr(found, name)]
    # A name may be a module that nobody has imported yet.
    missing = [(name, job) for name, job in missing if importlib.util.find_spec(f"{module}.{name}") is None]
    assert missing == []
