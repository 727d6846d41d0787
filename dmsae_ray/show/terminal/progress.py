"""Live lines while a sweep runs: one line per chain, redrawn on a terminal, printed on change elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

Status = dict[str, Any]

FIELDS = {"label", "cycle", "cycles", "phase", "step", "steps", "tokens_per_s", "fraction", "eta_s", "message", "saved"}
PHASES = ("queued", "starting", "train", "calibrate", "attribute", "evaluate", "done", "failed", "interrupted")
OVER = {"done", "failed", "interrupted"}
MEASURED = {"train", "attribute", "evaluate"}
"""Long phases: they tell tokens/s, and say something at least every `quiet_s`."""
BAR = 16


class ProgressBoard:
    """What each chain last said about itself. Plain state; whoever shares it between processes wraps it."""

    def __init__(self, labels: Iterable[str] = (), cycles: int = 0):
        self._statuses: dict[str, Status] = {}
        for label in labels:
            self.update(label, cycle=0, cycles=cycles, phase="queued", fraction=0.0)

    def update(self, label: str, **fields: Any) -> None:
        """Change some fields of a chain's status; the others stay."""
        assert fields.keys() <= FIELDS, f"unknown status fields {sorted(fields.keys() - FIELDS)}"
        assert fields.get("phase", "queued") in PHASES, f"unknown phase {fields['phase']!r}"
        self._statuses.setdefault(label, {"label": label}).update(fields)

    def snapshot(self) -> dict[str, Status]:
        """A copy of all statuses, by label, in the order in which they came."""
        return {label: dict(status) for label, status in self._statuses.items()}


def duration(seconds: float) -> str:
    """As 45s, 2m10s or 3h05m."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def format_status(status: Status) -> str:
    """One line: chain, cycle of last cycle, phase, share of the whole chain, tokens/s, time left. Missing fields are
    left out.
    """
    phase, cycles = status.get("phase", "queued"), status.get("cycles")
    parts = [f"{status.get('label', '?'):<12}"]
    if cycles and phase not in ("queued", "done"):
        parts.append(f"cycle {status.get('cycle', 0)}/{cycles - 1}")
    else:
        parts.append(" " * 9)
    parts.append(f"{phase:<11}")
    fraction = 1.0 if phase == "done" else status.get("fraction")
    if fraction is not None:
        fraction = min(1.0, max(0.0, fraction))
        full = int(fraction * BAR)
        parts.append(f"[{'#' * full}{'-' * (BAR - full)}] {int(fraction * 100):3d}%")
    if phase == "train" and status.get("steps"):
        parts.append(f"step {status.get('step', 0)}/{status['steps']}")
    speed = status.get("tokens_per_s")
    if speed and phase not in OVER:
        parts.append(f"{speed / 1000:.1f}k tokens/s" if speed >= 1000 else f"{speed:.0f} tokens/s")
    if status.get("eta_s") is not None and phase not in OVER:
        parts.append(f"ETA {duration(status['eta_s'])}")
    if status.get("message"):
        parts.append(str(status["message"]).splitlines()[0])
    return "  ".join(parts).rstrip()


class Said(NamedTuple):
    """In plain mode: what was last said of a chain, and when."""

    state: tuple[Any, Any]
    """cycle, phase"""
    line: str
    when: float
    rated: bool
    """whether the line told tokens/s"""


class LiveLines:
    """Context manager that shows what `statuses()` returns until it is left; the last state stays on screen.

    statuses: called from a thread of its own, returns status dicts by label; it must not raise.
    stream: where plain lines go (default: standard output). console: for tests; a terminal gets redrawn lines, all else
    plain ones.
    interval_s: between looks; quiet_s: in plain mode a long phase says something at least so often.
    """

    def __init__(
        self,
        statuses: Callable[[], dict[str, Status]],
        stream: TextIO | None = None,
        console: Console | None = None,
        interval_s: float = 1.0,
        quiet_s: float = 30.0,
    ):
        self._statuses, self._interval_s, self._quiet_s = statuses, interval_s, quiet_s
        self._stream = stream if stream is not None else sys.stdout
        self._console = console if console is not None else Console(file=self._stream, highlight=False)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live-lines", daemon=True)
        self._begin = time.monotonic()
        self._said: dict[str, Said] = {}

    def __enter__(self) -> LiveLines:
        self._begin = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        # Bounded: a look that hangs (a cluster that is gone) must not keep an interrupted driver alive.
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        if self._console.is_terminal:
            # Elsewhere than on standard output, what libraries print there is none of our business.
            ours = self._console.file is sys.stdout
            with Live(console=self._console, auto_refresh=False, redirect_stdout=ours, redirect_stderr=ours) as live:
                self._look_until_stopped(lambda found, last: live.update(self._lines(found), refresh=True))
        else:
            self._look_until_stopped(self._say_changes)

    def _look_until_stopped(self, show: Callable[[dict[str, Status], bool], None]) -> None:
        while True:
            show(self._statuses(), False)
            if self._stop.wait(self._interval_s):
                break
        show(self._statuses(), True)

    @staticmethod
    def _lines(found: dict[str, Status]) -> Group:
        return Group(*(Text(format_status(status), no_wrap=True, overflow="ellipsis") for status in found.values()))

    def _say_changes(self, found: dict[str, Status], final: bool) -> None:
        now = time.monotonic()
        for label, status in found.items():
            line, state = format_status(status), (status.get("cycle"), status.get("phase"))
            last = self._said.get(label)
            long = status.get("phase") in MEASURED
            overdue = last is not None and long and now - last.when >= self._quiet_s
            # A phase's first measured rate is said at once: how long it will take is known from then on.
            rated = long and bool(status.get("tokens_per_s"))
            news = last is None or state != last.state or (rated and not last.rated)
            if news or overdue or (final and (last is None or line != last.line)):
                print(f"{duration(now - self._begin):>6}  {line}", file=self._stream, flush=True)
                self._said[label] = Said(state, line, now, rated)
