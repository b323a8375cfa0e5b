// The canvas: a drawing, a picture with a mask over it, or lines that steer. Pointer, touch, keys.

import { canny } from "./edges.js";

const SIDE = 512; // pixels of the longer side, at least; scaled to the model's when it is sent
const UNDO = 20;
const LAYER = { drawing: "paint", part: "mask", edges: "lines" }; // what is painted on
const PICTURE = { drawing: "paint", part: "base", edges: "lines" }; // what pictures are put on
const MASK = [229, 72, 77];
const THINNEST = 1.5; // pixels of the model, of lines that steer: thinner ones have gaps

export class Board {
  #element; #layers = {}; #pen; #undo = []; #last = null; #keys = { x: 0.5, y: 0.5, isDown: false };
  #size = [0, 0]; // of the model's pictures
  mode = "words";
  colour = "#d02a2a";
  brush = 40; // thousandths of the width, times two
  isErasing = false;
  isGiven = false; // whether the picture to repaint is a person's own

  /** `changed()` is called when what is on the canvas became another. */
  constructor(element, pen, changed) {
    this.#element = element;
    this.#pen = pen;
    this.changed = changed;
    for (const name of ["paint", "base", "mask", "lines"]) {
      this.#layers[name] = element.querySelector(`#${name}`).getContext("2d", { willReadFrequently: true });
    }
    element.addEventListener("pointerdown", (event) => this.#down(event));
    element.addEventListener("pointermove", (event) => this.#move(event));
    for (const end of ["pointerup", "pointercancel"]) element.addEventListener(end, () => (this.#last = null));
    element.addEventListener("keydown", (event) => this.#key(event));
    element.addEventListener("focus", () => element.matches(":focus-visible") && this.#showPen());
    element.addEventListener("blur", () => this.#lift());
  }

  /** Take the shape of pictures of a size; what was painted is stretched. */
  resize(width, height) {
    const scale = Math.max(1, SIDE / Math.max(width, height));
    const size = [Math.round(width * scale), Math.round(height * scale)];
    const isFresh = !this.#size[0];
    this.#size = [width, height];
    this.#element.style.setProperty("--shape", `${width} / ${height}`);
    for (const [name, layer] of Object.entries(this.#layers)) {
      const { canvas } = layer;
      if (canvas.width === size[0] && canvas.height === size[1]) continue;
      const before = isFresh ? null : copyOf(canvas);
      [canvas.width, canvas.height] = size;
      this.#blank(name);
      if (before) layer.drawImage(before, 0, 0, ...size);
    }
    this.#undo = [];
  }

  #blank(name) {
    const layer = this.#layers[name], { width, height } = layer.canvas;
    layer.clearRect(0, 0, width, height);
    if (name === "mask") return;
    layer.fillStyle = name === "lines" ? "#000000" : "#ffffff";
    layer.fillRect(0, 0, width, height);
  }

  get #layer() {
    return this.#layers[LAYER[this.mode]];
  }

  // ── painting ──

  #down(event) {
    if (event.button > 0 || !this.#layer) return;
    event.preventDefault();
    this.#element.focus({ preventScroll: true });
    this.#pen.hidden = true;
    this.#element.setPointerCapture(event.pointerId);
    this.#remember();
    this.#last = this.#place(event);
    this.#line(this.#last, this.#last);
  }

  #move(event) {
    if (!this.#last) return;
    for (const one of event.getCoalescedEvents?.() ?? [event]) {
      const here = this.#place(one);
      this.#line(this.#last, here);
      this.#last = here;
    }
  }

  #place(event) {
    const box = this.#element.getBoundingClientRect(), { canvas } = this.#layer;
    return [
      ((event.clientX - box.left) / box.width) * canvas.width,
      ((event.clientY - box.top) / box.height) * canvas.height,
    ];
  }

  get #thickness() {
    const { width } = this.#layer.canvas, brush = (this.brush / 500) * width;
    return this.mode === "edges" ? Math.max(0.1 * brush, (THINNEST * width) / this.#size[0]) : brush;
  }

  #line(from, to) {
    const layer = this.#layer;
    layer.save();
    layer.lineCap = layer.lineJoin = "round";
    layer.lineWidth = Math.max(1, this.#thickness);
    const colours = { drawing: [this.colour, "#ffffff"], part: [`rgb(${MASK})`, "#000"], edges: ["#ffffff", "#000000"] };
    layer.strokeStyle = colours[this.mode][Number(this.isErasing)];
    if (this.mode === "part" && this.isErasing) layer.globalCompositeOperation = "destination-out";
    layer.beginPath();
    layer.moveTo(...from);
    layer.lineTo(to[0] + 0.01, to[1]);
    layer.stroke();
    layer.restore();
    this.changed();
  }

  // ── keys ──

  #key(event) {
    const step = event.shiftKey ? 0.1 : 0.02;
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!this.#layer || event.ctrlKey || event.metaKey || event.altKey) return;
    if (way) {
      const before = this.#spot();
      for (const [i, axis] of ["x", "y"].entries()) {
        this.#keys[axis] = Math.min(1, Math.max(0, this.#keys[axis] + way[i] * step));
      }
      if (this.#keys.isDown) this.#line(before, this.#spot());
    } else if (event.key === " ") {
      this.#keys.isDown = !this.#keys.isDown;
      if (this.#keys.isDown) {
        this.#remember();
        this.#line(this.#spot(), this.#spot());
      }
    } else return;
    event.preventDefault();
    this.#showPen();
  }

  #spot() {
    const { width, height } = this.#layer.canvas;
    return [this.#keys.x * width, this.#keys.y * height];
  }

  #showPen() {
    if (!this.#layer) return;
    const size = Math.max(6, (this.#thickness / this.#layer.canvas.width) * this.#element.clientWidth);
    Object.assign(this.#pen.style, {
      left: `${this.#keys.x * 100}%`, top: `${this.#keys.y * 100}%`, width: `${size}px`, height: `${size}px`,
      borderStyle: this.#keys.isDown ? "solid" : "dashed",
    });
    this.#pen.hidden = false;
  }

  #lift() {
    this.#keys.isDown = false;
    this.#pen.hidden = true;
  }

  // ── what is there ──

  #remember(name = LAYER[this.mode]) {
    const layer = this.#layers[name], { width, height } = layer.canvas;
    this.#undo.push([name, layer.getImageData(0, 0, width, height)]);
    this.#undo = this.#undo.slice(-UNDO);
  }

  undo() {
    const before = this.#undo.pop();
    if (!before) return false;
    this.#layers[before[0]].putImageData(before[1], 0, 0);
    this.changed();
    return true;
  }

  clear() {
    if (!this.#layer) return;
    this.#remember();
    this.#blank(LAYER[this.mode]);
    this.changed();
  }

  /** Put a picture on the canvas, cut to its shape; in edges mode, its edges. */
  load(bitmap, isGiven) {
    if (this.mode === "edges") this.#putEdges(bitmap);
    else this.#put(PICTURE[this.mode], bitmap);
    if (this.mode === "part") this.#blank("mask");
    else if (isGiven) this.#put("base", bitmap);
    this.isGiven = isGiven;
    this.changed();
  }

  #putEdges(bitmap) {
    const edges = covered(bitmap, ...this.#size), layer = edges.getContext("2d");
    layer.putImageData(canny(layer.getImageData(0, 0, ...this.#size)), 0, 0);
    this.#put("lines", edges);
  }

  /** Show the pictures again that an order had. */
  restore({ image, mask, control }) {
    if (image) this.#put(PICTURE[this.mode], image);
    if (mask) this.#put("mask", red(mask));
    if (control) this.#put("lines", control);
    this.isGiven = false;
  }

  #put(name, picture) {
    const layer = this.#layers[name], { width, height } = layer.canvas;
    const isSmooth = picture.width !== this.#size[0]; // the model's own come back to the pixel
    this.#remember(name);
    this.#blank(name);
    layer.drawImage(covered(picture, width, height, isSmooth), 0, 0);
  }

  /** Whether any of the picture is to be repainted. */
  get hasMask() {
    const { canvas } = this.#layers.mask;
    const { data } = this.#layers.mask.getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 3; i < data.length; i += 4) if (data[i] > 127) return true;
    return false;
  }

  /** The pictures that an order of this mode has, as base64: image, mask, control. */
  pictures(width, height) {
    const base = (name) => scaled(this.#layers[name].canvas, width, height);
    if (this.mode === "drawing") return { image: base64(base("paint")) };
    if (this.mode === "part") return { image: base64(base("base")), mask: base64(blackAndWhite(base("mask")), true) };
    return this.mode === "edges" ? { control: base64(blackAndWhite(base("lines"), 0), true) } : {};
  }
}

function copyOf(canvas) {
  const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  copy.getContext("2d").drawImage(canvas, 0, 0);
  return copy;
}

/** A copy of another size, halved on the way so that thin lines stay. */
function scaled(canvas, width, height) {
  let from = canvas;
  while (from.width >= 2 * width && from.height >= 2 * height) {
    const half = Object.assign(document.createElement("canvas"), { width: from.width >> 1, height: from.height >> 1 });
    half.getContext("2d").drawImage(from, 0, 0, half.width, half.height);
    from = half;
  }
  const to = Object.assign(document.createElement("canvas"), { width, height });
  to.getContext("2d").drawImage(from, 0, 0, width, height);
  return to;
}

/** A picture enlarged or made smaller to cover a size, its middle. */
function covered(picture, width, height, isSmooth = true) {
  const to = Object.assign(document.createElement("canvas"), { width, height }), layer = to.getContext("2d");
  const scale = Math.max(width / picture.width, height / picture.height);
  const size = [picture.width * scale, picture.height * scale];
  Object.assign(layer, { imageSmoothingEnabled: isSmooth, imageSmoothingQuality: "high" });
  layer.drawImage(picture, (width - size[0]) / 2, (height - size[1]) / 2, ...size);
  return to;
}

/** White where a channel (0 red, 3 how opaque) is more than half, black elsewhere. */
function blackAndWhite(canvas, channel = 3) {
  const layer = canvas.getContext("2d"), pixels = layer.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data.fill(pixels.data[i + channel] > 127 ? 255 : 0, i, i + 3);
    pixels.data[i + 3] = 255;
  }
  layer.putImageData(pixels, 0, 0);
  return canvas;
}

/** A mask as it is painted: red where it is white, nothing elsewhere. */
function red(mask) {
  const to = covered(mask, mask.width, mask.height), layer = to.getContext("2d");
  const pixels = layer.getImageData(0, 0, to.width, to.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data.set([...MASK, pixels.data[i]], i);
  }
  layer.putImageData(pixels, 0, 0);
  return to;
}

/** Small pictures and masks without loss; large ones as JPEG, which is quick to send. */
function base64(canvas, isExact = false) {
  const isSmall = canvas.width * canvas.height <= 256 * 256;
  return canvas.toDataURL(isExact || isSmall ? "image/png" : "image/jpeg", 0.92).split(",")[1];
}
