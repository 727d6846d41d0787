"""docker/README.md, from secrets to results: what compose.yaml names is started, and a sweep is submitted to it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest
from cluster.box import Box
from compose_file import DOCKER
from conftest import SMALL, same_results
from pyarrow import fs

from image.built import Image
from image.deployment import Deployment, missing

SUBMIT = "docker compose exec head ray job submit"
HANGS_S = 3600


def of_the_readme() -> list[str]:
    """The command that docker/README.md submits the quickstart by, as it runs in the head."""
    text = (DOCKER / "README.md").read_text().replace("\\\n", " ")
    (line,) = [line.strip() for line in text.splitlines() if line.strip().startswith(SUBMIT)]
    return shlex.split(line)[4:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """docker/ with secrets of its own, by the script that users call."""
    if lacking := missing():
        pytest.skip(f"NOT RUN: {lacking}")
    copy = tmp_path_factory.mktemp("docker")
    for name in ("secrets.sh", "mlflow_auth.ini"):
        shutil.copy(DOCKER / name, copy)
    for _ in range(2):  # the second time it leaves what is there
        subprocess.run(["sh", copy / "secrets.sh"], check=True, capture_output=True)
    return copy


@pytest.fixture(scope="module")
def deployed(image: Image, folder: Path) -> Iterator[Deployment]:
    with Box() as box:
        up = Deployment(box, image, folder)
        print("up after", {name: round(seconds) for name, seconds in up.seconds.items()})
        yield up


class Lab:
    """A user outside of the containers: MLflow and the object store, with the passwords in secrets/."""

    def __init__(self, deployed: Deployment, folder: Path):
        read = ConfigParser()
        read.read([folder / "secrets/mlflow_credentials", folder / "secrets/s3_keys"])
        self.mlflow = f"http://{deployed.ours['mlflow'].node.address}:5000"
        self.user, self.password = (read["mlflow"][f"mlflow_tracking_{what}"] for what in ("username", "password"))
        keys = read["default"]
        self.store = fs.S3FileSystem(
            access_key=keys["aws_access_key_id"],
            secret_key=keys["aws_secret_access_key"],
            endpoint_override=f"{deployed.running['objects'][0].node.address}:8333",
            scheme="http",
            region="us-east-1",
        )

    def ask(self, path: str, password: str, **body: object) -> dict:
        who = b64encode(f"{self.user}:{password}".encode()).decode()
        # The name under which containers know it: others are refused.
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {who}", "Host": "mlflow:5000"}
        request = urllib.request.Request(f"{self.mlflow}/api/2.0/mlflow/{path}", json.dumps(body).encode(), headers)
        return json.load(urllib.request.urlopen(request, timeout=120))

    def files(self, prefix: str) -> dict[str, fs.FileInfo]:
        below = fs.FileSelector(f"dmsae/{prefix}", recursive=True, allow_not_found=True)
        found = [info for info in self.store.get_file_info(below) if info.type == fs.FileType.File]
        return {info.path.removeprefix(f"dmsae/{prefix}/"): info for info in found}

    def copy(self, prefix: str, folder: Path) -> Path:
        for name, info in self.files(prefix).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with self.store.open_input_file(info.path) as file:
                (folder / name).write_bytes(file.read())
        return folder


@pytest.fixture
def lab(deployed: Deployment, folder: Path) -> Lab:
    return Lab(deployed, folder)


def test_without_password_or_token_nothing_is_given(deployed: Deployment, lab: Lab):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        lab.ask("experiments/search", "wrong", max_results=1)
    head = deployed.ours["head"]
    token = head.environment["RAY_AUTH_TOKEN_PATH"]
    head.environment["RAY_AUTH_TOKEN_PATH"] = "/dev/null"
    done = head.run(["ray", "job", "list", "--address", "http://127.0.0.1:8265"])
    head.environment["RAY_AUTH_TOKEN_PATH"] = token
    assert done.returncode != 0, done.stdout
    ask = "from pyarrow import fs; s3 = dict(endpoint_override='objects:8333', scheme='http', region='us-east-1'"
    for keys, code in (("", 0), (", anonymous=True", 1)):
        done = head.run(["python", "-c", f"{ask}{keys}); fs.S3FileSystem(**s3).get_file_info('dmsae')"])
        assert done.returncode == code, done.stderr


def test_a_sweep_on_it_comes_to_the_bits_of_a_plain_one(small_sweep, deployed: Deployment, lab: Lab, tmp_path):
    """Also: with the kernels of the image, its Python and its torch, on two machines without a common disk."""
    head = deployed.ours["head"]
    wrote = head.run(["sh", "-c", f"cat > small.yaml <<'END'\n{SMALL}\nEND"])
    assert wrote.returncode == 0, wrote.stderr
    submit = [word.replace("/quickstart?", "/small?") for word in of_the_readme()]
    done = head.run([*submit, "--config", "/home/dmsae/small.yaml"], timeout=HANGS_S)
    assert done.returncode == 0 and "succeeded" in done.stdout, done.stdout + done.stderr
    assert "no compiled kernels" not in done.stdout and "joined, 4 logical CPUs" in done.stdout, done.stdout
    same_results(lab.copy("small", tmp_path / "small"), small_sweep.output, cycles=4)


def test_the_quickstart_of_the_readme_leaves_its_results(deployed: Deployment, lab: Lab):
    begin = time.monotonic()
    done = deployed.ours["head"].run(of_the_readme(), timeout=HANGS_S)
    print(f"quickstart: {time.monotonic() - begin:.0f} s")
    assert done.returncode == 0 and "succeeded" in done.stdout, done.stdout + done.stderr
    names = lab.files("quickstart")
    (results,) = {name.split("/")[1] for name in names if name.startswith("sweeps/")}
    for name in ("report.html", "comparison.json", "consensus.json", "features.json"):
        assert names[f"sweeps/{results}/{name}"].size > 100, name
    assert not any(name.endswith("failed_parts.json") for name in names)
    cores = [name for name in names if re.fullmatch(r"chains/[^/]+/cycle_\d+/core\.safetensors", name)]
    assert len(cores) == 4 * 4, cores
    found = lab.ask("experiments/search", lab.password, max_results=100)["experiments"]
    ids = [one["experiment_id"] for one in found]
    runs = lab.ask("runs/search", lab.password, experiment_ids=ids, max_results=100)["runs"]
    ended = {run["info"]["run_name"]: run["info"]["status"] for run in runs}
    chains = {f"seed{seed}-k{k}" for seed in (0, 1) for k in (16, 32)}
    assert {*chains, "quickstart"} <= ended.keys() and set(ended.values()) == {"FINISHED"}, ended
