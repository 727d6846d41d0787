"""What tests read from an open page."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import Page


def table(page: Page, id: str) -> list[dict[str, str]]:
    """A table's visible rows: the whole value of each cell under its column's name."""
    return page.eval_on_selector(
        f"#{id}",
        """(table) => {
          const names = [...table.tHead.rows[0].cells].map((cell) => cell.querySelector("button").textContent);
          const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden);
          const entry = (cell, place) => [names[place], cell.dataset.value];
          return rows.map((row) => Object.fromEntries([...row.cells].map(entry)));
        }""",
    )


def traces(page: Page, id: str) -> list[dict[str, Any]]:
    """The traces that plotly has drawn."""
    return page.eval_on_selector(f"#{id}", "(plot) => JSON.parse(JSON.stringify(plot.data))")


def choose(page: Page, chart: str, **choices: str) -> None:
    """Choose what a chart shows."""
    for name, option in choices.items():
        page.select_option(f'select[data-chart="{chart}"][data-choice="{name}"]', option)
    page.evaluate("() => Promise.all([...document.querySelectorAll('.plot')].map((plot) => plot.drawn))")


def value(page: Page, selector: str) -> float:
    """The whole value of a number on the page."""
    return float(page.get_attribute(selector, "data-value") or "nan")


def number(text: str) -> float | None:
    """A cell's value as the artifact has it."""
    return None if text == "" else float(text)
