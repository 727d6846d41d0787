"""The study's results on a real MLflow server, asked through its API and looked at in its own page."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError

import mlflow
import pytest
from chromium import launched
from conftest import HANGS, environment, free_port, results, run_command
from playwright.sync_api import expect

import dmsae_ray


class Server:
    """`mlflow server` on a database of its own."""

    printed = ""
    """address that the command which logged to it printed"""

    def __init__(self, folder: Path):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = open(folder / "server.log", "w")
        # Started by its own Python and in a group of its own: its workers end with it.
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mlflow",
                "server",
                "--backend-store-uri",
                f"sqlite:///{folder / 'store.db'}",
                "--artifacts-destination",
                str(folder / "artifacts"),
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--workers",
                "1",
            ],
            env=environment(
                MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"
            ),  # eight processes less
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        end = time.monotonic() + HANGS
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                pytest.fail((folder / "server.log").read_text())
            time.sleep(0.2)

    def _healthy(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=2).read() == b"OK"
        except (URLError, OSError):
            return False

    def api(self, path: str, **body) -> dict:
        request = urllib.request.Request(
            f"{self.url}/api/2.0/mlflow/{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        return json.load(urllib.request.urlopen(request, timeout=300))

    def runs(self, experiment: str, query: str) -> dict[str, dict]:
        """Runs by name."""
        found = self.api("runs/search", experiment_ids=[experiment], filter=query, max_results=200).get("runs", [])
        return {run["info"]["run_name"]: run for run in found}

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(timeout=HANGS)
        self._log.close()


@pytest.fixture(scope="module")
def server(study, tmp_path_factory):
    """A server that has the whole study, logged by a run of the command that had nothing else left to do."""
    folder = tmp_path_factory.mktemp("mlflow")
    shutil.copy(study[0].parent / "small.yaml", folder / "small.yaml")
    shutil.copytree(study[0], folder / "out", ignore=shutil.ignore_patterns("mlflow.db", "mlartifacts", "mlflow_home"))
    server = Server(folder)
    run = run_command(folder / "out", "--track.uri", server.url)
    assert run.code == 0 and "ray: " not in run.out, run.out
    (server.printed,) = re.findall(r"MLflow: (http\S+)", run.out)
    yield server, folder / "out"
    server.stop()


@pytest.fixture(scope="module")
def experiment(server):
    (found,) = [
        one for one in server[0].api("experiments/search", max_results=10)["experiments"] if one["name"] == "dmsae_ray"
    ]
    return found["experiment_id"]


def tags_of(run: dict) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in run["data"]["tags"]}


def metrics_of(run: dict) -> dict[str, float]:
    return {metric["key"]: metric["value"] for metric in run["data"]["metrics"]}


def dataset_of(output: Path) -> str:
    """Key of the dataset that the chains were trained on."""
    (key,) = {json.loads(path.read_text())["fields"]["dataset"] for path in output.glob("chains/*/chain.json")}
    return key


def test_runs_are_found_by_stage_arm_seed_and_k(server, experiment):
    here, output = server
    chains = here.runs(experiment, "tags.`dmsae.kind` = 'chain'")
    rows = {
        row["chain"]: row
        for row in json.loads((results(output) / "evaluation.json").read_text())["rows"]
        if row["last"]
    }
    assert chains.keys() == rows.keys()
    for label, run in chains.items():
        row, tags = rows[label], tags_of(run)
        assert [tags[name] for name in ("stage", "arm", "seed", "k", "chain")] == [
            row["stage"],
            row["arm"],
            str(row["seed"]),
            str(row["k"]),
            label,
        ]
        assert run["info"]["status"] == "FINISHED"
        metrics = metrics_of(run)
        assert metrics["sae/fvu"] == pytest.approx(row["fvu"]) and metrics["core/size"] == row["core_out"]
        assert len(metrics) < 40
        assert [one["dataset"]["digest"] for one in run["inputs"]["dataset_inputs"]] == [dataset_of(output)]
    found = here.runs(experiment, "tags.arm = 'base' and tags.stage = 'distill' and tags.k = '8'")
    assert sorted(found) == ["seed0-k8", "seed1-k8"]
    params = [{param["key"]: param["value"] for param in run["data"]["params"]} for run in found.values()]
    assert {one["seed"] for one in params} == {"0", "1"}
    placebo = {p["key"]: p["value"] for p in chains["seed0-k8-random"]["data"]["params"]}
    assert placebo["selection.by"] == "random", "an arm's run has the arm's own parameters"


def test_tables_pictures_and_the_page_are_there_and_equal_the_files(server, experiment, tmp_path):
    here, output = server
    (run,) = here.runs(experiment, "tags.stage = 'sweep'").values()
    run_id, folder = run["info"]["run_id"], results(output)
    client = mlflow.MlflowClient(here.url)
    # Asked for through the tracking server alone: an artifact that it cannot give would not be in its page either.
    got = {entry.path for entry in client.list_artifacts(run_id)}
    assert {
        "report.html",
        "report.txt",
        "consistency.png",
        "core_sizes.png",
        "evaluation.json",
        "comparison.json",
        "consensus.json",
        "features.json",
        "expectations.json",
        "numbers.json",
        "tables",
    } <= got
    assert (
        Path(client.download_artifacts(run_id, "report.html", str(tmp_path))).read_bytes()
        == (folder / "report.html").read_bytes()
    )
    assert Path(client.download_artifacts(run_id, "consistency.png", str(tmp_path))).read_bytes().startswith(b"\x89PNG")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(here.url)  # load_table downloads by it, whatever client it is asked of
    try:
        tables = {
            name: client.load_table(experiment, f"tables/{name}.json", run_ids=[run_id])
            for name in ("chains", "pairs", "evaluation", "expectations", "features", "groups", "rediscovery")
        }
    finally:
        mlflow.set_tracking_uri(before)
    pairs = json.loads((folder / "comparison.json").read_text())["pairs"]
    assert tables["pairs"]["pw_mcc"].tolist() == pytest.approx([pair["pw_mcc"] for pair in pairs])
    assert len(tables["evaluation"]) == len(json.loads((folder / "evaluation.json").read_text())["rows"])
    assert tables["expectations"]["outcome"].tolist() == ["hit", "hit", "miss", "not available"]
    assert tables["features"]["id"].tolist() == [
        group["id"] for group in json.loads((folder / "consensus.json").read_text())["groups"]
    ]
    assert (
        tables["rediscovery"]["chain"].tolist()[0] == "seed100-k8-plain"
        and "base/seed" in tables["groups"]["group"].tolist()
    )
    numbers = json.loads((folder / "numbers.json").read_text())
    assert metrics_of(run)["results/consistency.base.seed.pw_mcc"] == pytest.approx(
        numbers["consistency.base.seed.pw_mcc"]
    )


def test_a_core_is_read_through_the_server(server, experiment):
    here, output = server
    (run,) = here.runs(experiment, "tags.chain = 'seed0-k8' and tags.`dmsae.kind` = 'chain'").values()
    want = dmsae_ray.load_sweep(results(output)).chains["seed0-k8"].core()
    for end in ("core", "cycle_01/core.safetensors"):
        found = dmsae_ray.load_core(f"runs:/{run['info']['run_id']}/{end}", store=here.url)
        assert found.fingerprint == want.fingerprint


def test_the_printed_address_shows_all_cores_with_size_and_agreement(server, experiment):
    """In the first screen, and the list of chains beside it has them as columns."""
    here, output = server
    chains = here.runs(experiment, "tags.arm = 'base' and tags.`dmsae.kind` = 'chain'")
    assert here.printed.startswith(f"{here.url}/#/experiments/{experiment}/runs?") and len(chains) == 2
    with launched() as browser:
        page, errors = browser.new_page(viewport={"width": 1400, "height": 900}), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.set_default_timeout(120_000)
        page.goto(here.printed)
        for chart in ("core/size", "agreement/pw_mcc"):
            expect(page.get_by_text(chart, exact=True).first).to_be_in_viewport(timeout=120_000)
        for label, run in chains.items():
            expect(page.get_by_text(label, exact=True).first).to_be_in_viewport(timeout=120_000)
            metrics = metrics_of(run)
            for name in ("core/size", "agreement/pw_mcc"):
                bar = page.locator(".bartext", has_text=f"{metrics[name]:.2f}").first
                expect(bar).to_be_in_viewport(timeout=120_000)
        # From nothing, as who opens an address: the page takes the shared view out of it once it has read it.
        page.goto("about:blank")
        page.goto(here.printed.replace("-compare&compareRunsMode=CHART", "-chains"))
        for column in ("seed", "k", "arm", "core/size", "agreement/pw_mcc", "sae/l0"):
            expect(page.locator(".ag-header-cell", has_text=column).first).to_be_visible(timeout=120_000)
        for label, run in chains.items():
            row = page.locator(".ag-row", has_text=label).first
            expect(row).to_be_in_viewport(timeout=120_000)
            # Pinned columns are a table of their own; a row has the same id in both.
            cell = page.locator(f".ag-row[row-id='{row.get_attribute('row-id')}'] [col-id='metrics.`core/size`']")
            expect(cell).to_have_text(f"{metrics_of(run)['core/size']:g}", timeout=120_000)
        assert errors == []
