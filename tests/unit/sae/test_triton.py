"""Triton's kernels: against torch in triton's interpreter, and compiled for an H100, both without a GPU.

In processes of their own, because triton is told to interpret before it is imported, and then for good.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is there for Linux only")

HERE = Path(__file__).parent


def run(*command, **environment):
    environment = os.environ | {"PYTHONPATH": f"{HERE.parents[2]}:{HERE}", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [sys.executable, *command],
        cwd=HERE,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_kernels_do_what_torch_does():
    run("-m", "pytest", "-q", "-n", "0", "triton_kernels.py", "-m", "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["stops or ahead", "not (stops or ahead)"])
def test_kernels_do_what_torch_does_in_the_longer_cases(part):
    run("-m", "pytest", "-q", "-n", "0", "triton_kernels.py", "-m", "slow", "-k", part)


def test_kernels_compile_for_an_h100_and_a_step_asks_the_device_for_nothing(tmp_path):
    out = run("triton_compile.py", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    kernels = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert {entry["kernel"] for entry in kernels} == {
        "prepare_rows",
        "gradient_squares",
        "adam",
        "sampled",
        "decode",
        "weight_gradients",
        "append",
        "count_sure",
        "count_digits",
        "choose_digit",
    }
    for entry in kernels:
        assert entry["spilled"] == entry["stack"] == 0, entry
        assert entry["shared"] <= 227 * 1024, entry
        if entry["kernel"] == "append" and "bf16" in entry["types"]:
            # Two programs on a multiprocessor (64 Ki registers, 227 KiB): one multiplies while the other hands on its
            # pairs.
            assert entry["registers"] * entry["warps"] * 32 * 2 <= 1 << 16 and entry["shared"] * 2 <= 227 * 1024, entry
            assert entry["tensor_cores"], entry
