"""`make ui`: where the runs are, and what stands in the way."""

import socket

import pytest

from dmsae_ray import ui
from dmsae_ray.driver.options import HarvestCommand, load
from dmsae_ray.show.mlflow.run_store import RunStore


def test_the_address_is_that_of_the_runs_also_after_a_move(tmp_path):
    old, new = tmp_path / "old", tmp_path / "a%20b #?"
    old.mkdir()
    experiment = RunStore(None, old, "dmsae_ray").experiment_id
    old.rename(new)
    config = load(HarvestCommand, ["--output", str(new)])
    assert ui.runs_of(config) == f"#/experiments/{experiment}/runs" and not old.exists()
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
