"use strict";
// Sort, filter and hide columns of every table. Without this script they are plain tables.

const FEWEST_ROWS = 4;
const FEWEST_COLUMNS = 4;
const SECONDS = { d: 86400, h: 3600, min: 60, s: 1 };

// A cell as a number: its first number, seconds for a duration, infinity for a time that was not reached.
function numberOf(text) {
  if (/^not within|^not reached/.test(text)) return Infinity;
  const parts = [...text.matchAll(/([\d.]+) (d|h|min|s)\b/g)];
  if (/^([\d.]+ (d|h|min|s)\s*)+$/.test(text)) return parts.reduce((sum, part) => sum + Number(part[1]) * SECONDS[part[2]], 0);
  const found = /^[^\w+-]*([+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)/i.exec(text);
  return found ? Number(found[1].replaceAll(",", "")) : NaN;
}

function compare(first, second) {
  const [one, other] = [numberOf(first), numberOf(second)];
  // "> 800" comes after "800", and "< 0.0001" before "0.0001".
  const side = (text) => ({ ">": 1, "<": -1 })[text[0]] || 0;
  if (!Number.isNaN(one) && !Number.isNaN(other)) return one === other ? side(first) - side(second) : one - other;
  return first.localeCompare(second);
}

function makeSortable(table, heads, body) {
  const original = [...body.rows];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "sort";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const next = { ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")] || "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      let rows = [...original];
      if (next !== "none") {
        head.setAttribute("aria-sort", next);
        const text = (row) => row.cells[column].textContent.trim();
        // Cells without a value come last in either direction.
        const missing = rows.filter((row) => text(row) === "-");
        const sign = next === "descending" ? -1 : 1;
        rows = rows.filter((row) => text(row) !== "-").sort((a, b) => sign * compare(text(a), text(b)));
        rows.push(...missing);
      }
      body.append(...rows);
    });
  });
}

function shownText(row) {
  return [...row.cells].filter((cell) => !cell.hidden).map((cell) => cell.textContent).join(" ").toLowerCase();
}

function makeFilter(body) {
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = "filter rows";
  field.setAttribute("aria-label", "filter rows");
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/);
    for (const row of body.rows) row.hidden = !words.every((word) => shownText(row).includes(word));
  });
  return field;
}

function show(table, column, shown) {
  for (const row of table.rows) row.cells[column].hidden = !shown;
}

function makeColumns(table, heads, scroll) {
  const menu = document.createElement("details");
  const title = document.createElement("summary");
  menu.append(title);
  const boxes = heads.map((head, column) => {
    const box = document.createElement("input");
    box.type = "checkbox";
    box.checked = true;
    const label = document.createElement("label");
    label.append(box, ` ${head.textContent}`);
    // The first column names the row.
    if (column > 0) menu.append(label);
    box.addEventListener("change", () => update(column));
    return box;
  });
  function update(column) {
    show(table, column, boxes[column].checked);
    const shown = boxes.filter((box) => box.checked).length;
    title.textContent = shown === boxes.length ? "columns" : `columns (${shown} of ${boxes.length} shown)`;
  }
  update(0);
  // Where the table is too wide, columns that are less important start hidden, the last ones first.
  for (let column = heads.length - 1; column > 0; column--) {
    if (scroll.scrollWidth > scroll.clientWidth + 1 && "optional" in heads[column].dataset) {
      boxes[column].checked = false;
      update(column);
    }
  }
  return menu;
}

for (const figure of document.querySelectorAll("figure.table")) {
  const table = figure.querySelector("table");
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const tools = document.createElement("div");
  tools.className = "tools";
  if (body.rows.length >= FEWEST_ROWS) tools.append(makeFilter(body));
  if (heads.length >= FEWEST_COLUMNS) tools.append(makeColumns(table, heads, figure.querySelector(".scroll")));
  if (body.rows.length > 1) makeSortable(table, heads, body);
  if (tools.childNodes.length) figure.querySelector(".scroll").before(tools);
}
