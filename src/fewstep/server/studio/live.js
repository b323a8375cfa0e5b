// The live socket: orders go out, the newest wins, pictures come back with how long they took.

const LONGEST_PAUSE = 8000; // milliseconds between attempts to connect
const PICTURES = ["image", "mask", "control"];

/** Calls `on.picture(answer)`, `on.error(error, n)`, `on.state("open" | "lost", reason)`. */
export class Live {
  #on; #key; #socket = null; #waiting = null; #n = 0; #attempts = 0; #timer = 0; #last = null;
  #sent = {}; // the pictures that this connection has been sent
  #asked = new Map(); // n -> what was said about an order

  constructor(on, key) {
    this.#on = on;
    this.#key = key;
  }

  /** Order a picture; what was ordered before and is not under way is forgotten. */
  ask(order, about) {
    const n = ++this.#n;
    this.#asked.set(n, { ...about, n, done: false });
    for (const old of this.#asked.keys()) if (old < n - 50) this.#asked.delete(old);
    this.#waiting = { n, order, format: about.final ? "png" : "jpeg" };
    this.#send();
  }

  /** The number of the newest order. */
  get newest() {
    return this.#n;
  }

  #connect() {
    clearTimeout(this.#timer);
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    const protocols = ["fewstep.live"];
    const key = this.#key();
    if (key) protocols.push(`fewstep.key.${base64url(key)}`);
    const socket = this.#socket = new WebSocket(`${scheme}//${location.host}/v1/live`, protocols);
    this.#sent = {};
    socket.onopen = () => this.#send();
    socket.onmessage = ({ data }) => socket === this.#socket && this.#answer(JSON.parse(data));
    socket.onclose = ({ reason }) => {
      if (socket !== this.#socket) return;
      this.#socket = null;
      const isMissed = this.#waiting || this.#asked.get(this.#n)?.done === false;
      // Nothing was on the way (the server ends silent sockets): the next order opens another one.
      if (!isMissed) return;
      this.#on.state("lost", reason);
      const pause = Math.min(LONGEST_PAUSE, 250 * 2 ** this.#attempts++);
      this.#timer = setTimeout(() => this.#again(), pause);
    };
  }

  /** Connect, and order again what was on the way. */
  #again() {
    this.#waiting ??= this.#last;
    this.#connect();
  }

  #send() {
    if (!this.#waiting) return;
    if (!this.#socket) return this.#connect();
    if (this.#socket.readyState !== WebSocket.OPEN) return;
    if (this.#socket.bufferedAmount > 0) { // the network is slower than the hand: newest only
      clearTimeout(this.#timer);
      this.#timer = setTimeout(() => this.#send(), 15);
      return;
    }
    this.#last = this.#waiting;
    const { n, order, format } = this.#waiting;
    this.#waiting = null;
    this.#socket.send(stringified({ type: "draw", n, format, order: this.#changed(order) }));
  }

  /** The order without the pictures that the server has already. */
  #changed(order) {
    const short = { ...order };
    for (const name of PICTURES) {
      const picture = order[name] ?? null;
      if (picture === (this.#sent[name] ?? null)) delete short[name];
      else short[name] = this.#sent[name] = picture;
    }
    return short;
  }

  #answer(message) {
    const about = this.#asked.get(message.n);
    if (message.type === "hello") { // there is a place for this socket
      this.#attempts = 0;
      this.#on.state("open");
    }
    if (message.type === "picture") {
      this.#socket.send(JSON.stringify({ type: "seen", n: message.n }));
      if (message.final && about) about.done = true;
      if (about) this.#on.picture({ ...message, about });
    } else if (message.type === "error") {
      if (about) about.done = true;
      this.#on.error(message.error, message.n);
    }
  }
}

/** JSON in which seeds keep all their digits. */
export function stringified(value, space) {
  const long = (text) => (JSON.rawJSON ? JSON.rawJSON(text) : Number(text));
  const digits = (key, one) => (key === "seed" && typeof one === "string" ? long(one) : one);
  return JSON.stringify(value, digits, space);
}

function base64url(text) {
  const bytes = new TextEncoder().encode(text);
  return btoa(String.fromCharCode(...bytes)).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");
}
