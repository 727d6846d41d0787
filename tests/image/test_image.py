"""The image itself, as its user: what is in it, what it can do, and what it must not have."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from cluster.box import REPOSITORY

from image.built import Image
from image.container import Container

EVERYTHING = """
import importlib, pkgutil, dmsae_ray
names = [module.name for module in pkgutil.walk_packages(dmsae_ray.__path__, "dmsae_ray.")]
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:
        if error.name != "triton":  # comes with torch for GPUs alone
            raise
print(len(names), dmsae_ray.__file__)
"""
KERNELS = """
import shutil
from dmsae_ray.sae.ops import native
print(native.library()._name, *filter(shutil.which, ("cc", "gcc", "clang")))
"""
TESTERS = "pytest _pytest py.py pluggy iniconfig hypothesis _hypothesis_globals.py sortedcontainers".split()
"""What tests need and the image has not, from the environment of this one."""
TESTED = ("test_step.py", "test_gate.py", "test_loss.py", "test_threshold.py")
NEEDS_COMPILER = "test_kernels_that_cannot_be_built_name_the_reason"


def said(container: Container, *argv: object) -> str:
    done = container.run(argv)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_user_is_nobody_and_writes_at_home_alone(container: Container):
    assert said(container, "id", "--user").strip() == str(container.image.user) != "0"
    assert "CapEff:\t0000000000000000" in said(container, "cat", "/proc/self/status")
    said(container, "touch", "/home/dmsae/mine", "/tmp/mine", "/srv/mlflow/mine")
    for place in ("/", "/opt/venv", "/opt/kernels", "/etc"):
        assert container.run(["touch", f"{place}/mine"]).returncode != 0, place
    assert not (container.image.root / "home/dmsae/mine").exists(), "what one container writes is not the image's"


def test_its_default_command_is_the_help_of_the_sweep(container: Container):
    assert container.image.command == ["python", "-m", "dmsae_ray.sweep", "--help"]
    assert "--sweep.seeds" in said(container, *container.image.command)


def test_everything_can_be_imported_and_the_model_is_there(container: Container):
    count, file = said(container, "python", "-c", EVERYTHING).split()
    assert int(count) == len(list((REPOSITORY / "dmsae_ray").rglob("*.py"))) - 1
    package = container.image.root / Path(file).relative_to("/").parent
    ours = {path.relative_to(REPOSITORY / "dmsae_ray") for path in REPOSITORY.glob("dmsae_ray/**/*.safetensors")}
    assert ours and ours <= {path.relative_to(package) for path in package.rglob("*.safetensors")}


def test_the_kernels_are_there_without_a_compiler(container: Container):
    (kernels,) = said(container, "python", "-c", KERNELS).split()
    assert kernels.startswith("/opt/kernels/") and "no compiled kernels" not in kernels


def test_the_tests_of_the_training_step_pass_in_it(container: Container):
    """On the code and with the kernels of the image. One test builds kernels, which it cannot."""
    site, at = Path(sysconfig.get_path("purelib")), "/home/dmsae/testing"
    for name in TESTERS:
        container.show(site / name, f"{at}/packages/{name}")
    container.show(REPOSITORY / "tests", f"{at}/tests")
    container.environment |= {"PYTHONPATH": f"{at}/packages", "OMP_NUM_THREADS": "1"}
    folder = f"{at}/tests/unit/sae"
    run = ["python", "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", at, "-p", "no:cacheprovider"]
    done = container.run([*run, "-k", f"not {NEEDS_COMPILER}", *(f"{folder}/{name}" for name in TESTED)])
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout + done.stderr


def test_what_it_says_of_itself_and_must_not_have(image: Image):
    assert image.labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert image.health == ["CMD", "ray", "health-check"]
    assert not any((image.root / name).exists() for name in ("src", "usr/bin/gcc", "usr/bin/git", "root/.cache/pip"))
