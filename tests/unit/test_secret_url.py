"""URLs that may hold a secret: what is shown of them, and that no front door says or keeps more."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import yaml

from dmsae_ray import evaluate, harvest, report, sweep, ui
from dmsae_ray.config import Config
from dmsae_ray.driver.options import SweepCommand, load
from dmsae_ray.driver.preflight import preflight
from dmsae_ray.driver.transcript import Screen
from dmsae_ray.secret_url import MASK, SecretUrl, masked, scrub

SECRET = "hunter2/+x"
URLS = {
    f"postgresql://name:{SECRET}@host:5432/db?sslmode=require": "postgresql://***@host:5432/db?sslmode=require",
    "postgresql://name:hun@ter2?x@host/db": "postgresql://***@host/db",
    "mysql+pymysql://name:hunter2#x@host/db?password=hunter2": "mysql+pymysql://***@host/db?password=***",
    "https://hunter2@host/x": "https://***@host/x",
    f"s3://key:{SECRET}@bucket/p?region=eu&endpoint_override=http%3A%2F%2Fu:hunter2@h:9": (
        "s3://***@bucket/p?region=eu&endpoint_override=http://***@h:9"
    ),
    "s3://bucket/p?secret_key=hunter2&access_key=hunter2;token=hunter2": "s3://bucket/p?secret_key=***&access_key=***;token=***",
    "https://host/x?sv=1&sig=hunter2%3D&X-Amz-Signature=hunter2": "https://host/x?sv=***&sig=***&X-Amz-Signature=***",
    "https://host/x?hunter2": "https://host/x?***",
    "https://host/x#token=hunter2": "https://host/x#token=***",
    "name:hunter2@host/x": "name:***@host/x",
}
PLAIN = [
    "embedded",
    "owner/name:part",
    "/data/a@b.txt",
    "~/texts/*.jsonl",
    "s3://bucket/p@v1/x?region=eu&scheme=http",
    "http://host:9000/p",
    "sqlite:////home/a b/x@y/m?o.db",
    "file:///a@b",
    "databricks://profile",
]


@pytest.mark.parametrize("url", URLS)
def test_what_may_be_a_secret_is_masked_wherever_a_url_is_printed(url):
    secret, shown = SecretUrl(url), URLS[url]
    assert {str(secret), f"{secret}", f"{secret:s}", masked(url)} == {shown} and repr(secret) == repr(shown)
    assert yaml.safe_load(yaml.safe_dump({"uri": secret})) == {"uri": shown}
    for same in (pickle.loads(pickle.dumps(secret)), copy.deepcopy(secret), SecretUrl(secret)):
        assert same == secret == url and same.reveal() == url
    assert "hunter2" not in scrub(f"could not open '{url}': no such host\n{url}") and "no such host" in scrub(
        f"'{url}': no such host"
    )
    assert scrub(shown) == shown and scrub(f"{shown}: gone, {shown}.") == f"{shown}: gone, {shown}."


@pytest.mark.parametrize("url", PLAIN)
def test_what_holds_no_secret_is_shown_as_it_is(url):
    assert str(SecretUrl(url)) == url == SecretUrl(url).reveal() and scrub(f"{url} not found") == f"{url} not found"


def test_a_part_of_a_url_is_masked_in_texts_of_others():
    SecretUrl("postgresql://u:pa%2Fssword@h/d")
    assert scrub("auth of pa/ssword (pa%2Fssword) failed") == "auth of *** (***) failed"


def options(url: str) -> list[str]:
    return ["--track.uri", url, "--harvest.store", url, "--corpus.mixture", json.dumps([{"source": url, "weight": 1}])]


@pytest.mark.parametrize("url", URLS)
def test_a_configuration_dumps_them_masked_and_hands_them_on_whole(url):
    command = load(SweepCommand, options(url))
    config = pickle.loads(pickle.dumps(Config(**command.sections())))
    for shown in (
        repr(config),
        str(command),
        config.model_dump_json(),
        json.dumps(config.section_dict()),
        yaml.safe_dump(config.section_dict()),
    ):
        assert "hunter2" not in shown and URLS[url] in shown
    assert config.track.uri.reveal() == config.harvest.store.reveal() == config.corpus.parts[0].source.reveal() == url


def test_arms_hand_them_on_whole():
    arms = {"random": {"fields": {"selection.by": "random", "selection.size": "match"}}}
    config = load(SweepCommand, ["--track.uri", "https://u:hunter2@h", "--study.arms", json.dumps(arms)])
    assert config.of_arm("random").track.uri.reveal() == "https://u:hunter2@h"


@pytest.mark.parametrize(
    "main, argv",
    [
        *((sweep.main, ["--corpus.source", url]) for url in URLS if "://" in url),
        *(
            (main, [field, "postgresql://u:hunter2@h/d?token=hunter2"])
            for main in (sweep.main, harvest.main, report.main, evaluate.main, ui.main)
            for field in ("--track", "--track.url", "--train.tokens")
        ),
        (sweep.main, ["--corpus.mixture", '[{"source": 3, "url": "https://u:hunter2@h"}]']),
    ],
)
def test_no_mistake_says_them(main, argv, tmp_path, capfd):
    assert main([*argv, "--output", str(tmp_path / "out")]) == 2
    said = capfd.readouterr()
    assert said.err.startswith("error: ") and "hunter2" not in said.out + said.err


def test_a_masked_one_is_not_used_but_asked_for_again(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(load(SweepCommand, ["--track.uri", "https://u:hunter2@h"]).section_dict()))
    config = load(SweepCommand, ["--config", str(path)])
    with pytest.raises(ValueError, match=r"^track\.uri https://\*\*\*@h: .* give the whole URL again"):
        preflight(config)


def test_each_part_of_a_mixture_is_looked_at(tmp_path):
    """Also the first of several, which all have the same field."""
    parts = [{"source": f"s3://{MASK}@bucket/a", "weight": 1}, {"source": str(tmp_path), "weight": 1}]
    with pytest.raises(ValueError, match=r"^corpus\.source s3://\*\*\*@bucket/a: .* give the whole URL again"):
        preflight(Config(corpus={"mixture": parts}))


def test_what_libraries_print_is_kept_without_them(tmp_path):
    """Through the file descriptors, as Ray prints, and in the logs that Ray leaves."""
    secret = SecretUrl("postgresql://u:pa%2Fssword@h/d")
    with Screen(tmp_path, "sweep", verbose=False) as say:
        os.write(1, f"engine for {secret.reveal()}\nfor u: pa/ssword\n".encode())
        ray = say.path.with_suffix(".ray")
        (ray / "events").mkdir(parents=True)
        (ray / "events" / "x.log").write_bytes(b"\xff pa%2Fssword \xff")
        (ray / "link").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").write_text("pa/ssword")
    assert say.path.with_suffix(".all").read_text() == "engine for postgresql://***@h/d\nfor u: ***\n"
    assert (ray / "events" / "x.log").read_bytes() == b"\xff *** \xff" and (
        tmp_path / "elsewhere"
    ).read_text() == "pa/ssword"


def test_an_error_that_nobody_expected_is_printed_without_them(tmp_path):
    code = (
        "from dmsae_ray.driver.options import SweepCommand, load\n"
        "config = load(SweepCommand, ['--track.uri', 'https://u:hunter2@h/x'])\n"
        "raise RuntimeError('cannot open ' + config.track.uri.reveal()) from KeyError('hunter2')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (
        done.returncode == 1 and "RuntimeError: cannot open https://***@h/x" in done.stderr and "line 3" in done.stderr
    )
    assert "hunter2" not in done.stderr.replace("KeyError('hunter2')", ""), "the source line alone, if at all"
