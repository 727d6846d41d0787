"""Documents, where they come from and which split they belong to."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmsae_ray.corpus.documents import check_source, corpus_fingerprint, load_documents
from dmsae_ray.corpus.hub_text import hub_rows
from dmsae_ray.corpus.local_files import EMBEDDED, is_hub
from dmsae_ray.corpus.split import SPLITS, UNDEALT, Deal, split_of


@pytest.fixture(scope="module")
def documents():
    return list(load_documents("embedded"))


def texts(source, **kwargs):
    return [document.text for document in load_documents(str(source), **kwargs)]


# -- the embedded corpus
# -------------------------------------------------------------------------------------------------


def test_embedded_corpus_is_small_licensed_and_without_duplicates(documents):
    assert EMBEDDED.stat().st_size < 4_000_000
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (EMBEDDED.parent / "LICENSE").read_text()
    assert hashlib.sha256(EMBEDDED.read_bytes()).hexdigest() in (EMBEDDED.parent / "README.md").read_text()
    assert len(documents) > 500 and len({d.text for d in documents}) == len(documents) == len(
        {d.name for d in documents}
    )
    assert {d.name.split("/")[0] for d in documents} == {"lib", "doc"}
    assert [d.name for d in documents] == sorted(d.name for d in documents)


def test_embedded_corpus_covers_every_split(documents):
    counts = dict.fromkeys(SPLITS, 0)
    for document in documents:
        counts[split_of(document.text, 0.05, 0.05)] += len(document.text)
    total = sum(counts.values())
    assert 0.85 < counts["train"] / total < 0.95
    assert counts["attribution"] / total > 0.02 and counts["evaluation"] / total > 0.02


# -- splits
# --------------------------------------------------------------------------------------------------------------


def test_split_depends_on_the_text_alone_and_is_stable():
    # Frozen values: another rule would move documents that the tiny model was trained on into held-out splits.
    assert [split_of(f"document {i}", 0.2, 0.2) for i in range(8)] == [
        "attribution",
        "train",
        "train",
        "evaluation",
        "train",
        "attribution",
        "train",
        "evaluation",
    ]


def test_split_shares_and_nesting():
    names = [f"text {i}" for i in range(4000)]
    small = [split_of(name, 0.05, 0.1) for name in names]
    assert abs(small.count("attribution") / 4000 - 0.05) < 0.015 and abs(small.count("evaluation") / 4000 - 0.1) < 0.02
    larger = [split_of(name, 0.15, 0.1) for name in names]
    assert all(b == "attribution" for a, b in zip(small, larger, strict=True) if a == "attribution")
    assert all(b != "train" or a == "train" for a, b in zip(small, larger, strict=True))
    assert {split_of(name, 0.0, 0.0) for name in names} == {"train"}


def test_parts_are_dealt_by_text_evenly_whatever_the_split():
    # Frozen values: another rule would move documents between parts of data that were harvested.
    deal = Deal(3, 0.2)
    assert [deal.splits_of(f"document {i}", 0.2, 0.2) for i in range(6)] == [
        ("attribution", "attribution-0"),
        ("train-1",),
        ("train-2",),
        ("evaluation",),
        ("train-1",),
        ("attribution", "attribution-1"),
    ]
    names = [f"text {i}" for i in range(6000)]
    found = [deal.splits_of(name, 0.1, 0.1) for name in names]
    for name, splits in zip(names, found, strict=True):
        split = split_of(name, 0.1, 0.1)
        (whole,) = UNDEALT.splits_of(name, 0.1, 0.1)
        assert whole == split and (splits[0].partition("-")[0] == split or split == "train"), "held out as ever"
        assert set(splits) <= set(deal.splits)
    counts = {split: sum(split in splits for splits in found) for split in deal.splits}
    assert abs(counts["calibration"] / 4800 - 0.2) < 0.02 and counts["evaluation"] + counts["attribution"] < 1400
    for part in range(3):
        assert abs(counts[f"train-{part}"] / 3840 - 1 / 3) < 0.03
        assert abs(counts[f"attribution-{part}"] / counts["attribution"] - 1 / 3) < 0.08
    assert sum(counts[f"attribution-{part}"] for part in range(3)) == counts["attribution"]


@pytest.mark.parametrize("shares", [(0.5, 0.5), (-0.1, 0.1), (0.1, 1.0)])
def test_split_refuses_impossible_shares(shares):
    with pytest.raises(ValueError, match="split shares"):
        split_of("text", *shares)


# -- loaders
# -------------------------------------------------------------------------------------------------------------


def test_txt_jsonl_and_parquet(tmp_path):
    (tmp_path / "a.txt").write_text("one document\nof two lines", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(
        '{"body": "first"}\n\n{"body": ""}\n{"body": null}\n{"body": "sécond"}\n', encoding="utf-8"
    )
    (tmp_path / "sub").mkdir()
    pq.write_table(pa.table({"body": ["third", None, "fourth"], "n": [1, 2, 3]}), tmp_path / "sub" / "c.parquet")
    (tmp_path / "ignored.tsv").write_text("x")
    assert texts(tmp_path / "a.txt") == ["one document\nof two lines"]
    assert texts(tmp_path / "b.jsonl", text_field="body") == ["first", "sécond"]
    assert texts(tmp_path / "sub" / "c.parquet", text_field="body") == ["third", "fourth"]
    everything = list(load_documents(str(tmp_path), "body"))
    assert [d.text for d in everything] == ["one document\nof two lines", "first", "sécond", "third", "fourth"]
    assert everything[2].name == f"{tmp_path / 'b.jsonl'} line 5"
    assert texts(tmp_path / "*.jsonl", text_field="body") == ["first", "sécond"]
    for source in (tmp_path, tmp_path / "b.jsonl", tmp_path / "sub" / "c.parquet", "embedded"):
        check_source(str(source), "body")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.jsonl", b'{"other": "a", "more": 1}\n', r"x\.jsonl line 1: no field 'text'.*more, other"),
        ("x.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"x\.jsonl line 2: field 'text' holds int"),
        ("x.jsonl", b'{"text": "a"\n', r"x\.jsonl line 1: not JSON"),
        ("x.jsonl", b'["a"]\n', r"x\.jsonl line 1: expected an object"),
        ("x.jsonl", b"", r"x\.jsonl: the file is empty"),
        ("x.jsonl", b'{"text": " "}\n', "no document has any text"),
        ("x.txt", b"", r"x\.txt: the file is empty"),
        ("x.txt", b"\xff\xfe", r"x\.txt: not UTF-8"),
        ("x.parquet", b"nonsense", r"x\.parquet: not a readable Parquet file"),
        ("x.tsv", b"a,b", r"cannot read \.tsv as text; save it as .csv"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(load_documents(str(tmp_path / name)))


def test_parquet_field_is_checked(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [1, 2], "body": ["a", "b"]}), path)
    for call in (lambda field: list(load_documents(str(path), field)), lambda field: check_source(str(path), field)):
        with pytest.raises(ValueError, match=r"x\.parquet: no field 'content'.*body, text"):
            call("content")
        with pytest.raises(ValueError, match="field 'text' holds int64"):
            call("text")


def test_missing_paths_and_empty_folders(tmp_path):
    for source in (tmp_path / "none.txt", tmp_path / "none", tmp_path / "*.txt", "./none"):
        with pytest.raises(ValueError, match="no such file or folder"):
            check_source(str(source), "text")
        with pytest.raises(ValueError, match="no such file or folder"):
            list(load_documents(str(source)))
    with pytest.raises(ValueError, match="holds no .txt"):
        check_source(str(tmp_path), "text")


def test_hub_ids_are_told_from_paths(tmp_path):
    assert is_hub("owner/name") and is_hub("name") and is_hub("owner/name:config")
    assert not is_hub(str(tmp_path)) and not is_hub("data/x.jsonl") and not is_hub("./data") and not is_hub("a/b/c")
    check_source("owner/name", "text", "0123456789abcdef0123456789abcdef01234567")  # a full commit: nobody is asked


def test_hub_rows_are_streamed_and_only_as_far_as_asked(tmp_path):
    """`datasets` takes a local folder where it takes a hub id: the same road as for the hub, without the network."""
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "third"\n')
    rows = hub_rows(str(tmp_path), None)
    assert [next(rows)[1]["text"] for _ in range(2)] == ["first", "second"]
    with pytest.raises(ValueError, match=r"broke off after 2 rows \(ArrowInvalid: JSON parse error.*corpus\.documents"):
        next(rows)
    with pytest.raises(ValueError, match=r"neither a local path nor a hub data set.*BuilderConfig 'other' not found"):
        next(hub_rows(f"{tmp_path}:other", None))


def test_a_parquet_data_set_left_early_does_not_abort_the_process(tmp_path):
    table = pa.table({"text": ["some text " * 50] * 50_000})
    for number in range(3):
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=5000)
    code = """
import sys
from itertools import islice
from dmsae_ray.corpus.hub_text import hub_rows
print(len(list(islice(hub_rows(sys.argv[1], None), 300))))
"""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=600)
        assert (done.returncode, done.stdout.strip()) == (0, "300"), done.stderr


@pytest.mark.parametrize(
    "calls, environment",
    [
        (["list(load_documents('owner/name'))", "corpus_fingerprint('owner/name')"], {"HF_HUB_OFFLINE": "1"}),
        (["corpus_fingerprint('owner/name')"], {"HF_ENDPOINT": "http://127.0.0.1:9"}),  # nobody listens there
    ],
    ids=["offline", "nobody"],
)
def test_an_unreachable_hub_is_one_clear_message(calls, environment, tmp_path):
    tries = "".join(f"\ntry: {call}\nexcept ValueError as error: print(error)" for call in calls)
    # A process of its own: the hub's library reads these variables when it is imported.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
        "HF_HOME": str(tmp_path)
    }
    done = subprocess.run(
        [sys.executable, "-c", f"from dmsae_ray.corpus.documents import *{tries}"],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    messages = done.stdout.split("corpus.source owner/name: nothing here has this name, and the hub")[1:]
    assert len(messages) == len(calls), done.stdout + done.stderr
    for message in messages:
        assert "could not be asked" in message and "a full commit as revision" in message


def test_fingerprint_follows_content_and_field(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "body": "y"}))
    first = corpus_fingerprint(str(tmp_path))
    assert corpus_fingerprint(str(tmp_path)) == first == corpus_fingerprint(str(tmp_path / "a.jsonl"))
    assert corpus_fingerprint(str(tmp_path), "body") != first
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "z", "body": "y"}))
    assert corpus_fingerprint(str(tmp_path)) != first
    assert corpus_fingerprint("embedded") == corpus_fingerprint("embedded", "any field")
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert corpus_fingerprint("owner/name", revision=commit) != corpus_fingerprint("owner/other", revision=commit)
