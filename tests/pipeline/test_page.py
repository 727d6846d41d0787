"""The pages that sweeps themselves wrote, in a real browser: a chart of real results shows them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from charts import look_at
from conftest import environment, results


def test_every_chart_of_a_single_arm_shows_its_data(small_sweep):
    look_at(results(small_sweep.output) / "report.html", charts_at_least=14)


def test_every_chart_of_a_study_shows_its_data(study):
    output, _ = study
    look_at(results(output) / "report.html", charts_at_least=14, width=1024)


@pytest.mark.slow
def test_every_chart_of_the_quickstart_shows_its_data(tmp_path):
    """What `make sweep` runs: no configuration but the default one."""
    output = tmp_path / "quickstart"
    command = [sys.executable, "-m", "dmsae_ray.sweep", "--output", str(output)]
    run = subprocess.run(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800
    )
    assert run.returncode == 0, run.stdout
    look_at(results(output) / "report.html", charts_at_least=14)
