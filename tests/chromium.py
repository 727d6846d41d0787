"""The system's Chromium, for the tests that look at pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str | None:
    """The browser: $CHROMIUM, or what the system has."""
    return os.environ.get("CHROMIUM") or next((path for path in map(shutil.which, NAMES) if path), None)


@contextmanager
def launched() -> Iterator[Browser]:
    """A headless browser; without one the test is not run, and says so."""
    path = chromium()
    if path is None:
        pytest.skip("NOT RUN: no Chromium found; apt-get install chromium, or set CHROMIUM to its path")
    with sync_playwright() as playwright:
        # Tests may run as root in a container, with little shared memory and no GPU. All pages of a site share a
        # process: what it compiled when a page was first opened, plotly above all, it finds the next time.
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--process-per-site"]
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield browser
        finally:
            browser.close()
