"""The parts of a sweep's results, one after the other: each stands alone, and what could not be made says why.

failed_parts.json in the results folder lists them, with reasons; it is not there when all were made.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from dmsae_ray.causes import causes
from dmsae_ray.files import discard, move, write_json
from dmsae_ray.lock import Superseded
from dmsae_ray.secret_url import scrub

FILE = "failed_parts.json"
T = TypeVar("T")


class Parts:
    """What was made of a results folder, and what was not."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder, self.say = folder, say
        self.reasons: dict[str, str] = {}
        """by name of a part that could not be made, or not all of it: why"""

    def make(self, name: str, act: Callable[[], T], needs: Sequence[str] = (), files: Sequence[str] = ()) -> T | None:
        """What `act` returns; None, and the reason noted, if it raises or a part that it needs could not be made.

        files: what it writes; those of an earlier run get another name (`earlier`) where this one made none: they would
        pass for these results. Only another driver's taking over (Superseded) and an interruption are raised.
        """
        lacking = [part for part in needs if part in self.reasons]
        try:
            if not lacking:
                made = act()
                for file in files:
                    if earlier(self.folder / file).exists():
                        discard(earlier(self.folder / file))
                return made
            self.note(name, f"not begun: it needs {' and '.join(lacking)}, which could not be made")
        except Superseded:
            raise
        except Exception as error:
            traceback.print_exc(file=_Scrubbed())
            self.note(name, reason_of(error))
        for file in files:
            if (self.folder / file).exists():
                move(self.folder / file, earlier(self.folder / file))
        return None

    def note(self, name: str, reason: str, state: str = "NOT MADE") -> None:
        """A part was not made, or is incomplete."""
        self.reasons[name] = reason
        self.say(f"{name}: {state}: {reason}")
        self.write()

    def write(self) -> None:
        """failed_parts.json as things stand."""
        if self.reasons:
            write_json(self.folder / FILE, [{"part": name, "reason": reason} for name, reason in self.reasons.items()])
        else:
            discard(self.folder / FILE)


def earlier(path: Path) -> Path:
    """Where a part's file of an earlier run is kept while it cannot be made anew."""
    return path.with_name(f"{path.stem}.earlier{path.suffix}")


def known_from(path: Path, say: Callable[[str], None]) -> dict | None:
    """What a JSON file of an earlier run holds; None if it is not there, or damaged: then it is made again."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        say(f"{path}: damaged ({error}); making it again")
        return None


def reason_of(error: BaseException) -> str:
    """An error in a line, without Ray's wrapping: what this program raises is a sentence by itself, of others the kind
    belongs to it.
    """
    # What Ray wrapped is its wrapping's `cause`; what an error of ours was made from is `__cause__`, and says less.
    cause = next(link for link in causes(error) if getattr(link, "cause", None) is None)
    line = scrub((str(cause).strip() or "no reason given").splitlines()[0])
    return line if isinstance(cause, ValueError) else f"{type(cause).__name__}: {line}"


UNREADABLE = (ValueError, KeyError, OSError, SafetensorError)
"""What reading a damaged or missing file of a chain raises."""


def damaged(folder: Path, error: BaseException) -> str:
    """What to do about a cycle's file that cannot be read."""
    return (
        f"{folder}: cannot be read ({reason_of(error)}); delete this cycle's folder and run the sweep to have it "
        "computed again"
    )


class _Scrubbed:
    """Standard error, where the log is, without secrets of URLs."""

    def write(self, text: str) -> None:
        sys.stderr.write(scrub(text))
