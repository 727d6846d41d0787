"""The terminal that tables are shown on."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console

WIDTH = 120
"""columns of report.txt, and of output that is not a terminal"""


def terminal_console(stream: TextIO | None = None) -> Console:
    """Where people read; where that is not a terminal, wide enough for the tables."""
    console = Console(file=stream, highlight=False)
    return console if console.is_terminal else Console(file=stream, highlight=False, width=WIDTH)
