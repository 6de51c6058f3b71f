// Puts the page together: messages of the stream into the fleet, the picture and the events, and
// these into the document, once a frame however many messages come.

import { Details } from "./details.js";
import { Events } from "./events.js";
import { Fleet } from "./fleet.js";
import { clock, count, element, say, size } from "./format.js";
import { Picture } from "./picture.js";
import { Rows } from "./rows.js";
import { keepToken, Stream } from "./stream.js";
import { fill, maker } from "./table.js";

const find = (id) => document.getElementById(id);
const fleet = new Fleet();
const events = new Events(find("list"), find("said"), find("since"));
const details = new Details(find("details"), (instance, rank) => fleet.rank(instance, rank));
const onRank = (instance, rank) => details.open(instance, rank);
const picture = new Picture(find("drawing"), onRank);
const rows = new Rows(find("scroller"), maker(toggle, onRank), fill);
const LINKS = { live: "Live", lost: "Dashboard lost, trying again", refused: "Token needed" };
let drawn = null; // the picture as it was told
let etcd = { away_since: null, reason: "" };
let complete = false; // all entries of the first messages are there
let due = 0;

function take(message) {
  if (message.whole) {
    fleet.clear();
    events.clear();
    complete = false;
  }
  for (const [kind, name, value] of message.entries) {
    if (kind === "rank") fleet.putRank(name, value);
    else if (kind === "instance") fleet.putInstance(name, value);
    else if (kind === "event") events.put(name, value, complete);
    else if (kind === "picture") drawn = value;
    else if (kind === "etcd") etcd = value;
    else if (kind === "began") events.began(value);
  }
  complete = complete || !message.more;
  if (!message.more) schedule();
}

function schedule() {
  if (!due) due = requestAnimationFrame(draw);
}

function draw() {
  due = 0;
  if (!complete) return;
  const text = find("text").value;
  const state = find("state").value;
  const shown = fleet.rows(text, state);
  rows.show(shown);
  const instances = shown.filter((row) => row.kind === "instance");
  const all = fleet.instances.size;
  const filtered = text.trim() || state;
  say(find("found"), filtered ? `${instances.length} of ${count(all, "instance")}` : "");
  find("empty").hidden = shown.length > 0;
  find("table").hidden = shown.length === 0;
  say(find("empty"), filtered ? "No instance fits the filter." : "No instance is registered.");
  const open = instances.some((row) => row.isOpen);
  say(find("fold"), open ? "Collapse all" : "Expand all");
  events.show(text);
  if (drawn) picture.show(drawn);
  details.update();
  totals();
  find("notice").hidden = !etcd.away_since;
  if (etcd.away_since)
    say(
      find("notice"),
      `etcd cannot be reached since ${clock(etcd.away_since)}. The page shows what was known then, and goes on by itself. ${etcd.reason}`,
    );
}

function totals() {
  const speed = drawn ? drawn.speed : 0;
  const shown = [
    [fleet.instances.size, "instance"],
    [fleet.total, "rank"],
    [drawn ? drawn.loads : 0, "load"],
  ].map(([number, noun]) => [number.toLocaleString("en"), `${noun}${number === 1 ? "" : "s"}`]);
  if (speed) shown.push([`${size(speed)}/s`, "in all"]);
  const now = JSON.stringify(shown);
  const target = find("totals");
  if (target.dataset.shown === now) return;
  target.dataset.shown = now;
  target.replaceChildren(
    ...shown.map(([number, noun]) => {
      const pair = element("div");
      pair.append(element("dt", "", noun), element("dd", "", number));
      return pair;
    }),
  );
}

function toggle(instance) {
  fleet.open.set(instance, !fleet.instances.get(instance)?.isOpen);
  schedule();
}

function onState(state) {
  const link = find("link");
  link.dataset.state = state === "refused" ? "lost" : state;
  say(link, LINKS[state] ?? state);
  if (state === "refused" && !find("login").open) find("login").showModal();
}

const stream = new Stream(take, onState);
find("filter").addEventListener("submit", (event) => event.preventDefault());
find("text").addEventListener("input", schedule);
find("state").addEventListener("change", schedule);
find("fold").addEventListener("click", () => {
  fleet.setAll(find("fold").textContent === "Expand all");
  schedule();
});
find("login").addEventListener("cancel", (event) => event.preventDefault());
find("login").querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken(find("token").value);
  find("login").close();
  find("token").value = "";
  say(find("login-note"), "That was not the token. It is the one in ENGINES_GATEWAY_TOKEN where the dashboard was started.");
  find("login-note").className = "bad";
  stream.open();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.closest("input, select, dialog")) return;
  event.preventDefault();
  find("text").focus();
});
stream.open();
