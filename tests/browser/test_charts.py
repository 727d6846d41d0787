"""Every chart shows data, within its axes and its frame, whatever is chosen; tables that are wider than their frame say
so.
"""

from __future__ import annotations

import re

import pytest
from charts import charts, faults
from playwright.sync_api import expect


@pytest.mark.parametrize(("name", "width"), [("single_arm", 1400), ("twelve_arms", 390), ("one_chain", 1024)])
def test_every_chart_shows_its_data(open_page, name, width):
    page = open_page(name, viewport={"width": width, "height": 900}).go("summary")
    assert len(charts(page)) >= 10 and faults(page) == []


def test_a_single_arm_is_said_not_offered(open_page):
    page = open_page("single_arm").go("coverage")
    assert page.locator("#view-coverage select").count() == 0
    expect(page.locator("#view-coverage .choices")).to_have_text("Arm base")


def test_a_reason_leaves_with_the_choice_that_had_none(open_page):
    page = open_page("single_arm").go("consistency")
    plot = page.locator("#chart-matrix")
    page.select_option('select[data-choice="Measure"]', "activation")
    page.select_option('select[data-choice="Show"]', "minus cycle-0 sets")
    expect(plot).to_contain_text("No pair has the cycle-0 sets of activation")
    page.select_option('select[data-choice="Show"]', "value")
    expect(plot).not_to_contain_text("No pair has")
    expect(plot.locator(".main-svg").first).to_be_visible()


def test_a_chart_is_saved_as_an_image_and_nothing_lies_over_it(open_page):
    page = open_page("single_arm", color_scheme="dark").go("quality")
    page.hover("#chart-fvu .nsewdrag")
    assert page.locator(".modebar-btn").count() == 0
    with page.expect_download() as started:
        page.click('[data-save="chart-fvu"]')
    assert started.value.suggested_filename == "chart-fvu.png"
    assert started.value.path().read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("width", [1400, 1024])
def test_the_page_s_header_stays_above_every_table(open_page, width):
    page = open_page("realistic", viewport={"width": width, "height": 700}).go("consistency")
    for table in page.locator(".view.current .scroll").all():
        heading = table.locator("thead th").first
        heading.evaluate("(cell) => scrollBy(0, cell.getBoundingClientRect().top - 20)")
        over = heading.evaluate(
            """(cell) => {
              const { left, top, height } = cell.getBoundingClientRect();
              const found = document.elementFromPoint(left + 30, Math.max(2, top + height / 2));
              return [top, found.closest("header") !== null];
            }"""
        )
        assert over[0] > 60 or over[1], "the heading of a table lies over the title of the page"


@pytest.mark.parametrize("width", [1400, 1024, 390])
def test_a_table_wider_than_its_frame_says_so(open_page, width):
    watched = open_page("realistic", viewport={"width": width, "height": 900})
    wide = 0
    for view in ("summary", "consistency", "cores", "quality"):
        page = watched.go(view)
        for table in page.locator(".view.current .table").all():
            more = table.locator(".more")
            hidden = table.locator(".scroll").evaluate("(scroll) => scroll.scrollWidth - scroll.clientWidth")
            if hidden <= 2:
                expect(more).to_be_hidden()
                continue
            wide += 1
            expect(more).to_have_text(re.compile(r"^\d+ more columns? →$"))
            for _ in range(20):
                if "→" not in more.inner_text():
                    break
                before = table.locator(".scroll").evaluate("(scroll) => scroll.scrollLeft")
                more.click()
                page.wait_for_function(
                    "([scroll, before]) => scroll.scrollLeft > before",
                    arg=[table.locator(".scroll").element_handle(), before],
                )
                page.wait_for_timeout(50)
            expect(more).to_have_text(re.compile(r"^← \d+ more columns?$"))
            last = table.locator("thead th").last.bounding_box()
            frame = table.locator(".scroll").bounding_box()
            assert last["x"] + last["width"] <= frame["x"] + frame["width"] + 2, (
                "the last column can be reached by the button"
            )
    assert wide or width == 1400, "some table is wider than a small screen"


def test_core_table_is_whole_at_1400(open_page):
    page = open_page("single_arm", viewport={"width": 1400, "height": 900}).go("cores")
    assert (
        page.locator("#table-cores").evaluate(
            "(table) => table.closest('.scroll').scrollWidth - table.closest('.scroll').clientWidth"
        )
        <= 0
    )
