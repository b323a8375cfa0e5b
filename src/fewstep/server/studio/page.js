// Small things of the page: keys, light and dark, files, the clipboard.

const THEMES = { system: "◐", light: "☀", dark: "☾" };
const spare = new Map(); // where the browser remembers nothing: of this page alone

/** A text that was remembered in "localStorage" or "sessionStorage", or null. */
export function recall(kind, name) {
  try {
    return window[kind].getItem(name);
  } catch {
    return spare.get(name) ?? null;
  }
}

export function remember(kind, name, text) {
  try {
    window[kind].setItem(name, text);
  } catch {
    spare.set(name, text);
  }
}

/** A button that goes through the themes; the choice survives a reload. */
export function theme(button) {
  const set = (name) => {
    if (name === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    button.textContent = THEMES[name];
    button.ariaLabel = button.title = `Theme: ${name}`;
    remember("localStorage", "fewstep-theme", name);
  };
  const stored = recall("localStorage", "fewstep-theme");
  set(Object.hasOwn(THEMES, stored) ? stored : "system");
  button.addEventListener("click", () => {
    const names = Object.keys(THEMES), now = document.documentElement.dataset.theme ?? "system";
    set(names[(names.indexOf(now) + 1) % names.length]);
  });
}

/** Shortcuts: letters outside of texts, and those with Control or Command everywhere. */
export function keyboard(letters, { draw, undo, areLettersOn }) {
  addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    const isText = event.target.matches?.("textarea, input:not([type=range], [type=checkbox], [type=radio], [type=color])");
    const isCommand = event.ctrlKey || event.metaKey;
    if (isCommand && event.key === "Enter") draw();
    else if (isCommand && event.key === "z" && !isText) undo();
    else if (event.key === "Escape" && isText) event.target.blur();
    else if (isText || isCommand || event.altKey || !areLettersOn() || !Object.hasOwn(letters, event.key)) return;
    else letters[event.key]();
    event.preventDefault();
  });
}

export function blobOf(base64, type) {
  return new Blob([Uint8Array.from(atob(base64), (one) => one.charCodeAt(0))], { type });
}

export function download(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** Copy a text; answers whether it went. Pages without TLS have the old way only. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(area);
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    return isCopied;
  }
}
