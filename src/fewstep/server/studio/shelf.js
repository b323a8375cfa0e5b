// The shelf of earlier pictures: history, and what was kept.

import { Store } from "./store.js";

export class Shelf {
  #list; #empty; #count; #open; #store = new Store(); #keptOnly = false; #current;
  #items = new Map(); // id and whether it is kept -> list item

  constructor(list, empty, count, open) {
    this.#list = list;
    this.#empty = empty;
    this.#count = count;
    this.#open = open;
  }

  /** Show what is stored. */
  async fill() {
    const all = await this.#store.all();
    const here = this.#keptOnly ? all.filter(({ kept }) => kept) : all;
    const before = this.#items;
    this.#items = new Map(here.map((one) => {
      const key = `${one.id} ${Boolean(one.kept)}`;
      return [key, before.get(key) ?? this.#item(one)];
    }));
    const focused = this.#list.contains(document.activeElement) ? document.activeElement : null;
    this.#list.replaceChildren(...this.#items.values());
    if (focused) (focused.isConnected ? focused : this.#list.querySelector("button"))?.focus();
    for (const [key, item] of before) {
      if (!this.#items.has(key)) URL.revokeObjectURL(item.querySelector("img").src);
    }
    this.#empty.hidden = here.length > 0;
    this.#count.textContent = all.length ? `${all.length} stored, ${all.filter(({ kept }) => kept).length} kept` : "";
    this.mark(this.#current);
  }

  #item(one) {
    const item = document.createElement("li"), button = document.createElement("button");
    const image = new Image();
    image.src = URL.createObjectURL(one.blob);
    image.alt = one.settings.prompt; // texts are set as texts, never as HTML
    Object.assign(button, { type: "button", title: one.settings.prompt });
    button.dataset.id = one.id;
    button.append(image);
    if (one.kept) {
      const star = Object.assign(document.createElement("span"), { className: "star", ariaHidden: "true" });
      star.textContent = "★";
      button.append(star);
      image.alt += " (kept)";
    }
    button.addEventListener("click", () => this.#open(one));
    item.append(button);
    return item;
  }

  /** Mark the picture that is shown. */
  mark(id) {
    this.#current = id;
    for (const button of this.#list.querySelectorAll("button")) {
      button.setAttribute("aria-current", String(button.dataset.id === String(id)));
    }
  }

  async filter(keptOnly) {
    this.#keptOnly = keptOnly;
    await this.fill();
  }

  /** Store a picture, or change it if it has an id; answers the id, which may be another. */
  async put(picture) {
    const id = await this.#store.put(picture);
    await this.fill();
    return id;
  }

  async delete(id) {
    await this.#store.delete(id);
    await this.fill();
  }

  async clearHistory() {
    await this.#store.clearHistory();
    await this.fill();
  }
}
