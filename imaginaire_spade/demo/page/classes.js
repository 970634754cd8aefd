// The list of classes: which one is chosen, how much of the map each has, search.

import { $ } from "./messages.js";

export class Classes {
  chosen; // class id
  #before; // the class chosen before it

  /** classes: [{id, name, colour: [r, g, b]}]. */
  constructor(classes) {
    this.all = classes;
    for (const { id, name, colour } of classes) {
      const [label, radio, swatch, text, share] = ["label", "input", "i", "span", "small"].map((tag) =>
        document.createElement(tag)
      );
      Object.assign(radio, { type: "radio", name: "class", value: id });
      swatch.style.backgroundColor = `rgb(${colour.join(" ")})`;
      text.textContent = name; // a name is text, whatever it holds
      label.title = name;
      label.append(radio, swatch, text, share);
      $("list").append(label);
      radio.addEventListener("change", () => this.choose(id));
    }
    $("search").hidden = classes.length <= 16;
    $("search").addEventListener("input", () => this.#search());
    $("search").addEventListener("keydown", (event) => event.key === "Enter" && this.chooseListed(0));
    this.choose(classes[Math.min(1, classes.length - 1)].id);
    this.choose(classes[0].id);
  }

  choose(id) {
    if (id !== this.chosen) this.#before = this.chosen;
    this.chosen = id;
    const radio = $("list").querySelector(`input[value="${id}"]`);
    radio.checked = true;
    const label = radio.parentElement, list = $("list");
    if (list.scrollWidth > list.clientWidth) list.scrollLeft = label.offsetLeft - (list.clientWidth - label.offsetWidth) / 2;
    else label.scrollIntoView({ block: "nearest" });
    $("chosen").textContent = label.title;
  }

  chooseBefore() {
    if (this.#before !== undefined) this.choose(this.#before);
  }

  /** Choose the one at this place of those listed. Returns whether there is one. */
  chooseListed(place) {
    const label = this.#labels.filter((one) => !one.hidden)[place];
    if (label) this.choose(Number(label.firstChild.value));
    return Boolean(label);
  }

  showShares(map) {
    const counts = map.counts(Math.max(...this.all.map((one) => one.id)) + 1);
    for (const label of this.#labels) {
      const share = (100 * counts[label.firstChild.value]) / map.ids.length;
      label.lastChild.textContent = share === 0 ? "" : share < 1 ? "< 1 %" : `${Math.round(share)} %`;
    }
  }

  get #labels() {
    return [...$("list").children];
  }

  #search() {
    const words = $("search").value.trim().toLowerCase().split(/\s+/);
    let found = 0;
    for (const label of this.#labels) {
      label.hidden = !words.every((word) => label.title.toLowerCase().includes(word));
      found += !label.hidden;
    }
    $("none_found").hidden = found > 0;
  }
}
