"""What a run found out about model and corpus: `sweep --status` takes it for exactly what was looked at, and else looks
itself.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from records import cycle_record

from dmsae_ray.activations import catalogue, found
from dmsae_ray.activations.catalogue import Identity, remember
from dmsae_ray.activations.found import MOST, Found, keep, recall, state_of
from dmsae_ray.distill.grid import planned
from dmsae_ray.driver.options import SweepCommand, load
from dmsae_ray.driver.session import session
from dmsae_ray.lm.source import TINY
from dmsae_ray.lock import OutputLock
from dmsae_ray.ownership import FOUND
from dmsae_ray.sweep import main

KNOWN = Found("model", "corpus", None)
"""What nobody would find: where it comes back, it was remembered."""
COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "1123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def argv(tmp_path):
    """Options that name a model folder, a corpus of two files and a marked output folder."""
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "corpus" / "more").mkdir(parents=True)
    for name, text in (("a.jsonl", "first"), ("more/b.jsonl", "second")):
        (tmp_path / "corpus" / name).write_text(json.dumps({"text": text, "body": "another"}))
    OutputLock(tmp_path / "out").release()
    return [
        *("--output", str(tmp_path / "out"), "--model.name", str(tmp_path / "model")),
        *("--corpus.source", str(tmp_path / "corpus"), "--sweep.seeds", "0", "--sweep.k", "8"),
    ]


def configured(argv, *more):
    return load(SweepCommand, [*argv, *more])


def known(argv, *more):
    """A configuration for which KNOWN is remembered."""
    config = configured(argv, *more)
    keep(config.home, state_of(config), KNOWN)
    assert recall(config) == KNOWN
    return config


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*")}


def edit(path):
    """Another content of the same length, and the time set back."""
    stat, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:11] + bytes([content[11] ^ 1]) + content[12:])  # of a corpus here, a letter of the text
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def swap(path):
    """Another file under the same name."""
    shutil.copy2(path, path.with_name("new"))
    path.with_name("new").replace(path)


@pytest.mark.parametrize("change", [edit, swap, lambda path: path.write_text("x")], ids=["edit", "swap", "write"])
@pytest.mark.parametrize("name", ["model/model.safetensors", "model/tokenizer_config.json", "corpus/more/b.jsonl"])
def test_a_file_that_changed_is_looked_at_again(argv, tmp_path, name, change):
    config = known(argv)
    change(tmp_path / name)
    assert recall(config) is None


@pytest.mark.parametrize("name", ["model/chat_templates/x.jinja", "model/special_tokens_map.json", "corpus/c.txt"])
def test_so_is_a_folder_with_a_file_more(argv, tmp_path, name):
    config = known(argv)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    assert recall(config) is None
    (tmp_path / name).unlink()
    assert recall(config) == KNOWN, "as it was"


@pytest.mark.parametrize(
    "more",
    [
        ("--model.bos_token", "<eos>"),
        ("--model.revision", "other"),
        ("--model.name", "tiny"),
        ("--corpus.text_field", "body"),
        ("--corpus.revision", "other"),
        ("--corpus.source", "embedded"),
        ("--corpus.source", "owner/name", "--corpus.revision", COMMIT),
    ],
)
def test_so_is_what_another_field_names(argv, more):
    known(argv)
    assert recall(configured(argv, *more)) is None
    known(argv, *more)


def test_a_commit_of_the_hub_stands_for_its_files_and_nobody_is_asked(argv):
    more = ("--model.name", "owner/model", "--corpus.source", "owner/texts")
    known(argv, *more, "--model.revision", COMMIT, "--corpus.revision", COMMIT)
    for commits in ((COMMIT, OTHER), (OTHER, COMMIT)):
        assert recall(configured(argv, *more, "--model.revision", commits[0], "--corpus.revision", commits[1])) is None


def test_a_mixture_is_its_parts_with_their_weights(argv, tmp_path):
    def mixture(weight, **second):
        parts = [{"source": str(tmp_path / "corpus"), "weight": 1}, {"source": "embedded", "weight": weight} | second]
        return [*argv[:4], "--corpus.mixture", json.dumps(parts)]

    known(mixture(2))
    assert recall(configured(mixture(3))) is None
    assert recall(configured(mixture(2, source=str(tmp_path / "corpus" / "a.jsonl")))) is None
    assert recall(configured(argv)) is None


def test_what_lies_beside_saved_data_counts(argv, tmp_path):
    """A folder of save_to_disk: only its data are hashed, but what is beside them says how they are read."""
    for name in ("state.json", "dataset_info.json", "data.arrow"):
        (tmp_path / "corpus" / name).write_text("{}")
    config = known(argv)
    (tmp_path / "corpus" / "state.json").write_text("{ }")
    assert recall(config) is None


@pytest.mark.parametrize("library", ["transformers", "tokenizers", "sentencepiece"])
def test_other_libraries_or_another_version_of_this_program_look_again(argv, monkeypatch, library):
    config, version = known(argv), found._version
    with monkeypatch.context() as patch:
        patch.setattr(found, "_version", lambda name: "0" if name == library else version(name))
        assert recall(config) is None
    with monkeypatch.context() as patch:
        patch.setattr(found, "FORMAT_VERSION", found.FORMAT_VERSION + 1)
        assert recall(config) is None
    assert recall(config) == KNOWN


def test_other_fields_and_another_place_of_the_output_folder_change_nothing(argv, tmp_path):
    config = known(argv)
    shutil.move(config.home, tmp_path / "moved")
    assert recall(configured(argv)) is None
    assert recall(configured(argv, "--output", str(tmp_path / "moved"), "--model.context", "64")) == KNOWN


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"found": 3}',
        '{"found": {"STATE": 3}}',
        '{"found": {"STATE": {"model": "m"}}}',
        '{"found": {"STATE": {"model": "m", "corpus": null, "chat_template": null}}}',
        '{"found": {"STATE": {"model": "m", "corpus": "c", "chat_template": 1}}}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_memory_is_none_and_is_written_anew(argv, content):
    config = configured(argv)
    if isinstance(content, str):
        content = content.replace("STATE", state_of(config)).encode()
    (config.home / FOUND).write_bytes(content)
    assert recall(config) is None
    assert known(argv)


def test_a_folder_in_the_memory_s_place_is_none(argv):
    config = configured(argv)
    (config.home / FOUND).mkdir()
    assert recall(config) is None


def test_the_oldest_is_forgotten(argv):
    config = known(argv)
    for number in range(MOST):
        assert recall(config) == KNOWN
        keep(config.home, str(number), KNOWN)
    assert recall(config) is None
    assert len(json.loads((config.home / FOUND).read_text())["found"]) == MOST


def test_a_command_that_holds_the_output_folder_remembers_what_it_found(argv):
    config = configured(argv)
    with session(config, "sweep", verbose=True):
        assert recall(config) == Identity(config).found
    assert [plan.key for plan in planned(config, recall(config))] == [plan.key for plan in planned(config)]
    before = contents(config.home)
    remember(config)
    assert contents(config.home) == before, "what is known already is not written again"


def test_a_run_looks_itself_whatever_is_remembered(argv):
    config = known(argv)
    remember(config)
    assert recall(config) == Identity(config).found != KNOWN


def test_nothing_is_remembered_of_files_that_change_meanwhile(argv, tmp_path, monkeypatch):
    class Slow(Identity):
        def __init__(self, config):
            super().__init__(config)
            edit(tmp_path / "corpus" / "a.jsonl")

    monkeypatch.setattr(catalogue, "Identity", Slow)
    config = configured(argv)
    remember(config)
    assert not (config.home / FOUND).exists()


@pytest.mark.parametrize("case", ["unchanged", "changed", "damaged", "none"])
def test_the_status_is_that_of_the_chains_remembered_or_of_those_there_are_and_writes_nothing(
    argv, tmp_path, capsys, case
):
    config = known(argv)
    if case == "changed":
        edit(tmp_path / "corpus" / "a.jsonl")
    elif case == "damaged":
        (config.home / FOUND).write_text("{")
    elif case == "none":
        (config.home / FOUND).unlink()
    (remembered,), (there,) = planned(config, KNOWN), planned(config)
    assert remembered.key != there.key
    before = contents(config.home)
    assert main([*argv, "--status"]) == 0
    said = capsys.readouterr().out
    assert f"chains/{(remembered if case == 'unchanged' else there).key}" in said, said
    assert contents(config.home) == before


def test_the_status_loads_nothing_heavy(argv):
    config = known(argv)
    (plan,) = planned(config, KNOWN)
    record = plan.folder.cycle(0).record
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps(cycle_record()))
    heavy = "torch numpy scipy pyarrow transformers tokenizers datasets huggingface_hub safetensors ray mlflow pandas"
    code = (
        "import sys; from dmsae_ray.sweep import main; assert main(sys.argv[1:]) == 0; "
        f"sys.exit(' '.join(set({heavy!r}.split()) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv, "--status"], capture_output=True, text=True, timeout=600)
    assert not done.stderr.strip(), done.stderr
    assert plan.key in done.stdout and "1 of" in done.stdout, done.stdout
