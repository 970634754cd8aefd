// A label map that is drawn on: integer class ids, never colours. Knows nothing of the page.

const UNDO_BYTES = 64 * 2 ** 20; // memory for what can be undone
const MOST_PARTS = 100; // with new noise: the server's

export class LabelMap {
  #past = [];
  #future = [];
  #open = false; // whether a change was begun that is not settled
  anew = []; // regions with new noise: {x, y: a pixel of it, id: its class, seed}; replaced, never changed

  /** height x width pixels of class `id`, in bytesPerId (1 or 2) bytes each. */
  constructor(height, width, bytesPerId, id) {
    this.height = height;
    this.width = width;
    this.ids = new (bytesPerId === 1 ? Uint8Array : Uint16Array)(height * width).fill(id);
  }

  at(x, y) {
    return this.ids[Math.floor(y) * this.width + Math.floor(x)];
  }

  contains(x, y) {
    return x >= 0 && y >= 0 && x < this.width && y < this.height;
  }

  /** Paint a stroke of a round brush `size` pixels across from (x0, y0) to (x1, y1), in pixels, borders at whole
   *  numbers. Returns the rectangle [left, top, right, bottom] that may have changed, or null. */
  stroke(x0, y0, x1, y1, size, id) {
    const reach = Math.max(size / 2, 0.5);
    const left = Math.max(0, Math.floor(Math.min(x0, x1) - reach));
    const top = Math.max(0, Math.floor(Math.min(y0, y1) - reach));
    const right = Math.min(this.width, Math.ceil(Math.max(x0, x1) + reach) + 1);
    const bottom = Math.min(this.height, Math.ceil(Math.max(y0, y1) + reach) + 1);
    if (left >= right || top >= bottom) return null;
    const dx = x1 - x0, dy = y1 - y0, squared = dx * dx + dy * dy;
    if (size > 1) {
      for (let y = top; y < bottom; y++) {
        for (let x = left; x < right; x++) {
          const px = x + 0.5 - x0, py = y + 0.5 - y0; // distance of the pixel's middle from the line
          const along = squared ? Math.min(1, Math.max(0, (px * dx + py * dy) / squared)) : 0;
          if ((px - along * dx) ** 2 + (py - along * dy) ** 2 <= reach * reach) this.ids[y * this.width + x] = id;
        }
      }
    }
    const steps = Math.ceil(2 * Math.max(Math.abs(dx), Math.abs(dy))) || 1; // the thinnest brush leaves no gaps
    for (let step = 0; step <= steps; step++) {
      const x = x0 + (dx * step) / steps, y = y0 + (dy * step) / steps;
      if (this.contains(x, y)) this.ids[Math.floor(y) * this.width + Math.floor(x)] = id;
    }
    return [left, top, right, bottom];
  }

  /** Give a polygon with these corners, [{x, y}, ...] in pixels, class `id`: the pixels whose middle is inside (even-odd). */
  polygon(corners, id) {
    for (let y = 0; y < this.height; y++) {
      const middle = y + 0.5, crossings = [];
      corners.forEach((a, place) => {
        const b = corners[(place + 1) % corners.length];
        if (a.y <= middle === b.y <= middle) return;
        crossings.push(a.x + ((middle - a.y) / (b.y - a.y)) * (b.x - a.x));
      });
      crossings.sort((a, b) => a - b);
      for (let pair = 0; pair + 1 < crossings.length; pair += 2) {
        const left = Math.max(0, Math.ceil(crossings[pair] - 0.5));
        const right = Math.min(this.width, Math.ceil(crossings[pair + 1] - 0.5));
        if (left < right) this.ids.fill(id, y * this.width + left, y * this.width + right);
      }
    }
  }

  /** Give the region of one class that holds (x, y) another class (pixels that touch by an edge). */
  fill(x, y, id) {
    const { ids, width } = this;
    const start = Math.floor(y) * width + Math.floor(x);
    const old = ids[start];
    if (old === id) return;
    const waiting = [start];
    while (waiting.length) {
      let place = waiting.pop();
      if (ids[place] !== old) continue;
      const row = place - (place % width);
      while (place > row && ids[place - 1] === old) place--;
      let above = false, below = false; // whether the run there was noted already
      for (; place < row + width && ids[place] === old; place++) {
        ids[place] = id;
        const up = ids[place - width] === old, down = ids[place + width] === old;
        if (up && !above) waiting.push(place - width);
        if (down && !below) waiting.push(place + width);
        above = up;
        below = down;
      }
    }
  }

  /** How many pixels each class has: an array with an entry for 0 .. count - 1. */
  counts(count) {
    const counts = new Array(count).fill(0);
    for (const id of this.ids) counts[id]++;
    return counts;
  }

  /** Give the region at a pixel new noise; can be undone. */
  renew(x, y, seed) {
    const part = { x: Math.floor(x), y: Math.floor(y), id: this.at(x, y), seed };
    this.anew = [...this.anew.filter((one) => one.x !== part.x || one.y !== part.y), part].slice(-MOST_PARTS);
  }

  /** Those whose pixel still has the class that it had. */
  get parts() {
    return this.anew.filter(({ x, y, id }) => this.contains(x, y) && this.at(x, y) === id);
  }

  /** Put other contents, perhaps of another size, in place; can be undone. */
  replace(height, width, ids, anew = []) {
    this.remember();
    Object.assign(this, { height, width, ids: this.ids.constructor.from(ids), anew });
    this.settle();
  }

  /** The same map with another number of pixels (nearest). */
  resize(height, width) {
    const ids = new this.ids.constructor(height * width);
    for (let y = 0, place = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        ids[place++] = this.at(((x + 0.5) * this.width) / width, ((y + 0.5) * this.height) / height);
      }
    }
    const place = (at, from, to) => Math.floor(((at + 0.5) * to) / from);
    this.replace(height, width, ids, this.anew.map((part) => (
      { ...part, x: place(part.x, this.width, width), y: place(part.y, this.height, height) }
    )));
  }

  /** To be called before a change that undo() takes back ... */
  remember() {
    this.settle();
    this.#past.push({ height: this.height, width: this.width, ids: this.ids.slice(), anew: this.anew });
    const most = Math.max(10, Math.floor(UNDO_BYTES / this.ids.byteLength));
    if (this.#past.length > most) this.#past.shift();
    this.#open = true;
  }

  /** ... and this after it (undo and redo do it themselves). Returns whether anything has changed. */
  settle() {
    if (!this.#open) return false;
    this.#open = false;
    const before = this.#past.at(-1);
    const same = before.width === this.width && before.height === this.height && before.anew === this.anew;
    if (same && before.ids.every((id, place) => id === this.ids[place])) {
      this.#past.pop();
      return false;
    }
    this.#future = [];
    return true;
  }

  /** Take back a change that was begun, as if it had never been. */
  abandon() {
    if (this.#open) Object.assign(this, this.#past.pop());
    this.#open = false;
  }

  /** Whether a change was begun that is not settled. */
  get isOpen() {
    return this.#open;
  }

  get canUndo() {
    return this.#past.length > 0;
  }

  get canRedo() {
    return this.#future.length > 0;
  }

  undo() {
    this.settle(); // (which makes another #future)
    this.#step(this.#past, this.#future);
  }

  redo() {
    this.settle();
    this.#step(this.#future, this.#past);
  }

  #step(from, to) {
    if (!from.length) return;
    to.push({ height: this.height, width: this.width, ids: this.ids, anew: this.anew });
    Object.assign(this, from.pop());
  }
}
