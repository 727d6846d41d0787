"""Everything at a URL, and no disk shared: what one machine finished another finds, and goes on from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import HANGS, SMALL, Run, environment, same_results, wait_for

from dmsae_ray import files, load_sweep, mirror
from dmsae_ray.driver.options import ReportCommand, load
from dmsae_ray.driver.report_run import against
from dmsae_ray.sweep import main

IGNORED = ("driver.lock", "ray", "logs")


def arguments(folder: Path, url: str, machine: str, *args: str) -> list[str]:
    """Options of the small sweep at this URL. machine: names the disk that the command works on."""
    (folder / "small.yaml").write_text(SMALL)
    return ["--config", str(folder / "small.yaml"), "--output", url, "--cluster.scratch", str(folder / machine), *args]


def started(folder: Path, url: str, machine: str, *args: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "dmsae_ray.sweep", *arguments(folder, url, machine, *args)],
        env=environment(),
        stdout=open(folder / f"{machine}.log", "w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finished(folder: Path, url: str, machine: str, *args: str) -> Run:
    process = started(folder, url, machine, *args)
    return Run(process.wait(timeout=HANGS), (folder / f"{machine}.log").read_text(), 0.0)


@pytest.fixture
def forget(monkeypatch):
    monkeypatch.setattr(files, "_elsewhere", {})
    monkeypatch.setattr(mirror, "_mirrors", {})


def test_a_sweep_that_lies_at_a_url_is_found_from_a_machine_that_never_saw_it(
    small_sweep, s3, tmp_path, capfd, forget, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    s3.proxy.reset()
    for path in small_sweep.output.rglob("*"):
        name = path.relative_to(small_sweep.output)
        if path.is_file() and name.parts[0] not in IGNORED:
            with s3.files.open_output_stream(f"activations/done/{name}") as stream:
                stream.write(path.read_bytes())
    url, before = s3.url("done", proxy=True), s3.content("done")
    assert main(arguments(tmp_path, url, "a", "--status")) == 0
    assert capfd.readouterr().out.count("2 cycles") == 2 and s3.content("done") == before
    run = finished(tmp_path, url, "a")
    assert run.code == 0 and "2 of 2 already finished" in run.out, run.out
    after = s3.content("done")
    kept = [name for name in before if name.startswith(("chains", "data", "tokens", "pairs"))]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    logged = sorted(name for name in after if name.startswith("logs/"))
    assert [Path(name).suffix for name in logged] == [".all", ".log"] and "claim" not in after
    place, options = url.split("?")
    sweep = load_sweep(f"{place}?{options}")
    assert sweep.chains["seed0-k8"].sae()[0].width == 256  # fetched as it is read
    assert len(next(iter(sweep.dataset().some_rows()))) == 2048  # read at the URL
    assert sweep.chains["seed0-k8"].core().size == load_sweep(small_sweep.output).chains["seed0-k8"].core().size
    (key,) = {name.split("/")[1] for name in after if name.startswith("sweeps/")}
    other = against(load(ReportCommand, ["--against", f"{place}/sweeps/{key}?{options}"]).against)
    assert other.numbers == sweep.numbers and other.chains["seed0-k8"].sae()[0].width == 256
    # It stands for the URL where the folder for temporary files was when the package was imported.
    shutil.rmtree(other.folder.parents[1])
    assert main(arguments(tmp_path, url, "b", "--clean", "--dry_run")) == 0
    assert "0 to remove" in capfd.readouterr().out


@pytest.mark.slow
def test_a_killed_machine_s_sweep_goes_on_from_another_to_the_bits_of_a_folder(small_sweep, s3, tmp_path):
    s3.proxy.reset()
    url = s3.url("killed", proxy=True)
    process = started(tmp_path, url, "a", "--sweep.seeds", "0")

    def middle() -> bool:
        return any("cycle_01/checkpoint.pt" in name for name in s3.names("killed"))

    wait_for(middle, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (record,) = [name for name in s3.content("killed") if name.endswith("record.json")]
    first = s3.content("killed")[record]
    run = finished(tmp_path, url, "b", "--sweep.seeds", "0")
    assert run.code == 0, run.out
    made = s3.content("killed")
    assert made[record] == first  # nothing finished is computed again
    assert not [name for name in made if name.endswith((".pt", "claim")) or "/attribution/" in name or ".tmp-" in name]
    output = s3.copy("killed", tmp_path / "whole")
    same_results(output, small_sweep.output, cycles=2)
    records = [json.loads(path.read_text()) for path in sorted(output.glob("chains/*/cycle_*/record.json"))]
    assert [one["generation"] for one in records] == [1, 2]
    (resume,) = records[1]["resumes"]
    assert resume["step"] > 0 and resume["step"] % 8 == 0
