"""A path, id or URL that may hold a secret: a name and password before the host, a key or token among its options.

It prints itself masked, wherever it is printed: `s3://***@bucket/prefix?region=us-east-1&secret_key=***`. Only `reveal`
gives the whole. `scrub` does the same for texts of others (errors, tracebacks) that may repeat such a URL or a part of
it, or a secret of the environment. Imports nothing of ours.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote

import yaml
from pydantic_core import core_schema

MASK = "***"
SHOWN = frozenset(
    "region scheme endpoint_override background_writes allow_bucket_creation allow_bucket_deletion "
    "check_directory_existence_before_creation tls_ca_file_path tls_verify_certificates force_virtual_addressing "
    "smart_defaults anonymous proxy retry_limit_seconds project_id replication buffer_size default_block_size "
    "enable_tls blob_storage_authority dfs_storage_authority host port dbname database driver charset sslmode ssl_mode "
    "connect_timeout timeout application_name mode cache uri "
    "versionId revision format".split()
)
"""Options of URLs whose values are shown. Any other's may be a secret, whatever its name: they differ from vendor to
vendor.
"""
SHORTEST = 4
"""Characters of the shortest secret that `scrub` looks for by itself: every `a` of a text masked would hide the text,
not the secret.
"""
IN_ENVIRONMENT = re.compile(r".*(TOKEN|PASSWORD|SECRET|SECRET_KEY|ACCESS_KEY|API_KEY|ACCOUNT_KEY)", re.IGNORECASE)
"""Variables whose values are secrets, whoever reads them: HF_TOKEN, MLFLOW_TRACKING_PASSWORD, AWS_SECRET_ACCESS_KEY."""
SHORTEST_IN_ENVIRONMENT = 8
"""Characters of the shortest of theirs that is looked for: what is shorter is more likely `1`, `true` or a word."""
WORD = 16
"""Letters alone, and fewer than this, are a word, which other words and the names of folders may hold."""
_SCHEME = re.compile(r"[A-Za-z][\w+.-]*:/{0,2}")
_OPTIONS = re.compile(r"[?#][\w.\[\]%+-]+=")
_IN_TEXT = re.compile(r"[A-Za-z][\w+.-]{0,30}://[^\s'\"<>`]*[^\s'\"<>`:;,.)]")
"""Of a longer scheme the end: without that bound a text of one long word takes minutes. Without what ends a clause: a
text that was masked already stays as it is.
"""

_known: set[str] = set()
"""Secrets of all URLs of this process, for `scrub`."""


class SecretUrl:
    """Immutable; equal to the text it was made of. Pickles and copies keep the value."""

    __slots__ = ("_url",)
    _url: str

    def __init__(self, url: str | SecretUrl):
        self._url = url._url if isinstance(url, SecretUrl) else str(url)
        _known.update(_secrets(self._url))

    def reveal(self) -> str:
        """The whole of it, for whoever opens it; never for a message or a file.

        Raises ValueError if it is a masked one, such as a config.yaml among a sweep's results has.
        """
        if MASK in self._url:
            raise ValueError(
                f"{self._url}: {MASK} stands for a secret that is not kept in files; give the whole URL again, in the "
                "file of --config or on the command line"
            )
        return self._url

    @property
    def is_url(self) -> bool:
        """Whether it has a scheme and `//`; a path or an id has not."""
        return "://" in self._url

    @property
    def place(self) -> str:
        """What names the place alone: without name, password and options."""
        if not self.is_url:
            return str(self)
        return str(self).partition("?")[0].replace(f"{MASK}@", "")

    def __str__(self) -> str:
        return masked(self._url)

    def __repr__(self) -> str:
        return repr(str(self))

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __bool__(self) -> bool:
        return bool(self._url)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SecretUrl):
            return self._url == other._url
        return self._url == other if isinstance(other, str) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._url)

    def __reduce__(self):
        return SecretUrl, (self._url,)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validated, serialization=core_schema.plain_serializer_function_ser_schema(str, when_used="json")
        )

    @classmethod
    def _validated(cls, value: Any) -> SecretUrl:
        if not isinstance(value, str | SecretUrl):
            raise ValueError(f"should be text, a path or a URL, not {type(value).__name__}")
        return cls(value)


yaml.SafeDumper.add_representer(SecretUrl, lambda dumper, url: dumper.represent_str(str(url)))


def masked(text: str) -> str:
    """A URL with a mask in place of name, password and the values of unknown options; a path or an id as it is."""
    scheme = _SCHEME.match(text)
    head = scheme[0] if scheme else ""
    rest = text[len(head) :]
    if scheme and (end := _credentials(rest)):
        head, rest = f"{head}{MASK}@", rest[end:]
    found = _OPTIONS.search(rest)
    if found is None:
        bare = rest.partition("?")
        # An option without a name is one as well, but a database's file may have such a name.
        hidden = (
            bool(bare[2])
            and scheme is not None
            and head.endswith(("//", "@"))
            and not rest.startswith("/")
            and bare[2] not in SHOWN
        )
        return f"{head}{bare[0]}?{MASK}" if hidden else head + rest
    place, options = rest[: found.start()], rest[found.start() :]
    return head + place + re.sub(r"([?&;#])([^=&;#]*)(=?)([^&;#]*)", _option, options)


def scrub(text: str) -> str:
    """A text of others without the secrets of the URLs in it, and without those of any URL that this process has
    seen, or of its environment.
    """
    return scrub_ours(_IN_TEXT.sub(lambda url: masked(url[0]), text))


def scrub_ours(text: str) -> str:
    """A text of our own, whose URLs are to be opened, without the secrets that this process knows."""
    for secret in _longest_first():
        if secret.isalpha() and len(secret) < WORD:
            text = re.sub(rf"(?<![\w/.-]){secret}(?![\w/.-])", MASK, text)  # not within `postgresql`, nor in a path
        else:
            text = text.replace(secret, MASK)
    return text


def _longest_first() -> list[str]:
    own = (value for name, value in os.environ.items() if IN_ENVIRONMENT.fullmatch(name))
    return sorted({*_known, *(value for value in own if len(value) >= SHORTEST_IN_ENVIRONMENT)}, key=len, reverse=True)


def _is_secret(url: str) -> bool:
    """Whether there is a password in it, a token in a user's place, or an option that may be one; no name alone."""
    scheme = _SCHEME.match(url)
    head = scheme[0] if scheme else ""
    end = _credentials(url[len(head) :])
    bare = head + url[len(head) + end :]
    user = url[len(head) : len(head) + end]
    return ":" in user or len(user) > WORD or masked(bare) != bare


def openly(argv: list[str]) -> str | None:
    """What to say of a command line that holds secrets; None if it holds none."""
    flag = ""
    for word in argv:
        if word.startswith("--"):
            flag = word.partition("=")[0]
        if any(_is_secret(url[0]) for url in _IN_TEXT.finditer(word)):
            return (
                f"warning: {flag or 'an argument'} holds a secret, and a command line can be read by every user of the "
                "machine, that of a submitted job in Ray's dashboard: put it into the file of --config, or leave it "
                "to the environment"
            )
    return None


def scrub_files(*places: Path) -> None:
    """Take the secrets that this process has seen out of logs of others: these files, and all files below these
    folders.
    """
    secrets = [secret.encode() for secret in _longest_first()]
    for place in places if secrets else ():
        for path in [place, *place.rglob("*")] if place.is_dir() else [place]:
            if path.is_file() and not path.is_symlink():
                content = path.read_bytes()
                clean = functools.reduce(lambda text, secret: text.replace(secret, MASK.encode()), secrets, content)
                if clean != content:
                    path.write_bytes(clean)


def print_scrubbed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own way to end with an error that nobody expected (`sys.excepthook`), without secrets."""
    sys.stderr.write(scrub("".join(traceback.format_exception(kind, error, trace))))


def _credentials(rest: str) -> int:
    """Where the host begins in what follows a scheme: beyond the last @ of name and password, 0 if there are none.

    A password may hold / ? # and @, which belong quoted there but come as they are: rather too much is masked than too
    little.
    """
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if ":" not in authority:
        return authority.rfind("@") + 1
    options = _OPTIONS.search(rest)
    end = rest[: options.start() if options else len(rest)].rfind("@") + 1
    port = re.fullmatch(r"[^:@]*:\d*", authority)
    return end or (0 if port else rest.rfind("@") + 1)


def _option(found: re.Match) -> str:
    mark, name, equals, value = found.groups()
    if not equals:
        return found[0] if not name or name in SHOWN or mark == "?" else f"{mark}{MASK}"
    if name in SHOWN:
        return f"{mark}{name}={masked(unquote(value)) if '@' in unquote(value) else value}"
    return f"{mark}{name}={MASK}"


def _secrets(url: str) -> set[str]:
    """What of a URL must not be read anywhere, as it stands, quoted and unquoted."""
    scheme = _SCHEME.match(url)
    rest = url[scheme.end() :] if scheme else url
    found: set[str] = set()
    if scheme and (end := _credentials(rest)):
        name, colon, password = rest[: end - 1].partition(":")
        found |= {rest[: end - 1] if password else "", password if colon else name}
    if options := _OPTIONS.search(rest):
        for one in re.split(r"[?&;#]", rest[options.start() + 1 :]):
            name, _, value = one.partition("=")
            if name not in SHOWN:
                found.add(value)
            elif "@" in unquote(value):
                found |= _secrets(unquote(value))
    found -= {"", MASK}
    return {
        form for secret in found for form in (secret, unquote(secret), quote(secret, safe="")) if len(form) >= SHORTEST
    }
