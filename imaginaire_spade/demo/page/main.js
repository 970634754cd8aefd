// The page: classes, tools and files around the easel, and the picture beside it.

import { Easel } from "./easel.js";
import { LabelMap } from "./label_map.js";

const MAX_UPLOAD_BYTES = 32 * 2 ** 20; // the server's
const PAUSE_MS = 80; // from a change to the request for its picture

const $ = (id) => document.getElementById(id);
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

let model; // what the server says of the model
let map;
let easel;
let chosen; // class id
let before; // the class chosen before it
let style = null; // style code of a photo
let sampleNumber = Math.floor(Math.random() * 1000);

// ------------------------------------------------------------------------------------------- talking to the server

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The painting page's server does not answer. Does it still run in its terminal?");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  throw new Error(said.error ?? `The server answered ${response.status} ${response.statusText}.`);
}

const askJSON = (path, fields) =>
  ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(fields) });

function askWithFile(path, file) {
  if (file.size > MAX_UPLOAD_BYTES) throw new Error(`${file.name} is too large: at most 32 MB are taken.`);
  return ask(path, { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: file });
}

function encoded(ids) {
  const bytes = new Uint8Array(ids.buffer, ids.byteOffset, ids.byteLength);
  let text = "";
  for (let start = 0; start < bytes.length; start += 8192) {
    text += String.fromCharCode(...bytes.subarray(start, start + 8192));
  }
  return btoa(text);
}

function decoded(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return model.bytes_per_id === 1 ? bytes : new Uint16Array(bytes.buffer);
}

const mapFields = () => ({ height: map.height, width: map.width, labels: encoded(map.ids) });

function showError(error) {
  $("error").firstElementChild.textContent = error.message;
  $("error").hidden = false;
}

/** An event handler whose errors are shown in the page. */
const told = (action) => async (event) => {
  $("error").hidden = true;
  try {
    await action(event);
  } catch (error) {
    showError(error);
  }
};

// ------------------------------------------------------------------------------------------------- the picture

let wanted = false;
let running = false;
let pictureFile = null;

/** Ask for the picture of the map as it is now. One request runs at a time; changes meanwhile ask once more. */
async function generate() {
  wanted = true;
  if (running) return;
  running = true;
  await pause(PAUSE_MS);
  const slow = setTimeout(() => ($("busy").hidden = false), 150);
  while (wanted) {
    wanted = false;
    try {
      await showPicture();
    } catch (error) {
      showError(error);
      $("status").textContent = "no picture of this label map";
    }
  }
  clearTimeout(slow);
  $("busy").hidden = true;
  running = false;
}

async function showPicture() {
  const startedAt = performance.now();
  const fields = mapFields();
  if (model.style_dims) Object.assign(fields, style ? { style } : { seed: seed() });
  const response = await askJSON("/api/picture", fields);
  const [height, width] = response.headers.get("Generated-Size").split("x").map(Number);
  const resized = height !== fields.height || width !== fields.width;
  pictureFile = await response.blob();
  const image = $("result").querySelector("img");
  const old = image.src;
  image.src = URL.createObjectURL(pictureFile);
  await image.decode();
  if (old) URL.revokeObjectURL(old);
  image.alt = "Picture generated from the label map";
  image.hidden = false;
  $("save_picture").disabled = false;
  const seconds = ((performance.now() - startedAt) / 1000).toFixed(2);
  const made = resized ? ` (made at ${width} × ${height})` : "";
  $("status").textContent = `${fields.width} × ${fields.height}${made}, ${seconds} s`;
}

function seed() {
  const value = $("seed").valueAsNumber;
  return Number.isInteger(value) && value >= 0 && value < 2 ** 32 ? value : 0;
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// ------------------------------------------------------------------------------------------------- classes

function listClasses() {
  for (const { id, name, colour } of model.classes) {
    const [label, radio, swatch, text, share] = ["label", "input", "i", "span", "small"].map((tag) =>
      document.createElement(tag)
    );
    Object.assign(radio, { type: "radio", name: "class", value: id });
    swatch.style.backgroundColor = `rgb(${colour.join(" ")})`;
    text.textContent = name; // a name is text, whatever it holds
    label.title = name;
    label.append(radio, swatch, text, share);
    $("list").append(label);
    radio.addEventListener("change", () => choose(id));
  }
  $("search").hidden = model.classes.length <= 16;
}

const classLabels = () => [...$("list").children];

function choose(id) {
  if (id !== chosen) before = chosen;
  chosen = id;
  const radio = $("list").querySelector(`input[value="${id}"]`);
  radio.checked = true;
  radio.parentElement.scrollIntoView({ block: "nearest", inline: "nearest" });
  $("chosen").textContent = radio.parentElement.title;
}

function search() {
  const words = $("search").value.trim().toLowerCase().split(/\s+/);
  let found = 0;
  for (const label of classLabels()) {
    label.hidden = !words.every((word) => label.title.toLowerCase().includes(word));
    found += !label.hidden;
  }
  $("none_found").hidden = found > 0;
}

function showShares() {
  const counts = map.counts(Math.max(...model.classes.map((one) => one.id)) + 1);
  for (const label of classLabels()) {
    const share = (100 * counts[label.firstChild.value]) / map.ids.length;
    label.lastChild.textContent = share === 0 ? "" : share < 1 ? "< 1 %" : `${Math.round(share)} %`;
  }
}

// ------------------------------------------------------------------------------------------------- the map

/** To be called after a change of the map that undo takes back as a whole. */
function settled() {
  $("undo").disabled = !map.canUndo;
  $("redo").disabled = !map.canRedo;
  showShares();
  generate();
  keep();
}

function shown() {
  const size = `${map.height}x${map.width}`;
  if (![...$("canvas_size").options].some((option) => option.value === size)) addSize(map.height, map.width);
  $("canvas_size").value = size;
  for (const frame of document.querySelectorAll(".frame")) frame.style.aspectRatio = `${map.width} / ${map.height}`;
  document.body.style.setProperty("--aspect", map.width / map.height);
  const most = Math.max(8, Math.round(Math.min(map.height, map.width) / 3));
  if ($("size").max !== String(most)) {
    $("size").max = most;
    $("size").value = Math.round(most / 4);
  }
  showSize();
  easel.show(map, model.classes);
  settled();
}

function addSize(height, width) {
  $("canvas_size").add(new Option(`${width} × ${height}`, `${height}x${width}`));
}

function take({ height, width, labels }) {
  map.replace(height, width, decoded(labels));
  shown();
}

const startFromSample = told(async () => {
  if (!model.num_samples) return;
  take(await (await ask(`/api/sample?number=${sampleNumber++}`)).json());
});

async function openMap(file) {
  const answer = await (await askWithFile("/api/label_map", file)).json();
  take(answer);
  const [height, width] = answer.original_size;
  if (height !== map.height || width !== map.width) {
    $("status").textContent = `${file.name} (${width} × ${height}) was shrunk to the largest canvas`;
  }
}

const saveMap = told(async () => {
  save(await (await askJSON("/api/label_map_file", mapFields())).blob(), "label_map.png");
});

function step(back) {
  back ? map.undo() : map.redo();
  shown();
}

// A reload of the page finds the map again.
const keepName = () => `${model.name} ${model.images_seen} ${model.classes.length} ${model.bytes_per_id}`;

function keep() {
  try {
    sessionStorage.setItem("label map", JSON.stringify({ model: keepName(), ...mapFields() }));
  } catch {
    // No room, or not allowed: then it is not kept.
  }
}

function kept() {
  try {
    const found = JSON.parse(sessionStorage.getItem("label map"));
    if (found?.model === keepName()) return { ...found, ids: decoded(found.labels) };
  } catch {
    // Nothing usable was kept.
  }
  return null;
}

// ------------------------------------------------------------------------------------------------- tools, style

const tool = () => document.querySelector('input[name="tool"]:checked').value;

function useTool(name) {
  document.querySelector(`input[name="tool"][value="${name}"]`).checked = true;
  easel.updateRing();
}

function showSize() {
  $("size_shown").textContent = `${$("size").value} px`;
  easel.updateRing();
}

function changeSize(factor) {
  const value = $("size").valueAsNumber;
  $("size").value = factor > 1 ? Math.max(value + 1, Math.round(value * factor)) : Math.round(value * factor);
  showSize();
}

function newSeed() {
  if (!model.style_dims) return;
  $("seed").value = Math.floor(Math.random() * 10000);
  dropPhoto();
}

async function usePhoto(file) {
  style = (await (await askWithFile("/api/style", file)).json()).style;
  const image = $("photo_shown").querySelector("img");
  if (image.src) URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(file);
  showStyle();
  generate();
}

function dropPhoto() {
  style = null;
  showStyle();
  generate();
}

function showStyle() {
  $("photo_shown").hidden = style === null;
  $("seed_field").classList.toggle("unused", style !== null);
}

// ------------------------------------------------------------------------------------------------- events

function listen() {
  $("search").addEventListener("input", search);
  $("search").addEventListener("keydown", (event) => {
    const [first] = classLabels().filter((label) => !label.hidden);
    if (event.key === "Enter" && first) choose(Number(first.firstChild.value));
  });
  $("size").addEventListener("input", showSize);
  for (const radio of document.querySelectorAll('input[name="tool"]')) {
    radio.addEventListener("change", () => easel.updateRing());
  }
  $("undo").addEventListener("click", () => step(true));
  $("redo").addEventListener("click", () => step(false));
  $("sample").addEventListener("click", startFromSample);
  $("clear").addEventListener("click", () => {
    map.replace(map.height, map.width, new map.ids.constructor(map.ids.length).fill(chosen));
    shown();
  });
  $("save_map").addEventListener("click", saveMap);
  $("save_picture").addEventListener("click", () => save(pictureFile, "picture.png"));
  $("canvas_size").addEventListener("change", () => {
    map.resize(...$("canvas_size").value.split("x").map(Number));
    shown();
  });
  $("seed").addEventListener("input", dropPhoto);
  $("dice").addEventListener("click", newSeed);
  $("photo_shown").querySelector("button").addEventListener("click", dropPhoto);
  takeFiles($("open"), $("easel"), openMap);
  takeFiles($("photo"), $("result"), usePhoto);
  $("error").querySelector("button").addEventListener("click", () => ($("error").hidden = true));
  $("help").addEventListener("click", () => $("shortcuts").showModal());
  document.addEventListener("keydown", onKey);
}

/** Files chosen with `input` or dropped on `frame`. */
function takeFiles(input, frame, use) {
  input.addEventListener("change", told(async () => {
    const [file] = input.files;
    try {
      if (file) await use(file);
    } finally {
      input.value = ""; // the same file can be chosen again
    }
  }));
  const allowed = () => !input.closest("label").hidden;
  for (const kind of ["dragover", "dragleave", "drop"]) {
    frame.addEventListener(kind, (event) => {
      event.preventDefault();
      frame.classList.toggle("over", kind === "dragover" && allowed());
    });
  }
  frame.addEventListener("drop", told(async (event) => {
    const [file] = event.dataTransfer.files;
    if (file && allowed()) await use(file);
  }));
}

function onKey(event) {
  const writing = event.target.matches("input:not([type=radio], [type=range], [type=file]), select");
  if ($("shortcuts").open) return;
  const key = event.key.toLowerCase();
  if (event.ctrlKey || event.metaKey) {
    const actions = { z: () => step(!event.shiftKey), y: () => step(false), s: saveMap };
    if (!actions[key] || (writing && key !== "s")) return;
    event.preventDefault();
    actions[key]();
    return;
  }
  if (writing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.altKey) return;
  const visible = classLabels().filter((label) => !label.hidden);
  const actions = {
    b: () => useTool("brush"), f: () => useTool("fill"), g: () => useTool("fill"), i: () => useTool("pick"),
    "[": () => changeSize(1 / 1.25), "]": () => changeSize(1.25),
    x: () => before !== undefined && choose(before),
    n: startFromSample, r: newSeed,
    "/": () => ($("search").hidden ? $("list").querySelector("input:checked") : $("search")).focus(),
    "?": () => $("shortcuts").showModal(),
  };
  if (/^[1-9]$/.test(key) && visible[key - 1]) choose(Number(visible[key - 1].firstChild.value));
  else if (actions[key]) actions[key]();
  else return;
  event.preventDefault();
}

async function start() {
  model = await (await ask("/api/model")).json();
  document.title = `${model.name} · imaginaire_spade`;
  const size = model.trained_size ? `${model.trained_size[1]} × ${model.trained_size[0]}` : "pictures of many sizes";
  $("model").textContent = `${model.name}, trained on ${size}, ${model.images_seen.toLocaleString("en")} images seen`;
  listClasses();
  for (const [height, width] of model.sizes) addSize(height, width);
  $("seed_field").hidden = $("dice").hidden = !model.style_dims;
  $("no_style").hidden = model.style_dims > 0;
  $("photo_field").hidden = !model.has_style_encoder;
  $("sample").hidden = !model.num_samples;
  const [height, width] = model.sizes[0];
  map = new LabelMap(height, width, model.bytes_per_id, model.classes[0].id);
  easel = new Easel(document.querySelector("#easel canvas"), $("ring"), {
    tool, size: () => $("size").valueAsNumber, chosen: () => chosen, changed: generate, settled,
    picked: (id) => {
      choose(id);
      if (tool() === "pick") useTool("brush");
    },
  });
  listen();
  document.querySelector("main").hidden = false;
  choose(model.classes[Math.min(1, model.classes.length - 1)].id);
  choose(model.classes[0].id);
  const found = kept();
  if (found) Object.assign(map, { height: found.height, width: found.width, ids: found.ids });
  else if (model.num_samples) {
    try {
      const { height, width, labels } = await (await ask(`/api/sample?number=${sampleNumber++}`)).json();
      Object.assign(map, { height, width, ids: decoded(labels) });
    } catch (error) {
      showError(error);
    }
  }
  shown();
}

start().catch(showError);
