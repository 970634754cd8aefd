// The server's answers. Nothing else of the page knows of requests; ids are arrays here, text on the wire.

import { fieldsOf, mapOf } from "./text.js";

const MAX_UPLOAD_BYTES = 32 * 2 ** 20; // the server's
const MOST_TRIES = 30; // while it is busy

const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

export class Server {
  model; // what it says of the model
  noSamples = "There are no label maps to start from: the data that the model was validated on is not here. Draw, open a file, or start the page with --samples FOLDER.";

  async start() {
    this.model = await (await this.#ask("/api/model")).json();
    return this.model;
  }

  /** The picture of a map: {file, height, width}, the size at which it was generated. more: {seed} or {style}. */
  async generate(map, more, signal) {
    const anew = this.model.takes_local_noise ? { anew: map.parts.map(({ x, y, seed }) => [x, y, seed]) } : {};
    const response = await this.#askJSON("/api/picture", { ...fieldsOf(map), ...more, ...anew }, signal);
    const [height, width] = response.headers.get("Generated-Size").split("x").map(Number);
    return { file: await response.blob(), height, width };
  }

  /** A label map to start from: {height, width, ids, original_size}. */
  sample = async (number) => this.#map(await this.#ask(`/api/sample?number=${number}`));

  /** That of a file. */
  openMap = async (file) => this.#map(await this.#askWithFile("/api/label_map", file));

  /** A label map's file. */
  mapFile = async (map) => (await this.#askJSON("/api/label_map_file", fieldsOf(map))).blob();

  /** The style code of a photo. */
  styleOf = async (file) => (await (await this.#askWithFile("/api/style", file)).json()).style;

  /** A map as text, and back. */
  pack = (map) => JSON.stringify(fieldsOf(map));
  unpack = (text) => mapOf(JSON.parse(text), this.model.bytes_per_id);

  #map = async (response) => mapOf(await response.json(), this.model.bytes_per_id);

  async #ask(path, options = {}) {
    for (let tries = 1; ; tries++) {
      let response;
      try {
        response = await fetch(path, options);
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new Error("The painting page's server does not answer. Does it still run in its terminal?");
      }
      if (response.ok) return response;
      const said = await response.json().catch(() => ({}));
      if (response.status !== 503 || tries === MOST_TRIES) {
        throw new Error(said.error ?? `The server answered ${response.status} ${response.statusText}.`);
      }
      await pause(Number(response.headers.get("Retry-After")) || 2);
      options.signal?.throwIfAborted();
    }
  }

  #askJSON(path, fields, signal) {
    const headers = { "Content-Type": "application/json" };
    return this.#ask(path, { method: "POST", headers, body: JSON.stringify(fields), signal });
  }

  #askWithFile(path, file) {
    if (file.size > MAX_UPLOAD_BYTES) throw new Error(`${file.name} is too large: at most 32 MB are taken.`);
    return this.#ask(path, { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: file });
  }
}
