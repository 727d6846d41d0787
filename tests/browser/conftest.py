"""One headless Chromium for all tests of the page, and pages that must say nothing on the console and ask the network
for nothing.

A window of its own for each test would cost three seconds, most of them to compile plotly anew: there are two tabs, one
in which the realistic sweep stays open, one in which a test opens the page that it asks for, from nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from chromium import launched
from playwright.sync_api import BrowserContext, Page

# What makes pages is imported where that happens: with `-n` the process that only shares out tests reads this, too.

VIEWPORT = {"width": 1280, "height": 720}


@pytest.fixture(scope="session")
def context() -> Iterator[BrowserContext]:
    """All tabs, and what they remember."""
    with launched() as browser, browser.new_context() as context:
        yield context


@dataclass
class Tab:
    """A tab of the browser, and everything that pages in it should not have done."""

    page: Page
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(120_000)
        self.page.on("console", lambda message: self.complaints.append(f"console {message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("request", lambda request: self._judge(request.url))

    def _judge(self, url: str) -> None:
        if not url.startswith(("file:", "data:", "blob:")):
            self.complaints.append(f"request: {url}")

    def settle(self) -> None:
        """All that the open page had to say is heard, and what its reader chose is forgotten: light or dark."""
        self.page.wait_for_function("true", polling=20)
        if self.page.url.startswith("file:"):
            self.page.evaluate("localStorage.clear()")


@dataclass
class Opened:
    """The page of a sweep, open in a tab until another is opened there."""

    tab: Tab
    address: str

    @property
    def complaints(self) -> list[str]:
        return self.tab.complaints

    def go(self, view: str) -> Page:
        """Open a view by its address and wait until its charts are drawn."""
        page = self.tab.page
        page.goto(f"{self.address}#{view}")
        page.wait_for_selector("html[data-ready]")
        page.wait_for_function(
            "() => [...document.querySelectorAll('.view.current .plot:not(.none)')].every((plot) => "
            "plot.querySelector('.main-svg'))"
        )
        return page


@pytest.fixture(scope="session")
def tabs() -> list[Tab]:
    """All tabs opened so far; they are closed with their browser."""
    return []


@pytest.fixture(scope="session")
def new_tab(context: BrowserContext, tabs: list[Tab]) -> Callable[[], Tab]:
    def new_tab_() -> Tab:
        tabs.append(Tab(context.new_page()))
        return tabs[-1]

    return new_tab_


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a sweep of sweeps.py, written once for all processes of `pytest -n`, its page within it."""
    root = tmp_path_factory.getbasetemp()
    shared = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "pages"
    shared.mkdir(exist_ok=True)

    @cache
    def folder_of_(name: str) -> Path:
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            page = shared / name / "page.html"
            if not page.exists():  # it comes last, and whole
                import sweeps

                from dmsae_ray.show.page import write_page

                write_page(getattr(sweeps, name)(page.parent), page)
        return page.parent

    return folder_of_


@pytest.fixture(scope="session")
def tab(new_tab: Callable[[], Tab]) -> Tab:
    """The tab for all pages but the one that stays open."""
    return new_tab()


@pytest.fixture
def open_page(tab: Tab, folder_of: Callable[[str], Path]) -> Callable[..., Opened]:
    """Opens the page of a sweep, from nothing and with nothing remembered; the one that the test opened before it is
    gone.
    """

    def open_(name: str, viewport: dict[str, int] = VIEWPORT, color_scheme: str = "light") -> Opened:
        address = (folder_of(name) / "page.html").as_uri()
        tab.settle()
        tab.page.goto("about:blank")
        tab.page.set_viewport_size(viewport)
        tab.page.emulate_media(color_scheme=color_scheme)
        return Opened(tab, address)

    return open_


@pytest.fixture(scope="session")
def sweep(new_tab: Callable[[], Tab], folder_of: Callable[[str], Path]) -> Opened:
    """The realistic sweep, opened once; tests leave it as they found it, or open their own."""
    tab = new_tab()
    tab.page.set_viewport_size({"width": 1280, "height": 900})
    tab.page.emulate_media(color_scheme="light")
    return Opened(tab, (folder_of("realistic") / "page.html").as_uri())


@pytest.fixture(scope="session")
def artifact(folder_of: Callable[[str], Path]) -> Callable[[str], dict[str, Any]]:
    """What a file of the realistic sweep holds, read once; tests leave it as it is."""
    return cache(lambda name: json.loads((folder_of("realistic") / f"{name}.json").read_text(encoding="utf-8")))


@pytest.fixture(autouse=True)
def silent(tabs: list[Tab]) -> Iterator[None]:
    """After every test: no page said anything on the console, failed, or asked the network for anything."""
    yield
    for tab in tabs:
        tab.settle()
    heard = [complaint for tab in tabs for complaint in tab.complaints]
    for tab in tabs:
        tab.complaints.clear()  # they are this test's, not the next one's
    assert heard == []
