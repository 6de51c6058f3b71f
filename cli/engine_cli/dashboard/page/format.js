// Numbers, times and elements as the page shows them. Text is only ever set as text.

const UNITS = ["B", "kB", "MB", "GB", "TB"];

export function size(nbytes) {
  let unit = 0;
  while (nbytes >= 1000 && unit < UNITS.length - 1) {
    nbytes /= 1000;
    unit += 1;
  }
  return `${unit ? nbytes.toFixed(1) : Math.round(nbytes)} ${UNITS[unit]}`;
}

export function speed(bytesPerSecond) {
  return bytesPerSecond ? `${size(bytesPerSecond)}/s` : "";
}

// Rounded down: 100 % is all of it.
export function percent(fraction) {
  return `${Math.floor(100 * fraction + 1e-6)} %`;
}

export function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

// By the reader's clock; with the day where it is another one.
export function clock(iso) {
  const at = new Date(iso);
  if (Number.isNaN(at.getTime())) return "";
  const two = (number) => String(number).padStart(2, "0");
  const time = `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
  if (at.toDateString() === new Date().toDateString()) return time;
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${time}`;
}

const KINDS = {
  ready: "good",
  loading: "busy",
  load: "busy",
  updating: "busy",
  draining: "busy",
  incomplete: "bad",
  degraded: "bad",
  unresponsive: "bad",
  lost: "bad",
  missing: "bad",
};

export function kindOf(state) {
  return KINDS[state] ?? "warn";
}

export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

export function say(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

export function termsOf(text) {
  return text.toLowerCase().split(/\s+/).filter(Boolean);
}
