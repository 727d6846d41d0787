"""The files of jobs/ that clusters read: what reads them accepts them, and would say what is misspelt."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dmsae_ray.driver.options import SweepCommand, load

REPOSITORY = Path(__file__).parents[2]
JOBS = REPOSITORY / "jobs"
RAYJOB = yaml.safe_load((JOBS / "rayjob.yaml").read_text())
CLUSTER = yaml.safe_load((JOBS / "cluster.yaml").read_text())
SCHEMA = json.loads((REPOSITORY / "tests" / "data" / "rayjob_schema.json").read_text())


def faults(rayjob: dict[str, Any]) -> list[str]:
    """What Kubernetes would refuse of it, or leave out in silence."""
    return [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(rayjob)]


def changed(tree: dict[str, Any], path: tuple[str | int, ...], value: object) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    inner: Any = tree
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return tree


def test_kubernetes_knows_every_field_of_the_rayjob():
    assert faults(RAYJOB) == []


HEAD = ("spec", "rayClusterSpec", "headGroupSpec")
CONTAINER = (*HEAD, "template", "spec", "containers", 0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "backOffLimit"), 3),
        (("spec", "backoffLimit"), "3"),
        (("spec", "preRunningDeadlineSeconds"), 0),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "Token"),
        ((*HEAD, "rayStartParams", "num-cpus"), 0),
        ((*CONTAINER, "envForm"), []),
        ((*CONTAINER, "resources", "limits", "memory"), "16 GB"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "volumes", 0, "emptyDirr"), {}),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, tuple) else None,
)
def test_a_misspelt_field_of_the_rayjob_is_found(path, value):
    assert faults(changed(RAYJOB, path, value)) != []


def test_what_the_operator_asks_of_a_rayjob_besides():
    """Beyond its schema, KubeRay refuses these when the job is made."""
    spec, cluster = RAYJOB["spec"], RAYJOB["spec"]["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert (RAYJOB["apiVersion"], RAYJOB["kind"]) == ("ray.io/v1", "RayJob")
    assert len(RAYJOB["metadata"]["name"]) <= 47
    assert spec["submissionMode"] == "SidecarMode" and not {"submitterPodTemplate", "submitterConfig"} & spec.keys()
    assert spec["shutdownAfterJobFinishes"]  # else neither Kueue nor ttlSecondsAfterFinished
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
    assert {pod["template"]["spec"]["restartPolicy"] for pod in pods} == {"Never"}
    pinned = next(
        line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line.startswith("ray==")
    )
    assert pinned == f"ray=={cluster['rayVersion']}"


def test_the_rayjobs_command_is_one_of_ours():
    *python, config, path = shlex.split(RAYJOB["spec"]["entrypoint"])[:5]
    rest = shlex.split(RAYJOB["spec"]["entrypoint"])[5:]
    assert python == ["python", "-m", "dmsae_ray.sweep"] and config == "--config"
    pods = [RAYJOB["spec"]["rayClusterSpec"]["headGroupSpec"], *RAYJOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    for pod in pods:
        (mount,) = [m for m in pod["template"]["spec"]["containers"][0]["volumeMounts"] if m["name"] == "config"]
        assert Path(path).parent == Path(mount["mountPath"])
    options = load(SweepCommand, ["--config", str(REPOSITORY / "configs" / "gemma2_2b_l12_65k.yaml"), *rest])
    assert str(options.output).startswith("s3://") and options.cluster.gpus_per_worker == 1


def test_ray_up_takes_the_cluster_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(CLUSTER))
    validate_config(prepared)
    assert prepared["available_node_types"]["local.cluster.node"]["min_workers"] == 2
    for path in (("worker_setup_command",), ("auth", "ssh_usr")):
        with pytest.raises(jsonschema.ValidationError, match=path[-1]):
            validate_config(prepare_config(changed(CLUSTER, path, "x")))
    missing = [path for path in CLUSTER["file_mounts"].values() if not path.startswith("~")]
    assert missing and all((REPOSITORY / path).exists() for path in missing)


def start_options() -> list[tuple[str, str]]:
    """Options of `ray start` as they stand in files: name and file."""
    commands = [*CLUSTER["head_start_ray_commands"], *CLUSTER["worker_start_ray_commands"]]
    slurm = (JOBS / "slurm.sbatch").read_text()
    node = slurm[slurm.index("\nnode='") : slurm.index("\n'\n")]
    readme = [line for line in (JOBS / "README.md").read_text().splitlines() if " ray start " in line]
    texts = {"cluster.yaml": "\n".join(commands), "slurm.sbatch": node, "README.md": "\n".join(readme)}
    found = [(name, file) for file, text in texts.items() for name in re.findall(r"(?<=[\s(])--([a-z][a-z-]+)", text)]
    cluster = RAYJOB["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        found += [(name, "rayjob.yaml") for name in group["rayStartParams"]]
    return found


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_ray_start_knows_its_options():
    from ray.scripts.scripts import start

    known = {name.lstrip("-") for option in start.params for name in (*option.opts, *option.secondary_opts)}
    found = start_options()
    assert {file for _, file in found} == {"cluster.yaml", "slurm.sbatch", "rayjob.yaml", "README.md"}
    assert [pair for pair in found if pair[0] not in known] == []


def test_the_slurm_job_is_a_shell_program():
    checked = subprocess.run(["bash", "-n", JOBS / "slurm.sbatch"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
