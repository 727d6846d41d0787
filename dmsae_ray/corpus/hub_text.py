"""A data set on the Hugging Face hub: `owner/name` or `owner/name:configuration`, of which the `train` split is
streamed.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator

from dmsae_ray.corpus.local_files import ABOUT
from dmsae_ray.hub import Repository, is_commit, repository


def hub_commit(source: str, revision: str | None) -> str:
    """The commit a hub data set's revision stands for, the same one all through a run. Raises ValueError if the hub
    does not say.
    """
    return revision if is_commit(revision) else _repository(source, revision).commit


def hub_content(source: str, revision: str | None) -> str:
    """What stands for a hub data set's documents: its files, README and the like left out; or the commit, where one is
    given in full, for which nobody is asked. Raises ValueError if the hub does not say.
    """
    if is_commit(revision):
        return revision
    found = _repository(source, revision)
    files = [
        f"{name} {blob}\n"
        for name, blob in found.files
        if not ABOUT.fullmatch(name.rpartition("/")[2]) and not name.startswith(".")
    ]
    return hashlib.sha256("".join([*files, found.configs]).encode()).hexdigest()


def _repository(source: str, revision: str | None) -> Repository:
    return repository("dataset", source.partition(":")[0], revision, "corpus.source")


def hub_rows(source: str, revision: str | None) -> Iterator[tuple[str, dict]]:
    """Yield (place, row) of a data set's `train` split, read as they are asked for. Raises ValueError if it cannot be
    read.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    name, _, configuration = source.partition(":")
    number = 0
    try:
        for row in load_dataset(name, configuration or None, split="train", streaming=True, revision=revision):
            yield f"{source} row {number}", row
            number += 1
    # ValueError: what the builders raise for a file that is not what its name says (pyarrow's errors are ValueErrors).
    except (DatasetsError, HTTPError, OSError, ValueError) as error:
        raise ValueError(_message(source, revision, error, after=number)) from error
    finally:
        # A Parquet data set not read to its end has threads of Arrow reading ahead, held by a cycle of references. If
        # they live on when the interpreter ends, it aborts (7 of 8 times where it ended at once; datasets issue 7566).
        gc.collect()


def _message(source: str, revision: str | None, error: Exception, after: int = 0) -> str:
    reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
    if after:
        return (
            f"corpus.source {source}: the hub data set broke off after {after} rows ({reason}); try again, or use "
            "fewer corpus.documents"
        )
    return (
        f"corpus.source {source}: neither a local path nor a hub data set that can be read at revision "
        f"{revision or 'main'} ({reason}); check the name, the network and the hub token, or give the full commit as "
        "corpus.revision"
    )
