// Which part of the map is shown: zoom and place, the same in every frame. Wheel, two fingers and keys change it.

const MOST = 32; // times

export class View {
  zoom = 1;
  #x = 0; // left top corner of what is shown, in parts of the whole
  #y = 0;
  #frames;
  #changed;

  /** frames: elements whose children of class "zoomed" are shown in part; changed: (zoom) => void. */
  constructor(frames, changed) {
    this.#frames = frames;
    this.#changed = changed;
    for (const frame of frames) frame.addEventListener("wheel", (event) => this.#wheel(event, frame), { passive: false });
  }

  /** Zoom so that the place (x, y) of the frame, in parts of it, shows the same place of the map. */
  zoomBy(factor, x = 0.5, y = 0.5) {
    const zoom = Math.min(MOST, Math.max(1, this.zoom * factor));
    this.#x += x / this.zoom - x / zoom;
    this.#y += y / this.zoom - y / zoom;
    this.zoom = zoom;
    this.#show();
  }

  /** Move what is shown by parts of the frame. */
  pan(x, y) {
    this.#x -= x / this.zoom;
    this.#y -= y / this.zoom;
    this.#show();
  }

  /** Move so far that the place (x, y), in parts of the whole, is shown. */
  reveal(x, y) {
    const part = 1 / this.zoom, margin = part / 16;
    this.#x = Math.min(x - margin, Math.max(x + margin - part, this.#x));
    this.#y = Math.min(y - margin, Math.max(y + margin - part, this.#y));
    this.#show();
  }

  reset() {
    this.zoom = 1;
    this.#show();
  }

  #show() {
    const most = 1 - 1 / this.zoom;
    this.#x = Math.min(most, Math.max(0, this.#x));
    this.#y = Math.min(most, Math.max(0, this.#y));
    for (const frame of this.#frames) {
      frame.style.setProperty("--zoom", this.zoom);
      frame.style.setProperty("--left", `${-100 * this.zoom * this.#x}%`);
      frame.style.setProperty("--top", `${-100 * this.zoom * this.#y}%`);
    }
    this.#changed(this.zoom);
  }

  #wheel(event, frame) {
    if (this.zoom === 1 && (event.deltaY >= 0 || event.shiftKey)) return; // then the page scrolls
    event.preventDefault();
    const box = frame.getBoundingClientRect();
    if (event.shiftKey) return this.pan(-(event.deltaX || event.deltaY) / box.width, event.deltaX ? -event.deltaY / box.height : 0);
    const pixels = event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? event.deltaY : 40 * event.deltaY;
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    this.zoomBy(Math.exp(-Math.min(200, Math.max(-200, pixels)) / 300), x, y);
  }
}
