"""Places are settled where the configuration is made; a plan that travels means the same under another folder, home and
environment.
"""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dmsae_ray.distill.grid import plan_all
from dmsae_ray.driver.options import EvaluateCommand, SweepCommand, load
from dmsae_ray.identity import chain_fields, dataset_fields, fields_key
from dmsae_ray.lm.source import TINY

SAY = """
import pickle, sys
from dmsae_ray.corpus.local_files import is_hub, local_files
from dmsae_ray.lm.source import local_folder
for plan in pickle.load(sys.stdin.buffer):
    c = plan.config
    sources = [part.source.reveal() for part in c.corpus.parts]
    sources = [source if is_hub(source) else [str(path) for path in local_files(source)] for source in sources]
    rest = (c.harvest.store, c.harvest.dataset, c.sae.core, c.track.uri)
    print(c.home, plan.folder.path, plan.references, local_folder(c.model.name), sources, *rest)
"""


def plans(*argv):
    return plan_all(load(SweepCommand, list(argv)), "", "0123456789ab")[:1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder whose name looks like a pattern, with a model and texts in it."""
    here = tmp_path / "he[r]e"
    for name in ("texts", "more"):
        (here / name).mkdir(parents=True)
        (here / name / "a.txt").write_text("text")
    shutil.copytree(TINY, here / "models" / "mine")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.delenv("DMSAE_RAY_HOME", raising=False)
    return here


def test_a_plan_means_the_same_in_a_process_with_another_folder_home_and_environment(here, tmp_path):
    mixture = (
        '[{"source": "te*/*.txt", "weight": 1}, {"source": "~/mo*/a.txt", "weight": 1}, {"source": "owner/name", '
        '"weight": 1}]'
    )
    travelled = [
        *plans(
            "--output",
            "out",
            "--model.name",
            "models/mine",
            "--corpus.source",
            "texts",
            "--track.uri",
            "sqlite:///runs.db",
        ),
        *plans("--model.name", "google/gemma", "--harvest.store", "~/store", "--corpus.mixture", mixture),
        *plans("--harvest.dataset", "data/x"),
    ]
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "google" / "gemma").mkdir(parents=True)
    (elsewhere / "owner" / "name").mkdir(parents=True)

    def said(cwd: Path, **env: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", SAY],
            input=pickle.dumps(travelled),
            cwd=cwd,
            env=os.environ | env,
            capture_output=True,
            check=True,
        )
        return done.stdout.decode().splitlines()

    lines = said(elsewhere, HOME=str(elsewhere), DMSAE_RAY_HOME=str(elsewhere / "made"))
    key = travelled[0].key
    assert lines[0] == (
        f"{here}/out {here}/out/chains/{key} {here}/out/data/0123456789ab {here}/models/mine [['{here}/texts/a.txt']] "
        f"None None None sqlite:///{here}/runs.db"
    )
    assert lines[1].startswith(f"{here}/dmsae_ray/quickstart ")
    assert lines[1].endswith(
        f" None [['{here}/texts/a.txt'], ['{here}/more/a.txt'], 'owner/name'] {here}/store None None None"
    )
    assert f" {here}/data/x " in lines[2]


def test_keys_do_not_depend_on_where_things_lie(here):
    def keys(*argv):
        config = load(SweepCommand, list(argv))
        return fields_key(dataset_fields(config, "model", "corpus")), fields_key(
            chain_fields(config, 0, 16, "0123456789ab")
        )

    plain = keys()
    for argv in (
        ["--output", "out"],
        ["--model.name", "models/mine"],
        ["--corpus.source", "texts"],
        ["--harvest.store", "x"],
        ["--harvest.dataset", "x"],
    ):
        assert keys(*argv) == plain, argv


@pytest.mark.parametrize(
    "given, meant",
    [
        ("sqlite:///runs.db", "sqlite:///{here}/runs.db"),
        ("sqlite:///a/runs.db?timeout=9", "sqlite:///{here}/a/runs.db?timeout=9"),
        ("sqlite:////x/runs.db", "sqlite:////x/runs.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("file:./runs", "file://{quoted}/runs"),
        ("file:///x/runs", "file:///x/runs"),
        ("runs", "{here}/runs"),
        ("http://host:5000", "http://host:5000"),
        ("databricks", "databricks"),
        ("postgresql://host/runs", "postgresql://host/runs"),
    ],
)
def test_a_tracking_store_in_a_file_is_absolute(here, given, meant):
    expected = meant.format(here=here, quoted=here.as_uri().removeprefix("file://"))
    config = load(SweepCommand, ["--track.uri", given])
    assert config.track.uri == expected
    assert load(SweepCommand, ["--track.uri", expected]).track.uri == expected, "read again it is the same"


def test_an_arm_s_core_and_another_sweep_s_folder_are_absolute(here):
    from dmsae_ray.driver.options import ReportCommand

    (here / "mine.yaml").write_text("study: {arms: {moved: {fields: {sae.core: a.safetensors}}}}\n")
    config = load(SweepCommand, ["--config", "mine.yaml"])
    assert config.study.arms["moved"].fields["sae.core"] == here / "a.safetensors"
    assert load(ReportCommand, ["--against", "other"]).against == str(here / "other")
    url = "s3://bucket/x/sweeps/mine-0123456789ab?region=r"
    assert load(ReportCommand, ["--against", url]).against == url


def test_a_user_who_is_not_there_is_named(here):
    with pytest.raises(ValueError, match="output: ~nobody-of-this-name/x: .*give the whole path"):
        load(SweepCommand, ["--output", "~nobody-of-this-name/x"])


@pytest.mark.parametrize(
    "text, words",
    [
        ("train: {lr: 0.1}\nsweep: {k: [8]}\ntrain: {batch: 512}\n", ["line 3", "train", "second time", "line 1"]),
        ("sweep:\n  k: [8]\n  seeds: [0]\n  k: [16]\n", ["line 4", " k ", "line 2"]),
        ("study:\n  arms:\n    a:\n      fields: {sae.width: 8}\n    a: {cycles: 1}\n", ["line 5", " a ", "line 3"]),
    ],
)
@pytest.mark.parametrize("command", [SweepCommand, EvaluateCommand])
def test_a_key_that_is_given_twice_is_an_error(tmp_path, text, words, command):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load(command, ["--config", str(path)])
    for word in [f"{path}: ", *words]:
        assert word in str(error.value), error.value


def test_what_is_merged_in_may_be_overridden(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "train: &a {lr: 0.1, batch: 512}\nattribution: {tau: 0.5}\nharvest:\n  seed: 3\ncompare: {<<: {draws: 130, "
        "seed: 1}, seed: 2}\n"
    )
    config = load(SweepCommand, ["--config", str(path)])
    assert (config.compare.draws, config.compare.seed, config.train.batch) == (130, 2, 512)


def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes("name: mine\n# für die Prüfung\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"mine\.yaml: line 2: byte 0xfc is not UTF-8 text .*save the file as UTF-8"):
        load(SweepCommand, ["--config", str(path)])
    path.write_bytes("\ufeffname: mine\n".encode())
    assert load(SweepCommand, ["--config", str(path)]).name == "mine", "a byte order mark is no mistake"
