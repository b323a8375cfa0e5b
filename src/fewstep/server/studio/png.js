// What a PNG says of itself, and the settings in it: ours, and those of AUTOMATIC1111's web UI.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const MOST_TEXT = 1 << 20; // of one chunk, once it is unpacked
const MOST_CHUNKS = 10_000;
const TAG = /<lora:([^:<>]{1,256})((?::[^:<>]*)*)>/g;

const latin = (bytes) => new TextDecoder("latin1").decode(bytes);
const utf8 = (bytes) => new TextDecoder("utf-8").decode(bytes);

/** Map of keyword to text of the tEXt, zTXt and iTXt chunks of a PNG (an ArrayBuffer). */
export async function textsOf(buffer) {
  const bytes = new Uint8Array(buffer);
  const texts = new Map();
  if (!SIGNATURE.every((value, i) => bytes[i] === value)) return texts;
  const view = new DataView(buffer);
  for (let at = 8, chunks = 0; at + 12 <= bytes.length && chunks < MOST_CHUNKS; chunks++) {
    const length = view.getUint32(at);
    const kind = latin(bytes.subarray(at + 4, at + 8));
    const end = at + 8 + length;
    if (end + 4 > bytes.length || kind === "IEND") break;
    const found = await textOf(kind, bytes.subarray(at + 8, end)).catch(() => null);
    if (found && !texts.has(found[0])) texts.set(...found);
    at = end + 4;
  }
  return texts;
}

/** [keyword, text] of a chunk, or null for chunks of another kind. */
async function textOf(kind, data) {
  if (!["tEXt", "zTXt", "iTXt"].includes(kind) || data.length > MOST_TEXT) return null;
  const end = data.indexOf(0);
  if (end < 1) return null;
  const key = latin(data.subarray(0, end));
  if (kind === "tEXt") return [key, latin(data.subarray(end + 1))];
  if (kind === "zTXt") return [key, latin(await inflated(data.subarray(end + 2)))];
  const isPacked = data[end + 1] === 1;
  const language = data.indexOf(0, end + 3);
  const translated = data.indexOf(0, language + 1);
  if (language < 0 || translated < 0) return null;
  const text = data.subarray(translated + 1);
  return [key, utf8(isPacked ? await inflated(text) : text)];
}

/** The bytes that zlib packed; throws if they are too many. */
async function inflated(bytes) {
  const reader = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
  const parts = [];
  let size = 0;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    size += value.length;
    if (size > MOST_TEXT) {
      await reader.cancel();
      throw new Error("too long");
    }
    parts.push(value);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

/** The settings in a PNG's texts, or null: {prompt, seed, steps, ...}, as far as they are told. */
export function settingsOf(texts) {
  const ours = texts.get("fewstep");
  if (ours) {
    try {
      return ofRecord(JSON.parse(ours), ours);
    } catch { /* damaged: the other text may be whole */ }
  }
  const theirs = texts.get("parameters");
  return theirs ? ofParameters(theirs) : null;
}

/** The settings of a record: of a command's file, or of a picture of the library or the server. */
export function ofRecord(record, text = "") {
  const first = record.pictures?.[0] ?? record;
  if (typeof first.prompt !== "string") return null;
  const seed = /"seed":\s*(\d+)/.exec(text)?.[1] ?? first.seed; // JSON.parse rounds long ones
  const additions = record.model?.additions ?? [];
  return known({
    start: startOf({ pipeline: record.model?.pipeline, ...first }),
    prompt: first.prompt,
    negative_prompt: first.negative_prompt,
    seed: seed == null ? undefined : String(seed),
    steps: first.steps,
    guidance_scale: first.guidance_scale,
    strength: first.strength,
    width: first.width,
    height: first.height,
    loras: lorasOf(additions.filter((one) => one.kind === "lora"), record.loras),
  });
}

/** What a record's picture was made from: "text", "image", "inpaint", or "edges" and a text. */
function startOf({ task, image, mask, control, controls, strength, pipeline }) {
  const found = task ?? (mask ? "inpaint" : image || Number.isFinite(strength) ? "image" : "text");
  const isSteered = control || controls?.length || /ControlNet|Adapter/.test(pipeline);
  return found === "text" && isSteered ? "edges" : found;
}

/** [{id, weight}] of a file's additions, or of a record's list or table. */
function lorasOf(additions, listed) {
  if (additions.length) return additions.map(({ id, weight }) => ({ id, weight }));
  if (Array.isArray(listed)) {
    return listed.map((one) => Array.isArray(one)
      ? { id: one[0], weight: one[1] }
      : { id: one.id ?? one.name ?? one.adapter, weight: one.weight ?? one.scale ?? 1 });
  }
  return Object.entries(listed ?? {}).map(([id, weight]) => ({ id, weight }));
}

/** The settings of `parameters`: the prompt, a line of what to leave out, a line of the rest. */
export function ofParameters(text) {
  const lines = text.replace(/\r\n/g, "\n").trimEnd().split("\n");
  const isLast = /(^|,\s*)Steps:\s*\d+/.test(lines.at(-1)) && lines.length > 0;
  const rest = isLast ? pairs(lines.pop()) : {};
  const at = lines.findIndex((line) => line.startsWith("Negative prompt:"));
  const negative = at < 0 ? undefined : lines.splice(at).join("\n").slice(16).trim();
  const size = /^(\d+)x(\d+)$/.exec(rest.Size ?? "");
  const start = startOfPairs(rest);
  return known({
    start,
    ...withoutTags(lines.join("\n")),
    negative_prompt: negative,
    seed: /^\d+$/.test(rest.Seed ?? "") ? rest.Seed : undefined,
    steps: number(rest.Steps),
    guidance_scale: number(rest["CFG scale"]),
    strength: start === "text" ? undefined : number(rest["Denoising strength"]),
    width: size ? Number(size[1]) : undefined,
    height: size ? Number(size[2]) : undefined,
  });
}

/** {prompt, loras} of a text that may have `<lora:NAME:0.5>`, or two weights: the first is taken. */
function withoutTags(text) {
  const loras = [...text.matchAll(TAG)].map(([, id, rest = ""]) => {
    const weights = rest.split(":").slice(1).map((one) => Number.parseFloat(one.replace(/^\w+=/, "")));
    return { id, weight: weights.find(Number.isFinite) ?? 1 };
  });
  return loras.length ? { prompt: text.replace(TAG, "").trim(), loras } : { prompt: text };
}

/** As `startOf`, of the last line: a second pass that enlarges has a strength, too. */
function startOfPairs(rest) {
  const has = (kind) => Object.keys(rest).some((key) => kind.test(key));
  if (has(/^(Mask|Inpaint|Masked)\b/)) return "inpaint";
  if ("Denoising strength" in rest && !has(/^Hires\b/)) return "image";
  return has(/^ControlNet\b/) ? "edges" : "text";
}

/** `Steps: 4, Seed: 7, Lora hashes: "a: b, c: d"` as an object. */
function pairs(line) {
  const found = Object.create(null);
  for (const [, key, quoted, plain] of line.matchAll(/\s*([\w /-]+):\s*(?:"((?:\\.|[^"\\])*)"|([^,]*))(?:,|$)/g)) {
    found[key.trim()] ??= quoted ?? plain.trim();
  }
  return found;
}

const number = (text) => (text === undefined || Number.isNaN(Number(text)) ? undefined : Number(text));
const known = (settings) =>
  Object.fromEntries(Object.entries(settings).filter(([, value]) => value !== undefined && value !== null));
