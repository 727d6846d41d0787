// Tables: a click on a heading sorts by the cells' whole values, a second one the other way round; long ones can be filtered.
function sortTable(table, column, descending) {
  const body = table.tBodies[0];
  const numeric = table.tHead.rows[0].cells[column].classList.contains("number");
  const value = (row) => row.cells[column].dataset.value;
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    // What is not available stands last either way.
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = numeric && !isNaN(x) && !isNaN(y) ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true });
    return descending ? -order : order;
  });
  body.append(...rows);
  for (const [place, heading] of [...table.tHead.rows[0].cells].entries()) {
    if (place === column) heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else heading.removeAttribute("aria-sort");
  }
}

for (const table of document.querySelectorAll("table")) {
  for (const [column, heading] of [...table.tHead.rows[0].cells].entries()) {
    heading.querySelector("button").addEventListener("click", () => {
      const before = heading.getAttribute("aria-sort");
      // Numbers start with the largest, names with the first.
      const descending = before ? before === "ascending" : heading.classList.contains("number");
      sortTable(table, column, descending);
    });
  }
}

for (const field of document.querySelectorAll("[data-filter-rows]")) {
  const rows = [...document.getElementById(field.dataset.filterRows).tBodies[0].rows];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const output = field.parentElement.querySelector("output");
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [place, row] of rows.entries()) {
      row.hidden = !words.every((word) => texts[place].includes(word));
      shown += !row.hidden;
    }
    output.textContent = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
  });
}
