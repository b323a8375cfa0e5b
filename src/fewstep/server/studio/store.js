// Pictures that survive a reload: in this browser alone, bounded in number and in bytes.

const BOUNDS = { false: { pictures: 100, bytes: 64 << 20 }, true: { pictures: 300, bytes: 256 << 20 } };
const SPARE = 100;

const asked = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

async function opened() {
  const request = indexedDB.open("fewstep-studio", 1);
  request.onupgradeneeded = () =>
    request.result.createObjectStore("pictures", { keyPath: "id", autoIncrement: true });
  return asked(request);
}

/** Whether the picture of an id survives a reload. */
export const isStored = (id) => typeof id === "number";

/** Pictures as {id, when, kept, settings, pictures, blob}. */
export class Store {
  #db = opened();
  #spare = new Map(); // id -> picture, of this page alone: the browser stores nothing, or is full
  #count = 0;

  constructor() {
    this.#db.catch(() => {}); // told by each use
  }

  /** The result of what `act` asks of the table, once it is written. */
  async #do(mode, act) {
    const change = (await this.#db).transaction("pictures", mode);
    const isWritten = new Promise((resolve, reject) => {
      change.oncomplete = resolve;
      change.onabort = () => reject(change.error);
    });
    const [result] = await Promise.all([asked(act(change.objectStore("pictures"))), isWritten]);
    return result;
  }

  async #stored() {
    return (await this.#do("readonly", (table) => table.getAll()).catch(() => [])).reverse();
  }

  /** All pictures, the newest first. */
  async all() {
    return [...[...this.#spare.values()].reverse(), ...(await this.#stored())];
  }

  /** Store a picture, or change it if it has an id; answers the id, which may be another. */
  async put({ id, ...rest }) {
    const picture = isStored(id) ? { ...rest, id } : rest;
    do {
      try {
        const key = await this.#do("readwrite", (table) => table.put(picture));
        this.#spare.delete(id);
        await this.#prune();
        return key;
      } catch (error) {
        if (error?.name !== "QuotaExceededError") break;
      }
    } while (await this.#makeRoom(id));
    if (isStored(id)) return id; // it is there as it was
    const key = id ?? `page-${++this.#count}`;
    this.#spare.set(key, { ...rest, id: key });
    if (this.#spare.size > SPARE) this.#spare.delete(this.#spare.keys().next().value);
    return key;
  }

  async delete(id) {
    if (!this.#spare.delete(id)) await this.#do("readwrite", (table) => table.delete(id));
  }

  /** Forget what is not kept. */
  async clearHistory() {
    for (const { id, kept } of await this.all()) if (!kept) await this.delete(id);
  }

  /** Forget the older half of the history but `id`; answers whether there was any. */
  async #makeRoom(id) {
    const history = (await this.#stored()).filter((one) => !one.kept && one.id !== id);
    const old = history.slice(history.length >> 1);
    for (const one of old) await this.delete(one.id);
    return old.length > 0;
  }

  async #prune() {
    const seen = { false: { pictures: 0, bytes: 0 }, true: { pictures: 0, bytes: 0 } };
    for (const one of await this.#stored()) {
      const sum = seen[Boolean(one.kept)], most = BOUNDS[Boolean(one.kept)];
      sum.pictures += 1;
      sum.bytes += bytesOf(one);
      if (sum.pictures > most.pictures || sum.bytes > most.bytes) await this.delete(one.id);
    }
  }
}

const bytesOf = ({ blob, pictures }) =>
  Object.values(pictures ?? {}).reduce((sum, text) => sum + text.length, blob.size);
