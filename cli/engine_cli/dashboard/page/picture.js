// Draws who reads from whom: sources on the left and readers on the right where there is room, else
// each below its source. The server has placed the nodes.

import { count, element, kindOf, percent, speed } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const CARD = { width: 132, height: 44 };
const GAP = { x: 40, y: 10 };
const INDENT = 26;
const MAX_INDENTS = 7;

export class Picture {
  constructor(target, onRank) {
    this.target = target;
    this.onRank = onRank;
    this.told = null;
    new ResizeObserver(() => this.drawIfWider()).observe(target);
  }

  show(told) {
    if (told === this.told) return;
    this.told = told;
    this.draw();
  }

  drawIfWider() {
    if (this.told && this.room() !== this.drawnFor) this.draw();
  }

  room() {
    const style = getComputedStyle(this.target);
    const room =
      this.target.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    return Math.max(200, Math.floor(room));
  }

  draw() {
    const { nodes, edges, more, unseen } = this.told;
    this.drawnFor = this.room();
    if (!nodes.length) {
      const text = unseen ? `Loads are not seen: ${unseen}` : "No load is running.";
      this.target.replaceChildren(element("p", "", text));
      return;
    }
    const focused = document.activeElement?.dataset?.name;
    const places = place(nodes, this.drawnFor);
    const svg = make("svg", {
      width: Math.max(...places.map((at) => at.x + at.width)) + 2,
      height: Math.max(...places.map((at) => at.y + CARD.height)) + 2,
      role: "group",
      "aria-label": "Who reads from whom",
    });
    for (const [from, to] of edges) svg.append(this.edge(places, nodes, from, to));
    nodes.forEach((node, at) => svg.append(this.node(node, places[at], sources(at, nodes, edges))));
    const parts = [svg];
    if (more) parts.push(element("p", "", `and ${count(more, "more reader")}`));
    this.target.replaceChildren(...parts);
    if (focused !== undefined)
      [...svg.querySelectorAll("[tabindex]")]
        .find((each) => each.dataset.name === focused)
        ?.focus({ preventScroll: true });
  }

  node(node, at, from) {
    const busy = node.fraction !== null;
    const progress = busy ? [percent(node.fraction), speed(node.speed)].filter(Boolean).join(" · ") : node.state;
    const group = make("g", {
      class: `node ${busy ? "busy" : kindOf(node.state)}`,
      transform: `translate(${at.x} ${at.y})`,
      "aria-label": `${node.name}, ${node.state} ${busy ? progress : ""}${from && `, reads from ${from}`}`,
    });
    const { width } = at;
    const { height } = CARD;
    const bar = { x: 10, y: height - 9, height: 3, rx: 1.5 };
    group.append(
      make("rect", { class: "card", x: 1, y: 1, width: width - 2, height: height - 2, rx: 6 }),
      text(node.name, { x: 10, y: 18 }, width - 20, 7.2),
      text(busy ? progress : node.state, { x: 10, y: 33, class: "low" }, width - 20, 6.4),
    );
    if (busy)
      group.append(
        make("rect", { class: "track", width: width - 20, ...bar }),
        make("rect", { class: "fill", width: (width - 20) * node.fraction, ...bar }),
      );
    const title = make("title", {});
    title.textContent = node.name;
    group.append(title);
    if (node.instance === null) {
      group.setAttribute("role", "img");
      return group;
    }
    group.setAttribute("role", "button");
    group.setAttribute("tabindex", "0");
    group.dataset.name = node.name;
    const open = () => this.onRank(node.instance, node.rank);
    group.addEventListener("click", open);
    group.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      open();
    });
    return group;
  }

  edge(places, nodes, from, to) {
    const [one, other] = [places[from], places[to]];
    const half = CARD.height / 2;
    const end = `${other.x - 6} ${other.y + half}`;
    let line;
    if (one.below) {
      const x = one.x + 12;
      line = `M ${x} ${one.y + (other.y > one.y ? CARD.height : 0)} L ${x} ${other.y + half} L ${end}`;
    } else {
      const x = one.x + one.width;
      const bend = Math.max(24, (other.x - x) / 2);
      line = `M ${x} ${one.y + half} C ${x + bend} ${one.y + half} ${other.x - bend} ${other.y + half} ${end}`;
    }
    const moving = nodes[to].speed > 0;
    const group = make("g", {});
    group.append(
      make("path", { class: moving ? "edge moving" : "edge", d: line }),
      make("path", { class: "head", d: `M ${other.x} ${other.y + half} l -7 -4 v 8 z` }),
    );
    return group;
  }
}

// In columns where they fit, else one below the other.
function place(nodes, room) {
  const columns = Math.max(...nodes.map((node) => node.column)) + 1;
  const width = Math.min(220, Math.floor((room - (columns - 1) * GAP.x) / columns));
  if (width >= CARD.width)
    return nodes.map((node) => ({
      x: node.column * (width + GAP.x),
      y: node.row * (CARD.height + GAP.y),
      width,
    }));
  return nodes.map((node, at) => {
    const x = Math.min(node.column, MAX_INDENTS) * INDENT;
    return { x, y: at * (CARD.height + GAP.y), width: Math.min(280, room - x - 2), below: true };
  });
}

function sources(at, nodes, edges) {
  return edges
    .filter(([, to]) => to === at)
    .map(([from]) => nodes[from].name)
    .join(", ");
}

// One line, cut in the middle, where names differ least.
function text(content, attributes, room, perLetter) {
  const made = make("text", attributes);
  const most = Math.max(4, Math.floor(room / perLetter));
  const cut = content.length > most;
  const half = Math.floor((most - 1) / 2);
  made.textContent = cut ? `${content.slice(0, half)}…${content.slice(-half)}` : content;
  return made;
}

function make(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
