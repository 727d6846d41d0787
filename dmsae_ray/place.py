"""Places that a configuration names: read against this process's folder, home and environment once, absolute ever
after.

A configuration travels to processes that run elsewhere, under another home. What it names there must be what it names
here, so nothing below is asked again: a path is absolute, and whatever is still relative is no path but the id of
something on the hub.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Any

from dmsae_ray.secret_url import MASK, SecretUrl, masked

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
"""`name`, `owner/name` or, for a data set, `owner/name:configuration`."""
SERVERS = ("databricks", "uc", "databricks-uc")
"""MLflow tracking URIs that are names of their own, no paths."""


def has_form_of_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not name.startswith(".")


def not_empty(value: Any) -> Any:
    """Raises ValueError for an empty name: as a path it would be the folder that the command happens to run in."""
    if isinstance(value, str) and not value.strip():
        raise ValueError("is empty: name a place, or leave the field out")
    return value


def _path(value: Any) -> str | None:
    """The text of a name that may be a path; None for whatever is none, such as a URL that holds a secret. Raises
    ValueError if empty.
    """
    text = str(value) if isinstance(value, SecretUrl) else not_empty(value)
    return text if isinstance(text, str) and MASK not in masked(text) else None


def absolute(value: Any) -> Any:
    """A path, `~` and the working folder written out. Raises ValueError if it is empty or names a user who is not
    there.
    """
    if not isinstance(not_empty(value), str | Path):
        return value
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{value}: {error}; give the whole path") from error


def folder_or_url(value: Any) -> Any:
    """A folder, absolute; a URL stays as it is."""
    if isinstance(value, Path):
        return str(absolute(value))
    text = _path(value)
    if text is None or ("://" in text and not text.startswith("file://")):
        return value
    return str(absolute(text.removeprefix("file://")))


def output_place(value: Any) -> Any:
    """The same of an output: whatever has no scheme is a path, whichever characters it has."""
    is_text = isinstance(value, str) and "://" not in value
    return str(absolute(value)) if is_text else folder_or_url(value)


def file_or_hub(value: Any, shipped: str) -> Any:
    """What is on this machine, absolute; the name of what is shipped with the package, a URL or a hub id stays as it
    is.

    Something on this machine comes before the hub. Decided here, where the name was given: another process may have a
    folder of that name in its own working folder. A pattern of files stays one, whatever characters the working
    folder's own name has.
    """
    text = _path(value)
    if text is None or text == shipped or "://" in text:
        return value
    path = absolute(text)
    if os.path.exists(path):
        return str(path)
    if has_form_of_hub_id(text):
        return value
    if glob.has_magic(text):
        user, slash, rest = text.partition("/")
        start, rest = (Path(user).expanduser(), rest) if slash and user.startswith("~") else (Path.cwd(), text)
        return str(Path(glob.escape(str(start))) / rest)
    return str(path)


def tracking_uri(value: Any) -> Any:
    """An MLflow tracking URI whose database or folder, if it has one, is absolute."""
    text = _path(value)
    if text is None or text in SERVERS:
        return value
    if found := re.fullmatch(r"(sqlite(?:\+\w+)?:///)([^/:?][^?]*)(\?.*)?", text):
        return found[1] + str(absolute(found[2])) + (found[3] or "")
    if found := re.fullmatch(r"file:(?://)?([^/].*)", text):
        return absolute(found[1]).as_uri()
    return value if re.match(r"[a-z][a-z0-9+.-]*:", text) else str(absolute(text))


def default_output(name: str) -> Path:
    """Where what an experiment makes lies if its configuration does not say: `$DMSAE_RAY_HOME/<name>` or
    `~/dmsae_ray/<name>`.
    """
    return absolute(os.environ.get("DMSAE_RAY_HOME") or "~/dmsae_ray") / name
