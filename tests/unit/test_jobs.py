"""Programs of jobs/: what they take from the package is there. They run by hand, so nothing else would tell."""

import ast
import importlib.util
import subprocess
import sys
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


@pytest.mark.slow
def test_the_data_bench_s_harvest_runs():
    flags = ["--harvest.tokens", "16384", "--harvest.rows_per_shard", "4096"]
    flags += ["--harvest.calibration_tokens", "2048", "--harvest.rows_per_group", "512"]
    code = f"import bench_data; print(bench_data.harvest_ratio('small', {flags}, 'cpu', 1, None))"
    done = subprocess.run([sys.executable, "-c", code], cwd=JOBS / "bench", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("['small', '"), done.stderr
