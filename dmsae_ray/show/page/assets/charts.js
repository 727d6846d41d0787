// Charts: plotly draws each when it first comes into sight, with the template of the page's theme.
const chartData = JSON.parse(document.getElementById("data-charts").textContent);
// No bar of buttons over the chart: it lies over axes, legend and colour bar. A drag zooms, a double click goes back, and the
// button beside the heading saves the image. Where a finger scrolls the page, a drag is left to that.
const plotConfig = { responsive: true, displayModeBar: false };
const fingers = matchMedia("(pointer: coarse)");

function chartKey(id) {
  const fields = [...document.querySelectorAll(`select[data-chart="${id}"]`)];
  return fields.map((field) => field.value).join("\n");
}

// One drawing after the other: plotly may still be settling margins, which it must not find taken away.
function drawChart(place) {
  place.dataset.theme = theme();
  place.drawn = (place.drawn ?? Promise.resolve()).then(() => draw(place));
}

const LONGEST_ON_PHONE = 14;
const shortened = (name) => (name.length > LONGEST_ON_PHONE ? `${name.slice(0, 6)}…${name.slice(-7)}` : name);

// On a phone names take no more room than what they name: long ones lose their middle (a touch shows them whole), a legend of many
// stands above the chart, not over it, and a colour bar would take the width of the cells, which state their values.
function fitPhone(place, data, layout) {
  for (const trace of data) if (trace.type === "heatmap") trace.showscale = false;
  for (const [letter, name] of [["x", "xaxis"], ["y", "yaxis"]]) {
    const axis = (layout[name] ??= {});
    if (axis.title?.text) axis.title.text = axis.title.text.replace(" (", "<br>(");
    if (axis.type !== "category") continue;
    axis.tickvals = [...new Set(axis.categoryarray ?? data.flatMap((trace) => trace[letter]))];
    axis.ticktext = axis.tickvals.map((category) => shortened(String(category)));
  }
  const named = data.filter((trace) => trace.name && trace.showlegend !== false).length;
  if (layout.showlegend !== false && named > 4) {
    for (const trace of data) if (trace.name) trace.name = trace.name.length > 28 ? `${trace.name.slice(0, 20)}…${trace.name.slice(-7)}` : trace.name;
    layout.height += 20 * named;
    // Half of the height is all that plotly lets a legend have by itself.
    layout.legend = { ...layout.legend, maxheight: 24 * named };
    place.style.height = `${layout.height}px`;
  }
}

function draw(place) {
  const figure = chartData.charts[place.id][chartKey(place.id)];
  if (figure === undefined) throw new Error(`${place.id} has no figure for ${JSON.stringify(chartKey(place.id))}`);
  const none = typeof figure === "string";
  place.classList.toggle("none", none);
  if (none) {
    Plotly.purge(place);
    place.style.height = "";
    place.textContent = figure;
    return;
  }
  // A reason that stood here before would push the chart down.
  if (!place.querySelector(".main-svg")) place.textContent = "";
  place.style.height = `${figure.layout.height}px`;
  const read = figure.layout.meta?.read;
  if (read) place.closest("figure").querySelector("figcaption p").textContent = read;
  const template = chartData.templates[theme()];
  const narrow = place.clientWidth < 520;
  const layout = { ...figure.layout, template, ...(narrow ? { margin: { l: 44, r: 8, t: 12, b: 44 } } : {}) };
  if (fingers.matches) layout.dragmode = false;
  // plotly keeps and changes what it is given: it gets a copy of the data.
  const data = structuredClone(figure.data);
  const own = structuredClone(layout);
  if (narrow) fitPhone(place, data, own);
  return Plotly.react(place, data, own, plotConfig);
}

function drawCharts(within) {
  for (const place of within.querySelectorAll(".plot")) {
    if (place.dataset.theme !== theme()) drawChart(place);
  }
}

for (const field of document.querySelectorAll("select[data-chart]")) {
  // The charts of a view follow one another: an arm chosen for one is chosen for all that have it.
  field.addEventListener("change", () => {
    for (const other of field.closest(".view").querySelectorAll(`select[data-choice="${field.dataset.choice}"]`)) {
      if (![...other.options].some((option) => option.value === field.value)) continue;
      other.value = field.value;
      drawChart(document.getElementById(other.dataset.chart));
    }
  });
}
for (const button of document.querySelectorAll("[data-save]")) {
  button.addEventListener("click", () => {
    const place = document.getElementById(button.dataset.save);
    // An image has the page's ground behind it: on none, the dark page's letters could not be read.
    const layout = { ...structuredClone(place.layout), paper_bgcolor: getComputedStyle(place.closest(".chart")).backgroundColor };
    const chosen = chartKey(place.id).replace(/[^A-Za-z0-9]+/g, "-");
    const size = { width: place.clientWidth, height: place.clientHeight, scale: 2 };
    Plotly.downloadImage({ data: place.data, layout }, { format: "png", filename: [place.id, chosen].filter(Boolean).join("-"), ...size });
  });
}
document.addEventListener("themechange", () => {
  const view = document.querySelector(".view.current");
  if (view) drawCharts(view);
});
