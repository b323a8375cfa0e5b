// The order of a picture as a program: Python's standard library, or curl.

import { stringified } from "./live.js";

const FILES = ["image", "mask", "control"];

/** The kind of file that base64 holds. */
export const kindOf = (base64) => (base64.startsWith("iVBOR") ? "png" : "jpeg");

/** Files that a program of these settings reads: {image: "image.png", ...}. */
export const filesOf = (pictures) => Object.fromEntries(
  FILES.filter((name) => pictures?.[name]).map((name) => [name, `${name}.${kindOf(pictures[name])}`]));

export function python(settings, pictures, hasKey) {
  const files = filesOf(pictures);
  const key = hasKey ? `, "Authorization": "Bearer " + os.environ["FEWSTEP_API_KEY"]` : "";
  const lines = [
    ...(Object.keys(files).length ? ["import base64"] : []), "import json", ...(hasKey ? ["import os"] : []),
    "import urllib.request", "",
    `order = ${stringified(settings, 4)}`, // texts and numbers are written alike in both languages
    ...Object.entries(files).map(([name, file]) =>
      `order["${name}"] = base64.b64encode(open("${file}", "rb").read()).decode()`),
    "request = urllib.request.Request(",
    `    "${location.origin}/v1/generate",`,
    "    json.dumps(order).encode(),",
    `    {"Content-Type": "application/json", "Accept": "image/png"${key}},`,
    ")",
    'open("picture.png", "wb").write(urllib.request.urlopen(request).read())',
  ];
  return `${lines.join("\n")}\n`;
}

export function curl(settings, pictures, hasKey) {
  const files = filesOf(pictures);
  const lines = [`curl ${quoted(`${location.origin}/v1/generate`)}`, "-H 'Content-Type: application/json'", "-H 'Accept: image/png'"];
  if (hasKey) lines.push('-H "Authorization: Bearer $FEWSTEP_API_KEY"');
  lines.push("-o picture.png", "--fail-with-body");
  const order = stringified(settings);
  if (!Object.keys(files).length) return `${[...lines, `-d ${quoted(order)}`].join(" \\\n  ")}\n`;
  const parts = Object.entries(files).map(([name, file]) => `,"${name}":"'"$(base64 < ${file} | tr -d '\\n')"'"`);
  // A picture is longer than an argument may be, so the order goes in by a pipe.
  return `printf %s ${quoted(order.slice(0, -1)).slice(0, -1)}${parts.join("")}}' | ${[...lines, "-d @-"].join(" \\\n  ")}\n`;
}

/** One word of a shell. */
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
