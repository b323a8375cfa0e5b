// Canny's edges of a picture, as `fewstep.annotate.canny` finds them: white on black.

const TAN_22 = Math.tan(Math.PI / 8);

/** Marks the edges of `pixels` (ImageData) in a new ImageData. */
export function canny(pixels, low = 60, high = 120) {
  const { width, height } = pixels;
  const [dx, dy] = gradients(pixels);
  const strength = dx.map((value, i) => Math.abs(value) + Math.abs(dy[i]));
  const at = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? 0 : strength[y * width + x]);
  const ridge = new Uint8Array(width * height); // 1: weak, 2: strong
  const front = [];
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const here = strength[i];
      if (here <= low || !isRidge(here, x, y, dx[i], dy[i], at)) continue;
      ridge[i] = here > high ? 2 : 1;
      if (here > high) front.push(i);
    }
  }
  join(ridge, front, width, height);
  const out = new ImageData(width, height);
  for (let i = 0; i < ridge.length; i++) {
    out.data.fill(ridge[i] === 2 ? 255 : 0, 4 * i, 4 * i + 3);
    out.data[4 * i + 3] = 255;
  }
  return out;
}

/** Whether the gradient is no weaker than on either side, in its own of four directions. */
function isRidge(here, x, y, dx, dy, at) {
  const across = Math.abs(dx), down = Math.abs(dy);
  if (down < across * TAN_22) return here > at(x - 1, y) && here >= at(x + 1, y);
  if (down > across / TAN_22) return here > at(x, y - 1) && here >= at(x, y + 1);
  const side = dx < 0 === dy < 0 ? 1 : -1;
  return here > at(x - side, y - 1) && here > at(x + side, y + 1);
}

/** Weak ridges that a chain leads to from a strong one become strong. */
function join(ridge, front, width, height) {
  while (front.length) {
    const i = front.pop(), x = i % width, y = (i - x) / width;
    for (let ny = Math.max(0, y - 1); ny <= Math.min(height - 1, y + 1); ny++) {
      for (let nx = Math.max(0, x - 1); nx <= Math.min(width - 1, x + 1); nx++) {
        const j = ny * width + nx;
        if (ridge[j] !== 1) continue;
        ridge[j] = 2;
        front.push(j);
      }
    }
  }
}

/** Sobel's gradients along x and y, of each pixel's colour that changes most. */
function gradients({ data, width, height }) {
  const dx = new Float32Array(width * height), dy = new Float32Array(width * height);
  for (let y = 0, i = 0; y < height; y++) {
    const above = Math.max(0, y - 1) * width, row = y * width;
    const below = Math.min(height - 1, y + 1) * width;
    for (let x = 0; x < width; x++, i++) {
      const left = Math.max(0, x - 1), right = Math.min(width - 1, x + 1);
      for (let c = 0; c < 3; c++) {
        const p = (r, column) => data[4 * (r + column) + c];
        const gx = p(above, right) - p(above, left) + 2 * (p(row, right) - p(row, left))
          + p(below, right) - p(below, left);
        const gy = p(below, left) + 2 * p(below, x) + p(below, right)
          - p(above, left) - 2 * p(above, x) - p(above, right);
        if (Math.abs(gx) + Math.abs(gy) > Math.abs(dx[i]) + Math.abs(dy[i])) {
          dx[i] = gx;
          dy[i] = gy;
        }
      }
    }
  }
  return [dx, dy];
}
