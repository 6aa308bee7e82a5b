"use strict";
// The table of cases: sorting by any column, one class alone, cases by name. Without this script it is a plain table.
(() => {
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
  const table = document.getElementById("case-table");
  if (!table) return;
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows];
  const tools = document.getElementById("case-tools");
  const choice = document.getElementById("class-choice");
  const search = document.getElementById("case-search");
  const told = document.getElementById("case-told");
  const more = document.getElementById("case-more");
  const portion = 200; // Rows laid out at once: thousands make a phone slow.
  let room = portion;
  const words = new Intl.Collator("en", { numeric: true });
  const text = (row, column) => row.cells[column].textContent.trim();

  const show = () => {
    const name = choice.value, part = search.value.trim().toLowerCase();
    let found = 0, last = null;
    for (const row of body.rows) {
      const mine = row.cells[0].textContent.trim();
      const fits = (name === "" || row.dataset.class === name) && mine.toLowerCase().includes(part);
      found += fits;
      row.hidden = !fits || found > room;
      if (row.hidden) continue;
      row.classList.toggle("again", mine === last);
      last = mine;
    }
    told.textContent = (found > room ? room + " of " : "") + found + (found === 1 ? " row" : " rows");
    more.hidden = found <= room;
    more.textContent = "Show " + Math.min(portion, found - room) + " more of " + (found - room) + " rows";
  };

  const sort = (column, down) => {
    const numbers = heads[column].classList.contains("number");
    const keyed = rows.map((row) => [numbers ? parseFloat(text(row, column)) : text(row, column), row]);
    keyed.sort(([a], [b]) => {
      if (!numbers) return down ? words.compare(b, a) : words.compare(a, b);
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return down ? b - a : a - b;
    });
    body.append(...keyed.map(([, row]) => row));
    heads.forEach((head, place) => {
      if (place === column) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    show();
  };

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(column, head.getAttribute("aria-sort") === "ascending"));
  });
  const again = () => { room = portion; show(); };
  choice.addEventListener("change", again);
  search.addEventListener("input", again);
  more.addEventListener("click", () => { room += portion; show(); });
  addEventListener("hashchange", () => {
    const row = document.getElementById(location.hash.slice(1));
    if (!rows.includes(row) || !row.hidden) return;
    room = Infinity; choice.value = ""; search.value = "";
    show();
    row.scrollIntoView();
  });
  addEventListener("beforeprint", () => { room = Infinity; show(); });
  tools.hidden = false;
  show();
})();
