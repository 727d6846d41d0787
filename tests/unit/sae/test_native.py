"""Kernels that were built ahead, as an image has them: without a compiler, for this processor and this source alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_step import assert_same, batches, new_trainer

from dmsae_ray.sae.ops import native


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    made = native.build_ahead(folder)
    assert made and sorted(made) == sorted(folder.iterdir())
    return folder


@pytest.fixture
def fresh(monkeypatch):
    """As a new process: no kernels are loaded yet. Afterwards those of other tests are."""
    caches = (native.library, native._function)
    for cached in caches:
        cached.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


def no_compiler(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def states() -> list[object]:
    trainer, made = new_trainer(), []
    for x_BD in batches(8):
        trainer.step(x_BD)
        made.append(trainer.state_dict())
    assert trainer.loss.ops.name == "compiled"
    return made


def test_without_a_compiler_they_come_to_the_bits_of_those_built_here(fresh, built, tmp_path):
    here = states()
    native.library.cache_clear()
    native._function.cache_clear()
    no_compiler(fresh, tmp_path)
    fresh.setenv("DMSAE_RAY_KERNELS", str(built))
    assert_same(states(), here)
    assert Path(native.library()._name).parent == built and not (tmp_path / "cache").exists()


def test_those_of_another_source_are_not_taken(fresh, built, tmp_path):
    no_compiler(fresh, tmp_path)
    fresh.setenv("DMSAE_RAY_KERNELS", str(built))
    fresh.setattr(native, "SOURCE", tmp_path / "other.c")
    native.SOURCE.write_text(Path(native.__file__).with_name("kernels.c").read_text() + "/* changed */\n")
    with pytest.raises(native.NotBuilt, match="no C compiler"):
        native.library()


def test_those_for_a_better_processor_are_not_taken(fresh, built, tmp_path):
    no_compiler(fresh, tmp_path)
    fresh.setenv("DMSAE_RAY_KERNELS", str(built))
    fresh.setattr(native, "_processor", lambda: "flags : fpu sse sse2")
    with pytest.raises(native.NotBuilt, match="no C compiler"):
        native.library()
