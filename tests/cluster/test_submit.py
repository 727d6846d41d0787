"""`ray job submit` from another machine, to a cluster of four that share a folder."""

from __future__ import annotations

import pytest
from conftest import command, same_results

from cluster.ray_box import RayBox


@pytest.mark.parametrize(
    "token",
    [
        pytest.param({}, id="none"),
        pytest.param({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, id="wrong"),
    ],
)
def test_a_submission_without_the_token_is_refused(ray_box: RayBox, token: dict[str, str]):
    file = f"touched-with-{len(token)}"
    job = ray_box.try_to_submit(["touch", f"/share/{file}"], ray_box.client, token)
    assert job.wait() != 0 and "AuthenticationError" in job.said and "submitted successfully" not in job.said, job.said
    job.env = ray_box.token
    asked = job.ask("status")
    assert asked.returncode != 0 and f"Job {job.id} does not exist" in asked.stdout + asked.stderr, asked
    assert not (ray_box.share / file).exists()
    accepted = ray_box.submit(["touch", f"/share/{file}"])
    assert accepted.wait() == 0 and (ray_box.share / file).exists(), accepted.said


def test_a_job_on_several_machines_comes_to_the_bits_of_one(small_sweep, ray_box: RayBox):
    """Cores, SAEs and the rows that were trained on, of all chains."""
    output = ray_box.share / "out"
    argv = [word.replace(str(ray_box.share), "/share") for word in command(output)]
    job = ray_box.submit(["python", *argv[1:]])
    assert job.wait() == 0, job.said
    assert "joined, 3 logical CPUs" in job.said and "chains: 2 to run" in job.said and "succeeded" in job.said, job.said
    same_results(output, small_sweep.output, cycles=4)

    ours = "tmp/ray/session_*/runtime_resources/working_dir_files/*/dmsae_ray/config.py"
    at_work = {node.name for node in ray_box.workers.values() if any(node.disk.glob(ours))}
    assert len(at_work) >= 2, f"our code was wanted on {at_work} alone"
    assert not any((node.disk / "root/dmsae_ray").exists() for node in ray_box.box.nodes.values())
