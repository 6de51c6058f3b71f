// A table of which only the rows in sight are in the document, however many there are. All rows are
// of one height, which the style sheet gives.

import { element } from "./format.js";

const BEYOND = 8; // rows above and below that are drawn too

export class Rows {
  // `make(row)` gives a <tr>, `fill(tr, row)` writes into it. A row has a `key`; one that has
  // changed is another object.
  constructor(scroller, make, fill) {
    this.scroller = scroller;
    this.body = scroller.querySelector("tbody");
    this.columns = 1;
    this.height = 34;
    this.make = make;
    this.fill = fill;
    this.rows = [];
    this.drawn = new Map(); // by key: the element, and the row that it shows
    this.above = this.padding();
    this.below = this.padding();
    this.body.replaceChildren(this.above, this.below);
    scroller.addEventListener("scroll", () => this.draw(), { passive: true });
    const resized = new ResizeObserver(() => this.measure());
    resized.observe(scroller);
    resized.observe(this.body.parentElement.tHead);
    scroller.addEventListener("keydown", (event) => this.onKey(event));
  }

  padding() {
    const row = element("tr");
    const cell = element("td", "pad");
    cell.dataset.whole = "";
    row.setAttribute("aria-hidden", "true");
    row.append(cell);
    return row;
  }

  show(rows) {
    this.rows = rows;
    this.body.parentElement.setAttribute("aria-rowcount", rows.length + 1);
    this.draw();
  }

  // What the style sheet says: only now, as to ask in each frame would make the browser lay out all
  // of it twice. Cells of a whole row span the columns in sight: others would get room too.
  measure() {
    this.height = Number.parseFloat(getComputedStyle(this.body).getPropertyValue("--row")) || 34;
    const heads = [...this.body.parentElement.tHead.rows[0].cells];
    this.columns = heads.filter((cell) => cell.offsetParent !== null).length || this.columns;
    for (const cell of this.body.querySelectorAll("[data-whole]")) cell.colSpan = this.columns;
    this.draw();
  }

  made(row) {
    const tr = this.make(row);
    for (const cell of tr.querySelectorAll("[data-whole]")) cell.colSpan = this.columns;
    return { tr, row: null };
  }

  draw() {
    const height = this.height;
    const { scrollTop, clientHeight } = this.scroller;
    const first = Math.max(0, Math.floor(scrollTop / height) - BEYOND);
    const last = Math.min(this.rows.length, Math.ceil((scrollTop + clientHeight) / height) + BEYOND);
    const wanted = new Set();
    for (let at = first; at < last; at += 1) wanted.add(this.rows[at].key);
    for (const [key, { tr }] of this.drawn) {
      if (wanted.has(key)) continue;
      if (tr.contains(document.activeElement)) this.scroller.focus({ preventScroll: true });
      tr.remove();
      this.drawn.delete(key);
    }
    let before = this.above;
    for (let at = first; at < last; at += 1) {
      const row = this.rows[at];
      let known = this.drawn.get(row.key);
      if (!known) this.drawn.set(row.key, (known = this.made(row)));
      if (known.row !== row || known.open !== row.isOpen) {
        this.fill(known.tr, row);
        known.row = row;
        known.open = row.isOpen;
      }
      if (known.at !== at) {
        known.at = at;
        known.tr.setAttribute("aria-rowindex", at + 2);
        known.tr.dataset.at = at;
      }
      if (before.nextSibling !== known.tr) before.after(known.tr);
      before = known.tr;
    }
    this.above.firstChild.style.height = `${first * height}px`;
    this.below.firstChild.style.height = `${(this.rows.length - last) * height}px`;
    this.above.hidden = first === 0;
    this.below.hidden = last === this.rows.length;
  }

  onKey(event) {
    const tr = event.target.closest("tbody tr");
    const page = Math.max(1, Math.floor(this.scroller.clientHeight / this.height) - 2);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page };
    const at = tr ? Number(tr.dataset.at) : Math.floor(this.scroller.scrollTop / this.height) - 1;
    let to = null;
    if (event.key in steps) to = at + steps[event.key];
    else if (event.key === "Home") to = 0;
    else if (event.key === "End") to = this.rows.length - 1;
    if (to === null || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.focus(Math.min(this.rows.length - 1, Math.max(0, to)), Math.sign(to - at) || 1);
  }

  // The next row from there that has something to focus.
  focus(at, step) {
    while (this.rows[at] && this.rows[at].kind === "model") at += step;
    if (!this.rows[at]) return;
    const height = this.height;
    const head = this.body.parentElement.tHead.offsetHeight;
    const { scrollTop, clientHeight } = this.scroller;
    if (at * height < scrollTop) this.scroller.scrollTop = at * height;
    else if ((at + 1) * height + head > scrollTop + clientHeight)
      this.scroller.scrollTop = (at + 1) * height + head - clientHeight;
    this.draw();
    this.drawn.get(this.rows[at].key)?.tr.querySelector("button")?.focus({ preventScroll: true });
  }
}
