"""Names that stand in files become paths. Whoever may write the file must not reach what lies elsewhere with them.

What a store does with names and links, and a manifest with those of shards, is in test_ownership.py; what a mirror does
in test_mirror.py; models and corpora are in lm/test_source.py and corpus/test_formats.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from records import cycle_record
from shards import make_dataset

from dmsae_ray.activations.dataset import ActivationDataset, DatasetError
from dmsae_ray.config import Config
from dmsae_ray.driver.housekeeping import dataset_of
from dmsae_ray.lock import OutputLock
from dmsae_ray.results.saved_sweep import SavedSweep
from dmsae_ray.store import StoreError
from dmsae_ray.sweep import main

OUT = [
    "../../precious",
    "/precious",
    "0123456789ab/../../precious",
    "0123456789ab\n",
    "..",
    "",
    None,
    3,
    ["0123456789ab"],
]
"""What is no key."""


def put(path: Path, tree: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))
    return path


@pytest.fixture
def home(tmp_path) -> Path:
    """An output folder, beside something that is not its own."""
    OutputLock(tmp_path / "a" / "b" / "out").release()
    put(tmp_path / "a" / "precious" / "cycle_00" / "record.json", cycle_record())
    return tmp_path / "a" / "b" / "out"


def sweep_of(home: Path, key: object, dataset: object) -> Path:
    """A results folder whose files name a chain and a dataset."""
    folder = home / "sweeps" / "small-0123456789ab"
    put(folder / "config.yaml", {"name": "small"})
    put(folder / "chains.json", [{"label": "seed0-k16", "key": key, "cycles": 1}])
    if isinstance(key, str) and key == "aaaaaaaaaaaa":
        put(home / "chains" / key / "chain.json", {"fields": {"dataset": dataset}})
        put(home / "chains" / key / "cycle_00" / "record.json", cycle_record())
    return folder


@pytest.mark.parametrize("key", OUT)
def test_a_sweep_names_chains_and_a_dataset_by_keys_alone(home, key):
    for chain, dataset in ((key, ""), ("aaaaaaaaaaaa", key)):
        with pytest.raises(ValueError, match=r"chains?\.json: names .* where a key of twelve hex digits belongs"):
            SavedSweep.open(sweep_of(home, chain, dataset))


@pytest.mark.parametrize("key", OUT)
def test_cleaning_does_not_look_where_a_name_leads(home, capsys, key):
    """And removes nothing if it cannot tell what is needed."""
    sweep_of(home, key, "")
    put(home / "pairs" / "0123456789ab.json", {})
    assert main(["--output", str(home), "--clean"]) == 0
    assert "where a key of twelve hex digits belongs" in capsys.readouterr().out
    assert (home / "pairs" / "0123456789ab.json").exists()
    sweep_of(home, "aaaaaaaaaaaa", key)
    with pytest.raises(ValueError, match="not known which activations this chain needs: nothing is removed"):
        dataset_of(home / "chains" / "aaaaaaaaaaaa")
    assert main(["--output", str(home), "--clean"]) == 2
    assert (home / "pairs" / "0123456789ab.json").exists() and (home.parents[1] / "precious").exists()


@pytest.mark.parametrize("key", ["../x", "/x", "a/b", "", ".."])
def test_a_manifest_s_key_names_a_folder(tmp_path, key):
    """In which what was measured of the dataset is looked for, and written."""
    folder = make_dataset(tmp_path / "data").store.local
    tree = json.loads((folder / "manifest.json").read_text())
    put(folder / "manifest.json", tree | {"key": key})
    with pytest.raises(DatasetError, match=r"manifest\.json: not a manifest \(its key .* cannot name a folder"):
        ActivationDataset(folder)


def test_a_shard_that_is_a_link_is_not_read(tmp_path):
    dataset = make_dataset(tmp_path / "data")
    shard = dataset.store.path(dataset.manifest.shards[0].file)
    shard.rename(tmp_path / "elsewhere.parquet")
    shard.symlink_to(tmp_path / "elsewhere.parquet")
    with pytest.raises(StoreError, match="by a link leads out of this folder"):
        ActivationDataset(tmp_path / "data").verify()


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", ".x", "", "a b", "a\n"])
def test_a_sweep_s_name_is_one_folder_s(name):
    with pytest.raises(ValidationError):
        Config(name=name)


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", ".x", "", "a_b", "a\n"])
def test_so_is_an_arm_s(name):
    with pytest.raises(ValidationError):
        Config(study={"arms": {name: {"seeds": [0]}}})


@pytest.mark.parametrize("hook", ["../x", "blocks.0.hook_resid_post/../../x", "blocks.../x.hook_resid_post", "/x"])
def test_a_hook_is_one_of_the_model_s(tmp_path, capsys, hook):
    for field in ("--model.hook", "--harvest.hooks"):
        assert main(["--output", str(tmp_path / "out"), field, hook]) == 2
        assert hook in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").rglob("x"))
