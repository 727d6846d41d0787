"""One headless Chromium for all tests of the page, and pages that must say nothing on the console and ask the network
for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sweeps
from chromium import launched
from playwright.sync_api import Browser, Page

from dmsae_ray.show.page import write_page


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@dataclass
class Watched:
    """An open page, and everything that it should not have done."""

    page: Page
    address: str
    complaints: list[str] = field(default_factory=list)

    def go(self, view: str) -> Page:
        """Open a view by its address and wait until its charts are drawn."""
        self.page.goto(f"{self.address}#{view}")
        self.page.wait_for_selector("html[data-ready]")
        self.page.wait_for_function(
            "() => [...document.querySelectorAll('.view.current .plot:not(.none)')].every((plot) => "
            "plot.querySelector('.main-svg'))"
        )
        return self.page


@pytest.fixture(scope="session")
def opened(browser: Browser) -> Iterator[list[Watched]]:
    """All pages opened so far; they are closed before their browser is."""
    pages: list[Watched] = []
    yield pages
    for watched in pages:
        watched.page.context.close()


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a sweep of sweeps.py, written once, its page within it."""
    written: dict[str, Path] = {}

    def folder_of_(name: str) -> Path:
        if name not in written:
            written[name] = getattr(sweeps, name)(tmp_path_factory.mktemp("sweeps") / name)
            write_page(written[name], written[name] / "page.html")
        return written[name]

    return folder_of_


@pytest.fixture(scope="session")
def open_page(browser: Browser, folder_of: Callable[[str], Path], opened: list[Watched]) -> Callable[..., Watched]:
    """Opens the page of a sweep in a context of its own."""

    def open_(name: str, **context: object) -> Watched:
        page = browser.new_context(**context).new_page()
        page.set_default_timeout(120_000)
        watched = Watched(page, (folder_of(name) / "page.html").as_uri())
        page.on("console", lambda message: watched.complaints.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: watched.complaints.append(f"error: {error}"))
        page.on("request", lambda request: _judge(watched, request.url))
        opened.append(watched)
        return watched

    return open_


def _judge(watched: Watched, url: str) -> None:
    if not url.startswith(("file:", "data:", "blob:")):
        watched.complaints.append(f"request: {url}")


@pytest.fixture(scope="session")
def sweep(open_page: Callable[..., Watched]) -> Watched:
    """The realistic sweep, opened once; tests leave it as they found it, or open their own."""
    return open_page("realistic", color_scheme="light", viewport={"width": 1280, "height": 900})


@pytest.fixture(scope="session")
def artifact(folder_of: Callable[[str], Path]) -> Callable[[str], dict[str, Any]]:
    """What a file of the realistic sweep holds."""
    return lambda name: json.loads((folder_of("realistic") / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def silent(opened: list[Watched]) -> Iterator[None]:
    """After every test: no page said anything on the console, failed, or asked the network for anything."""
    yield
    assert [complaint for watched in opened for complaint in watched.complaints] == []
