"""The lines with which the main README submits a sweep, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def submit_lines() -> str:
    (block,) = re.findall(r"^```sh submit\n(.*?)^```$", README.read_text(), re.M | re.S)
    return block
