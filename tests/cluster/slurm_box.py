"""Slurm whose nodes are machines of a box: a controller, from which jobs are submitted, and two that compute.

They have a folder in common, at /share. Slurm tells its users' programs apart by munge, whose key lies in it here.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from cluster.box import REPOSITORY, Box, Node

JOB = REPOSITORY / "jobs" / "slurm.sbatch"
STARTS_S, HANGS = 120.0, 1800.0
PACKAGES = {"slurm-wlm": "slurmctld slurmd sbatch srun scancel scontrol squeue", "munge": "munged"}
ENV = {"SLURM_CONF": "/share/slurm.conf"}

CONFIG = """
ClusterName=box
SlurmctldHost=control
SlurmUser=root
AuthInfo=socket=/tmp/munge/socket,cred_expire=15
StateSaveLocation=/srv/slurmctld
SlurmdSpoolDir=/srv/slurmd
SlurmctldPidFile=/srv/slurmctld.pid
SlurmdPidFile=/srv/slurmd.pid
SlurmctldLogFile=/srv/slurmctld.log
SlurmdLogFile=/srv/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=one,two CPUs=2 RealMemory=2000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
"""A job that goes back to the queue waits until its credentials have expired, two minutes by default."""


def lacking() -> str:
    """What this machine lacks for Slurm; empty if nothing."""
    without = [package for package, names in PACKAGES.items() if not all(map(shutil.which, names.split()))]
    return f"apt-get install {' '.join(without)}" if without else ""


class SlurmBox:
    """share: a folder of this machine, which all nodes have at /share."""

    def __init__(self, box: Box, share: Path):
        self.share = share
        (share / "slurm.conf").write_text(CONFIG)
        (share / "munge.key").write_bytes(secrets.token_bytes(128))
        (share / "munge.key").chmod(0o600)
        self.control, self.one, self.two = (box.node(name, share) for name in ("control", "one", "two"))
        self.computing = (self.one, self.two)
        for node, daemon in ((self.control, "slurmctld"), (self.one, "slurmd"), (self.two, "slurmd")):
            self._start(node, daemon)
        self._wait(lambda: self.ask("sinfo", "-h", "-o", "%D %T") == "2 idle", lambda: self.ask("sinfo", "-N", "-l"))

    def _start(self, node: Node, daemon: str) -> None:
        made = node.run(["mkdir", "-p", "/tmp/munge", "/srv/slurmctld", "/srv/slurmd"])
        assert made.returncode == 0, made.stderr
        files = [f"--{what}-file=/tmp/munge/{what}" for what in ("pid", "log", "seed")]
        # It wants a user of its own, and says so, unless it is told otherwise.
        munged = ["munged", "--foreground", "--force", "--socket=/tmp/munge/socket", "--key-file=/share/munge.key"]
        node.popen([*munged, *files], log=node.disk / "munged.log")
        self._wait((node.disk / "tmp/munge/socket").exists, (node.disk / "munged.log").read_text)
        node.popen([daemon, "-D"], env=ENV, log=node.disk / f"{daemon}.log")

    def _wait(self, condition: Callable[[], object], tell: Callable[[], str]) -> None:
        end = time.monotonic() + STARTS_S
        while not condition():
            assert time.monotonic() < end, tell()
            time.sleep(0.2)

    def ask(self, *command: str) -> str:
        """What a command of Slurm says, given on the controller."""
        done = self.control.run(["env", "--chdir=/share", *command], env=ENV)
        return (done.stdout + done.stderr).strip()

    def submit(self, *args: str, options: tuple[str, ...] = (), **variables: str) -> SlurmJob:
        """jobs/slurm.sbatch, with these options of sbatch, and arguments of the command; variables: of sbatch's
        environment.
        """
        sbatch = ["env", "--chdir=/share", "sbatch", "--parsable", *options, JOB, *args]
        done = self.control.run(sbatch, env=ENV | variables)
        assert done.returncode == 0, done.stderr
        return SlurmJob(self, done.stdout.strip())


class SlurmJob:
    def __init__(self, slurm: SlurmBox, number: str):
        self.slurm, self.number = slurm, number

    @property
    def said(self) -> str:
        """What all its runs have said."""
        path = self.slurm.share / f"dmsae-{self.number}.out"
        return path.read_text() if path.exists() else ""

    def shows(self, field: str) -> str:
        """A field of `scontrol show job`, such as JobState, ExitCode, Restarts or RunTime."""
        fields = self.slurm.ask("scontrol", "show", "job", self.number).split()
        return next((word.split("=", 1)[1] for word in fields if word.startswith(f"{field}=")), "")

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Until then the job is not to end."""
        end = time.monotonic() + HANGS
        while not condition():
            assert not self.ended() and time.monotonic() < end, f"{self.shows('JobState')}: {self.said}"
            time.sleep(0.5)

    def ended(self) -> bool:
        return self.shows("JobState") not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")

    def wait(self) -> str:
        """The state in which it has ended."""
        end = time.monotonic() + HANGS
        while not self.ended():
            assert time.monotonic() < end, self.said
            time.sleep(0.5)
        return self.shows("JobState")
