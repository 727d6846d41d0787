"""What an output folder may be, and what in it is ours to remove: through the front door, in a folder that holds a
person's own files.
"""

import json
import shutil

import pytest
from records import cycle_record

from dmsae_ray.activations.catalogue import remember
from dmsae_ray.driver.options import SweepCommand, load
from dmsae_ray.lock import OutputLock
from dmsae_ray.ownership import MARKER, marked, scratch
from dmsae_ray.sweep import main

STRANGERS = [
    "data/measurements.csv",
    "data/0123456789ab/measurements.csv",
    "ray/tracer.py",
    "ray/1/scene.txt",
    "chains/blocks.txt",
    "tokens/tolkien.txt",
    "sweeps/chimney.txt",
    "pairs/of_shoes.json",
    "logs/2026.log",
    "mlflow.db",
    "mlartifacts/model.bin",
    "generation",
    "driver.lock",
    "dmsae_ray_found.json",
    "data",
]


def put(path, text="mine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MARKER
    }


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("arguments", [[], ["--clean"]])
def test_a_folder_with_strangers_under_our_names_is_refused_and_left_alone(
    tmp_path, monkeypatch, capsys, name, arguments
):
    put(tmp_path / name)
    put(tmp_path / "report.txt.tmp-17-0a1b2c")
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["--output", ".", *arguments]) == 2
    said = capsys.readouterr().err
    assert f"error: output folder {tmp_path}: " in said, said
    assert arguments or f"holds {name.partition('/')[0]}" in said, said
    assert contents(tmp_path) == before and not (tmp_path / MARKER).exists()


def test_other_commands_refuse_it_too(tmp_path, capsys):
    from dmsae_ray import evaluate, harvest, report

    put(tmp_path / "data" / "mine.csv")
    for command in (harvest.main, report.main, evaluate.main):
        assert command(["--output", str(tmp_path)]) == 2
        assert "error: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_with_other_names_is_taken_and_marked(tmp_path):
    put(tmp_path / "notes.txt")
    (tmp_path / "data").mkdir()
    OutputLock(tmp_path).release()
    assert marked(tmp_path) and (tmp_path / "notes.txt").read_text() == "mine"


def test_folders_of_versions_without_a_mark_are_ours_and_so_are_copies_of_their_parts(tmp_path):
    old, copy = tmp_path / "old", tmp_path / "copy"
    put(old / "driver.lock", json.dumps({"pid": 1, "host": "here", "since": "then"}))
    put(old / "generation", "3")
    put(old / "data" / "mine.csv")  # was put there beside ours: stays, and is in nobody's way
    OutputLock(old).release()
    assert marked(old)
    for name in (
        "data/0123456789ab/shards/train-00000.parquet",
        "data/0123456789ab/tokens/attribution-1.safetensors",
        "tokens/0123456789ab/train.safetensors",
        "tokens/0123456789ab/train-0.safetensors",
        "tokens/0123456789ab/calibration.safetensors",
        "chains/0123456789ab/chain.json",
    ):
        put(copy / name)
    OutputLock(copy).release()
    assert marked(copy)


@pytest.fixture
def home(tmp_path):
    """An output folder of ours with what cleaning may remove, with a person's files among it, and with links to
    elsewhere.
    """
    home, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    OutputLock(home).release()
    for name in GOES:
        put(home / name, "{}")
    for name in STAYS:
        put(home / name)
    for name in ("a.tmp-1-0a1b2c", "0123456789ab/train.safetensors", "train-00000.parquet"):
        put(elsewhere / name)
    (home / "tokens").symlink_to(elsewhere)
    (home / "chains" / "aaaaaaaaaaaa").symlink_to(elsewhere)
    (home / "data" / "cccccccccccc").mkdir(parents=True)
    (home / "data" / "cccccccccccc" / "shards").symlink_to(elsewhere)
    return home


GOES = [
    "data/bbbbbbbbbbbb/shards/train-00000.parquet",
    "data/bbbbbbbbbbbb/manifest.json.tmp-7-0a1b2c",
    "chains/bbbbbbbbbbbb/cycle_00/checkpoint.pt",
    "chains/bbbbbbbbbbbb/chain.json",
    "ray/1/tune/trial/result.json",
    "sweeps/small-bbbbbbbbbbbb/report.txt.tmp-7-0a1b2c",
    "generation.tmp-7-0a1b2c",
    "dmsae_ray_found.json.tmp-7-0a1b2c",
]
STAYS = [
    "mine.tmp-7-0a1b2c",
    "data/mine/x.tmp-7-0a1b2c",
    "data/mine.csv",
    "data/bbbbbbbbbbbb/notes.txt",
    "chains/bbbbbbbbbbbb/cycle_00/notes.txt",
    "chains/thoughts/chain.json",
    "ray/notes.txt",
    "ray/2/scene.txt",
    "sweeps/small-bbbbbbbbbbbb/draft.tmp-7",
    "sweeps/plan.txt.tmp-7-0a1b2c",
]


def test_cleaning_removes_ours_alone_says_what_it_leaves_and_follows_no_link(home, capsys):
    elsewhere = contents(home.parent / "elsewhere")
    assert main(["--output", str(home), "--clean", "--dry_run"]) == 0
    assert all((home / name).exists() for name in GOES)
    assert main(["--output", str(home), "--clean"]) == 0
    said = capsys.readouterr().out
    assert [name for name in GOES if (home / name).exists()] == []
    assert [name for name in STAYS if not (home / name).exists()] == []
    assert contents(home.parent / "elsewhere") == elsewhere
    for name in (
        "data/bbbbbbbbbbbb/notes.txt",
        "chains/bbbbbbbbbbbb/cycle_00/notes.txt",
        "data/cccccccccccc/shards",
        "tokens",
    ):
        assert f"left {home / name}: " in said and (home / name).exists(), said


def test_a_sweep_s_scratch_folder_replaces_only_those_of_drivers(home):
    assert scratch(home, 3) == home / "ray" / "3"
    assert (
        not (home / "ray" / "1").exists()
        and (home / "ray" / "2" / "scene.txt").exists()
        and (home / "ray" / "notes.txt").exists()
    )
    with pytest.raises(ValueError, match="ray/2: holds what this program did not make"):
        scratch(home, 2)


def test_an_empty_name_is_no_place(capsys):
    for field in ("output", "model.name", "corpus.source", "harvest.store", "harvest.dataset", "sae.core", "track.uri"):
        assert main([f"--{field}", ""]) == 2
        assert f"{field}: is empty" in capsys.readouterr().err
    assert main(["--corpus.mixture", '[{"source": "", "weight": 1}]']) == 2
    assert "corpus.mixture.0.source: is empty" in capsys.readouterr().err


def test_a_results_folder_s_configuration_means_the_output_folder_it_lies_in(tmp_path):
    first, moved = tmp_path / "first", tmp_path / "moved"
    OutputLock(first).release()
    for text in ("name: small\n", f"name: small\noutput: {first}\n"):  # as it is written, and as it once was
        put(first / "sweeps" / "small-0123456789ab" / "config.yaml", text)
        shutil.move(first, moved)
        path = moved / "sweeps" / "small-0123456789ab" / "config.yaml"
        assert load(SweepCommand, ["--config", str(path)]).home == moved
        assert (
            load(SweepCommand, ["--config", str(path), "--output", str(tmp_path / "given")]).home == tmp_path / "given"
        )
        shutil.move(moved, first)
    loose = put(tmp_path / "sweeps" / "x" / "config.yaml", f"output: {first}\n")
    assert load(SweepCommand, ["--config", str(loose)]).home == first, "no folder of ours: what the file says"


@pytest.mark.parametrize(
    "file",
    [
        "../../../../precious.txt",
        "/precious.txt",
        "shards/../../precious.parquet",
        "manifest.json",
        "shards/notes.txt",
        "",
    ],
)
def test_a_manifest_makes_a_repair_delete_nothing_but_shards(tmp_path, capsys, file):
    from shards import make_dataset

    from dmsae_ray.harvest import main as harvest

    dataset = make_dataset(tmp_path / "a" / "b" / "c" / "data")
    folder = dataset.store.local
    tree = json.loads((folder / "manifest.json").read_text())
    tree["shards"][1]["file"] = str(tmp_path) + file if file.startswith("/") else file
    put(folder / "manifest.json", json.dumps(tree))
    for place in (
        tmp_path / "precious.txt",
        folder / "precious.parquet",
        folder.parent / "precious.parquet",
        folder / "shards" / "notes.txt",
    ):
        put(place)
    before = contents(tmp_path)
    assert harvest(["--output", str(tmp_path / "out"), "--harvest.dataset", str(folder), "--repair"]) == 2
    said = capsys.readouterr()
    assert (
        f"error: {folder}/manifest.json: " in said.err
        and "no shard of this dataset; that file was not touched" in said.err
    ), said
    assert contents(tmp_path).items() >= before.items()


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a//x", "", "./x", "..", "a/.."])
def test_no_name_leads_out_of_a_store(tmp_path, name):
    from dmsae_ray.store import Store, StoreError

    store = Store(tmp_path / "store")
    put(tmp_path / "x")
    (tmp_path / "store" / "a").mkdir(parents=True)
    for act in (
        store.size,
        store.sizes,
        store.read,
        store.delete,
        store.child,
        lambda n: store.write(n, b"1"),
        lambda n: store.read_range(n, 0, 1),
    ):
        with pytest.raises(StoreError, match="leads out of this folder; it was neither read nor touched"):
            act(name)
    assert (tmp_path / "x").read_text() == "mine"


def test_no_link_leads_out_of_a_store(tmp_path):
    from dmsae_ray.store import Store, StoreError

    (tmp_path / "store").mkdir()
    store = Store(tmp_path / "store")
    put(tmp_path / "elsewhere" / "x")
    (tmp_path / "store" / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "store" / "x").symlink_to(tmp_path / "elsewhere" / "x")
    (tmp_path / "store" / "round").symlink_to(tmp_path / "store" / "round")
    for name in ("folder/x", "x", "round"):
        for act in (
            store.size,
            store.read,
            store.delete,
            lambda n: store.write(n, b"1"),
            lambda n: store.read_range(n, 0, 1),
        ):
            with pytest.raises(StoreError, match="by a link leads out of this folder"):
                act(name)
    assert contents(tmp_path / "elsewhere") == {"x": b"mine"}
    linked = Store(tmp_path / "linked")
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere")
    assert linked.read("x") == b"mine", "the store itself may be a link: it was named by its owner"


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_that_ray_could_not_use_is_said_before_any_work(tmp_path, monkeypatch, capsys, name):
    for other in ("TMPDIR", "RAY_TMPDIR", "RAY_ADDRESS"):
        monkeypatch.delenv(other, raising=False)
    for folder, words in (
        (tmp_path / ("long" * 20), "characters too long"),
        ("/dev/null", "cannot be written"),
        ("here", "not the whole path"),
    ):
        monkeypatch.setenv(name, str(folder))
        assert main(["--output", str(tmp_path / "out"), "--cluster.address", "local"]) == 2
        said = capsys.readouterr().err
        assert f"error: {name} '{folder}': " in said and words in said and f"Set {name} to a short folder" in said, said
    assert not (tmp_path / "out").exists()


def test_an_ascii_terminal_shows_what_it_can(tmp_path):
    import os
    import subprocess
    import sys

    home = tmp_path / "Prüfung"
    lock = OutputLock(home)
    remember(load(SweepCommand, ["--output", str(home)]))  # so that the processes need neither torch nor the tokenizer
    lock.release()
    for env in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        done = subprocess.run(
            [sys.executable, "-m", "dmsae_ray.sweep", "--status", "--output", str(home)],
            env=os.environ | env,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        assert b"seed0-k16" in done.stdout and b"no driver at work" in done.stdout and done.stdout.isascii()


def test_a_disk_s_trouble_is_told_in_one_line_whoever_raised_it():
    import errno

    from dmsae_ray.causes import disk_trouble

    full = OSError(errno.ENOSPC, "No space left on device", "/out/chains/x")
    assert disk_trouble(full).startswith("/out/chains/x: No space left on device; free space there")
    wrapped = RuntimeError("a task of Ray failed")
    wrapped.__cause__ = full
    assert disk_trouble(wrapped) == disk_trouble(full)
    assert disk_trouble(RuntimeError("x\nOSError: [Errno 28] No space left on device: '/out/ray'")).startswith(
        "/out/ray: No space left"
    )
    assert disk_trouble(RuntimeError("(sqlite3.OperationalError) database or disk is full")).startswith(
        "database or disk is full; free"
    )
    assert (
        disk_trouble(ValueError("of another kind")) is None
        and disk_trouble(PermissionError(errno.EACCES, "no")) is None
    )


def test_another_sweep_s_keys_name_folders_and_nothing_else(tmp_path):
    from dmsae_ray.results.saved_sweep import SavedSweep

    folder = tmp_path / "out" / "sweeps" / "small-0123456789ab"
    put(folder / "config.yaml", "name: small\n")
    put(folder / "numbers.json", "{}")
    put(folder / "chains.json", json.dumps([{"label": "seed0-k16", "key": "../../precious"}]))
    with pytest.raises(
        ValueError, match=r"chains\.json: names '../../precious' where a key of twelve hex digits belongs"
    ):
        SavedSweep.open(folder)


def test_cleaning_removes_compared_pairs_that_no_sweep_asks_for(tmp_path, capsys):
    """Those of a sweep's results stay, also of another one than is cleaned for; where its needs cannot be told, all
    do.
    """
    from dmsae_ray.config import CompareConfig
    from dmsae_ray.distill.folder import ChainFolder
    from dmsae_ray.results.comparison import pair_names

    home = tmp_path / "out"
    OutputLock(home).release()
    folders = [home / "chains" / key for key in ("aaaaaaaaaaaa", "bbbbbbbbbbbb")]
    for folder in folders:
        put(folder / "chain.json", json.dumps({"fields": {"dataset": "dddddddddddd"}}))
        put(folder / "cycle_00" / "record.json", json.dumps(cycle_record()))
        put(folder / "cycle_00" / "core.safetensors", folder.name)
    sweep = home / "sweeps" / "other-cccccccccccc"
    put(sweep / "config.yaml", "compare: {draws: 100}\n")
    put(sweep / "chains.json", json.dumps([{"key": folder.name, "cycles": 1} for folder in folders]))
    needed = pair_names(
        CompareConfig(draws=100), home / "data" / "dddddddddddd", [(ChainFolder(folder), 1) for folder in folders]
    )
    assert len(needed) == 4
    for name in (*needed, "0123456789ab.json", "mine.json"):
        put(home / "pairs" / name, "{}")
    (sweep / "chains.json").rename(sweep / "elsewhere.json")
    assert main(["--output", str(home), "--clean"]) == 0
    assert (home / "pairs" / "0123456789ab.json").exists() and f"kept all of {home}/pairs" in capsys.readouterr().out
    (sweep / "elsewhere.json").rename(sweep / "chains.json")
    assert main(["--output", str(home), "--clean"]) == 0
    assert {path.name for path in (home / "pairs").iterdir()} == needed | {"mine.json"}


def test_a_node_says_which_folders_it_does_not_see(tmp_path, monkeypatch):
    """What runs on each node of a cluster that was joined; here on this one."""
    from dmsae_ray.cluster import probe

    monkeypatch.setattr(probe, "APPEARS_S", 0.3)
    path = put(tmp_path / "probe.json", "a token")
    assert probe.unseen(str(path), "a token", {"model.name": str(tmp_path)}) == []
    (line,) = probe.unseen(str(path), "another", {})
    assert f"output folder {tmp_path}: it is another folder there" in line and "--output" in line
    (line,) = probe.unseen(str(tmp_path / "none" / "probe.json"), "a token", {})
    assert f"output folder {tmp_path}/none: it cannot be read there (No such file or directory)" in line
    (line,) = probe.unseen(str(path), "a token", {"harvest.dataset": str(tmp_path / "x")})
    assert line.startswith(f"does not see harvest.dataset {tmp_path}/x")


STOPPED = """
import ctypes, os, signal, time
from dmsae_ray.stop import deaf, keeping_signals, stoppable

def strike():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(os.getpid(), number)
        time.sleep(0.05)

@keeping_signals
def begin():
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(1))  # as ray.init does

@stoppable()
def main():
    begin()
    try:
        strike()
    except KeyboardInterrupt:
        strike()
        with deaf():
            for number in (signal.SIGTERM, signal.SIGINT):
                ctypes.CDLL(None).signal(number, 0)  # as ray.shutdown does
            time.sleep(0.2)
            strike()
        strike()
        print("left cleanly")
        return 130

raise SystemExit(main())
"""


def test_signals_that_follow_the_first_do_not_end_the_way_out_half_way():
    """With what Ray does to handlers in its place; the real one is in tests/faults."""
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "left cleanly\n"), done
