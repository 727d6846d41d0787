"""What in an output folder is ours: only that is ever removed, and only a folder without strangers under our names is
taken.

A folder is marked when it is first taken. Inside it, a file is ours by its place and whole name, as the table below has
them: an output folder may be one that holds a person's own `data/`, or a link to another disk. Links are neither
followed nor removed.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dmsae_ray.files import TEMPORARY, Elsewhere, elsewhere, leftovers, write_json

MARKER = "dmsae_ray.json"
STANDS_FOR = "stands_for"
"""In the folder that stands for an output at a URL: which."""
FOUND = "dmsae_ray_found.json"
"""What names the datasets, as a run found it out; may go at any time."""
KEY = r"[0-9a-f]{12}"
FOLDERS = {
    "data": rf"{KEY}",
    "tokens": rf"{KEY}",
    "chains": rf"{KEY}",
    "pairs": rf"{KEY}\.json",
    "models": rf"[\w.-]+-{KEY}",
    "sweeps": rf"[A-Za-z0-9][\w.-]*-{KEY}",
    "ray": r"\d+",
    "logs": (
        r"(sweep|harvest|report|evaluate)-\d{8}-\d{6}\.(log|all|ray)|"
        rf"(worker|trial)-{KEY}-\d+-\d+-[0-9a-f]{{6}}\.log"
    ),
}
"""What each folder of an output folder holds."""
FILES = {
    "data": (
        r"manifest\.json|references-[\w.-]+\.json|loss-gradients-\d+\.safetensors|"
        r"shards|shards/(train-\d{5,}|calibration)\.parquet|"
        r"tokens|tokens/(attribution(-\d+)?|evaluation)\.safetensors"
    ),
    "tokens": r"((train|attribution)(-\d+)?|calibration|evaluation)\.safetensors",
    "chains": (
        r"chain\.json|failed\.json|writer|cycle_\d\d+|cycle_\d\d+/(checkpoint\.pt|curve\.jsonl|(sae|scores|core)\.safetensors|record\.json|"
        r"evaluation-\d+\.json|attribution|attribution/[0-9a-f]+-\d{5,}\.safetensors)"
    ),
    "models": r"[\w.-]+\.(json|safetensors|jinja|model|txt)",
    # What Ray Tune and Ray Train write there is theirs to name: below these, everything is.
    "ray": rf"\.validate_storage_marker|(tune|{KEY}-\d+(-[0-9a-f]+)?)(/.*)?",
}
"""What lies in a folder of the table above, by its name from there."""
OTHER = ("mlflow.db", "mlartifacts", "mlflow_home", "driver.lock", "claim", "generation", "probe.json", FOUND)
"""Further names that we use in an output folder."""


def named_key(path: Path, key: object) -> str:
    """A key that a file names, which becomes the name of a folder. Raises ValueError if it is none."""
    if not isinstance(key, str) or not re.fullmatch(KEY, key):
        raise ValueError(f"{path}: names {key!r} where a key of twelve hex digits belongs; the file was altered")
    return key


def marked(home: Path) -> bool:
    """Whether this is an output folder of ours: it has our mark, or the lock that versions before the mark left."""
    return _is_there(home / MARKER) or _has_lock(home / "driver.lock")


def _is_there(path: Path) -> bool:
    place = elsewhere(path)
    return path.is_file() if place is None else place.there(path)


def mark(home: Path) -> None:
    """Raises ValueError if the folder holds what is not ours under a name that we use."""
    if not _is_there(home / MARKER):
        refuse_strangers(home)
        write_json(home / MARKER, {"format_version": 1, "what": "an output folder of dmsae_ray"})


def make_home(home: Path) -> None:
    """Raises ValueError if the folder can neither be made nor written to."""
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output folder {home}: cannot be made ({error.strerror}); give --output a folder you may write to"
        ) from error
    if not os.access(home, os.W_OK | os.X_OK):
        raise ValueError(f"output folder {home}: no permission to write; give --output a folder you may write to")


def refuse_strangers(home: Path) -> None:
    """A folder that is not marked holds nothing but ours under our names. Raises ValueError that names what is not."""
    try:
        if marked(home):
            found = []
        elif (place := elsewhere(home)) is not None:
            found = [home / name for name in place.names(home) if _is_strange(name)]
        else:
            found = [home / name for name in OTHER if os.path.lexists(home / name)] + list(_strangers(home))
    except OSError as error:
        raise ValueError(
            f"output folder {home}: cannot be read ({error.strerror}); give --output a folder of your own"
        ) from error
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"output folder {home}: holds {', '.join(str(path.relative_to(home)) for path in found[:3])}{more}, which "
            "this program did not make, under names that it would use. Nothing was touched; give --output a folder of "
            f"its own, such as {home / 'dmsae_ray'}"
        )


def _has_lock(path: Path) -> bool:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError):
        return False  # no lock of ours is no error: a folder that cannot be read is refused where it is taken
    return isinstance(tree, dict) and {"pid", "host", "since"} <= tree.keys()


def _strangers(home: Path) -> Iterator[Path]:
    """First of what stands in the place of ours, folder by folder. Looks through links, since it only looks."""
    for name, pattern in FOLDERS.items():
        folder = home / name
        if not os.path.lexists(folder):
            continue
        if not folder.is_dir():
            yield folder
            continue
        for path in sorted(folder.iterdir()):
            within = FILES.get(name)
            if not _is(pattern, path.name) or (
                within and not (path.is_dir() and all(_is(within, inner.name) for inner in path.iterdir()))
            ):
                yield path


def is_ours(name: str) -> bool:
    """Whether a file's whole name, seen from the output folder, is one that we give."""
    if "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        return False
    top, _, rest = name.partition("/")
    entry, _, inner = rest.partition("/")
    if top not in FOLDERS:
        return top == "mlartifacts" or name in (MARKER, *OTHER)
    if not _is(FOLDERS[top], entry) or (top in ("pairs", "logs") and inner):
        return False
    return top not in FILES or _is(FILES[top], inner)


def _is_strange(name: str) -> bool:
    return not is_ours(name) if name.partition("/")[0] in FOLDERS else name.partition("/")[0] in OTHER


def _is(pattern: str, name: str) -> bool:
    return re.fullmatch(rf"(?:{pattern})(?:{TEMPORARY})?", name) is not None


def ours_in(home: Path, kind: str) -> list[Path]:
    """The entries of a folder of the table that are named as ours are, links left out. kind: `data`, `chains`, ..."""
    folder = home / kind
    if folder.is_symlink() or not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if _is(FOLDERS[kind], path.name) and not path.is_symlink())
    return sorted(path for path in found if path.is_dir() == (kind != "pairs"))


def temporaries(home: Path) -> list[Path]:
    """What killed writers left under temporary names, wherever ours write; nothing else is looked at."""
    ours = [folder for kind in ("data", "tokens", "chains", "models", "sweeps") for folder in ours_in(home, kind)]
    single = [
        path for path in [*home.iterdir(), *ours_in(home, "pairs")] if re.fullmatch(rf"[\w.-]+{TEMPORARY}", path.name)
    ]
    single = [
        path for path in single if path.parent != home or re.sub(f"{TEMPORARY}$", "", path.name) in (MARKER, *OTHER)
    ]
    return [path for path in single if path.is_file() and not path.is_symlink()] + [
        path for folder in ours for path in leftovers(folder)
    ]


def scratch(home: Path, generation: int) -> Path:
    """A new folder for what Ray writes down for itself, after those of drivers that were killed are gone: nothing is
    ever read there.

    Raises ValueError if the name is taken by something that is not ours.
    """
    for path in ours_in(home, "ray"):
        remove(path, "ray")
    new = home / "ray" / str(generation)
    if os.path.lexists(new):
        raise ValueError(
            f"{new}: holds what this program did not make, in the place for Ray's own files; move it elsewhere"
        )
    new.mkdir(mode=0o700, parents=True)  # Ray pickles configurations there, secrets of URLs included
    return new


def remove(path: Path, kind: str, within: Path | None = None) -> list[Path]:
    """Remove a file or folder of ours, but not what in it is not ours. Returns what was left.

    within: the entry of the table's folder that `path` lies in; None: itself.
    """
    within, left = within or path, []
    if (place := elsewhere(path)) is not None:
        _remove_there(place, path, kind, within)
        if not path.exists():
            return []
    if not stat.S_ISDIR(path.lstat().st_mode):
        path.unlink(missing_ok=True)
        return []
    for inner in sorted(path.iterdir()):
        if inner.is_symlink() or not _is(FILES[kind], inner.relative_to(within).as_posix()):
            left.append(inner)
        elif inner.is_dir():
            left += remove(inner, kind, within)
        else:
            inner.unlink(missing_ok=True)  # of an output at a URL another process may have, too
    if not left:
        with suppress(FileNotFoundError):
            path.rmdir()
    return left


def _remove_there(place: Elsewhere, path: Path, kind: str, within: Path) -> None:
    """The same at the place that the output folder stands for. Nothing there is a link."""
    for name in [path.relative_to(place.folder).as_posix(), *place.names(path)]:
        file = place.folder / name
        if file == path or kind not in FILES or _is(FILES[kind], file.relative_to(within).as_posix()):
            place.discard(file)
