// The stream of changes: opened with the token, and again whenever it ends. While the tab is hidden
// it is closed: nobody looks, and a browser has few connections to one host.

const TOKEN = "token";
const AGAIN_MS = [250, 500, 1000, 2000];
const SILENT_MS = 45_000; // the server says something every 15 s

export class Refused extends Error {}

export async function ask(path, signal) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch(path, { headers, signal, cache: "no-store" });
  if (answer.status === 401) throw new Refused();
  return answer;
}

export function keepToken(token) {
  sessionStorage.setItem(TOKEN, token);
}

export class Stream {
  // `onMessage` gets each message, `onState` live, busy, lost or refused.
  constructor(onMessage, onState) {
    this.onMessage = onMessage;
    this.onState = onState;
    this.tries = 0;
    document.addEventListener("visibilitychange", () => this.turn());
  }

  turn() {
    if (document.hidden) this.stop();
    else if (!this.stopping) this.open();
  }

  stop() {
    clearTimeout(this.timer);
    this.stopping?.abort();
    this.stopping = null;
  }

  async open() {
    this.stop();
    const stopping = new AbortController();
    this.stopping = stopping;
    try {
      const answer = await ask("api/changes", stopping.signal);
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      await this.read(answer.body.getReader(), stopping);
    } catch (error) {
      if (this.stopping !== stopping) return;
      if (error instanceof Refused) {
        this.stopping = null;
        this.onState("refused");
        return;
      }
    }
    if (this.stopping !== stopping) return;
    this.onState("lost");
    const wait = AGAIN_MS[Math.min(this.tries, AGAIN_MS.length - 1)];
    this.tries += 1;
    this.timer = setTimeout(() => this.open(), wait);
  }

  async read(reader, stopping) {
    const decoder = new TextDecoder();
    let rest = "";
    for (;;) {
      const silent = setTimeout(() => reader.cancel(), SILENT_MS);
      const { value, done } = await reader.read();
      clearTimeout(silent);
      if (done || this.stopping !== stopping) return;
      const parts = (rest + decoder.decode(value, { stream: true })).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue;
        this.tries = 0;
        this.onState("live");
        this.onMessage(JSON.parse(part.slice(6)));
      }
    }
  }
}
