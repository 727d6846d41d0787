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

// A table that is wider than its frame says so: which side has more, and how many columns are out of sight.
function showMore(scroll) {
  const frame = scroll.parentElement;
  const { left, right } = scroll.getBoundingClientRect();
  if (right === left) return; // in a view that is not shown
  const cells = [...scroll.querySelector("table").tHead.rows[0].cells];
  // The name of the row stays in sight, over the columns that have gone.
  const over = getComputedStyle(cells[0]).left === "0px" ? cells[0].getBoundingClientRect().right : left;
  const columns = cells.slice(1).map((cell) => cell.getBoundingClientRect());
  const before = columns.filter((cell) => cell.left < over - 2).length;
  const after = columns.filter((cell) => cell.right > right + 2).length;
  frame.classList.toggle("before", before > 0);
  frame.classList.toggle("after", after > 0);
  const more = frame.parentElement.querySelector(".more");
  const columnsOf = (number) => `${number} more column${number === 1 ? "" : "s"}`;
  more.textContent = after ? `${columnsOf(after)} →` : `← ${columnsOf(before)}`;
  more.hidden = !before && !after;
}

const tableFrames = [...document.querySelectorAll(".table .scroll")];
const frameSizes = new ResizeObserver((entries) => entries.forEach((entry) => showMore(entry.target)));
for (const scroll of tableFrames) {
  frameSizes.observe(scroll);
  scroll.addEventListener("scroll", () => showMore(scroll), { passive: true });
  scroll.closest(".table").querySelector(".more").addEventListener("click", () => {
    const room = scroll.scrollWidth - scroll.clientWidth;
    scroll.scrollLeft = scroll.scrollLeft < room - 2 ? Math.min(room, scroll.scrollLeft + 0.7 * scroll.clientWidth) : 0;
  });
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
