"""The hub, by a server that answers as it does: mistyped names end soon and say both readings, and names of data follow
content alone.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import multiprocessing
import os
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from dmsae_ray.hub import SECONDS
from dmsae_ray.lm.source import TINY, model_info

COMMITS = {"main": "a" * 40, "other": "b" * 40}
"""`other` differs from main by an edit of the README."""


def git_id(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    """owner/tiny is the shipped model and owner/texts a data set of one file; there is nothing else."""

    def files(self, kind: str, commit: str) -> dict[str, bytes]:
        readme = {"README.md": commit.encode()}
        if kind == "models":
            return readme | {
                path.name: path.read_bytes() for path in TINY.iterdir() if path.is_file() and path.name != "README.md"
            }
        return readme | {"data.jsonl": b'{"text": "a"}\n'}

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        if path.startswith(("api/models/", "api/datasets/")):
            _, kind, owner, name, *rest = path.split("/")
            if rest[:1] == ["tree"]:
                return self.answer(200, b"[]", Content_Type="application/json")  # folders of chat templates
            self.server.asked.append(self.path)
            if f"{kind}/{owner}/{name}" not in ("models/owner/tiny", "datasets/owner/texts"):
                return self.answer(404, b"", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            revision = rest[1] if rest else "main"
            commit = COMMITS.get(revision, revision)
            siblings = [
                {"rfilename": file, "size": len(content), "blobId": git_id(content)}
                | (
                    {"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}}
                    if file.endswith(".safetensors")
                    else {}
                )
                for file, content in self.files(kind, commit).items()
            ]
            return self.answer(
                200,
                json.dumps({"id": f"{owner}/{name}", "sha": commit, "siblings": siblings}).encode(),
                Content_Type="application/json",
            )
        if path.startswith("owner/tiny/resolve/"):
            revision, file = path.split("/")[3:5]
            content = self.files("models", COMMITS.get(revision, revision)).get(file)
            if content is not None:
                etag = hashlib.sha256(content).hexdigest() if file.endswith(".safetensors") else git_id(content)
                return self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=COMMITS.get(revision, revision))
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMITS.get(revision, revision))
        return self.answer(404, b"")

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["dmsae_ray.driver.sweep_run", "torch"])


@dataclass
class Ended:
    """What a process said, and its exit status."""

    returncode: int
    stdout: str
    stderr: str


def run_code(code: str, args: tuple[str, ...], environment: dict[str, str], out: Path, err: Path) -> None:
    """In the process itself, in which nothing has asked yet what is in the environment."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    assert "huggingface_hub" not in sys.modules
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *args]
    exec(code, {"__name__": "__main__"})


def python(code: str, home: Path, endpoint: str, *args: str, **more: str) -> Ended:
    """In a process of its own: the hub's library reads its variables when it is imported. It is a fork of one that has
    imported the rest, which takes seconds.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = kept | {"HF_HOME": str(home), "HF_ENDPOINT": endpoint} | more
    said = home / "stdout", home / "stderr"
    process = FORKS.Process(target=run_code, args=(code, args, environment, *said))
    process.start()
    process.join(600)
    assert process.exitcode is not None, "it hangs"
    return Ended(process.exitcode, *(path.read_text() for path in said))


SWEEPS = """
import sys, time
import dmsae_ray.sweep, dmsae_ray.driver.sweep_run, huggingface_hub
for given in sys.argv[2:]:
    since = time.time()
    print("code", dmsae_ray.sweep.main([*given.split("="), "--output", sys.argv[1]]), time.time() - since)
    print("end of command", file=sys.stderr)
"""
"""Commands one after the other in one process, which pays once for its imports: each one's exit status and seconds."""
MISTYPED = [("--model.name", "models/gemma", "model"), ("--corpus.source", "data/my.text", "data set")]


def sweeps(home, endpoint: str, *given: str, **more: str) -> list[tuple[int, float, str]]:
    """Exit status, seconds and errors of the command with each of these options."""
    done = python(SWEEPS, home, endpoint, str(home / "out"), *given, **more)
    ends = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("code ")]
    assert len(ends) == len(given), done.stdout + done.stderr
    said = done.stderr.split("end of command\n")
    return [(int(code), float(seconds), words) for (code, seconds), words in zip(ends, said, strict=False)]


def test_a_name_that_nobody_has_is_one_message_with_both_readings(hub, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    done = sweeps(tmp_path, endpoint, *(f"{flag}={name}" for flag, name, _ in MISTYPED))
    for (flag, name, kind), (code, _, said) in zip(MISTYPED, done, strict=True):
        assert code == 2, said
        asking, error = [line for line in said.splitlines() if line.startswith(("hub:", "error:"))]
        assert f"asking {endpoint} about the {kind} {name}" in asking
        assert (
            f"{flag[2:]} {name}: nothing here has this name, and the hub has no such {kind}" in error
            and f"correct {flag[2:]}" in error
        )
    assert len(hub.asked) == 2 and not (tmp_path / "out" / "tokens").exists()


def test_a_hub_that_does_not_answer_is_waited_for_once(tmp_path):
    with socket.socket() as silent:  # takes connections, and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for code, seconds, said in sweeps(tmp_path, endpoint, *(f"{flag}={name}" for flag, name, _ in MISTYPED)):
            assert code == 2 and "could not be asked" in said, said
            assert SECONDS - 1 < seconds < 6 * SECONDS  # the rest is a busy machine's


def test_no_network_wanted_is_said_at_once(tmp_path):
    ((code, seconds, said),) = sweeps(tmp_path, "http://127.0.0.1:9", "--model.name=owner/tiny", HF_HUB_OFFLINE="1")
    assert code == 2 and "could not be asked (OfflineModeIsEnabled" in said and seconds < SECONDS


INFO = """
import sys
from dmsae_ray.lm.source import model_info, pinned_revision
for revision in sys.argv[1:]:
    revision = revision or None
    print(pinned_revision("owner/tiny", revision), model_info("owner/tiny", revision).fingerprint)
"""


def test_a_model_is_named_after_its_content_wherever_it_lies_and_asked_for_once(hub, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    done = python(INFO, tmp_path, endpoint, "", "other", "")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [commit for commit, _ in lines] == [COMMITS["main"], COMMITS["other"], COMMITS["main"]]
    assert {fingerprint for _, fingerprint in lines} == {model_info("tiny").fingerprint}
    assert sum(path.startswith("/api/models/owner/tiny") for path in hub.asked) == 2, hub.asked
    # Its configuration is in the cache, its weights are not; they are once it has asked.
    weights = "from huggingface_hub import hf_hub_download; hf_hub_download('owner/tiny', 'model.safetensors')"
    again = python(INFO + weights, tmp_path, endpoint, COMMITS["main"])
    assert again.stdout.splitlines() == done.stdout.splitlines()[:1] and len(hub.asked) == 3
    offline = python(INFO, tmp_path, "http://127.0.0.1:9", COMMITS["main"], "main", HF_HUB_OFFLINE="1")
    assert offline.stdout.splitlines() == 2 * done.stdout.splitlines()[:1], offline.stderr


DATA = """
import sys
from dmsae_ray.corpus.documents import corpus_fingerprint
from dmsae_ray.corpus.hub_text import hub_commit
for revision in ("main", "other", "main"):
    print(hub_commit("owner/texts", revision), corpus_fingerprint("owner/texts", revision=revision))
"""


def test_a_data_set_is_named_after_its_files_and_not_after_its_readme(hub, tmp_path):
    done = python(DATA, tmp_path, f"http://127.0.0.1:{hub.server_port}")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [commit for commit, _ in lines] == [COMMITS["main"], COMMITS["other"], COMMITS["main"]] and len(
        {name for _, name in lines}
    ) == 1
    assert len(hub.asked) == 2
