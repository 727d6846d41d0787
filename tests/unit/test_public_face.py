"""What `import dmsae_ray` gives."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import dmsae_ray

EXPORTED = [
    "ActivationDataset",
    "Core",
    "Explorer",
    "MatryoshkaSAE",
    "PlainSAE",
    "load_core",
    "load_sae",
    "load_sweep",
    "read_sae",
]


def test_these_names_are_public_and_have_their_words():
    assert [name for name in dir(dmsae_ray) if not name.startswith("_") and name in dmsae_ray._EXPORTED] == EXPORTED
    assert sorted(dmsae_ray._EXPORTED) == EXPORTED
    for name in EXPORTED:
        found = getattr(dmsae_ray, name)
        assert found.__name__ == name and inspect.getdoc(found), name
    with pytest.raises(AttributeError, match="no attribute 'load_swep'"):
        _ = dmsae_ray.load_swep  # type: ignore[attr-defined]  # that is the test


def test_importing_the_package_imports_nothing_else():
    code = (
        "import sys; before = set(sys.modules); import dmsae_ray; "
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['dmsae_ray']"


def test_what_is_no_file_of_ours_is_named(tmp_path):
    for load, said in (
        (dmsae_ray.load_core, "core.safetensors: no such core file"),
        (dmsae_ray.load_sae, "sae.safetensors: cannot be read"),
        (dmsae_ray.load_sweep, "not a sweep's results folder"),
    ):
        with pytest.raises(ValueError, match=said):
            load(tmp_path)
    for name in "ab":
        (tmp_path / "sweeps" / name).mkdir(parents=True)
        (tmp_path / "sweeps" / name / "chains.json").write_text("[]")
    with pytest.raises(ValueError, match=r"holds the results of 2 sweeps \(a, b\); give the folder of one of them"):
        dmsae_ray.load_sweep(tmp_path)
