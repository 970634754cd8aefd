// The canvas: shows a label map in the colours of its classes, and turns pointer and keys into strokes.

export class Easel {
  #canvas;
  #ring;
  #context;
  #map;
  #colours; // one 32-bit value per id, as ImageData wants it
  #image;
  #last = null; // where the last stroke was, in pixels of the map
  #cursor = null; // where the keyboard points
  #drawing = false;

  /** tool: () => "brush" | "fill" | "pick"; size: () => brush diameter in pixels of the map; chosen: () => class id;
   *  changed: () => void, after every change; settled: () => void, after a change that undo takes back as a whole;
   *  picked: (id) => void. */
  constructor(canvas, ring, { tool, size, chosen, changed, settled, picked }) {
    Object.assign(this, { tool, size, chosen, changed, settled, picked });
    this.#canvas = canvas;
    this.#ring = ring;
    this.#context = canvas.getContext("2d", { alpha: false });
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", (event) => this.#up(event));
    canvas.addEventListener("pointercancel", (event) => this.#up(event));
    canvas.addEventListener("pointerleave", () => this.#drawing || (ring.hidden = true));
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => (ring.hidden = true));
    new ResizeObserver(() => (ring.hidden = true)).observe(canvas);
  }

  /** classes: [{id, colour: [r, g, b]}]. */
  show(map, classes) {
    this.#map = map;
    this.#colours = new Uint32Array(Math.max(...classes.map((one) => one.id)) + 1);
    const bytes = new Uint8ClampedArray(this.#colours.buffer);
    for (const { id, colour } of classes) bytes.set([...colour, 255], 4 * id);
    this.refresh();
  }

  /** Draw the map anew, or the rectangle [left, top, right, bottom] of it. */
  refresh(part = null) {
    const { width, height, ids } = this.#map;
    if (this.#canvas.width !== width || this.#canvas.height !== height || !this.#image) {
      this.#canvas.width = width;
      this.#canvas.height = height;
      this.#image = new ImageData(width, height);
      part = null;
    }
    const [left, top, right, bottom] = part ?? [0, 0, width, height];
    const pixels = new Uint32Array(this.#image.data.buffer);
    for (let y = top; y < bottom; y++) {
      for (let place = y * width + left; place < y * width + right; place++) pixels[place] = this.#colours[ids[place]];
    }
    this.#context.putImageData(this.#image, 0, 0, left, top, right - left, bottom - top);
  }

  /** Show how large the brush is, where it was last. */
  updateRing() {
    if (this.#cursor && !this.#ring.hidden) this.#showRing(this.#cursor);
  }

  #point(event) {
    const box = this.#canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) * this.#map.width) / box.width,
      y: ((event.clientY - box.top) * this.#map.height) / box.height,
    };
  }

  #showRing({ x, y }) {
    const box = this.#canvas.getBoundingClientRect();
    const scale = box.width / this.#map.width;
    const across = this.tool() === "brush" ? Math.max(this.size() * scale, 4) : 10;
    Object.assign(this.#ring.style, {
      width: `${across}px`,
      height: `${across}px`,
      transform: `translate(${x * scale - across / 2}px, ${y * scale - across / 2}px)`,
    });
    this.#ring.hidden = false;
  }

  #down(event) {
    if (!event.isPrimary || event.button > 2 || event.button === 1) return;
    const point = this.#point(event);
    if (event.button === 2 || event.altKey) return this.#pick(point);
    this.#apply(point, event.shiftKey && this.#last);
    if (this.tool() === "brush") {
      this.#drawing = true;
      this.#canvas.setPointerCapture(event.pointerId);
    }
  }

  #move(event) {
    if (!event.isPrimary) return;
    const point = this.#point(event);
    this.#cursor = point;
    if (event.pointerType !== "touch") this.#showRing(point);
    if (!this.#drawing) return;
    const merged = event.getCoalescedEvents?.() ?? [];
    for (const one of merged.length ? merged : [event]) this.#line(this.#point(one));
    this.changed();
  }

  #up(event) {
    if (!event.isPrimary || !this.#drawing) return;
    this.#drawing = false;
    if (this.#map.settle()) this.settled();
  }

  #key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const { width, height } = this.#map;
    this.#cursor ??= { x: width / 2, y: height / 2 };
    if (moves[event.key]) {
      const step = event.shiftKey ? 1 : Math.max(1, Math.round(this.size() / 2));
      const [dx, dy] = moves[event.key];
      this.#cursor = {
        x: Math.min(width - 0.5, Math.max(0.5, this.#cursor.x + dx * step)),
        y: Math.min(height - 0.5, Math.max(0.5, this.#cursor.y + dy * step)),
      };
      this.#showRing(this.#cursor);
    } else if (event.key === " " || event.key === "Enter") {
      this.#apply(this.#cursor, null);
      if (this.tool() === "brush" && this.#map.settle()) this.settled();
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }

  /** Use the tool at a point; the brush draws a line from `from` where that is given. */
  #apply(point, from) {
    if (!this.#map.contains(point.x, point.y)) return;
    if (this.tool() === "pick") return this.#pick(point);
    this.#map.remember();
    if (this.tool() === "fill") {
      this.#map.fill(point.x, point.y, this.chosen());
      this.refresh();
      if (this.#map.settle()) this.settled();
      return;
    }
    this.#last = from || point;
    this.#line(point);
    this.changed();
  }

  #line(point) {
    const part = this.#map.stroke(this.#last.x, this.#last.y, point.x, point.y, this.size(), this.chosen());
    this.#last = point;
    if (part) this.refresh(part);
  }

  #pick({ x, y }) {
    if (this.#map.contains(x, y)) this.picked(this.#map.at(x, y));
  }
}
