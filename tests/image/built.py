"""The image of docker/Dockerfile, built without a container engine or a registry: by buildah, on Debian's Python.

The base image is made by debootstrap and stands for the one that the Dockerfile names; another is taken with

    make test-image BUILD_ARGS='--build-arg BASE=python:3.11-slim-bookworm'

BUILD_ARGS are further arguments of `buildah build`, such as --volume for pip's configuration of this machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cluster.box import REPOSITORY
from compose_file import COMPOSE, DOCKER, load

STORE = Path("/var/tmp/dmsae_ray-image")
"""Images and containers; it may be deleted."""
BASE = "localhost/dmsae_ray-base:bookworm"
INPUTS = "dmsae_ray.made-of"
"""The label with the digest of what it was made of."""
PACKAGES = ("python3.11-venv", "python3-distutils", "ca-certificates")
BUILD_ARGS = shlex.split(os.environ.get("BUILD_ARGS", ""))
DOCKERFILE = DOCKER / "Dockerfile"


@cache
def missing() -> str:
    """What this machine lacks for building; empty if nothing."""
    if os.geteuid() != 0:
        return "building an image needs root"
    lacking = [program for program in ("buildah", "debootstrap") if shutil.which(program) is None]
    return f"apt-get install {' '.join(lacking)}" if lacking else ""


def buildah(*arguments: object, show: bool = False) -> str:
    """What it says, unless that is shown while it comes. Raises OSError if it fails."""
    where = ["--storage-driver", "vfs", "--root", STORE / "storage", "--runroot", STORE / "run"]
    command = ["buildah", *map(str, [*where, *arguments])]
    done = subprocess.run(command, capture_output=not show, text=True)
    if done.returncode:
        raise OSError(f"{shlex.join(command)}: {done.returncode}" if show else f"{shlex.join(command)}: {done.stderr}")
    return "" if show else done.stdout.strip()


def has(image: str) -> bool:
    return bool(buildah("images", "--quiet", "--filter", f"reference={image}"))


def make_base() -> None:
    """Debian with the Python that it has, as an image; the next time it is there."""
    if has(BASE) or any(argument.startswith("BASE=") for argument in BUILD_ARGS):
        return
    container = buildah("from", "scratch")
    root = Path(buildah("mount", container))
    strap = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", "bookworm", str(root)]
    done = subprocess.run(strap, capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stdout[-3000:] + done.stderr)
    for kept in (*root.glob("var/cache/apt/archives/*.deb"), *root.glob("var/lib/apt/lists/*_*")):
        kept.unlink()
    buildah("commit", "--rm", container, BASE)


@dataclass(frozen=True)
class Image:
    """It, unpacked."""

    root: Path
    """its files, which are not to be changed"""
    env: dict[str, str]
    user: int
    group: int
    folder: str
    """where its commands start"""
    command: list[str]
    labels: dict[str, str]
    health: list[str]
    """its own check"""
    bytes: int


def made_of() -> str:
    """A digest of all that the image is made of, but for what the base and the indices of packages have."""
    digest = hashlib.sha256(repr(BUILD_ARGS).encode())
    allowed = re.findall(r"^!(.+)$", (DOCKER / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    files = [DOCKERFILE]
    for place in (REPOSITORY / name for name in allowed):
        files += sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    for file in (file for file in files if "__pycache__" not in file.parts):
        digest.update(f"{file.relative_to(REPOSITORY)} {file.stat().st_mode}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def build() -> Image:
    """The image under the name that the compose file has, from this checkout as it lies here; if it is there already,
    that one.
    """
    name, inputs = load(COMPOSE)["services"]["head"]["image"], made_of()
    unpacked = f"of-{inputs[:16]}"
    there = buildah("containers", "--format", "{{.ContainerName}}").split()
    for container in set(there) - {unpacked}:
        buildah("rm", container)
    if not has(name) or config_of(name)["Labels"].get(INPUTS) != inputs:
        make_base()
        how = ["--isolation", "chroot", "--format", "docker", "--layers=false", "--build-arg", f"BASE={BASE}"]
        as_what = ["--label", f"{INPUTS}={inputs}", "--tag", name]
        buildah("build", *how, *BUILD_ARGS, *as_what, "--file", DOCKERFILE, REPOSITORY, show=True)
        for dangling in buildah("images", "--quiet", "--filter", "dangling=true").split():
            buildah("rmi", dangling)
    config = config_of(name)
    user, group = re.fullmatch(r"(\d+):(\d+)", config["User"]).groups()  # type: ignore[union-attr]
    if unpacked not in there:
        buildah("from", "--pull-never", "--name", unpacked, name)
    root = Path(buildah("mount", unpacked))
    return Image(
        root,
        dict(line.split("=", 1) for line in config["Env"]),
        int(user),
        int(group),
        config["WorkingDir"],
        config["Cmd"],
        config["Labels"],
        config["Healthcheck"]["Test"],
        int(subprocess.run(["du", "-sb", root], capture_output=True, text=True, check=True).stdout.split()[0]),
    )


def config_of(image: str) -> dict[str, Any]:
    return json.loads(buildah("inspect", "--type", "image", image))["Docker"]["config"]
