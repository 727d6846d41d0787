"""What people have as text: formats, compressed files, odd bytes, chat messages, one long book; through the front door
where a user would.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmsae_ray.activations.catalogue import find_datasets
from dmsae_ray.activations.harvester import Harvest
from dmsae_ray.activations.shard import ShardEntry
from dmsae_ray.activations.shard_maker import ShardMaker
from dmsae_ray.config import Config, CorpusConfig
from dmsae_ray.corpus.documents import check_source, corpus_fingerprint, load_documents
from dmsae_ray.corpus.encode import encode
from dmsae_ray.corpus.mixture import check_mixture, ignored
from dmsae_ray.corpus.pieces import BOOK, PIECE, pieces_of
from dmsae_ray.corpus.prepare import prepare_tokens
from dmsae_ray.corpus.split import SPLITS
from dmsae_ray.driver.options import SweepCommand, load
from dmsae_ray.lm.source import TINY, load_tokenizer
from dmsae_ray.sweep import main

TEXTS = ["first text\nof two lines", "sécond, with a comma", 'third "quoted"']
ROWS = [{"text": text, "n": number} for number, text in enumerate(TEXTS)]
BOM = b"\xef\xbb\xbf"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def texts(source, **kwargs):
    return [document.text for document in load_documents(str(source), **kwargs)]


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def csv_bytes() -> bytes:
    import csv
    import io

    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["n", "text"])
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


FORMS = {
    "a.jsonl": lines(ROWS),
    "a.ndjson": lines(ROWS),
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "b.json": lines(ROWS),
    "a.csv": csv_bytes(),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("bom", [b"", BOM])
def test_every_form_of_rows_gives_the_same_documents(tmp_path, name, packed, bom):
    content = bom + FORMS[name]
    if packed == ".gz":
        content = gzip.compress(content)
    elif packed == ".zst":
        half = len(content) // 2  # two frames, as a tool that compresses in parallel writes
        content = b"".join(pa.Codec("zstd").compress(part, asbytes=True) for part in (content[:half], content[half:]))
    path = tmp_path / (name + packed).upper()
    path.write_bytes(content)
    assert texts(path) == texts(tmp_path) == TEXTS
    check_source(str(path), "text")
    with pytest.raises(ValueError, match=r"no field 'body' \(corpus.text_field\); its fields are: n, text"):
        texts(path, text_field="body")


@pytest.mark.parametrize("suffix", [".txt", ".md", ".TXT.gz"])
def test_text_files_are_a_document_each_and_a_mark_of_byte_order_is_none_of_it(tmp_path, suffix):
    content = BOM + TEXTS[1].encode()
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert texts(tmp_path / f"a{suffix}") == [TEXTS[1]]


def test_one_object_in_a_json_file(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS[0], indent=2))
    assert texts(tmp_path / "a.json") == TEXTS[:1]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "large_binary", "dictionary"])
def test_text_columns_of_every_kind(tmp_path, kind):
    column = pa.array(TEXTS + [None])
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pa, kind)())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert texts(tmp_path) == TEXTS and not check_source(str(tmp_path), "text")


def test_bytes_that_are_no_text_are_named_by_file_and_row(tmp_path):
    pq.write_table(pa.table({"text": pa.array([b"good", b"\xff\xfe"])}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet row 1: not UTF-8"):
        texts(tmp_path)


@pytest.mark.parametrize("dict_of_splits", [False, True])
def test_a_folder_of_save_to_disk(tmp_path, dict_of_splits):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ROWS)
    other = Dataset.from_list([{"text": "a test's", "n": 0}])
    (DatasetDict({"train": data, "test": other}) if dict_of_splits else data).save_to_disk(str(tmp_path / "saved"))
    assert texts(tmp_path / "saved") == TEXTS and not check_source(str(tmp_path / "saved"), "text")
    first = corpus_fingerprint(str(tmp_path / "saved"))
    data.add_item({"text": "more", "n": 3}).save_to_disk(str(tmp_path / "more"))
    assert corpus_fingerprint(str(tmp_path / "more")) != first
    with pytest.raises(ValueError, match="no field 'body'.*n, text"):
        check_source(str(tmp_path / "saved"), "body")


@pytest.mark.parametrize("name", ["../elsewhere/data-00000-of-00001.arrow", "{}/elsewhere/data-00000-of-00001.arrow"])
def test_a_folder_of_save_to_disk_names_its_own_files_alone(tmp_path, name):
    from datasets import Dataset

    for folder in ("saved", "elsewhere"):
        Dataset.from_list(ROWS).save_to_disk(str(tmp_path / folder))
    state = tmp_path / "saved" / "state.json"
    tree = json.loads(state.read_text())
    tree["_data_files"].append({"filename": name.format(tmp_path)})
    state.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"saved/state\.json: names '.*elsewhere/.*' *, which is no data file of its"):
        texts(tmp_path / "saved")
    state.write_text("{")
    with pytest.raises(ValueError, match="saved: not a readable folder of save_to_disk"):
        texts(tmp_path / "saved")


# -- what is not read is named
# --------------------------------------------------------------------------------------------


def test_what_lies_beside_the_texts_is_named_and_nothing_of_it_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS[:1]))
    (tmp_path / "B.JSONL.GZ").write_bytes(gzip.compress(lines(ROWS[1:2])))
    (tmp_path / "C.JSONL").write_bytes(lines(ROWS[2:]))
    for name in ("README.txt", "LICENSE.txt", "readme.md", ".hidden.txt", "paper.pdf", "notes"):
        (tmp_path / name).write_text("nothing of the corpus")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.txt").write_text("nothing of the corpus")
    assert sorted(texts(tmp_path)) == sorted(TEXTS)
    (line,) = ignored(CorpusConfig(source=str(tmp_path)))
    assert line.startswith("corpus: 7 not read")
    assert all(
        name in line
        for name in ("README.txt", "LICENSE.txt", "readme.md", ".hidden.txt", "paper.pdf", "notes", ".git/a.txt")
    )
    before = corpus_fingerprint(str(tmp_path))
    (tmp_path / "README.txt").write_text("other")
    assert corpus_fingerprint(str(tmp_path)) == before
    assert texts(tmp_path / "README.txt") == ["other"]  # named itself, it is meant
    assert not ignored(CorpusConfig(source=str(tmp_path / "a.jsonl"))) and not ignored(CorpusConfig())


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("a.pdf", "save it as .txt"),
        ("a.docx", "save it as .txt"),
        ("a.tsv", "as .csv"),
        ("a.zip", "unpack"),
        ("a", "without a suffix"),
    ],
)
def test_other_files_say_what_to_do(tmp_path, name, remedy, capsys):
    (tmp_path / name).write_bytes(b"x")
    assert main(["--corpus.source", str(tmp_path / name), "--output", str(tmp_path / "out")]) == 2
    assert remedy in (said := capsys.readouterr().err) and said.startswith("error: ") and str(tmp_path / name) in said


# -- damage
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl.gz", gzip.compress(lines(ROWS * 50))[:-20], "cannot be read"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.jsonl.zst", pa.Codec("zstd").compress(lines(ROWS * 50), asbytes=True)[:-5], "cannot be read"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}\n", "line 1: not JSON"),
        ("a.json", b'[{"text": "a"}, ["b"]]', "item 1: expected an object"),
        ("a.csv", b"text,n\na,1\n\xff,2\n", "cannot be read"),
        ("a.csv", b"n,text\n1,a\n2\n", "line 3: has 1 columns"),
    ],
)
def test_damaged_files_are_named_by_the_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        texts(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_halves_of_surrogate_pairs_are_replaced_and_counted(tmp_path, tokenizer):
    random.seed(0)
    words = [" ".join(str(random.random()) for _ in range(20)) for _ in range(200)]
    rows = [{"text": word} for word in words]
    rows[7]["text"] += " \ud800 and \udfff"
    rows[9]["text"] += " \U0001f600"  # a pair: JSON's escape of one character
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    documents = list(load_documents(str(tmp_path / "a.jsonl")))
    assert documents[7].text == words[7] + " \ufffd and \ufffd" and documents[7].replaced == 2
    assert documents[9].text == words[9] + " \U0001f600" and sum(d.replaced for d in documents) == 2
    said = []
    prepare_tokens(
        CorpusConfig(source=str(tmp_path / "a.jsonl"), attribution_share=0.2, evaluation_share=0.2),
        tokenizer,
        32,
        tmp_path / "t",
        None,
        said.append,
    )
    assert len(said) == 2 and "a.jsonl line 8: 2 characters" in said[0] and "2 characters in all" in said[1]


# -- one long book
# --------------------------------------------------------------------------------------------------------


def book(characters: int) -> str:
    random.seed(1)
    paragraphs, size = [], 0
    while size < characters:
        paragraph = " ".join("".join(random.choices("abcdefgh", k=5)) for _ in range(random.randint(20, 120))) + "."
        paragraphs.append(paragraph)
        size += len(paragraph) + 2
    return "\n\n".join(paragraphs)


def test_pieces_joined_are_the_text_and_end_where_a_paragraph_does():
    text = book(100_000)
    pieces = list(pieces_of(text, PIECE))
    assert (
        "".join(pieces) == text
        and max(map(len, pieces)) <= PIECE
        and all(piece.endswith("\n\n") for piece in pieces[:-1])
    )
    for odd in ("x" * 5000, "word " * 2000, "line\n" * 2000, "Sentence one. " * 500, "\r\n\r\n".join(["p" * 700] * 9)):
        pieces = list(pieces_of(odd, 1000))
        assert "".join(pieces) == odd and all(500 <= len(piece) <= 1000 for piece in pieces[:-1])


def test_one_book_is_a_corpus_and_lands_in_all_splits(tmp_path, tokenizer):
    path = tmp_path / "book.txt"
    path.write_text(book(300_000))
    made = prepare_tokens(CorpusConfig(source=str(path)), tokenizer, 32, tmp_path / "tokens")
    assert all(made[split].tokens > 1000 for split in SPLITS)
    path.write_text(book(BOOK - 1000))
    assert len(texts(path)) == 1 and len(texts(path, piece_characters=1000)) > 40
    # Rows are documents as they are, unless asked for otherwise.
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": book(300_000)}))
    assert len(texts(tmp_path / "a.jsonl")) == 1 and len(texts(tmp_path / "a.jsonl", piece_characters=5000)) > 50


# -- chat
# -----------------------------------------------------------------------------------------------------------------

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"


@pytest.fixture
def instruct(tmp_path):
    """The tiny model with a chat template."""
    folder = tmp_path / "instruct"
    shutil.copytree(TINY, folder)
    options = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(options | {"chat_template": TEMPLATE}))
    return folder


def test_chat_messages_become_what_the_template_makes_of_them(tmp_path, instruct):
    messages = [{"role": "user", "content": "hello <eos>", "id": 7}, {"role": "assistant", "content": "world"}]
    (tmp_path / "a.jsonl").write_bytes(lines([{"messages": messages}, {"messages": []}]))
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "a.parquet")
    tokenizer = load_tokenizer(str(instruct))
    made = []
    for name in ("a.jsonl", "a.parquet"):
        assert check_mixture(CorpusConfig(source=str(tmp_path / name), text_field="messages"))
        (encoded,) = encode(load_documents(str(tmp_path / name), "messages"), tokenizer)
        made.append(encoded.ids.tolist())
    assert made[0] == made[1] == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)[1:]
    assert made[0].count(tokenizer.eos_token_id) >= 2 and tokenizer.bos_token_id not in made[0]


def test_chat_messages_need_a_template(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(lines([{"messages": [{"role": "user", "content": "x"}]}]))
    assert (
        main(
            [
                "--corpus.source",
                str(tmp_path / "a.jsonl"),
                "--corpus.text_field",
                "messages",
                "--output",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert "no chat template" in capsys.readouterr().err
    (tmp_path / "a.jsonl").write_bytes(lines([{"messages": [{"from": "human", "value": "x"}]}]))
    assert (
        main(
            [
                "--corpus.source",
                str(tmp_path / "a.jsonl"),
                "--corpus.text_field",
                "messages",
                "--output",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert "chat messages are a list of {role, content}" in capsys.readouterr().err


# -- more of a corpus than was read
# ---------------------------------------------------------------------------------------


def test_more_held_out_tokens_are_read_for_a_finished_dataset_and_its_key_and_first_ones_stay(tmp_path):
    """Without Ray: the harvest's own maker in this process."""
    small = [
        "--output",
        str(tmp_path),
        "--harvest.tokens",
        "4096",
        "--harvest.calibration_tokens",
        "512",
        "--harvest.rows_per_group",
        "512",
    ]
    small += [
        "--train.batch",
        "512",
        "--attribution.tokens",
        "500",
        "--features.tokens",
        "500",
        "--harvest.rows_per_shard",
        "4096",
    ]

    def configuration(*more: str) -> Config:
        return Config(**load(SweepCommand, [*small, "--evaluate.tokens", "500", *more]).sections())

    config, said = configuration(), []
    work = Harvest(config, said.append)
    maker = ShardMaker(config, work.targets, str(work.tokens), work.plans[0])
    plans = {"plans": [json.dumps([plan.to_dict() for plan in work.plans])]}
    for plan, row in zip(work.plans, maker(plans), strict=True):
        for hook, entry in json.loads(row["entries"][0]).items():
            work.entries[hook][plan.name] = ShardEntry(**entry)
    before = work._finish(work.targets[0])
    first = before.held_out("evaluation").ids.copy()
    assert 500 <= before.held_out("evaluation").tokens < 3000
    more = configuration("--evaluate.tokens", "6000")
    found = find_datasets(more, more.hooks, said.append)[more.model.hook]
    assert "reading on in the corpus, for 6,000 tokens of evaluation" in said[-1]
    assert (
        found.held_out("evaluation").tokens >= 6000 and (found.held_out("evaluation").ids[: len(first)] == first).all()
    )
    assert found.manifest == before.manifest and not (
        set(tmp_path.glob("data/*")) - {tmp_path / "data" / before.manifest.key}
    )
    said.clear()
    assert find_datasets(config, config.hooks, said.append)[config.model.hook].manifest == before.manifest and not said
