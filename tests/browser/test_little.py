"""Sweeps in which something is missing: a plain sentence in its place, never an empty chart."""

from __future__ import annotations

import pytest
from dom import table, traces
from playwright.sync_api import expect
from test_views import VIEWS

SAYS = {
    "one_chain": {
        "summary": "nothing was stated in advance",
        "consistency": "cores have not been compared, which needs two finished chains",
        "consensus": "no consensus over chains has been made",
        "cores": "No chain has a second core",
    },
    "unscored": {
        "summary": "What was run is not known",
        "consensus": "no consensus over chains has been made",
        "features": "no features have been described",
    },
    "bare": {
        "summary": "Failures are not known",
        "consistency": "comparison.json is not there",
        "cores": "No finished cycle selected a core",
        "coverage": "evaluation.json holds none",
        "quality": "FVU was not measured",
        "density": "evaluation.json holds none",
        "features": "features.json is not there",
    },
    "all_failed": {
        "summary": "no chain has finished a cycle",
        "consistency": "cores have not been compared",
        "cores": "no chain has finished a cycle",
        "coverage": "no chain has finished a cycle",
        "quality": "no chain has finished a cycle",
        "density": "no chain has finished a cycle",
    },
}


@pytest.mark.parametrize("name", SAYS)
def test_what_is_missing_is_said(open_page, name):
    watched = open_page(name)
    for view in VIEWS:
        page = watched.go(view)
        current = page.locator(".view.current")
        notes = " ".join(current.locator(".note").all_inner_texts())
        wanted = SAYS[name].get(view)
        assert (wanted in notes) if wanted else True, (view, notes)
        shown = current.locator(".plot:not(.none), tbody tr, .facts, .card, #browser").count()
        assert shown or notes, f"{view} is blank"
        for plot in current.locator(".plot:not(.none)").all():
            assert plot.evaluate("(plot) => plot.querySelectorAll('.trace, .hm').length") > 0, (
                f"an empty chart in {view}"
            )
        assert current.locator("tbody:not(:has(tr))").count() == 0, f"an empty table in {view}"


def test_one_chain(open_page):
    watched = open_page("one_chain")
    page = watched.go("quality")
    assert [trace["x"] for trace in traces(page, "chart-fvu")] == [["16"]]
    assert {row["Low and high are"] for row in table(page, "table-spreads")} == {"one seed"}
    page = watched.go("features")
    expect(page.locator("#feature-list li")).to_have_count(3)
    assert watched.go("summary").locator("#card-agreement").count() == 0, "one chain agrees with none"


def test_unscored_pairs_say_why(open_page):
    page = open_page("unscored").go("consistency")
    reason = "cores of 1 and 1 latents: a comparison needs at least 2 on each side"
    assert reason in page.locator("#chart-matrix").inner_text()
    (row,) = table(page, "table-pairs")
    assert (row["PW-MCC"], row["Beyond chance"]) == ("", "")
    assert page.locator(f'#table-pairs td[title="{reason}"]').count() >= 4
    assert [row["Chain"] for row in table(open_page("unscored").go("summary"), "table-failed")] == ["seed4-k16"]
