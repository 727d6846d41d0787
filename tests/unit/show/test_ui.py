"""`make ui`: where the runs are, and what stands in the way."""

import socket

import pytest

from dmsae_ray import ui
from dmsae_ray.driver.options import HarvestCommand, load
from dmsae_ray.show.mlflow.run_store import RunStore
from dmsae_ray.show.mlflow.views import places, shared_views


def test_the_address_is_that_of_the_runs_also_after_a_move(tmp_path, tables_made_once):
    old, new = tmp_path / "old", tmp_path / "a%20b #?"
    old.mkdir()
    store = RunStore(None, old, "dmsae_ray")
    store.load()
    config = load(HarvestCommand, ["--output", str(old)])
    with pytest.raises(ValueError, match="has no sweep yet"):
        ui.runs_of(config)
    for key in ("first", "last"):
        run = store.open(key, "sweep", key, key, {}, None, start_ms={"first": 1000, "last": 2000}[key])
        store.set_status(run, "FINISHED", end_ms={"first": 5000, "last": 6000}[key])
    assert "python -m dmsae_ray.report" in ui.runs_of(config)["runs"], "an earlier version wrote no views"
    for name, state in shared_views("last", store.home).items():
        store.experiment_tag(name, state)
    old.rename(new)
    config = load(HarvestCommand, ["--output", str(new)])
    assert ui.runs_of(config) == places(store.experiment_id, "last", store.home, run)._asdict() and not old.exists()
    with pytest.raises(ValueError, match="no experiment 'another'"):
        ui.runs_of(load(HarvestCommand, ["--output", str(new), "--track.experiment", "another"]))


def test_a_port_in_use_and_an_empty_folder_are_said(tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MLFLOW_PORT", str(taken.getsockname()[1]))
        assert ui.main(["--output", str(tmp_path)]) == 2
        assert "Address already in use" in (said := capsys.readouterr().err) and "MLFLOW_PORT=5001" in said
    assert ui.main(["--output", str(tmp_path)]) == 2 and "nothing logged yet" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_PORT", "here")
    assert ui.main(["--output", str(tmp_path)]) == 2 and "not a port" in capsys.readouterr().err
