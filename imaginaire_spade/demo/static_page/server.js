// Stands in for the server: the generator runs in the browser itself, by onnxruntime-web, from files of this folder.

import * as ort from "./onnxruntime/ort.wasm.min.mjs";
import { readPNG, writePNG } from "./png.js";
import { fieldsOf, mapOf } from "./text.js";

ort.env.wasm.wasmPaths = new URL("./onnxruntime/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more need headers that few hosts send
ort.env.wasm.proxy = true; // in a worker, so that drawing does not wait

const MAX_SIDE = 2048, MAX_PIXELS = 2048 * 1024; // of a canvas, as with a server

export class Server {
  model; // model.json
  noSamples = "Everything runs in this browser; nothing is sent. Draw, or open a label map.";
  #session;
  #last = Promise.resolve(); // a session does one thing at a time

  async start() {
    this.model = await (await fetched("model.json")).json();
    const bytes = new Uint8Array(await (await fetched(this.model.file)).arrayBuffer());
    this.#session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
    return this.model;
  }

  /** The picture of a map: {file, height, width}, the size at which it was generated. more: {seed} or {style}. */
  async generate(map, more, signal) {
    const { trained_size: trained, far } = this.model;
    const isFar = trained && [map.height, map.width].some((side, axis) => Math.max(side, trained[axis]) > far * Math.min(side, trained[axis]));
    const made = isFar ? resized(map, ...trained) : map;
    const { height, width } = made;
    const feeds = this.feeds(made, more.style ?? this.styleOfSeed(more.seed));
    const run = this.#last.then(() => {
      signal?.throwIfAborted();
      return this.#session.run(feeds);
    });
    this.#last = run.catch(() => {});
    const aborted = new Promise((_, reject) => signal?.addEventListener("abort", () => reject(signal.reason)));
    const { images } = await Promise.race([run, aborted]);
    return { file: await this.#file(images, made, map), height, width };
  }

  /** The generator's inputs, for a map of the size at which it is generated, filled up at the bottom and on the right. */
  feeds({ height, width, ids }, style) {
    const { size_multiple: step, num_classes: dontCare, inputs, style_dims } = this.model;
    const [rows, columns] = [height, width].map((side) => Math.max(2 * step, Math.ceil(side / step) * step));
    const labels = new Int32Array(rows * columns).fill(dontCare), edges = new Float32Array(rows * columns);
    for (let y = 0, place = 0; y < height; y++) {
      for (let x = 0; x < width; x++, place++) {
        labels[y * columns + x] = ids[place];
        edges[y * columns + x] =
          (x > 0 && ids[place - 1] !== ids[place]) || (x < width - 1 && ids[place + 1] !== ids[place]) ||
          (y > 0 && ids[place - width] !== ids[place]) || (y < height - 1 && ids[place + width] !== ids[place]);
      }
    }
    const all = {
      labels: () => new ort.Tensor("int32", labels, [1, rows, columns]),
      edges: () => new ort.Tensor("float32", edges, [1, rows, columns]),
      z: () => new ort.Tensor("float32", Float32Array.from(style), [1, style_dims]),
    };
    return Object.fromEntries(inputs.map((name) => [name, all[name]()]));
  }

  /** Standard normal numbers (Box-Muller) of a small generator (mulberry32): other styles than the server's. */
  styleOfSeed(seed) {
    const uniform = () => {
      seed = (seed + 0x6d2b79f5) | 0;
      let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return (((t ^ (t >>> 14)) >>> 0) + 1) / (2 ** 32 + 1);
    };
    return Array.from({ length: this.model.style_dims }, () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()));
  }

  async #file({ data, dims: [, , rows, columns] }, { height, width }, map) {
    const pixels = new ImageData(width, height);
    for (let y = 0, place = 0; y < height; y++) {
      for (let x = 0; x < width; x++, place += 4) {
        for (let c = 0; c < 3; c++) {
          pixels.data[place + c] = Math.round((data[(this.model.bands[c] * rows + y) * columns + x] + 1) * 127.5);
        }
        pixels.data[place + 3] = 255;
      }
    }
    const own = new OffscreenCanvas(width, height);
    own.getContext("2d").putImageData(pixels, 0, 0);
    if (width === map.width && height === map.height) return own.convertToBlob();
    const canvas = new OffscreenCanvas(map.width, map.height);
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(own, 0, 0, map.width, map.height);
    return canvas.convertToBlob();
  }

  /** The label map of a PNG file: {height, width, ids, original_size}. */
  async openMap(file) {
    try {
      const { channels, values, ...size } = await readPNG(new Uint8Array(await file.arrayBuffer()));
      const ids = channels === 3 ? this.#ofColours(values) : this.#ofRawIds(values);
      const { height: h, width: w } = size;
      const step = Math.max(1, Math.max(h, w) / MAX_SIDE, Math.sqrt((h * w) / MAX_PIXELS));
      const [height, width] = [h, w].map((side) => Math.max(1, Math.floor(side / step)));
      return { ...resized({ ...size, ids }, height, width), original_size: [h, w] };
    } catch (error) {
      throw new Error(`${file.name} cannot be opened as a label map. ${error.message}`);
    }
  }

  #ofRawIds(values) {
    const table = this.model.train_ids; // raw id -> train id
    const wrong = [...new Set(values)].filter((value) => table[value] === undefined).slice(0, 10);
    if (wrong.length) throw new Error(`It has the label value(s) ${wrong.join(", ")}, which are no class of this model.`);
    return this.#ids(values.length).map((_, place) => table[values[place]]);
  }

  #ofColours(values) {
    const table = new Map(this.model.classes.map(({ id, colour }) => [colour.join(), id]));
    return this.#ids(values.length / 3).map((_, place) => {
      const colour = values.subarray(3 * place, 3 * place + 3).join();
      if (!table.has(colour)) throw new Error(`It has the colour ${colour}, which is no class's of this model.`);
      return table.get(colour);
    });
  }

  #ids = (count) => new (this.model.bytes_per_id === 1 ? Uint8Array : Uint16Array)(count);

  /** A label map's file: ids as the data set's files have them. */
  mapFile(map) {
    const raw = {}; // train id -> the smallest raw id that means it
    for (const [id, trainId] of Object.entries(this.model.train_ids)) if (id >= 0) raw[trainId] ??= Number(id);
    const fits = this.model.classes.every(({ id }) => raw[id] < 256);
    const palette = fits && Object.fromEntries(this.model.classes.map(({ id, colour }) => [raw[id], colour]));
    return writePNG(map, Uint16Array.from(map.ids, (id) => raw[id]), palette);
  }

  pack = (map) => JSON.stringify(fieldsOf(map));
  unpack = (text) => mapOf(JSON.parse(text), this.model.bytes_per_id);
}

async function fetched(name) {
  const response = await fetch(new URL(name, import.meta.url)).catch(() => null);
  if (response?.ok) return response;
  throw new Error(`${name} cannot be read. The page needs a web server, such as: python -m http.server`);
}

/** The same map with another number of pixels (nearest, by their middles). */
function resized(map, height, width) {
  if (map.height === height && map.width === width) return map;
  const ids = new map.ids.constructor(height * width);
  for (let y = 0, place = 0; y < height; y++) {
    const row = Math.floor(((y + 0.5) * map.height) / height) * map.width;
    for (let x = 0; x < width; x++) ids[place++] = map.ids[row + Math.floor(((x + 0.5) * map.width) / width)];
  }
  return { height, width, ids };
}
