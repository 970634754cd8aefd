// The canvas: shows a label map in the colours of its classes, and turns pointer and keys into strokes and shapes.
// Knows nothing of servers and pictures.

const STROKES = ["brush", "erase", "line"]; // the tools that draw while the pointer is down
const CLOSE = 12; // pixels of the screen around a polygon's first corner that close it, and beside the map's border

export class Easel {
  #canvas;
  #frame;
  #ring;
  #shape; // what a line or a polygon will be, above the canvas
  #context;
  #map;
  #colours; // one 32-bit value per id, as ImageData wants it
  #image;
  #last = null; // where the last stroke was, in pixels of the map
  #cursor = null; // where pointer or keyboard are
  #drawing = false; // a stroke or line, by the pointer
  #corners = []; // of the polygon, or the start of the line
  #fingers = new Map(); // pointer id -> place on the screen
  #tap = null; // where the pointer went down, for tools that act when it goes up
  #pans = false; // by the middle button

  /** frame: an element with canvas, svg and .ring. tool: () => "brush" | "erase" | "line" | "polygon" | "fill" | "pick" | "renew";
   *  size: () => brush diameter in pixels of the map; chosen: () => class id to paint; changed: () => void, after every
   *  change; settled: () => void, after a change that undo takes back as a whole; picked: (id) => void; view: a View. */
  constructor(frame, { tool, size, chosen, changed, settled, picked, view }) {
    Object.assign(this, { tool, size, chosen, changed, settled, picked, view });
    this.#frame = frame;
    const canvas = (this.#canvas = frame.querySelector("canvas"));
    this.#ring = frame.querySelector(".ring");
    this.#shape = frame.querySelector("svg polygon");
    this.#context = canvas.getContext("2d", { alpha: false });
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", (event) => this.#up(event));
    canvas.addEventListener("pointercancel", (event) => this.#up(event));
    canvas.addEventListener("pointerleave", () => this.#drawing || (this.#ring.hidden = true));
    canvas.addEventListener("dblclick", () => this.#close());
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => (this.#ring.hidden = true));
    new ResizeObserver(() => (this.#ring.hidden = true)).observe(canvas);
  }

  get canvas() {
    return this.#canvas;
  }

  /** classes: [{id, colour: [r, g, b]}]. */
  show(map, classes) {
    this.#map = map;
    this.#colours = new Uint32Array(Math.max(...classes.map((one) => one.id)) + 1);
    const bytes = new Uint8ClampedArray(this.#colours.buffer);
    for (const { id, colour } of classes) bytes.set([...colour, 255], 4 * id);
    this.#shape.parentElement.setAttribute("viewBox", `0 0 ${map.width} ${map.height}`);
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

  /** End what is being drawn: to be called before anything else changes the map. */
  finish() {
    this.#drawing = false;
    this.cancel();
    if (this.#map.settle()) this.settled();
  }

  /** Give up a line or polygon. Returns whether there was one. */
  cancel() {
    const had = this.#corners.length > 0;
    this.#corners = [];
    this.#showShape();
    return had;
  }

  /** Show how large the brush is, where it was last. */
  updateRing() {
    if (this.#cursor && !this.#ring.hidden) this.#showRing(this.#cursor);
    this.#showShape();
  }

  #point(event) {
    const box = this.#canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) * this.#map.width) / box.width,
      y: ((event.clientY - box.top) * this.#map.height) / box.height,
    };
  }

  #showRing({ x, y }) {
    const box = this.#canvas.getBoundingClientRect(), frame = this.#frame.getBoundingClientRect();
    const scale = box.width / this.#map.width;
    const across = STROKES.includes(this.tool()) ? Math.max(this.size() * scale, 4) : 10;
    const left = box.left - frame.left + x * scale, top = box.top - frame.top + y * scale;
    Object.assign(this.#ring.style, {
      width: `${across}px`,
      height: `${across}px`,
      transform: `translate(${left - across / 2}px, ${top - across / 2}px)`,
    });
    this.#ring.hidden = false;
  }

  #showShape() {
    const points = this.#corners.length && this.#cursor ? [...this.#corners, this.#cursor] : [];
    this.#shape.setAttribute("points", points.map(({ x, y }) => `${x},${y}`).join(" "));
    this.#shape.setAttribute("class", this.tool());
    this.#shape.style.setProperty("--size", `${this.size()}`);
  }

  // ----------------------------------------------------------------------------------------------- pointer

  #down(event) {
    if (event.pointerType === "touch") {
      this.#fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
      if (this.#fingers.size === 2) return this.#abandon(); // two fingers move the map
    }
    if (!event.isPrimary || event.button > 2) return;
    const point = (this.#cursor = this.#point(event));
    this.#canvas.setPointerCapture(event.pointerId);
    if (event.button === 1) {
      event.preventDefault();
      this.#pans = true;
    } else if (event.button === 2 || event.altKey) {
      this.#pick(point);
    } else if (STROKES.includes(this.tool())) {
      this.#begin(point, event.shiftKey);
      this.#drawing = true;
    } else {
      this.#tap = point;
    }
  }

  #move(event) {
    const box = this.#frame.getBoundingClientRect();
    const finger = this.#fingers.get(event.pointerId);
    const before = this.#span();
    if (finger) Object.assign(finger, { x: event.clientX, y: event.clientY });
    if (finger && before) {
      const after = this.#span();
      this.view.pan((after.x - before.x) / box.width, (after.y - before.y) / box.height);
      this.view.zoomBy(after.apart / before.apart, (after.x - box.left) / box.width, (after.y - box.top) / box.height);
      return;
    }
    if (!event.isPrimary) return;
    if (this.#pans) return this.view.pan(event.movementX / box.width, event.movementY / box.height);
    const point = (this.#cursor = this.#point(event));
    if (event.pointerType !== "touch") this.#showRing(point);
    if (this.#corners.length) this.#showShape();
    if (!this.#drawing || this.tool() === "line") return;
    const merged = event.getCoalescedEvents?.() ?? [];
    for (const one of merged.length ? merged : [event]) this.#stroke(this.#point(one));
    this.changed();
  }

  #up(event) {
    this.#fingers.delete(event.pointerId);
    this.#pans = false;
    if (!event.isPrimary) return;
    if (this.#tap && event.type === "pointerup") this.#begin(this.#tap, false);
    this.#tap = null;
    if (!this.#drawing) return;
    this.#drawing = false;
    if (this.tool() === "line") this.#endLine(this.#point(event));
    else if (this.#map.settle()) this.settled();
  }

  /** Middle and distance of two fingers, on the screen; null: there are not two. */
  #span() {
    const [a, b] = this.#fingers.values();
    if (this.#fingers.size !== 2) return null;
    return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, apart: Math.max(1, Math.hypot(a.x - b.x, a.y - b.y)) };
  }

  #abandon() {
    if (this.#drawing) this.#map.abandon();
    this.#drawing = false;
    this.#tap = null;
    if (this.tool() === "line") this.cancel();
    this.refresh();
  }

  // ----------------------------------------------------------------------------------------------- keys

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
      this.view.reveal(this.#cursor.x / width, this.#cursor.y / height);
      this.#showRing(this.#cursor);
      this.#showShape();
    } else if (event.key === "Enter" && this.tool() === "polygon") {
      this.#close();
    } else if (event.key === " " || event.key === "Enter") {
      if (this.tool() === "line" && this.#corners.length) this.#endLine(this.#cursor);
      else this.#begin(this.#cursor, event.shiftKey);
      if (this.#map.settle()) this.settled();
    } else if (event.key === "Backspace" && this.#corners.length) {
      this.#corners.pop();
      this.#showShape();
    } else if (event.key !== "Escape" || !this.cancel()) {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }

  // ----------------------------------------------------------------------------------------------- tools

  /** Use the tool at a point; the brush draws a straight line from where it was last if `on`. */
  #begin(point, on) {
    const tool = this.tool();
    if (!this.#map.contains(point.x, point.y)) return;
    if (tool === "pick") {
      this.#pick(point);
    } else if (tool === "renew") {
      this.#change(() => this.#map.renew(point.x, point.y, Math.floor(Math.random() * 10000)));
    } else if (tool === "fill") {
      this.#change(() => this.#map.fill(point.x, point.y, this.chosen()));
    } else if (tool === "line") {
      this.#corners = [point];
      this.#showShape();
    } else if (tool === "polygon") {
      this.#corner(point);
    } else {
      this.#map.remember();
      this.#last = (on && this.#last) || point;
      this.#stroke(point);
      this.changed();
    }
  }

  #stroke(point) {
    const part = this.#map.stroke(this.#last.x, this.#last.y, point.x, point.y, this.size(), this.chosen());
    this.#last = point;
    if (part) this.refresh(part);
  }

  #endLine(point) {
    const [start] = this.#corners;
    this.cancel();
    if (!start) return;
    this.#last = point;
    this.#change(() => this.#map.stroke(start.x, start.y, point.x, point.y, this.size(), this.chosen()));
  }

  #corner({ x, y }) {
    const { width, height } = this.#map;
    const [first] = this.#corners, last = this.#corners.at(-1);
    const scale = this.#canvas.getBoundingClientRect().width / width;
    const snap = (place, side) => (place * scale < CLOSE ? 0 : (side - place) * scale < CLOSE ? side : place);
    const point = { x: snap(x, width), y: snap(y, height) };
    const away = (corner) => (corner ? Math.hypot(corner.x - point.x, corner.y - point.y) * scale : Infinity);
    if (this.#corners.length >= 3 && away(first) < CLOSE) return this.#close();
    if (away(last) > 2) this.#corners.push(point); // (a double click is two clicks)
    this.#showShape();
  }

  /** Paint the polygon. */
  #close() {
    const corners = this.#corners;
    if (this.tool() !== "polygon" || corners.length < 3) return;
    this.cancel();
    this.#change(() => this.#map.polygon(corners, this.chosen()));
  }

  /** One change as a whole. */
  #change(action) {
    this.#map.remember();
    action();
    this.refresh();
    if (this.#map.settle()) this.settled();
  }

  #pick({ x, y }) {
    if (this.#map.contains(x, y)) this.picked(this.#map.at(x, y));
  }
}
