// What the server has told: instances and their ranks, and as which rows they are shown.

import { termsOf } from "./format.js";

const OPEN_UP_TO = 48; // ranks in all: so many are shown without being asked for
const collator = new Intl.Collator("en", { numeric: true });

export class Fleet {
  constructor() {
    this.clear();
    this.open = new Map(); // by instance, what the reader has chosen
  }

  clear() {
    this.instances = new Map();
    this.ranks = new Map(); // by instance, by rank
    this.sorted = null;
    this.sortedRanks = new Map();
    this.total = 0; // ranks that are there
  }

  putInstance(name, told) {
    const known = this.instances.get(name);
    if (told === null) {
      this.instances.delete(name);
      this.sorted = null;
      return;
    }
    const text = `${told.instance} ${told.model} ${told.state} ${told.content} ${told.labels} ${told.why} v${told.version}`;
    this.instances.set(name, {
      ...told,
      kind: "instance",
      key: `i ${name}`,
      text: text.toLowerCase(),
    });
    if (!known || known.model !== told.model) this.sorted = null;
  }

  putRank(key, told) {
    const at = key.lastIndexOf("/");
    const [instance, number] = [key.slice(0, at), Number(key.slice(at + 1))];
    let ranks = this.ranks.get(instance);
    if (!ranks) this.ranks.set(instance, (ranks = new Map()));
    const known = ranks.get(number);
    if (isThere(known)) this.total -= 1;
    if (told === null) {
      ranks.delete(number);
      this.sortedRanks.delete(instance);
      if (!ranks.size) this.ranks.delete(instance);
      return;
    }
    const text = [
      key,
      told.state,
      told.host,
      told.device,
      told.session,
      told.protocol,
      told.content,
      told.reason,
    ].join(" ");
    const rank = { ...told, kind: "rank", key: `r ${key}`, text: text.toLowerCase() };
    if (isThere(rank)) this.total += 1;
    ranks.set(number, rank);
    if (!known) this.sortedRanks.delete(instance);
  }

  rank(instance, number) {
    return this.ranks.get(instance)?.get(number);
  }

  isOpen(name) {
    return this.open.get(name) ?? this.total <= OPEN_UP_TO;
  }

  setAll(open) {
    for (const name of this.instances.keys()) this.open.set(name, open);
  }

  // `state`: empty for any, "not" for all but ready.
  rows(text, state) {
    const terms = termsOf(text);
    const fits = (shown, others = "") =>
      (!state || (state === "not" ? shown.state !== "ready" : shown.state === state)) &&
      terms.every((term) => shown.text.includes(term) || others.includes(term));
    const filtered = terms.length > 0 || state !== "";
    const rows = [];
    let model = null;
    for (const instance of this.inOrder()) {
      const whole = !filtered || fits(instance);
      const ranks = this.ranksOf(instance.instance);
      const some =
        filtered && !(whole && !state) ? ranks.filter((rank) => fits(rank, instance.text)) : ranks;
      if (!whole && !some.length) continue;
      if (instance.model !== model) {
        model = instance.model;
        rows.push({ kind: "model", key: `m ${model}`, model });
      }
      const open = whole ? this.isOpen(instance.instance) : this.open.get(instance.instance) ?? true;
      instance.isOpen = open;
      rows.push(instance);
      if (open) for (const rank of some.length || !whole ? some : ranks) rows.push(rank);
    }
    return rows;
  }

  inOrder() {
    this.sorted ??= [...this.instances.values()]
      .sort(
        (one, other) =>
          collator.compare(one.model, other.model) ||
          collator.compare(one.instance, other.instance),
      )
      .map((instance) => instance.instance);
    return this.sorted.map((name) => this.instances.get(name));
  }

  ranksOf(instance) {
    const ranks = this.ranks.get(instance);
    if (!ranks) return [];
    let numbers = this.sortedRanks.get(instance);
    if (!numbers) {
      numbers = [...ranks.keys()].sort((one, other) => one - other);
      this.sortedRanks.set(instance, numbers);
    }
    return numbers.map((number) => ranks.get(number));
  }
}

function isThere(rank) {
  return rank !== undefined && !["lost", "held", "missing"].includes(rank.state);
}
