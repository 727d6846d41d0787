"""The page as a whole: tables that sort, light and dark, narrow screens, accessibility."""

from __future__ import annotations

import pytest
from dom import number, table, traces
from playwright.sync_api import expect
from test_views import VIEWS


def test_tables_sort_by_whole_values_and_keep_what_is_missing_last(sweep):
    page = sweep.go("consistency")
    heading = page.locator("#table-pairs thead th", has_text="Density p99")
    for direction in ("descending", "ascending"):
        heading.locator("button").click()
        expect(heading).to_have_attribute("aria-sort", direction)
        values = [number(row["Density p99"]) for row in table(page, "table-pairs")]
        known = [found for found in values if found is not None]
        assert known == sorted(known, reverse=direction == "descending")
        assert None in values and values[: len(known)] == known, "missing ones stand last either way"
    page.locator("#table-pairs thead th", has_text="Chain b").locator("button").click()
    names = [row["Chain b"] for row in table(page, "table-pairs")]
    assert names == sorted(names)
    assert page.locator("#table-pairs [aria-sort]").count() == 1


def test_long_tables_can_be_filtered(sweep):
    page = sweep.go("consistency")
    field = page.locator('[data-filter-rows="table-pairs"]')
    field.fill("random k16")
    expected = list(table(page, "table-pairs"))
    assert expected and all("random" in " ".join(row.values()) and "k16" in " ".join(row.values()) for row in expected)
    expect(page.locator("label", has=field).locator("output")).to_have_text(f"{len(expected)} of 52 rows")
    field.fill("")
    assert len(table(page, "table-pairs")) == 52


def test_light_and_dark(open_page):
    watched = open_page("one_chain", color_scheme="dark")
    page = watched.go("quality")

    def look() -> tuple[str, str]:
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return paper, page.locator("#chart-fvu .xtick text").first.evaluate("(text) => getComputedStyle(text).fill")

    dark = look()
    page.emulate_media(color_scheme="light")
    page.wait_for_function("() => document.querySelector('#chart-fvu').dataset.theme === 'light'")
    light = look()
    assert dark[0] != light[0] and dark[1] != light[1], "page and chart follow the system"
    page.click("#theme")
    assert look() == dark, "and the reader, against the system"
    expect(page.locator("#theme")).to_have_attribute("aria-pressed", "true")
    page.reload()
    watched.go("quality")
    assert look() == dark, "remembered"
    before = traces(page, "chart-fvu")[0]["y"]
    page.click("#theme")
    assert look() == light and traces(page, "chart-fvu")[0]["y"] == before


@pytest.mark.parametrize("width", [390])
def test_narrow_screens_do_not_scroll_sideways(open_page, width):
    watched = open_page("realistic", viewport={"width": width, "height": 800})
    for view in VIEWS:
        page = watched.go(view)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view
        link = page.locator("nav a[aria-current]").bounding_box()
        assert link["x"] >= -1 and link["x"] + link["width"] <= width + 1, (
            f"the navigation does not show where one is: {view}"
        )
        for caption in page.locator(".view.current caption span").all():
            box = caption.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width, f"a caption of {view} runs out of sight"
        for plot in page.locator(".view.current .plot").all():
            assert plot.evaluate("(plot) => plot.querySelector('.main-svg').clientWidth") <= width


def luminance(colour: str) -> float:
    channels = [float(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(open_page, scheme):
    page = open_page("realistic", color_scheme=scheme).go("summary")
    # What stands behind a text: the nearest element with a colour of its own.
    colours = """(element) => {
      let behind = element;
      while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
      return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
    }"""
    for selector in (
        ".lead",
        "h1 .project",
        "nav a:not([aria-current])",
        ".card .label",
        ".card strong",
        "caption",
        ".unit",
        "tbody td",
        ".outcome-hit td:nth-child(2)",
        ".outcome-miss td:nth-child(2)",
        ".outcome-open td:nth-child(2)",
        ".outcome-not-available td:nth-child(2)",
        ".missing",
        ".facts dt",
    ):
        ink, paper = page.locator(selector).first.evaluate(colours)
        assert contrast(ink, paper) >= 4.5, (selector, ink, paper)
    from dmsae_ray.show.page.arm_style import COLOURS

    paper = page.locator(".card").first.evaluate(colours)[1]
    for colour in COLOURS:
        rgb = f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"
        assert contrast(rgb, paper) >= 3, (colour, paper)


def test_every_control_has_a_name_and_every_heading_a_scope(sweep):
    for view in VIEWS:
        page = sweep.go(view)
        current = page.locator(".view.current")
        for control in current.locator("select, input").all():
            assert control.evaluate("(control) => control.labels[0]?.textContent.trim()"), view
        assert (
            current.locator(
                "thead th:not([scope='col']), tbody th:not([scope='row']), table:not(:has(caption))"
            ).count()
            == 0
        )
    listbox = page.locator("#feature-list")
    assert (listbox.get_attribute("role"), listbox.get_attribute("aria-label")) == ("listbox", "Features")
    assert listbox.locator('[role="option"][aria-selected="true"]').count() == 1


def test_focus_can_be_seen(sweep):
    page = sweep.go("summary")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    outline = page.evaluate("[document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]")
    assert outline[0] in ("A", "BUTTON") and outline[1] == "solid"


def test_the_page_runs_no_script_but_its_own(sweep):
    page = sweep.go("summary")
    assert page.locator("script").count() == 4, "two of data, plotly, and the page's"
    assert page.content().count("plotly.js v") == 1
    # The policy of the page itself is what keeps a text of the corpus from ever being run.
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = true'}))"
    )
    assert page.evaluate("window.ran") is None
    refused = [complaint for complaint in sweep.complaints if "Content Security Policy" in complaint]
    assert len(refused) == len(sweep.complaints) == 1
    sweep.complaints.clear()
