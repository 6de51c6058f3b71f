// The rows of instances and ranks: what is in each cell.

import { count, element, kindOf, percent, say, size, speed } from "./format.js";

const WIDE = ["ranks num", "version num", "content", "size num", "speed num", "note"];

// `onOpen(instance)` folds or unfolds, `onRank(instance, rank)` shows details.
export function maker(onOpen, onRank) {
  return (row) => {
    const tr = element("tr", row.kind);
    if (row.kind === "model") {
      const cell = element("td");
      cell.dataset.whole = "";
      tr.append(cell);
      return tr;
    }
    const name = element("td", "name");
    const button = element("button", "link");
    button.type = "button";
    if (row.kind === "rank") {
      button.setAttribute("aria-haspopup", "dialog");
      button.addEventListener("click", () => onRank(row.instance, row.rank));
    } else {
      button.addEventListener("click", () => onOpen(row.instance));
      button.addEventListener("keydown", (event) => {
        const open = button.getAttribute("aria-expanded") === "true";
        if (event.key === (open ? "ArrowLeft" : "ArrowRight")) onOpen(row.instance);
      });
    }
    name.setAttribute("role", "rowheader");
    name.append(button, element("div", "under"));
    const state = element("td", "state");
    state.append(element("span", "mark"));
    tr.append(name, state, ...WIDE.map((column) => element("td", `${column} wide`)));
    return tr;
  };
}

export function fill(tr, row) {
  if (row.kind === "model") {
    say(tr.firstChild, row.model || "Unknown model");
    return;
  }
  const [name, state, ranks, version, content, bytes, pace, note] = tr.children;
  const [button, under] = name.children;
  say(button, row.kind === "instance" ? row.instance : `Rank ${row.rank}`);
  if (row.kind === "instance") {
    button.setAttribute("aria-expanded", String(row.isOpen));
    say(ranks, `${row.present} / ${row.world_size || "?"}`);
  }
  mark(state.firstChild, row.state, row.state === "ready" ? null : row.fraction);
  const there = row.nbytes !== undefined;
  say(version, there ? (row.version ?? "differs") : "");
  say(content, row.content ?? "");
  say(bytes, there ? size(row.nbytes) : "");
  say(pace, speed(row.speed ?? 0));
  const text = notes(row);
  say(note, text);
  note.title = text;
  say(under, row.kind === "instance" ? inShort(row, text) : text);
}

export function mark(target, state, fraction) {
  target.className = `mark ${kindOf(state)}`;
  const known = typeof fraction === "number";
  const text = known ? `${state} ${percent(fraction)}` : state;
  let bar = target.querySelector("progress");
  if (!known && !bar && target.textContent === text) return;
  if (!target.firstChild) target.append("");
  if (target.firstChild.nodeValue !== text) target.firstChild.nodeValue = text;
  if (!known) {
    bar?.remove();
    return;
  }
  if (!bar) {
    bar = element("progress");
    bar.setAttribute("aria-hidden", "true"); // the number stands beside it
    target.append(bar);
  }
  bar.value = fraction;
}

function notes(row) {
  if (row.kind === "instance")
    return [row.why, row.labels.replaceAll(",", ", "), row.read_by ? `read by ${count(row.read_by, "load")}` : ""]
      .filter(Boolean)
      .join("; ");
  return [
    row.reason,
    row.reads_from ? `reads from ${row.reads_from}` : "",
    row.read_by ? `read by ${count(row.read_by, "load")}` : "",
    [row.host, row.device].filter(Boolean).join(" "),
    row.session,
  ]
    .filter(Boolean)
    .join("; ");
}

// For a narrow page, which has no other columns.
function inShort(row, text) {
  const facts = `${row.present} of ${row.world_size || "?"}, ${size(row.nbytes)}, version ${row.version ?? "differs"}`;
  return row.state === "ready" ? facts : text || facts;
}
