// Charts: plotly draws each when it first comes into sight, with the template of the page's theme.
const chartData = JSON.parse(document.getElementById("data-charts").textContent);
const plotConfig = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };

function chartKey(id) {
  const fields = [...document.querySelectorAll(`select[data-chart="${id}"]`)];
  return fields.map((field) => field.value).join("\n");
}

function drawChart(place) {
  const figure = chartData.charts[place.id][chartKey(place.id)];
  const none = figure === undefined || typeof figure === "string";
  place.classList.toggle("none", none);
  if (none) {
    Plotly.purge(place);
    place.style.height = "";
    place.textContent = figure ?? "There is nothing to show for this choice.";
    return;
  }
  if (place.textContent && !place.classList.contains("js-plotly-plot")) place.textContent = "";
  place.style.height = `${figure.layout.height}px`;
  const read = figure.layout.meta?.read;
  if (read) place.closest("figure").querySelector("figcaption p").textContent = read;
  const template = chartData.templates[theme()];
  const narrow = place.clientWidth < 520;
  const layout = { ...figure.layout, template, ...(narrow ? { margin: { l: 44, r: 8, t: 12, b: 44 } } : {}) };
  // plotly keeps and changes what it is given: it gets a copy of the data.
  const data = structuredClone(figure.data);
  // On a phone a colour bar would take the width of the cells, which state their values.
  if (narrow) for (const trace of data) if (trace.type === "heatmap") trace.showscale = false;
  Plotly.react(place, data, structuredClone(layout), plotConfig);
  place.dataset.theme = theme();
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
document.addEventListener("themechange", () => {
  const view = document.querySelector(".view.current");
  if (view) drawCharts(view);
});
