"""Local files of a source: which are read, which are left out, and how their bytes are had.

A folder is searched recursively. Hidden files and what comes with a corpus without being a part of it (README*,
LICENSE* and the like) are left out, as is whatever has none of the suffixes below: `ignored_files` names them, so that
nothing is missing in silence.
"""

from __future__ import annotations

import glob
import gzip
import io
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from dmsae_ray.files import file_sha256
from dmsae_ray.place import has_form_of_hub_id
from dmsae_ray.secret_url import masked

EMBEDDED = Path(__file__).parent / "embedded" / "documents.parquet"
PACKED = (".gz", ".zst")
TEXT = (".txt", ".md")
ROWS = (".jsonl", ".ndjson", ".json", ".csv")
PACKABLE = (*TEXT, *ROWS)
"""May be compressed as a whole."""
SUFFIXES = (*PACKABLE, ".parquet")
TAKES = f"{', '.join(SUFFIXES)} files (all but .parquet also as {' and '.join(PACKED)})"
ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|contributing|authors|citation)([._-].*)?", re.IGNORECASE
)
REMEDIES = {
    (".pdf", ".docx", ".doc", ".odt", ".rtf", ".epub", ".html", ".htm"): "save it as .txt",
    (".tsv", ".xlsx", ".xls"): "save it as .csv",
    (".zip", ".tar", ".tgz", ".7z", ".bz2", ".xz", ".rar"): "unpack it",
    (".arrow", ".feather"): "give the folder that save_to_disk wrote, or save it as .parquet",
}


def is_hub(source: str) -> bool:
    """Whether a source names a hub data set: it has the form of one. The configuration has made what is local
    absolute.
    """
    return has_form_of_hub_id(source) and not source.lower().endswith((*SUFFIXES, *PACKED))


def suffix_of(path: Path) -> str:
    """What says how a file is read, in lower case, without that of its compression."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def is_packed(path: Path) -> bool:
    return path.suffix.lower() in PACKED


def can_read(path: Path) -> bool:
    return suffix_of(path) in (PACKABLE if is_packed(path) else SUFFIXES)


def local_files(source: str) -> list[Path]:
    """The files of a local source that are read, sorted by path; those that `save_to_disk` wrote for such a folder.

    Raises ValueError if there are none, or if one that was named, itself or by a pattern, cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = saved_files(path) if is_saved(path) else [p for p in _inside(path) if _is_corpus(path, p)]
        if not found:
            there = ", ".join(sorted({p.name for p in _inside(path)})[:5])
            raise ValueError(
                f"corpus.source {masked(source)}: the folder holds no {TAKES}"
                + (f"; there are {there}" if there else "")
            )
        return found
    if path.is_file():
        found = [path]
    elif path.exists():
        raise ValueError(f"corpus.source {masked(source)}: neither a file nor a folder; give {TAKES}")
    else:
        found = sorted(p for p in _matches(path) if p.is_file())
    if not found:
        raise ValueError(
            f"corpus.source {masked(source)}: no such file or folder, and nothing matches it as a glob; give "
            f"`embedded`, a path to {TAKES}, a folder of them or of save_to_disk, or a hub data set id such as "
            "owner/name"
        )
    for p in found:
        if not can_read(p):
            kind = "".join(p.suffixes[-2:]) if is_packed(p) else p.suffix
            remedy = next((f"{text}; " for kinds, text in REMEDIES.items() if p.suffix.lower() in kinds), "")
            raise ValueError(
                f"{p}: cannot read {kind or 'files without a suffix'} as text; {remedy}corpus.source takes {TAKES}"
            )
    return found


def ignored_files(source: str) -> list[Path]:
    """Whatever lies in a source's folder, or matches its pattern, and is not read, sorted by path."""
    path = Path(source).expanduser()
    if path.is_dir():
        return [] if is_saved(path) else [p for p in _inside(path) if not _is_corpus(path, p)]
    if path.is_file() or "**" in path.parts:
        return []
    return sorted(p for p in _matches(path) if p.is_dir())


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote this folder by save_to_disk: a data set, or a dict of them."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def saved_files(folder: Path) -> list[Path]:
    """The data files of such a folder, of its `train` split if it is a dict. Raises ValueError if it has none."""
    if (folder / "dataset_dict.json").is_file():
        if not (folder / "train").is_dir():
            splits = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "none"
            raise ValueError(
                f"corpus.source {folder}: a dict of data sets without `train`; its splits are {splits}: give the "
                "folder of one"
            )
        folder = folder / "train"
    return sorted(folder.glob("*.arrow"))


def open_bytes(path: Path) -> io.BufferedReader | gzip.GzipFile:
    """A file's bytes, unpacked. What is wrong with them is raised as they are read: OSError, EOFError or zlib.error."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


class FileState(NamedTuple):
    """What tells, without reading it, whether a file may hold something else than when it was last looked at."""

    size: int
    """bytes"""
    modified_ns: int
    inode: int
    changed_ns: int
    """the time that no program can set back, as one that copies or unpacks does with `modified_ns`"""

    @staticmethod
    def of(path: Path) -> FileState:
        """That of the file that a link leads to. Raises OSError."""
        stat = path.stat()
        return FileState(stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns)


def file_hash(path: Path) -> str:
    """sha256 of a file; kept in this process while its state stays the same: a corpus may take minutes to read."""
    return _hash(path, FileState.of(path))


@lru_cache(maxsize=100_000)
def _hash(path: Path, state: FileState) -> str:
    return file_sha256(path)


def _inside(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _is_corpus(folder: Path, path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return can_read(path) and not hidden and not (suffix_of(path) in TEXT and ABOUT.fullmatch(path.name))


def _matches(pattern: Path) -> list[Path]:
    return [Path(p) for p in glob.glob(str(pattern), recursive=True)]
