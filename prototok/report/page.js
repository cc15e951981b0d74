"use strict";
// Two things follow the address after #, so that a view can be linked to:
//   #sort=TABLE,COLUMN,asc|desc    a table, sorted
//   #text=ANCHOR                   a text of the gallery
const number = (cell) => (cell.dataset.v === undefined ? NaN : Number(cell.dataset.v));

function sort(name, column, direction) {
  const table = document.getElementById(name);
  const head = table && table.tHead && table.tHead.rows[0].cells[column];
  if (!head) return;
  const sign = direction === "desc" ? -1 : 1;
  const rows = Array.from(table.tBodies[0].rows);
  rows.sort((a, b) => {
    const [x, y] = [a.cells[column], b.cells[column]];
    const [p, q] = [number(x), number(y)];
    if (isNaN(p) && isNaN(q)) return sign * x.textContent.localeCompare(y.textContent);
    if (isNaN(p) || isNaN(q)) return isNaN(p) ? 1 : -1; // what has no number stays below
    return sign * (p - q);
  });
  table.tBodies[0].append(...rows);
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
}

const exhibits = Array.from(document.querySelectorAll(".exhibit"));
const picker = document.getElementById("pick");

function show(anchor) {
  if (!exhibits.some((one) => one.dataset.anchor === anchor)) return false;
  for (const one of exhibits) one.hidden = one.dataset.anchor !== anchor;
  picker.value = anchor;
  return true;
}

function follow() {
  const hash = decodeURIComponent(location.hash.slice(1));
  if (hash.startsWith("sort=")) {
    const [name, column, direction] = hash.slice(5).split(",");
    sort(name, Number(column), direction);
    document.getElementById(name)?.scrollIntoView({ block: "center" });
  } else if (hash.startsWith("text=") && show(hash.slice(5))) {
    document.getElementById("gallery").scrollIntoView();
  }
}

document.addEventListener("click", (event) => {
  const head = event.target.closest("th[scope=col]");
  if (!head || !event.target.closest("button")) return;
  const down = head.getAttribute("aria-sort") === "ascending";
  sort(head.closest("table").id, head.cellIndex, down ? "desc" : "asc");
});
if (exhibits.length) {
  picker.parentElement.hidden = false;
  picker.addEventListener("change", () => { location.hash = "text=" + picker.value; });
  show(exhibits[0].dataset.anchor);
}
window.addEventListener("hashchange", follow);
follow();
