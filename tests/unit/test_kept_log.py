"""Logs that outlive their process: in a folder, and at a URL on a real S3 server."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dmsae_ray import files, kept_log, mirror
from dmsae_ray.kept_log import KeptLog
from dmsae_ray.mirror import mirror_of
from dmsae_ray.ownership import is_ours
from dmsae_ray.secret_url import SecretUrl

NAME = "logs/worker-0123456789ab-3-0-abcdef.log"


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(kept_log, "FIRST_S", 0.05)
    monkeypatch.setattr(kept_log, "EVERY_S", 0.3)


def test_what_is_kept_is_what_the_process_said_so_far_and_its_error(tmp_path, soon):
    out, err, to = tmp_path / "out", tmp_path / "err", tmp_path / NAME
    out.write_text("began\n")
    assert is_ours(NAME) and not is_ours(f"{NAME}/x")
    with pytest.raises(ZeroDivisionError), KeptLog([out, err], to, "worker 0 of seed0-k8"):
        until(to.exists)
        assert to.read_text() == "worker 0 of seed0-k8\nbegan\n"  # now, should the power go
        err.write_text("a warning\n")
        until(lambda: "a warning" in to.read_text())
        _ = 1 // 0
    assert to.read_text().startswith("worker 0 of seed0-k8\nbegan\na warning\nTraceback")
    assert to.read_text().endswith("ZeroDivisionError: integer division or modulo by zero\n")
    assert [path.name for path in to.parent.iterdir()] == [to.name]


def test_a_process_that_said_nothing_leaves_no_file(tmp_path):
    with KeptLog([tmp_path / "not there"], tmp_path / NAME, "worker 0"):
        pass
    assert not (tmp_path / "logs").exists()


def test_a_long_log_s_end_is_kept_without_secrets(tmp_path):
    said = tmp_path / "out"
    SecretUrl("https://me:a-secret-of-the-test@host/x")
    said.write_bytes(b"first\n" + b"x" * kept_log.MOST_BYTES + b"\nhttps://me:a-secret-of-the-test@host/x \xff\n")
    with KeptLog([said], tmp_path / NAME):
        pass
    kept = (tmp_path / NAME).read_text()
    left_out = said.stat().st_size - kept_log.MOST_BYTES
    assert kept.startswith(f"[{left_out} bytes before this are left out]\nxxx") and "a-secret" not in kept
    assert len(kept) < kept_log.MOST_BYTES + 100


def test_a_log_at_a_url_takes_few_requests_whatever_is_said(s3, tmp_path, soon, monkeypatch):
    monkeypatch.setattr(files, "_elsewhere", {})
    monkeypatch.setattr(mirror, "_mirrors", {})
    s3.proxy.reset()
    folder = mirror_of(SecretUrl(s3.url("kept-log", proxy=True)), tmp_path / "a").folder
    said, began = tmp_path / "out", time.monotonic()
    with KeptLog([said], folder / NAME), open(said, "w") as file:
        for line in range(2000):
            print(line, file=file, flush=True)
            time.sleep(0.0005)
        until(lambda: s3.content("kept-log").get(NAME, b"").endswith(b"\n1999\n"))  # sent before it ends
        sendings = (time.monotonic() - began) / 0.3 + 2
        time.sleep(0.7)
        asked = len(s3.proxy.served)  # nothing more is said, so that nothing more is sent
        time.sleep(0.7)
        assert len(s3.proxy.served) == asked <= 6 * sendings
    assert not (folder / "logs").exists()


def test_a_server_that_is_away_holds_no_end_up(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_elsewhere", {})
    monkeypatch.setattr(mirror, "_mirrors", {})
    monkeypatch.setattr(kept_log, "LAST_S", 0.5)
    folder = mirror_of(SecretUrl(s3.url("away", proxy=True)), tmp_path / "a").folder
    (tmp_path / "out").write_text("said\n")
    s3.proxy.reset(lambda request: True)
    began = time.monotonic()
    with KeptLog([Path(tmp_path / "out")], folder / NAME) as log:
        pass
    assert 0.4 < time.monotonic() - began < 5
    s3.proxy.reset()
    log._thread.join(60)
    assert s3.content("away") == {NAME: b"said\n"}
