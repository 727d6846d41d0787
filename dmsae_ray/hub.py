"""What the Hugging Face hub says about a repository: asked once per process and commit, in bounded time, and said
beforehand.

So a mistyped local path, which has the form of a hub id, ends in seconds; one run sees one commit; and what names data
depends on the files that decide them, not on the commit, which an edit of a README makes another.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

SECONDS = 10.0
"""Longest that the hub is waited for, names looked up and all."""
SHARD = re.compile(r"(model|pytorch_model)-\d+-of-(\d+)\.(safetensors|bin)")
COMMIT = re.compile(r"[0-9a-f]{40}")
Kind = Literal["model", "dataset"]
WORDS = {"model": "model", "dataset": "data set"}


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    commit: str
    files: tuple[tuple[str, str], ...]
    """(name, what stands for its bytes: their sha256 where git keeps only that, else git's id of them), sorted"""
    configs: str = ""
    """what the head of a data set's README says about which files are which configuration"""


def is_commit(revision: str | None) -> TypeGuard[str]:
    """Whether a revision is a full commit, which stands for itself."""
    return revision is not None and COMMIT.fullmatch(revision) is not None


_known: dict[tuple[str, str, str | None], Repository] = {}


def repository(kind: Kind, name: str, revision: str | None, field: str) -> Repository:
    """What the hub, or for a model that is in its local cache the cache, says about a repository.

    field: of the configuration, such as model.name, for the message. Raises ValueError that gives both readings of the
    name.
    """
    if (kind, name, revision) not in _known:
        found = _look_up(kind, name, revision, field)
        _known[kind, name, revision] = _known[kind, name, found.commit] = found
    return _known[kind, name, revision]


def _look_up(kind: Kind, name: str, revision: str | None, field: str) -> Repository:
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if kind == "model" and is_commit(revision) and (known := cached(name, revision)) is not None:
        return known  # neither the commit nor its files can be others on the hub
    remedy = f"correct {field}, or give the path of a {'folder' if kind == 'model' else 'file or folder'} that is there"
    try:
        info = _asked(kind, name, revision)
    except GatedRepoError as error:
        raise ValueError(
            f"{field} {name}: the hub shows it only to those who accepted its licence ({_reason(error)}); accept it "
            "there and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(
            f"{field} {name}: the hub has this {WORDS[kind]}, but no revision {revision}; correct the revision"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{field} {name}: nothing here has this name, and the hub has no such {WORDS[kind]} (or shows it only "
            f"with its owner's token); {remedy}"
        ) from error
    # The hub's library raises ValueError for what is no id, and its HTTP library's errors are no OSErrors.
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        if kind == "model" and (known := cached(name, revision)) is not None:
            _say(
                f"hub: {name} could not be asked for ({_reason(error)}); going on with commit {known.commit} of the "
                "local cache"
            )
            return known
        own = "; with a full commit as revision it need not be asked" if kind == "dataset" else ""
        raise ValueError(
            f"{field} {name}: nothing here has this name, and the hub, where it could be a {WORDS[kind]}, could not be "
            f"asked ({_reason(error)}); {remedy}, or see to the network{own}"
        ) from error
    files = tuple(
        sorted((file.rfilename, file.lfs.sha256 if file.lfs else str(file.blob_id)) for file in info.siblings or ())
    )
    card = getattr(info, "card_data", None)
    return Repository(
        info.sha, files, repr((card.to_dict() if card else {}).get("configs")) if kind == "dataset" else ""
    )


def cached(name: str, revision: str | None) -> Repository | None:
    """A model that the hub's library keeps on this machine; None if it has not got configuration and all weights.

    The cache names a file's bytes as the hub does, and holds them under that name.
    """
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    files = {
        path.relative_to(folder).as_posix(): os.path.basename(os.path.realpath(path))
        for path in folder.rglob("*")
        if path.is_file()
    }
    return Repository(folder.name, tuple(sorted(files.items()))) if loaded_weights(files) else None


def loaded_weights(names: Iterable[str]) -> list[str]:
    """The weight files that transformers loads, of those that are there: safetensors first, one file before shards;
    none if one lacks.
    """
    names = sorted(names)
    for kind, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if f"{kind}.{suffix}" in names:
            return [f"{kind}.{suffix}"]
        shards = {
            name: found for name in names if (found := SHARD.fullmatch(name)) and (found[1], found[3]) == (kind, suffix)
        }
        if shards:
            return list(shards) if len(shards) == int(next(iter(shards.values()))[2]) else []
    return []


def _asked(kind: Kind, name: str, revision: str | None) -> Any:
    """The hub's answer. Raises what its library does, and TimeoutError: a name that is looked up has no time limit of
    its own.
    """
    from huggingface_hub import HfApi, constants

    if not constants.HF_HUB_OFFLINE:
        _say(
            f"hub: asking {constants.ENDPOINT} about the {WORDS[kind]} {name} (nothing on this machine has that "
            f"name), at most {SECONDS:.0f} s"
        )
    api, answer = HfApi(), []

    def ask() -> None:
        try:
            answer.append(getattr(api, f"{kind}_info")(name, revision=revision, timeout=SECONDS, files_metadata=True))
        except BaseException as error:  # raised below, in the thread that asked
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if not answer:
        raise TimeoutError(f"no answer in {SECONDS:.0f} s")
    if isinstance(answer[0], BaseException):
        raise answer[0]
    return answer[0]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
