"""Damaged shards, a full disk: found by name, and mended by exactly the command that the message gives."""

import json
import re
import shutil
import subprocess

import pytest
from conftest import command, run_command, same_results
from tmpfs import mounted

from dmsae_ray import harvest, sweep
from dmsae_ray.activations.dataset import ActivationDataset
from dmsae_ray.activations.shard import ShardWriter, inspect_shard, read_rows

REPAIR = "python -m dmsae_ray.harvest --repair"


@pytest.fixture
def output(small_sweep, tmp_path):
    """An output folder with the finished activations, and the tokens that a harvest would otherwise make first."""
    for name in ("data", "tokens"):
        shutil.copytree(small_sweep.output / name, tmp_path / "out" / name)
    return tmp_path / "out"


def dataset_of(output) -> ActivationDataset:
    (folder,) = (output / "data").glob("*")
    return ActivationDataset(folder)


def shards(output) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("data/*/shards/*")}


def times(output) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in output.glob("data/*/shards/*")}


def here(capfd, main, output, *args) -> tuple[int, str]:
    """A command in this process, which has paid for its imports: exit status, and all it said."""
    code = main(command(output, *args)[3:])
    said = capfd.readouterr()
    return code, said.out + said.err


def truncate(dataset, path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(dataset, path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def remove(dataset, path):
    path.unlink()


def of_another_dataset(dataset, path):
    """The same rows, written whole, by another configuration: same size, nothing wrong with the file."""
    m, name = dataset.manifest, f"shards/{path.name}"
    (entry,) = [entry for entry in dataset.entries() if entry.file == name]
    rows = read_rows(dataset.store, entry, m.rows_per_group, m.d, m.dtype)
    about = inspect_shard(dataset.store, name)[1] | {"dataset": "0" * len(m.key)}
    ShardWriter().write(dataset.store, name, rows, m.rows_per_group, about, entry.positions)
    assert path.stat().st_size == entry.bytes


def alter_manifest(change):
    def alter(dataset, path):
        tree = json.loads(dataset.store.read("manifest.json"))
        (entry,) = [entry for entry in tree["shards"] if entry["file"].endswith(path.name)]
        change(entry)
        dataset.store.write("manifest.json", json.dumps(tree, indent=1).encode())

    return alter


alter_digest = alter_manifest(lambda entry: entry["digests"].__setitem__(3, "0123456789abcdef"))
alter_rows = alter_manifest(lambda entry: entry.__setitem__("rows", entry["rows"] - 512))
HARMS = {
    "truncated": (truncate, "bytes, the manifest says"),
    "a flipped bit": (flip, "has not the checksum"),
    "missing": (remove, "is missing"),
    "of another dataset": (of_another_dataset, "is a shard of another dataset"),
    "a digest in the manifest": (alter_digest, "footer and the manifest disagree"),
    "rows in the manifest": (alter_rows, "footer and the manifest disagree"),
}


@pytest.mark.parametrize("what", HARMS)
def test_what_is_bad_is_named_with_the_command_that_repairs_it_before_any_work(output, capfd, what):
    harm, words = HARMS[what]
    dataset = dataset_of(output)
    bad = dataset.store.local / "shards" / "train-00001.parquet"
    harm(dataset, bad)
    code, said = here(capfd, harvest.main, output, "--verify")
    assert code == 1 and said.count("bad: ") == 1 and "1 bad" in said
    assert str(bad) in said and words in said and REPAIR in said
    # Given as finished, a missing shard is an error too. Where it is ours, it is made again: the test after the next.
    places = [("--harvest.dataset", str(dataset.store.local))] + [()] * (harm is not remove)
    for place in places:
        code, said = here(capfd, sweep.main, output, *place)
        assert code == 2 and str(bad) in said and words in said and REPAIR in said, said
    assert bad.exists() != (harm is remove) and not list(output.glob("chains/*"))


def test_a_sound_dataset_verifies(output, capfd):
    code, said = here(capfd, harvest.main, output, "--verify")
    assert code == 0 and "nothing is bad" in said and "3 shards" in said


@pytest.mark.slow
def test_a_missing_shard_of_our_own_is_made_again_and_it_alone(output, small_sweep):
    next(output.glob("data/*/shards/train-00000.parquet")).unlink()
    before = times(output)
    run = run_command(output, module="harvest")
    assert run.code == 0 and "2 kept from before" in run.out, run.out
    assert shards(output) == shards(small_sweep.output)
    assert times(output).items() >= before.items()


@pytest.mark.parametrize("given", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_command_of_the_message_makes_only_bad_shards_again(output, small_sweep, capfd, given):
    dataset = dataset_of(output)
    flip(dataset, dataset.store.local / "shards" / "train-00000.parquet")
    of_another_dataset(dataset, dataset.store.local / "shards" / "calibration.parquet")
    good = times(output)["train-00001.parquet"]
    place = ("--harvest.dataset", str(dataset.store.local)) if given else ()
    code, said = here(capfd, sweep.main, output, *place)
    assert code == 2
    ((module, option),) = set(re.findall(r"`python -m dmsae_ray\.(\w+) (--\w+)`", said))
    run = run_command(output, option, *place, module=module)
    assert run.code == 0 and run.out.count("bad: ") == 2, run.out
    assert shards(output) == shards(small_sweep.output)
    assert times(output)["train-00001.parquet"] == good
    code, said = here(capfd, harvest.main, output, "--verify", *place)
    assert code == 0 and "nothing is bad" in said


@pytest.mark.slow
def test_an_altered_manifest_is_not_hidden_by_a_repair(output, small_sweep):
    """The shard is right and the manifest is not: a repair says so, and following its words gives the old manifest."""
    dataset = dataset_of(output)
    alter_digest(dataset, dataset.store.local / "shards" / "train-00001.parquet")
    run = run_command(output, "--repair", module="harvest")
    assert run.code == 2 and "the manifest was altered" in run.out and "delete manifest.json" in run.out, run.out
    assert shards(output) == shards(small_sweep.output)
    (dataset.store.local / "manifest.json").unlink()
    run = run_command(output, module="harvest")
    assert run.code == 0 and "3 kept from before" in run.out, run.out
    assert dataset_of(output).manifest == dataset_of(small_sweep.output).manifest


def test_a_repair_touches_no_dataset_that_the_configuration_did_not_make(output, capfd):
    dataset = dataset_of(output)
    flip(dataset, dataset.store.local / "shards" / "train-00000.parquet")
    before = shards(output)
    place = ("--harvest.dataset", str(dataset.store.local), "--model.hook", "blocks.1.hook_resid_post")
    code, said = here(capfd, harvest.main, output, "--repair", *place)
    assert code == 2 and "model.hook" in said, said
    assert shards(output) == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of three megabytes."""
    with mounted(tmp_path / "disk", "size=3m") as place:
        yield place


def test_a_full_disk_ends_the_harvest_in_words_and_the_same_command_goes_on(small_sweep, small_disk, tmp_path):
    """Also the short form of a missing shard: the shards that the disk took are kept, and only the others are made."""
    output = tmp_path / "out"
    shutil.copytree(small_sweep.output / "tokens", output / "tokens")
    arguments = ("--harvest.store", str(small_disk))
    run = run_command(output, *arguments, module="harvest")
    assert run.code == 2 and "Traceback" not in run.out, run.out
    (line,) = [line for line in run.out.splitlines() if line.startswith("error: ")]
    assert re.search(rf"{small_disk}/\w+/shards/[\w-]+\.parquet: No space left on device", line)
    assert "free space" in line and "--harvest.store" in line and "same command continues" in line
    expected = shards(small_sweep.output)
    kept = {path: path.stat().st_mtime_ns for path in small_disk.glob("*/shards/*")}
    assert 1 <= len(kept) < len(expected)
    assert all(path.read_bytes() == expected[path.name] for path in kept)
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    again = run_command(output, *arguments, module="harvest")
    assert again.code == 0 and f"{len(kept)} kept from before" in again.out, again.out
    assert {path.name: path.read_bytes() for path in small_disk.glob("*/shards/*")} == expected
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_disk_too_small_for_the_tokens_ends_in_words_too(small_disk, tmp_path, capfd):
    output = tmp_path / "out"
    output.mkdir()
    subprocess.run(["mount", "-o", "remount,size=64k", small_disk], check=True)
    (output / "tokens").symlink_to(small_disk)
    code, said = here(capfd, harvest.main, output)
    assert code == 2 and "error: " in said
    assert re.search(rf"error: {output}/tokens/\w+: No space left on device; free space there", said), said


@pytest.mark.slow
def test_a_disk_that_fills_up_under_the_chains_ends_them_at_once_and_the_same_command_goes_on(
    small_sweep, small_disk, tmp_path
):
    """A checkpoint is what finds no room: nothing is tried again, each chain says so, and what was harvested stays."""
    output = tmp_path / "out"
    for part in ("data", "tokens"):
        shutil.copytree(small_sweep.output / part, output / part)
    subprocess.run(["mount", "-o", "remount,size=600k", small_disk], check=True)
    (output / "chains").symlink_to(small_disk)
    run = run_command(output, "--cluster.concurrent", "1")
    assert run.code in (1, 2) and "Traceback" not in run.out, run.out
    assert re.search(r"/chains/[\w./]+: No space left on device; free space there, or give --output", run.out), run.out
    assert run.out.count("starting") <= 4, run.out  # twice for each chain: queued by the trial, and begun
    subprocess.run(["mount", "-o", "remount,size=32m", small_disk], check=True)
    again = run_command(output)
    assert again.code == 0 and "complete and checked" in again.out, again.out
    same_results(output, small_sweep.output, cycles=4)
