// The last pictures, and the label maps and styles that they are of: a click brings one back. Kept in the page alone.

import { $ } from "./messages.js";

const MOST = 12;
const MOST_BYTES = 64 * 2 ** 20; // of label maps and pictures' files
const SIDE = 144; // of a thumbnail, in pixels

export class History {
  #entries = []; // the newest first
  #count = 0;

  /** bring: (entry) => void, with what was given to add(). */
  constructor(bring) {
    this.bring = bring;
    this.#show();
  }

  /** Note the picture that is shown. entry: {height, width, ids, anew, seed, style, drawn: the map's thumbnail, made:
   *  {file, ...}}, or null for one that is not worth it; image: the picture; style: what its style is called. */
  add(entry, image, style) {
    let now = entry && this.#entries.find((other) => same(other, entry));
    if (entry && !now) {
      now = entry;
      now.button = document.createElement("button");
      const text = document.createElement("span");
      text.textContent = [`Picture ${++this.#count}`, style].filter(Boolean).join(", ");
      Object.assign(now.button, { type: "button", title: "Bring back this picture, its label map and its style" });
      now.button.append(entry.drawn, thumbnail(image, image.naturalWidth, image.naturalHeight, true), text);
      now.button.addEventListener("click", () => this.bring(entry));
      this.#entries.unshift(now);
      $("pictures").prepend(now.button);
      while (this.#entries.length > MOST || (this.#entries.length > 1 && this.#bytes > MOST_BYTES)) {
        this.#entries.pop().button.remove();
      }
    }
    for (const one of this.#entries) one.button.setAttribute("aria-current", one === now);
    this.#show();
  }

  get #bytes() {
    return this.#entries.reduce((sum, { ids, made }) => sum + ids.byteLength + made.file.size, 0);
  }

  #show() {
    $("history").hidden = !this.#entries.length;
  }
}

function same(one, other) {
  const alike = ["height", "width", "seed", "style"].every((name) => one[name] === other[name]);
  return alike && JSON.stringify(one.anew) === JSON.stringify(other.anew) && one.ids.every((id, place) => id === other.ids[place]);
}

/** A small copy of a canvas or image. */
export function thumbnail(source, width, height, smooth = false) {
  const scale = Math.min(1, SIDE / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(scale * width));
  canvas.height = Math.max(1, Math.round(scale * height));
  const context = canvas.getContext("2d", { alpha: false });
  Object.assign(context, { imageSmoothingEnabled: smooth, imageSmoothingQuality: "high" });
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  canvas.ariaHidden = "true";
  return canvas;
}
