"""A data set on the Hugging Face hub: `owner/name` or `owner/name:configuration`, of which the `train` split is streamed."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator

from dmsae_ray.secret_url import masked, scrub

COMMIT = re.compile(r"[0-9a-f]{40}")


def hub_commit(source: str, revision: str | None) -> str:
    """The commit a hub data set's revision stands for. Raises ValueError if the hub does not say."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # its HTTP library's base class: no connection is not an OSError there

    try:
        return HfApi().dataset_info(source.partition(":")[0], revision=revision).sha
    except (HTTPError, OSError) as error:
        raise ValueError(_message(source, revision, error)) from error


def hub_rows(source: str, revision: str | None) -> Iterator[tuple[str, dict]]:
    """Yield (place, row) of a data set's `train` split, read as they are asked for. Raises ValueError if it cannot be read."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError

    repository, _, configuration = source.partition(":")
    number = 0
    try:
        for row in load_dataset(repository, configuration or None, split="train", streaming=True, revision=revision):
            yield f"{source} row {number}", row
            number += 1
    # ValueError: what the builders raise for a file that is not what its name says (pyarrow's errors are ValueErrors).
    except (DatasetsError, HTTPError, OSError, ValueError) as error:
        raise ValueError(_message(source, revision, error, after=number)) from error
    finally:
        # A Parquet data set not read to its end has threads of Arrow reading ahead, held by a cycle of references. If they
        # live on when the interpreter ends, it aborts (7 of 8 times where it ended at once; datasets issue 7566).
        gc.collect()


def _message(source: str, revision: str | None, error: Exception, after: int = 0) -> str:
    reason = scrub(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}")
    if after:
        return f"corpus.source {masked(source)}: the hub data set broke off after {after} rows ({reason}); try again, or use fewer corpus.documents"
    return (
        f"corpus.source {masked(source)}: neither a local path nor a hub data set that can be read at revision {revision or 'main'} "
        f"({reason}); check the name, the network and the hub token, or give the full commit as corpus.revision"
    )
