// All of one rank in a dialog: what the table knows at once, the rest of its record when that has
// come, and its tensors if somebody asks.

import { clock, count, element, percent, say, size, speed } from "./format.js";
import { Rows } from "./rows.js";
import { ask } from "./stream.js";

const CODE = new Set(["Session", "Content", "Incarnation", "Generation"]);

export class Details {
  constructor(dialog, rankOf) {
    this.dialog = dialog;
    this.rankOf = rankOf;
    this.facts = dialog.querySelector("#facts");
    this.button = dialog.querySelector("#tensors");
    this.note = dialog.querySelector("#tensors-note");
    this.scroller = dialog.querySelector("#tensors-scroller");
    dialog.querySelector(".close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
    dialog.addEventListener("close", () => (this.place = null));
    this.button.addEventListener("click", () => this.showTensors());
    this.place = null;
  }

  async open(instance, rank) {
    const place = { instance, rank };
    this.place = place;
    this.record = null;
    this.shown = null;
    this.scroller.hidden = true;
    say(this.note, "");
    say(this.dialog.querySelector("h2"), `${instance} rank ${rank}`);
    this.update();
    if (!this.dialog.open) this.dialog.showModal();
    const record = await this.get("rank");
    if (this.place !== place) return;
    this.record = record;
    this.shown = null;
    this.update();
  }

  // While it is open, when the table has changed.
  update() {
    if (!this.place) return;
    const rank = this.rankOf(this.place.instance, this.place.rank);
    if (rank === this.shown && rank) return;
    this.shown = rank;
    this.button.hidden = !rank || rank.nbytes === undefined;
    const facts = rank ? factsOf(rank, this.record ?? {}) : [["State", "not registered any more"]];
    this.facts.replaceChildren(
      ...facts
        .filter(([, value]) => value !== undefined && value !== null && value !== "")
        .flatMap(([name, value]) => [
          element("dt", "", name),
          element("dd", CODE.has(name) ? "code" : "", String(value)),
        ]),
    );
  }

  async get(what) {
    const { instance, rank } = this.place;
    try {
      const answer = await ask(`api/${what}?${new URLSearchParams({ instance, rank })}`);
      const body = await answer.json();
      if (!answer.ok) say(this.note, answer.status === 404 ? "" : body.detail);
      return answer.ok ? body : null;
    } catch {
      say(this.note, "The dashboard does not answer.");
      return null;
    }
  }

  async showTensors() {
    const place = this.place;
    this.button.disabled = true;
    const told = await this.get("tensors");
    this.button.disabled = false;
    if (this.place !== place || !told) return;
    const { columns, rows, tensors } = told;
    this.scroller.querySelector("thead tr").replaceChildren(
      ...columns.map((name) => {
        const cell = element("th", "", name[0] + name.slice(1).toLowerCase());
        cell.scope = "col";
        return cell;
      }),
    );
    this.rows ??= new Rows(this.scroller, makeTensor, fillTensor);
    this.scroller.hidden = false;
    this.button.hidden = true;
    this.scroller.scrollTop = 0;
    this.rows.show(rows.map((cells, at) => ({ key: at, cells })));
    const all = count(tensors, "tensor");
    say(this.note, rows.length < tensors ? `The first ${rows.length} of ${all}.` : `${all}.`);
  }
}

function makeTensor(row) {
  const tr = element("tr");
  tr.append(...row.cells.map(() => element("td")));
  return tr;
}

function fillTensor(tr, row) {
  row.cells.forEach((text, at) => {
    say(tr.children[at], text);
    tr.children[at].title = text;
  });
}

function factsOf(rank, record) {
  const { model } = record;
  const there = rank.nbytes !== undefined;
  const topology = Object.entries(record.topology ?? {});
  const rails = Object.entries(record.rails ?? {});
  return [
    ["State", rank.fraction == null ? rank.state : `${rank.state} ${percent(rank.fraction)}`],
    ["Reason", rank.reason],
    ["Speed", speed(rank.speed ?? 0)],
    ["Reads from", rank.reads_from],
    ["Read by", rank.read_by ? count(rank.read_by, "load") : ""],
    ["Model", model && [model.name, model.revision, model.dtype, model.quantization].filter(Boolean).join(", ")],
    ["Version", rank.version],
    ["Content", record.content ?? rank.content],
    ["Tensors", there ? `${rank.tensors.toLocaleString("en")}, ${size(rank.nbytes)}` : ""],
    ["Rank", record.world_size && `${rank.rank} of ${record.world_size}`],
    ["Labels", Object.entries(record.labels ?? {}).map((pair) => pair.join("=")).sort().join(", ")],
    ["Topology", topology.map(([axis, [at, of]]) => `${axis} ${at} of ${of}`).join(", ")],
    ["Host", [rank.host, record.pid ? `pid ${record.pid}` : ""].filter(Boolean).join(", ")],
    ["Location", record.location],
    ["Device", rank.device],
    ["Session", rank.session],
    ["Protocol", rank.protocol],
    ["Fabric", record.fabric],
    ["Rails", rails.map(([name, subnet]) => [name, subnet].filter(Boolean).join(" ")).join(", ")],
    [there ? "Registered" : "Lost", rank.since ? clock(rank.since) : ""],
    ["Kept by", record.kept_by],
    ["Generation", record.generation],
    ["Incarnation", record.incarnation],
    ["Written by", record.writer && `engine-registry ${record.writer}`],
  ];
}
