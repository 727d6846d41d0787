"""Where files lie: whole or not at all, and said in words when it cannot be. Local folders; a server's refusals without
a server.
"""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest
from tmpfs import mounted

from dmsae_ray import store as store_
from dmsae_ray.files import replacing
from dmsae_ray.store import ATTEMPTS, Missing, Store, StoreError

CONTENT = bytes(range(256)) * 40


@pytest.fixture(params=["folder", "url"])
def store(request, tmp_path):
    """A folder with a blank in its name, given as such and as a URL."""
    return Store(tmp_path / "a store" if request.param == "folder" else f"file://{tmp_path}/a store")


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_is_written_is_read(store):
    assert store.size("x/a.bin") is None and store.sizes("x") == {}
    store.write("x/a.bin", CONTENT)
    store.write("x/b.bin", memoryview(b"b"))
    store.write("x/y/c.bin", b"")
    assert store.read("x/a.bin") == CONTENT and store.size("x/a.bin") == len(CONTENT) and store.size("x/y/c.bin") == 0
    assert store.sizes("x") == {"x/a.bin": len(CONTENT), "x/b.bin": 1} and store.size("x") is None, (
        "a folder is no file"
    )
    store.write("x/a.bin", b"new")
    assert store.read("x/a.bin") == b"new"
    store.delete("x/a.bin")
    store.delete("x/a.bin")  # gone already: what was wanted
    assert list(store.sizes("x")) == ["x/b.bin"] and files_below(store.local) == ["x/b.bin", "x/y/c.bin"]


def test_a_child_and_a_travelled_store_are_the_same_place(store):
    store.write("x/a.bin", CONTENT)
    assert store.child("x").read("a.bin") == CONTENT
    assert pickle.loads(pickle.dumps(store.child("x"))).read("a.bin") == CONTENT
    assert store.where("x/a.bin") == str(store.local / "x/a.bin")


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("here")
    monkeypatch.chdir("/")
    store.write("a", b"1")
    assert (tmp_path / "here" / "a").read_bytes() == b"1" and Store(str(tmp_path / "here")).url == store.url


@pytest.mark.parametrize(
    "offset, length, expected",
    [
        (0, 10, CONTENT[:10]),
        (5000, 300, CONTENT[5000:5300]),
        (4096, 4096, CONTENT[4096:8192]),
        (4095, 2, CONTENT[4095:4097]),
        (len(CONTENT) - 3, 100, CONTENT[-3:]),
        (len(CONTENT), 5, b""),
        (len(CONTENT) + 10_000, 5, b""),
        (7, 0, b""),
    ],
)
def test_a_range_holds_what_the_file_has_of_it(store, offset, length, expected):
    """To its last byte: beyond the end of a map lies a signal that kills the process."""
    store.write("a", CONTENT)
    part = store.read_range("a", offset, length)
    assert bytes(part) == expected and len(part) == len(expected)


def test_a_range_outlives_its_file(store):
    store.write("a", CONTENT)
    part = store.read_range("a", 100, 5000)
    store.write("a", b"short")
    store.delete("a")
    assert bytes(part) == CONTENT[100:5100]


def test_a_missing_file_is_missing_and_named(store):
    for act in (lambda: store.read("x/none"), lambda: store.read_range("x/none", 0, 1)):
        with pytest.raises(Missing, match=r"a store/x/none: no such file"):
            act()


# -- whole or not at all
# -------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size):
    """The kernel ends every write to a file at this size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_ends_midway_leaves_what_was_there(store):
    store.write("x/a", b"before")
    for name in ("x/a", "x/new"):
        with largest_file(4096), pytest.raises(StoreError, match=rf"{name}: File too large"):
            store.write(name, CONTENT)
    assert files_below(store.local) == ["x/a"] and store.read("x/a") == b"before"


def test_a_block_that_raises_leaves_neither_file_nor_temporary_name(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a") as temporary:
        temporary.write_bytes(b"half")
        assert files_below(tmp_path) == [temporary.name] and str(os.getpid()) in temporary.name
        raise KeyboardInterrupt
    assert files_below(tmp_path) == []


def test_a_killed_writer_leaves_no_file_under_the_name(tmp_path):
    code = (
        "import os, signal, sys, pathlib\nfrom dmsae_ray.files import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")]).returncode == -9
    assert [name.startswith("a.tmp-") for name in files_below(tmp_path)] == [True]


def test_a_full_disk_is_said_to_be_full(tmp_path):
    with mounted(tmp_path / "small", "size=1m") as disk:
        store = Store(disk)
        store.write("a", b"a" * 1000)
        with pytest.raises(StoreError) as error:
            store.write("x/b", b"b" * (2 << 20))
        for words in (
            "small/x/b: No space left on device",
            "--harvest.store a larger disk",
            "what is finished is kept",
        ):
            assert words in str(error.value)
        assert files_below(store.local) == ["a"]
        store.write("x/b", b"b" * 1000)  # the half that was written holds no room


def test_a_folder_that_refuses_is_named(tmp_path):
    """Root may write where permissions forbid it, so what refuses here is a file system mounted read-only."""
    with mounted(tmp_path / "sealed", "size=1m") as disk:
        store = Store(disk)
        store.write("a", b"1")
        subprocess.run(["mount", "-o", "remount,ro", str(store.local)], check=True)
        for name, act in (("x/a", lambda: store.write("x/a", b"1")), ("a", lambda: store.delete("a"))):
            with pytest.raises(
                StoreError, match=rf"sealed/{name}: Read-only file system; check the path and its permissions"
            ):
                act()
        assert store.read("a") == b"1"


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"file/x/a: (Not a directory|File exists); check the path"):
        Store(tmp_path / "file").write("x/a", b"1")


# -- servers
# -------------------------------------------------------------------------------------------------------------

SECRET = "s3://bucket/some/where?endpoint_override=http://127.0.0.1:9&region=hunter2"


def test_the_options_of_a_url_travel_and_are_never_shown():
    for store in (Store(SECRET), pickle.loads(pickle.dumps(Store(SECRET)))):
        child = store.child("x")
        assert child.where("a") == "s3://bucket/some/where/x/a" and str(store) == "s3://bucket/some/where"
        assert child.url.reveal() == SECRET.replace("/where?", "/where/x?")


@pytest.mark.parametrize(
    "url",
    [
        "s3://name:hunter2@bucket/p?region=us-east-1",
        "nope://bucket/p?password=hunter2",
        "s3://bucket/p?bogus=hunter2",
        "nope://name:hunter2@bucket/p",
    ],
)
def test_no_secret_of_a_url_reaches_a_message(url):
    try:
        store = Store(url)
    except StoreError as error:
        assert "hunter2" not in str(error) and "bucket/p" in str(error) and "\n" not in str(error)
    else:
        assert "hunter2" not in store.where("a") + str(store.child("x")) and store.where("a") == "s3://bucket/p/a"
        assert "hunter2" in store.child("x").url.reveal(), "whoever opens it needs it"


def test_a_url_that_nobody_can_open_is_named():
    with pytest.raises(StoreError, match=r"nope://bucket/p: not a place that pyarrow can open .*s3://"):
        Store("nope://bucket/p")


BUSY = OSError("503 Slow Down\nmore of it")


def refusing(times, error=BUSY):
    """A call that fails so often, then answers; and how often it was called."""
    calls = []

    def act():
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "answer"

    return act, calls


@pytest.fixture
def waits(monkeypatch):
    """The waits between attempts, made none."""
    seen = []
    monkeypatch.setattr(store_.time, "sleep", seen.append)
    return seen


def test_a_server_that_refuses_for_a_while_is_asked_again(waits):
    act, calls = refusing(ATTEMPTS - 1)
    assert Store(SECRET)._again("a", act) == "answer" and len(calls) == ATTEMPTS
    assert waits == sorted(waits) and len(waits) == ATTEMPTS - 1 and sum(waits) > 15


def test_a_server_that_goes_on_refusing_ends_in_words(waits):
    act, calls = refusing(ATTEMPTS)
    with pytest.raises(StoreError) as error:
        Store(SECRET)._again("x/a", act)
    assert len(calls) == ATTEMPTS and not isinstance(error.value, Missing)
    for words in ("s3://bucket/some/where/x/a", f"{ATTEMPTS} attempts", "503 Slow Down", "run the same command again"):
        assert words in str(error.value)
    assert "hunter2" not in str(error.value) and "more of it" not in str(error.value)


def test_a_file_that_is_not_there_is_an_answer(waits):
    act, calls = refusing(1, FileNotFoundError("key"))
    with pytest.raises(Missing, match="s3://bucket/some/where/a: no such file"):
        Store(SECRET)._again("a", act)
    assert len(calls) == 1 and waits == []


def test_a_mistake_of_ours_is_not_tried_again(waits):
    act, calls = refusing(1, TypeError("ours"))
    with pytest.raises(TypeError):
        Store(SECRET)._again("a", act)
    assert len(calls) == 1 and waits == []
