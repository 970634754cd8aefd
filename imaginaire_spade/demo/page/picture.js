// The picture of the map: asked for when the map has changed, one request at a time; busy state and Stop, further
// styles, the comparison with the map.

import { $, showError } from "./messages.js";

const PAUSE_MS = 80; // from a change to the request for its picture
const BUSY_MS = 150; // until the page says that it waits
const MORE = 3; // styles besides the one chosen

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

export class Picture {
  file = null;
  #wanted = false;
  #running = false;
  #stopped = null; // an AbortController
  #several = false;
  #since = 0; // when the request that runs was sent
  #current = false; // whether the picture is that of the map
  #ready = null; // a picture of the map that was generated before

  /** generate: (seed, signal) => Promise of {file, height, width}, of the map as it is now; map: () => the LabelMap;
   *  canvas: where it is shown; seed: () => the one chosen; chooseSeed: (seed) => void; state: () => what the picture
   *  will be of; shown: (state, picture, img) => void. */
  constructor({ generate, map, canvas, seed, chooseSeed, state, shown }) {
    Object.assign(this, { generate, map, canvas, seed, chooseSeed, state, shown });
    $("stop").addEventListener("click", () => this.stop());
    $("several").addEventListener("click", () => this.toggleSeveral());
    $("compare").addEventListener("click", () => this.toggleCompare());
    $("compare_at").addEventListener("input", () => this.#showCompared());
  }

  /** To be called after every change of what is to be generated, with its picture if there is one. */
  async update(ready = null) {
    this.#showCompared();
    this.#ready = ready;
    if (ready) this.#stopped?.abort();
    this.#wanted = true;
    if (this.#running) return;
    this.#running = true;
    await pause(PAUSE_MS);
    const startedAt = performance.now();
    const ticking = setInterval(() => this.#showBusy(performance.now() - startedAt > BUSY_MS), 100);
    while (this.#wanted) await this.#round();
    clearInterval(ticking);
    this.#showBusy(false);
    this.#running = false;
  }

  /** Give up what is asked for; the next change asks anew. */
  stop() {
    this.#wanted = false;
    this.#stopped?.abort();
  }

  toggleSeveral() {
    this.#several = !this.#several;
    $("several").setAttribute("aria-pressed", this.#several);
    $("variants").hidden = !this.#several;
    if (this.#several) this.update();
  }

  toggleCompare() {
    const compares = $("compared").hidden;
    $("compare").setAttribute("aria-pressed", compares);
    $("compared").hidden = $("compare_at").hidden = !compares;
    this.#showCompared();
    if (compares) $("compare_at").focus();
  }

  async #round() {
    this.#wanted = false;
    this.#stopped = new AbortController();
    try {
      await this.#showPicture();
      for (let more = 1; this.#several && !this.#wanted && more <= MORE; more++) await this.#showVariant(more);
    } catch (error) {
      const stopped = error.name === "AbortError";
      if (!stopped) showError(error);
      $("status").textContent = stopped ? "stopped: this picture is of an earlier label map" : "no picture of this label map";
    }
  }

  async #showPicture() {
    const { height, width } = this.map(), state = this.state(), ready = this.#ready, img = $("result").querySelector("img");
    this.#ready = null;
    this.#since = performance.now();
    this.#current = false;
    const made = ready ?? (await this.generate(null, this.#stopped.signal));
    await put(img, made.file, "Picture generated from the label map");
    this.file = made.file;
    this.#current = true;
    $("save_picture").disabled = false;
    const seconds = ((performance.now() - this.#since) / 1000).toFixed(2);
    const resized = made.height !== height || made.width !== width;
    const size = `${width} × ${height}${resized ? ` (made at ${made.width} × ${made.height})` : ""}`;
    $("status").textContent = ready ? `${size}, generated before` : `${size}, ${seconds} s`;
    this.shown(state, made, img);
  }

  async #showVariant(more) {
    const seed = (this.seed() + more) % 2 ** 32;
    this.#since = performance.now();
    const { file } = await this.generate(seed, this.#stopped.signal);
    const button = $("variants").children[more - 1] ?? document.createElement("button");
    if (!button.parentElement) {
      button.type = "button";
      button.append(document.createElement("img"), document.createElement("span"));
      $("variants").append(button);
    }
    await put(button.firstChild, file, "");
    button.lastChild.textContent = `Style ${seed}`;
    button.onclick = () => this.chooseSeed(seed);
  }

  #showBusy(busy) {
    const seconds = busy ? Math.floor((performance.now() - this.#since) / 1000) : 0;
    $("result").setAttribute("aria-busy", busy);
    $("result").classList.toggle("old", seconds > 0 && !this.#current);
    $("busy").hidden = !busy;
    $("waiting").hidden = !seconds;
    $("seconds").textContent = `generating … ${seconds} s`;
  }

  #showCompared() {
    if ($("compared").hidden) return;
    const copy = $("compared").querySelector("canvas");
    if (copy.width !== this.canvas.width || copy.height !== this.canvas.height) {
      Object.assign(copy, { width: this.canvas.width, height: this.canvas.height });
    }
    copy.getContext("2d", { alpha: false }).drawImage(this.canvas, 0, 0);
    $("result").style.setProperty("--at", `${$("compare_at").value}%`);
  }
}

async function put(image, file, alt) {
  const old = image.src;
  image.src = URL.createObjectURL(file);
  await image.decode();
  if (old) URL.revokeObjectURL(old);
  image.alt = alt;
  image.hidden = false;
}
