"""Two commands on one small cluster: together they ask for all it has, and both finish. Short form: streams that leave
one CPU to reading, in tests/pipeline/test_streams.py.
"""

import pytest
from ray_head import ray_head
from victims import Victim, copy_parts, none_left_running  # noqa: F401 (a fixture is used by its name)


@pytest.mark.slow
def test_two_sweeps_whose_workers_hold_every_cpu_both_finish(small_sweep, tmp_path):
    """One CPU for each one's only worker, on the two that our own error message asks for: none is left for reading
    rows.
    """
    with ray_head(cpus=2) as (address, _, env):
        running = []
        for seed in "01":
            output = tmp_path / seed / "out"
            copy_parts(small_sweep.output, output, "data", "tokens")
            args = ("--sweep.seeds", seed, "--sweep.cycles", "1", "--cluster.cpus_per_worker", "1")
            running.append(Victim(output, *args, **env | {"RAY_ADDRESS": address}))
        for command in running:
            command.finish()
            assert "joined, 2 logical CPUs" in command.said
