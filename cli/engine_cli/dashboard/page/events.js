// What has happened, the newest first; and the losses, said aloud to those who do not see the page.

import { clock, element, say, termsOf } from "./format.js";

const MAX_SHOWN = 100;
const QUIET_MS = 5000; // between two things that are said aloud
const KINDS = {
  rank_joined: "busy",
  rank_updated: "busy",
  rank_lost: "bad",
  instance_ready: "good",
  instance_loading: "busy",
  instance_degraded: "bad",
  instance_gone: "bad",
  version_released: "good",
};

export class Events {
  constructor(list, aloud, since) {
    this.list = list;
    this.aloud = aloud;
    this.since = since;
    this.clear();
    this.saidAt = 0;
  }

  clear() {
    this.known = new Map(); // by number
    this.shown = null;
  }

  put(number, told, isNews) {
    this.shown = null;
    if (told === null) {
      this.known.delete(number);
      return;
    }
    this.known.set(number, told);
    const loud = told.kind === "rank_lost" || told.kind === "instance_degraded";
    if (isNews && loud && Date.now() - this.saidAt > QUIET_MS) {
      this.saidAt = Date.now();
      say(this.aloud, told.text);
    }
  }

  began(iso) {
    say(this.since, `since ${clock(iso)}`);
  }

  show(text) {
    if (this.shown === text) return;
    this.shown = text;
    const terms = termsOf(text);
    const some = [...this.known]
      .sort(([one], [other]) => (one < other ? 1 : -1))
      .map(([, told]) => told)
      .filter((told) => terms.every((term) => told.text.toLowerCase().includes(term)))
      .slice(0, MAX_SHOWN);
    this.list.replaceChildren(...some.map(line));
    if (!some.length)
      this.list.append(
        element("li", "none", terms.length ? "No event fits the filter." : "Nothing has happened yet."),
      );
  }
}

function line(told) {
  const item = element("li");
  const time = element("time", "", clock(told.at));
  time.dateTime = told.at;
  item.append(time, element("span", `mark ${KINDS[told.kind] ?? "warn"}`, told.text));
  return item;
}
