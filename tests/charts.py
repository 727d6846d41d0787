"""What must hold of every chart of a sweep's page, whatever charts it has: found on the page itself, so that none is
forgotten.
"""

from __future__ import annotations

from pathlib import Path

from chromium import launched
from playwright.sync_api import Page

# Of each chart, under each combination of its options: what is wrong with it, in words.
LOOK = """async () => {
  const faults = [];
  const frame = () => new Promise(requestAnimationFrame);
  const axisOf = (plot, name) => plot._fullLayout[name[0] + "axis" + name.slice(1)];
  const inside = (axis, value) => {
    const pixel = axis.type === "category" ? axis.l2p(axis._categories.indexOf(value)) : axis.d2p(value);
    return pixel >= -1 && pixel <= axis._length + 1;
  };
  const every = (fields) => fields.reduce(
    (found, field) => found.flatMap((one) => [...field.options].map((option) => [...one, [field, option.value]])),
    [[]],
  );
  // All combinations where they are few, else every option beside the first ones of the other fields.
  const combinations = (fields) => {
    const all = every(fields);
    const first = ([field, option]) => option === field.options[0].value;
    return all.length <= 24 ? all : all.filter((one) => one.filter((chosen) => !first(chosen)).length <= 1);
  };
  function look(plot) {
    const found = [];
    let marks = 0;
    for (const trace of plot._fullData) {
      const [x, y] = [axisOf(plot, trace.xaxis), axisOf(plot, trace.yaxis)];
      if (trace.type === "heatmap") {
        marks += trace.z.flat().filter(Number.isFinite).length;
        for (const [axis, values] of [[x, trace.x], [y, trace.y]]) {
          if (!values.every((value) => inside(axis, value))) found.push("cells beyond an axis");
        }
        continue;
      }
      for (const [place, value] of trace.y.entries()) {
        if (value == null || trace.x[place] == null) continue;
        if (trace.mode !== "text") marks += 1;
        const point = `(${trace.x[place]}, ${value})`;
        if (!inside(x, trace.x[place]) || !inside(y, value)) found.push(`${point} lies beyond the axes`);
        for (const [axis, error, middle] of [[y, trace.error_y, value], [x, trace.error_x, trace.x[place]]]) {
          if (!error?.visible) continue;
          const ends = [middle + error.array[place], middle - (error.arrayminus ?? error.array)[place]];
          if (!ends.every((end) => inside(axis, end))) found.push(`the bar of ${point} reaches beyond the axes`);
        }
      }
    }
    if (!marks) found.push("no mark");
    const area = plot.querySelector(".nsewdrag").getBoundingClientRect();
    const size = `${Math.round(area.width)} by ${Math.round(area.height)} pixels`;
    if (area.height < 60 || area.width < 100) found.push(`the axes are crushed to ${size}`);
    const kinds = ".scatterlayer .point, .scatterlayer .js-line, .barlayer .point path, .hm image";
    const drawn = [...plot.querySelectorAll(kinds)];
    const seen = drawn.filter((mark) => {
      const box = mark.getBoundingClientRect();
      const across = box.left < area.right + 1 && box.right > area.left - 1;
      return (box.width || box.height) && across && box.top < area.bottom + 1 && box.bottom > area.top - 1;
    });
    if (!seen.length) found.push("nothing is drawn");
    const whole = plot.getBoundingClientRect();
    for (const text of plot.querySelectorAll(".main-svg text")) {
      const box = text.getBoundingClientRect();
      const across = box.left < whole.left - 2 || box.right > whole.right + 2;
      const cut = across || box.top < whole.top - 2 || box.bottom > whole.bottom + 2;
      if (box.width && cut) found.push(`“${text.textContent}” is cut off`);
    }
    const box = plot.querySelector(".legend")?.getBoundingClientRect();
    if (box?.height && box.bottom > area.top + 1) found.push("the legend lies over the chart");
    return [...new Set(found)];
  }
  // What each chart can be asked for, under its name in words: here until the chart was looked at.
  const charts = [...document.querySelectorAll(".view.current .plot")].map((plot) => {
    const fields = [...document.querySelectorAll(`select[data-chart="${plot.id}"]`)];
    const asked = (options) => [plot.id, ...options].join(" / ");
    const choices = new Map(combinations(fields).map((one) => [asked(one.map(([, option]) => option)), one]));
    return { plot, fields, choices, asked: () => asked(fields.map((field) => field.value)), drawn: 0 };
  });
  // The charts of a view follow one another: one choice draws several, and none is drawn again for what was looked at.
  async function lookAtAll() {
    await Promise.all(charts.map(({ plot }) => plot.drawn));
    await frame();
    for (const chart of charts) {
      const asked = chart.asked();
      if (!chart.choices.delete(asked)) continue;
      if (chart.plot.classList.contains("none")) {
        // In place of a chart may stand why there is none, for some options; never for all.
        if (!chart.plot.textContent.trim().endsWith(".")) faults.push(`${asked}: empty, and no reason`);
        continue;
      }
      chart.drawn += 1;
      faults.push(...look(chart.plot).map((fault) => `${asked}: ${fault}`));
    }
  }
  await lookAtAll();
  for (const { fields, choices } of charts) {
    for (const [asked, choice] of [...choices]) {
      if (!choices.has(asked)) continue;
      for (const [field, option] of choice) field.value = option;
      fields.at(-1).dispatchEvent(new Event("change"));
      await lookAtAll();
    }
  }
  for (const { plot, drawn, choices } of charts) {
    if (!drawn) faults.push(`${plot.id}: nothing under any option`);
    for (const asked of choices.keys()) faults.push(`${asked}: never came into sight`);
  }
  // Once more as they opened, after all that they showed between.
  for (const { fields } of charts) for (const field of fields) field.selectedIndex = 0;
  for (const { fields, choices, asked } of charts) {
    choices.set(asked(), []);
    fields.at(-1)?.dispatchEvent(new Event("change"));
  }
  await lookAtAll();
  return faults;
}"""


def charts(page: Page) -> list[str]:
    """The ids of all charts of the page, in whatever view."""
    return page.eval_on_selector_all(".plot", "(plots) => plots.map((plot) => plot.id)")


def faults(page: Page) -> list[str]:
    """What is wrong with any chart of the open page, in any view, under any of its options; every view is opened."""
    found = []
    for address in page.eval_on_selector_all("nav a", "(links) => links.map((link) => link.hash)"):
        page.evaluate("(address) => { location.hash = address; }", address)
        page.wait_for_function(
            "(address) => document.querySelector('nav a[aria-current]').hash === address", arg=address
        )
        found += page.evaluate(LOOK)
    return found


def look_at(path: Path, charts_at_least: int, width: int = 1400) -> None:
    """Open a page in a browser of its own and fail with all that is wrong with it: charts, the console, requests to
    anywhere.
    """
    complaints: list[str] = []
    with launched() as browser:
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: complaints.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on(
            "request",
            lambda request: (
                request.url.startswith(("file:", "data:", "blob:")) or complaints.append(f"request: {request.url}")
            ),
        )
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        assert len(charts(page)) >= charts_at_least, charts(page)
        found = faults(page) + complaints
        assert not found, "\n".join(found)
