// The studio: what is typed and painted becomes orders, and pictures come back.

import { Board } from "./board.js";
import { Busy } from "./busy.js";
import { Live } from "./live.js";
import { settingsOf, textsOf } from "./png.js";
import { Settings } from "./settings.js";
import { Shelf } from "./shelf.js";
import { curl, filesOf, kindOf, python } from "./snippets.js";
import { isStored } from "./store.js";
import { blobOf, copy, download, keyboard, recall, remember, theme } from "./page.js";

const $ = (id) => document.getElementById(id);
const PAUSE = 350; // milliseconds without input until the picture is refined
const SETTLED = 1500; // and until it is stored
const IDEAS = ["a red apple", "a rocket", "a penguin", "a sunflower", "a house", "a lemon on a blue background"];
const COLOURS = ["#d02a2a", "#f08c1a", "#f5d20a", "#3a9d3a", "#2b6fd6", "#7a4ac2", "#7b4a2b", "#f2b8c6", "#111111", "#ffffff"];
const TASKS = { words: "text", drawing: "image", part: "inpaint" };
const ABSENT = { // what a file was made from and does not hold
  image: "its starting picture is not in the file: put that on the canvas to draw this one again",
  inpaint: "its starting picture and its mask are not in the file",
  edges: "the picture that steered it is not in the file",
};

let model = null;
let shown = null; // {id, when, kept, settings, pictures, blob}
let newestShown = 0;
let soon = 0, pause = 0, settling = 0, loading = 0; // timers
let attempts = 0; // to reach the server
let isLost = false;

const settings = new Settings(() => changed(), tell);
const busy = new Busy($("frame"), $("status"));
const board = new Board($("board"), $("pen"), () => changed());
const live = new Live({ picture: arrived, error: refused, state: connection }, key);
const shelf = new Shelf($("shelf"), $("shelf-empty"), $("count"), (one) => void revisit(one));

// ── beginning ──

function key() {
  return recall("sessionStorage", "fewstep-key") ?? "";
}

async function begin() {
  let answer;
  try {
    answer = await fetch("/v1/limits", { headers: key() ? { Authorization: `Bearer ${key()}` } : {} });
  } catch {
    return later("The server does not answer; trying again …");
  }
  if (answer.status === 401) return void askForKey();
  if (!answer.ok) return later(answer.status === 503 ? "The model is loading …" : `The server answers ${answer.status}; trying again …`, answer.status !== 503);
  const { model: facts, limits } = await answer.json();
  attempts = 0;
  if (JSON.stringify(facts) !== JSON.stringify(model)) meet(facts, limits);
}

function later(text, isWrong = true) {
  tell(text, isWrong);
  clearTimeout(loading);
  loading = setTimeout(begin, Math.min(8000, 500 * 2 ** attempts++));
}

/** Take the ranges of a model, the first or another one. */
function meet(facts, limits) {
  model = facts;
  settings.limit(model, limits);
  $("model").textContent = `${model.id} · ${model.native_size.join(" × ")}`;
  for (const [mode, task] of Object.entries(TASKS)) modeInput(mode).parentElement.hidden = !model.tasks.includes(task);
  $("mode-edges").hidden = !model.controls.length;
  $("pixels").checked = Math.max(...model.native_size) <= 128;
  sharp();
  if (modeInput(mode()).parentElement.hidden) choose("words");
  tell("Ready. Type a prompt.");
  changed();
}

function askForKey() {
  if ($("key").open) return;
  $("key-wrong").textContent = key() ? "That key was refused." : "";
  $("key-value").value = "";
  $("key").showModal();
}

// ── ordering ──

function mode() {
  return document.querySelector("input[name=mode]:checked").value;
}

function modeInput(name) {
  return document.querySelector(`input[name=mode][value=${name}]`);
}

/** The settings and pictures of an order, or null if there is nothing to draw yet. */
function order() {
  const { strength, control_scale, ...rest } = settings.read();
  if (!model || !rest.prompt.trim()) return null;
  if (mode() === "part" && !board.hasMask) return null;
  if (mode() === "drawing") rest.strength = strength;
  if (mode() === "edges") rest.control_scale = control_scale;
  if (!rest.loras.length) delete rest.loras;
  return { settings: rest, pictures: board.pictures(rest.width, rest.height) };
}

/** Something was typed or painted: draw it at once, refine it after a pause. */
function changed() {
  clearTimeout(pause);
  clearTimeout(settling);
  reshape();
  if (!$("live").checked) return;
  pause = setTimeout(() => ask(true), PAUSE);
  if (soon) return; // once for all input between two frames of the screen
  const began = performance.now();
  soon = setTimeout(() => {
    soon = 0;
    ask(false, { began });
  }, 16);
}

/** Order nothing of what was typed so far, and store nothing. */
function halt() {
  for (const timer of [soon, pause, settling]) clearTimeout(timer);
  soon = 0;
}

function ask(final, { began = performance.now(), stores = false } = {}) {
  const now = order();
  if (!now) return stores && tell(missing());
  const steps = final ? now.settings.steps : settings.quick;
  busy.begin();
  live.ask({ ...now.settings, steps, ...now.pictures }, { ...now, final, stores, began });
}

function missing() {
  if (!model) return "The model is not there yet.";
  return $("prompt").value.trim() ? "Paint over what should change." : "Type a prompt first.";
}

/** The button: another picture, or with a locked seed the same. */
function draw() {
  halt();
  if (!$("lock").checked && shown) settings.reseed();
  ask(true, { stores: true });
}

// ── answers ──

async function arrived(answer) {
  const { about } = answer;
  if (answer.final && about.n === live.newest) busy.end();
  else busy.goOn();
  if (about.n < newestShown) return; // an older one, which came late
  newestShown = about.n;
  const kind = answer.png ? "png" : "jpeg";
  const blob = blobOf(answer[kind], `image/${kind}`);
  if (!(await show(blob, about.settings.prompt))) return;
  if (!document.hidden) requestAnimationFrame(() => badge(answer, performance.now() - about.began));
  shown = { settings: about.settings, pictures: about.pictures, blob, kept: false };
  const isWhole = answer.final && about.final;
  buttons(isWhole);
  if (!isWhole) return;
  if (!about.pictures.image) board.isGiven = false; // there is something newer to repaint
  $("about").textContent = `${about.settings.steps} steps · seed ${about.settings.seed}`;
  const one = shown;
  if (about.stores) await store(one);
  else settling = setTimeout(() => store(one), SETTLED);
}

let turns = 0, turnShown = 0;
/** Show a picture once it is decoded; answers whether it is the newest that could be. */
async function show(blob, prompt) {
  const turn = ++turns;
  const image = new Image();
  image.src = URL.createObjectURL(blob);
  const isDecoded = await image.decode().then(() => true, () => false);
  if (!isDecoded || turn < turnShown) {
    URL.revokeObjectURL(image.src);
    return false;
  }
  turnShown = turn;
  const before = $("picture").src;
  $("picture").src = image.src;
  $("picture").alt = prompt;
  $("picture").hidden = false;
  $("empty").hidden = true;
  if (before.startsWith("blob:")) setTimeout(() => URL.revokeObjectURL(before), 1000);
  return true;
}

function badge(answer, ms) {
  const number = (value) => (value < 10 ? value.toFixed(1) : Math.round(value));
  const server = answer.latency_ms;
  $("latency").querySelector("b").textContent =
    `${number(ms)} ms · server ${number(server)} ms${answer.cached ? " (stored)" : ""}`;
  const line = answer.queue_ms === undefined ? "" : `, ${number(answer.queue_ms)} ms of it waiting in line`;
  $("latency").title = `From your input to the picture on the screen ${number(ms)} ms; ` +
    `of which the server took ${number(server)} ms${line}${answer.cached ? "; it had drawn this picture before" : ""}`;
}

function refused(error, n) {
  if (n && n < live.newest) return;
  busy.end();
  if (error.code === "cancelled") return;
  if (error.code === "unauthorized") return void askForKey();
  tell(error.hint ? `${error.message}: ${error.hint}.` : `${error.message}.`, true);
  if (["queue_full", "not_ready"].includes(error.code)) {
    clearTimeout(pause);
    pause = setTimeout(() => ask(true), 2000);
  }
}

function connection(state, reason) {
  if (state === "open" && isLost) {
    tell("Connected again.");
    busy.begin(); // what was on the way is ordered again
  }
  isLost = state === "lost";
  if (!isLost) return;
  busy.end();
  tell(`${reason || "The connection was lost"}; trying again …`, true);
  void begin(); // the key may be another, or the model
}

function tell(text, isWrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", isWrong);
}

// ── the picture that is shown ──

async function store(one) {
  clearTimeout(settling);
  if (one.id) return;
  one.when = Date.now();
  one.id = await shelf.put(one);
  if (one === shown) buttons(true);
  tell(isStored(one.id) ? `Drawn: ${one.settings.prompt}`
    : "Drawn, but this browser has no room for it: it is here until the page is left.", !isStored(one.id));
}

function buttons(isWhole) {
  for (const id of ["keep", "download", "reuse", "python", "curl"]) $(id).disabled = !isWhole;
  $("delete").disabled = !shown?.id;
  $("keep").setAttribute("aria-pressed", String(Boolean(shown?.kept)));
  $("keep").textContent = shown?.kept ? "★ Kept" : "☆ Keep";
  shelf.mark(shown?.id);
}

async function keep() {
  if (!shown) return;
  shown.kept = !shown.kept;
  if (shown.id) shown.id = await shelf.put(shown);
  else await store(shown);
  tell(shown.kept ? "Kept." : "No longer kept.");
  buttons(true);
}

function save() {
  const name = shown.settings.prompt.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60).replace(/^-|-$/g, "") || "picture";
  download(shown.blob, `${name}-${shown.settings.seed}.png`);
}

async function reuse() {
  if (mode() === "words") choose("drawing");
  board.load(await createImageBitmap(shown.blob), false);
  tell("The picture is on the canvas.");
}

async function copyAs(write, name) {
  const files = filesOf(shown.pictures);
  const text = write(shown.settings, shown.pictures, Boolean(key()));
  const isCopied = await copy(text);
  for (const [field, file] of Object.entries(files)) {
    download(fileOf(shown.pictures[field]), file);
  }
  const beside = Object.keys(files).length ? ` It reads ${Object.values(files).join(" and ")}, which you just got.` : "";
  tell(isCopied ? `Copied as ${name}.${beside}` : "The browser does not let this page copy.", !isCopied);
}

const fileOf = (base64) => blobOf(base64, `image/${kindOf(base64)}`);

async function remove() {
  if (!shown?.id) return;
  await shelf.delete(shown.id);
  shown = { ...shown, id: undefined, kept: false };
  buttons(true);
  tell("Deleted.");
}

/** Show an earlier picture again, with its settings and what it was begun with. */
async function revisit(one) {
  quiet();
  shown = one;
  await show(one.blob, one.settings.prompt);
  restore(one.settings);
  const { image, mask, control } = one.pictures ?? {};
  modeInput(control ? "edges" : mask ? "part" : image ? "drawing" : "words").checked = true;
  enter();
  const bitmaps = await Promise.all([image, mask, control].map((one) => one && createImageBitmap(fileOf(one))));
  if (image || control) board.restore({ image: bitmaps[0], mask: bitmaps[1], control: bitmaps[2] });
  $("about").textContent = `${one.settings.steps} steps · seed ${one.settings.seed}`;
  buttons(true);
}

/** Let nothing that is under way replace what is shown next. */
function quiet() {
  halt();
  busy.end();
  newestShown = live.newest + 1;
}

function restore(found) {
  const notes = [...settings.write(found), ...(ABSENT[found.start] ? [ABSENT[found.start]] : [])];
  $("lock").checked = true;
  reshape();
  tell(`Settings restored${notes.length ? `; ${notes.join("; ")}` : ""}.`);
}

// ── pictures that are given ──

/** Take a file: its settings if it has any, else as the picture to begin with. */
async function take(file, isForCanvas) {
  if (!file) return;
  if (!["image/png", "image/jpeg", "image/webp"].includes(file.type)) {
    return tell("Only PNG, JPEG and WebP pictures can be taken.", true);
  }
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return tell("That picture is damaged.", true);
  }
  const found = isForCanvas ? null : settingsOf(await textsOf(await file.arrayBuffer()));
  if (found) {
    quiet();
    if (found.start === "text") modeInput("words").checked = true;
    enter();
    restore(found);
    const { strength, control_scale, ...rest } = settings.read(); // of pictures that are not here
    shown = { settings: rest, blob: file, kept: false };
    await show(file, rest.prompt);
    $("about").textContent = "from a file";
    buttons(true);
    return;
  }
  if (mode() === "words") choose("drawing");
  board.load(bitmap, true);
  tell(isForCanvas ? "The picture is on the canvas." : "No settings in that picture; it is on the canvas.");
}

function dropping() {
  const area = (event) => event.target.closest?.("#board");
  for (const kind of ["dragover", "dragleave", "drop"]) {
    addEventListener(kind, (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return; // text may fall into the prompt
      event.preventDefault();
      $("board").classList.toggle("over", kind === "dragover" && Boolean(area(event)));
      if (kind === "drop") void take(event.dataTransfer.files[0], Boolean(area(event)));
    });
  }
  addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])][0];
    if (file) void take(file, false);
  });
}

// ── the page ──

function choose(name) {
  const input = modeInput(name);
  if (input.parentElement.hidden) return;
  input.checked = true;
  entered();
}

/** Begin in another way. */
function entered() {
  enter();
  if (mode() === "part" && shown && !board.isGiven) void reuse();
  changed();
}

/** Show the tools of a way to begin. */
function enter() {
  $("tables").dataset.mode = board.mode = mode();
  $("board-hint").textContent = {
    drawing: "Paint, or drop a picture here.",
    part: "Paint over what should change; drop a picture here to work on it.",
    edges: "Draw outlines, or drop a picture here to take its edges.",
  }[mode()] ?? "";
}

let shape = "";
function reshape() {
  if (!model) return;
  const { width, height } = settings.read();
  if (shape === `${width}x${height}`) return;
  shape = `${width}x${height}`;
  board.resize(width, height);
  $("frame").style.setProperty("--shape", `${width} / ${height}`);
}

function sharp() {
  document.body.classList.toggle("sharp", $("pixels").checked);
}

function erase(isErasing) {
  board.isErasing = isErasing;
  $("eraser").setAttribute("aria-pressed", String(isErasing));
}

function thickness(value) {
  $("brush").value = value;
  board.brush = Number($("brush").value);
}

const on = (id, act, kind = "click") => $(id).addEventListener(kind, act);

function wire() {
  on("draw", draw);
  on("dice", () => (settings.reseed(), changed()));
  on("open", () => $("file").click());
  on("file", () => (void take($("file").files[0], false), ($("file").value = "")), "change");
  on("eraser", () => erase(!board.isErasing));
  on("undo", () => board.undo() || tell("Nothing to undo."));
  on("clear", () => board.clear());
  on("brush", () => thickness($("brush").value), "input");
  on("colour", () => ((board.colour = $("colour").value), erase(false)), "input");
  on("pixels", sharp, "change");
  on("live", () => changed(), "change");
  on("keep", () => void keep());
  on("download", save);
  on("reuse", () => void reuse());
  on("python", () => void copyAs(python, "Python"));
  on("curl", () => void copyAs(curl, "curl"));
  on("delete", () => void remove());
  on("forget", async () => (await shelf.clearHistory(), tell("The history is empty; kept pictures are still there.")));
  on("help-open", () => $("help").showModal());
  on("key", () => {
    remember("sessionStorage", "fewstep-key", $("key-value").value);
    void begin();
  }, "close");
  for (const input of document.querySelectorAll("input[name=mode]")) input.addEventListener("change", entered);
  for (const input of document.querySelectorAll("input[name=shelf]")) {
    input.addEventListener("change", () => void shelf.filter(input.value === "kept"));
  }
  $("ideas").append(...IDEAS.map((idea) => {
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.textContent = idea;
    button.addEventListener("click", () => (($("prompt").value = idea), changed()));
    return button;
  }));
  $("swatches").append(...COLOURS.map((colour) => {
    const button = Object.assign(document.createElement("button"), { type: "button", ariaLabel: colour });
    button.style.background = colour;
    button.addEventListener("click", () => (($("colour").value = board.colour = colour), erase(false)));
    return button;
  }));
}

const press = (id) => () => $(id).disabled || $(id).click();
const KEYS = {
  "/": () => $("prompt").focus(), "?": () => $("help").showModal(),
  1: () => choose("words"), 2: () => choose("drawing"), 3: () => choose("part"), 4: () => choose("edges"),
  n: press("dice"), l: press("lock"), k: press("keep"), s: press("download"), u: press("reuse"), e: press("eraser"),
  "[": () => thickness(board.brush - 8), "]": () => thickness(board.brush + 8),
};

wire();
theme($("theme"));
keyboard(KEYS, { draw, undo: () => board.undo(), areLettersOn: () => $("letters").checked });
dropping();
void shelf.fill();
void begin();
