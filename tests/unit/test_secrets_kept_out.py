"""Secrets of URLs and of the environment are in nothing that a sweep writes: everything that writes configurations,
records, logs, parameters and tags is run with marked ones, and each file is searched. What is shown of a URL is in
test_secret_url.py; a whole sweep is searched in cluster/test_mlflow_node.py.
"""

from __future__ import annotations

import json
import logging
import os
import urllib.parse
from pathlib import Path

import pytest
import yaml
from plans import SMALL
from shards import make_dataset

from dmsae_ray.distill.failure import write_failure
from dmsae_ray.distill.folder import ChainFolder
from dmsae_ray.distill.grid import plan_chains
from dmsae_ray.driver.options import SweepCommand, load
from dmsae_ray.driver.results import write_results
from dmsae_ray.driver.session import door
from dmsae_ray.driver.sweep_run import listed, sweep_folder, sweep_key
from dmsae_ray.driver.tracked import tracker_of
from dmsae_ray.driver.transcript import Screen
from dmsae_ray.files import write_json
from dmsae_ray.lock import OutputLock
from dmsae_ray.secret_url import MASK, scrub, scrub_ours
from dmsae_ray.show.mlflow.run_store import RunStore
from dmsae_ray.store import Store, StoreError

MARK, OTHER = "hunter2", "swordfish"
"""In every secret of a URL, and of the environment."""
PASSWORD = f"p%40:{MARK}/+x"
ENVIRONMENT = {
    "AWS_SECRET_ACCESS_KEY": f"{OTHER}-of-the-bucket",
    "AWS_SESSION_TOKEN": f"{OTHER}-of-the-session",
    "HF_TOKEN": f"hf_{OTHER}",
    "MLFLOW_TRACKING_PASSWORD": f"{OTHER} of the lab",
    "RAY_AUTH_TOKEN": f"{OTHER}0123456789",
}
URLS = {
    "track.uri": f"postgresql://lab:{PASSWORD}@host:5432/runs?password={MARK}",
    "harvest.store": f"s3://key:{PASSWORD}@bucket/p?endpoint_override=http%3A%2F%2Fu:{MARK}@127.0.0.1:1&secret_key={MARK}",
    "corpus.source": f"https://u:{PASSWORD}@host/texts?sig={MARK}",
}
PAGE = "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=x&compareRunsMode=CHART"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def fields(urls: dict[str, str]) -> dict:
    tree: dict = {"name": "marked", "sweep": {"seeds": [0, 1], "k": [4]}}
    for field, url in urls.items():
        section, name = field.split(".")
        tree.setdefault(section, {})[name] = url
    return tree


def marked(content: bytes) -> bool:
    return MARK.encode() in content or OTHER.encode() in content


def holding_the_mark(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and marked(path.read_bytes())]


def leak() -> str:
    """What a library may say."""
    of_urls = [*URLS.values(), *map(urllib.parse.unquote, URLS.values())]
    return "; ".join([f"cannot open {url!r}" for url in of_urls] + [f"refused {v}" for v in ENVIRONMENT.values()])


def test_the_mark_is_found(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.db").write_bytes(b"\0" + PASSWORD.encode())
    assert MARK in leak() and OTHER in leak() and holding_the_mark(tmp_path) == [tmp_path / "folder" / "x.db"]


def test_nothing_that_a_sweep_writes_holds_a_secret(tmp_path, capfd):
    home, file = tmp_path / "out", tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(fields(URLS)))
    dataset = make_dataset(tmp_path / "data")
    config = load(SweepCommand, ["--config", str(file), "--output", str(home), *SMALL])
    assert config.track.uri.reveal() == URLS["track.uri"], "they are used"
    lock = OutputLock(home)
    plans = plan_chains(config, dataset)
    folder = sweep_folder(config, plans)
    folder.mkdir(parents=True)
    with Screen(home, "sweep", verbose=False) as say:
        say(f"at {config.track.uri}: {leak()}")
        say(PAGE)
        os.write(1, leak().encode())  # as Ray prints
        logging.getLogger("dmsae_ray").warning("%s", leak())
        ray = say.path.with_suffix(".ray") / "session" / "worker.out"
        ray.parent.mkdir(parents=True)
        ray.write_text(leak())
        (folder / "config.yaml").write_text(yaml.safe_dump(config.section_dict(), sort_keys=False))
        write_json(folder / "chains.json", [listed(plan) for plan in plans])
        for plan in plans:
            plan.folder.describe(plan.key, plan.label, plan.fields)
        try:
            raise OSError(leak())
        except OSError as error:
            write_failure(plans[0], lock.lease(), "error", f"worker 0: {error}", cycle=0)
        tracker = tracker_of(config, sweep_key(plans), plans, dataset, RunStore(None, home, "experiment"))
        assert tracker.sync()
        write_results(config, dataset, plans, folder, say, connect=lambda: None, fresh=True)
        tracker.close("FAILED")
    lock.release()
    written = [path for path in home.rglob("*") if path.is_file()]
    assert {"mlflow.db", "config.yaml", "chain.json", "failed.json", "worker.out", "report.html"} <= {
        path.name for path in written
    }
    assert len([path for path in written if path.parent.name == "logs"]) >= 2
    assert holding_the_mark(home) == []
    assert MASK in (folder / "config.yaml").read_text() and MASK in ChainFolder(plans[0].folder.path).failure().reason
    said = capfd.readouterr()
    assert PAGE in said.out, "it can be opened"
    assert not marked((said.out + said.err).encode())
    assert "postgresql://***@host:5432/runs?password=***" in said.out


def test_no_error_says_one(capfd):
    @door(SweepCommand, "stopped")
    def fails(command: SweepCommand) -> int:
        raise ValueError(leak())

    assert fails([]) == 2
    said = capfd.readouterr()
    assert MASK in said.err and not marked((said.out + said.err).encode())


def test_a_store_that_refuses_does_not_say_it(tmp_path):
    """Nor do pyarrow and the server's own words."""
    url, _, _ = URLS["harvest.store"].replace(PASSWORD, urllib.parse.quote(PASSWORD, safe="")).partition("&secret_key")
    store = Store(f"{url}&scheme=http&region=us-east-1", attempts=1)
    with pytest.raises(StoreError) as error:
        store.read("manifest.json")
    assert MARK not in str(error.value) and "s3://bucket/p/manifest.json" in str(error.value)


def test_what_is_short_in_the_environment_hides_no_text(monkeypatch):
    monkeypatch.setenv("ANY_TOKEN", "step")
    assert scrub("step 3 of 4") == "step 3 of 4"
    monkeypatch.setenv("ANY_TOKEN", "a longer one")
    assert scrub("a longer one") == MASK
    assert os.environ["ANY_TOKEN"] == "a longer one"


@pytest.mark.parametrize(
    "argv, flag",
    [
        (["--track.uri", URLS["track.uri"]], "--track.uri"),
        ([f"--harvest.store={URLS['harvest.store']}"], "--harvest.store"),
        (["--corpus.mixture", json.dumps([{"source": URLS["corpus.source"], "weight": 1}])], "--corpus.mixture"),
    ],
)
def test_a_secret_among_the_arguments_is_warned_of(capsys, argv, flag):
    load(SweepCommand, argv)
    said = capsys.readouterr().out
    assert said.startswith(f"warning: {flag} holds a secret") and MARK not in said


@pytest.mark.parametrize("url", ["postgresql://lab@host/db", "s3://bucket/x?endpoint_override=host:9000&scheme=http"])
def test_a_name_alone_and_what_is_no_secret_are_not_warned_of(capsys, url):
    load(SweepCommand, ["--track.uri", url] if url.startswith("post") else ["--output", url])
    assert "holds a secret" not in capsys.readouterr().out


def test_a_password_that_is_a_word_is_not_taken_out_of_other_words(monkeypatch):
    monkeypatch.setenv("POSTGRES_PASSWORD", "quickstart")
    monkeypatch.setenv("OTHER_PASSWORD", "postgres9-")
    shown = scrub_ours("in /tmp/quickstart and quickstarts; the password is quickstart, then postgres9-x")
    assert shown == "in /tmp/quickstart and quickstarts; the password is ***, then ***x"


def test_other_arguments_are_not(capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(fields(URLS)))
    load(SweepCommand, ["--config", str(file), "--output", "s3://bucket/p?region=eu", "--sweep.seeds", "0"])
    assert "warning" not in capsys.readouterr().out
