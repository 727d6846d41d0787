"""The folder of a Ray of our own: nobody else's, and gone with its process, or soon after."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from dmsae_ray.cluster import temporary
from dmsae_ray.cluster.temporary import private_folder, remove


def test_what_a_killed_command_left_is_removed_and_what_one_at_work_has_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    code = (
        "from dmsae_ray.cluster.temporary import private_folder; import os, signal; print(private_folder(), flush=True)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", f"{code}; os.kill(os.getpid(), 9)"], stdout=subprocess.PIPE, text=True
    )
    left = tmp_path / os.path.basename(killed.stdout.strip())
    assert left.is_dir() and left.stat().st_mode & 0o777 == 0o700
    working = subprocess.Popen(
        [sys.executable, "-c", f"{code}; input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert working.stdout is not None
    busy = tmp_path / os.path.basename(working.stdout.readline().strip())
    first = private_folder()
    assert left.exists(), "it may be about to be held"
    long_ago = time.time() - 2 * temporary.NEW_S
    for folder in (left, busy, first):
        os.utime(folder, (long_ago, long_ago))
    second = private_folder()
    assert not left.exists() and busy.exists() and first.exists()
    working.communicate("\n")
    remove(first), remove(second)
    assert not first.exists() and not second.exists()
