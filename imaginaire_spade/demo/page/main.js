// The page: tools, files, style and keys around the easel and the picture.

import { Classes } from "./classes.js";
import { Easel } from "./easel.js";
import { History, thumbnail } from "./history.js";
import { LabelMap } from "./label_map.js";
import { $, showError, showNotice, told } from "./messages.js";
import { Picture } from "./picture.js";
import { Server } from "./server.js";
import { View } from "./view.js";

const TOOLS = { b: "brush", e: "erase", l: "line", p: "polygon", f: "fill", g: "fill", i: "pick", a: "renew" }; // by their keys

const server = new Server();
let model; // what the server says of the model
let map;
let classes, easel, history, picture, view;
let style = null; // of a photo: {code, photo}
let sampleNumber = Math.floor(Math.random() * 1000);

// ------------------------------------------------------------------------------------------------- the map

/** To be called after a change of the map that undo takes back as a whole. */
function settled() {
  $("undo").disabled = !map.canUndo;
  $("redo").disabled = !map.canRedo;
  classes.showShares(map);
  picture.update();
  keep();
}

/** To be called after a change of all of the map, perhaps of its size. */
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

/** Change the map as a whole; what is being drawn ends before. */
function change(action) {
  easel.finish();
  action();
  shown();
}

const step = (back) => change(() => (back ? map.undo() : map.redo()));

/** Take another map, in its own shape; what is not as in `name` is said. */
function take({ height, width, ids, original_size: [ownHeight, ownWidth] }, name) {
  const shrunk = ownHeight !== height || ownWidth !== width;
  showNotice(shrunk ? `${name} is ${ownWidth} × ${ownHeight}; no canvas is as large, so it was shrunk to ${width} × ${height}.` : "");
  view.reset();
  change(() => map.replace(height, width, ids));
}

const startFromSample = told(async () => {
  if (model.num_samples) take(await server.sample(sampleNumber++), "The sample");
});

const openMap = async (file) => take(await server.openMap(file), file.name);

const saveMap = told(async () => {
  easel.finish();
  save(await server.mapFile(map), "label_map.png");
});

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// A reload of the page finds the map again.
const keepName = () => `${model.name} ${model.images_seen} ${model.classes.length} ${model.bytes_per_id}`;

function keep() {
  try {
    sessionStorage.setItem("label map", JSON.stringify({ model: keepName(), seed: seed(), anew: map.anew, map: server.pack(map) }));
  } catch {
    // No room, or not allowed: then it is not kept.
  }
}

function kept() {
  try {
    const found = JSON.parse(sessionStorage.getItem("label map"));
    if (found?.model === keepName()) return { seed: found.seed, anew: found.anew, ...server.unpack(found.map) };
  } catch {
    // Nothing usable was kept.
  }
  return null;
}

// ------------------------------------------------------------------------------------------------- tools

const tool = () => document.querySelector('input[name="tool"]:checked').value;

function useTool(name) {
  const radio = document.querySelector(`input[name="tool"][value="${name}"]`);
  if (radio.closest("label").hidden) return;
  radio.checked = true;
  easel.finish();
  easel.updateRing();
}

function changeSize(factor) {
  const size = $("size"), value = size.valueAsNumber;
  size.value = factor > 1 ? Math.max(value + 1, Math.round(value * factor)) : Math.min(value - 1, Math.round(value * factor));
  showSize();
}

function showSize() {
  $("size_shown").textContent = `${$("size").value} px`;
  easel.updateRing();
}

// ------------------------------------------------------------------------------------------------- style

function seed() {
  const value = $("seed").valueAsNumber;
  return Number.isInteger(value) && value >= 0 && value < 2 ** 32 ? value : 0;
}

function useSeed(value) {
  if (!model.style_dims) return;
  $("seed").value = value;
  useStyle(null);
}

const newSeed = () => useSeed(Math.floor(Math.random() * 10000));

const usePhoto = async (file) => useStyle({ code: await server.styleOf(file), photo: file });

/** Take a photo's style, or null: that of the number. */
function useStyle(found) {
  style = found;
  const image = $("photo_shown").querySelector("img");
  if (image.src) URL.revokeObjectURL(image.src);
  if (found) image.src = URL.createObjectURL(found.photo);
  $("photo_shown").hidden = style === null;
  $("seed_field").classList.toggle("unused", style !== null);
  picture.update();
  keep();
}

// ------------------------------------------------------------------------------------------------- history

/** What a picture is of, for the history; null in the middle of a stroke. */
function state() {
  if (map.isOpen) return null;
  const { height, width, anew } = map;
  return { height, width, ids: map.ids.slice(), anew, seed: seed(), style, drawn: thumbnail(easel.canvas, width, height) };
}

function note(of, made, image) {
  const name = model.style_dims ? (of?.style ? "style of a photo" : `style ${of?.seed}`) : "";
  history.add(of && { ...of, made }, image, name);
}

function bring({ height, width, ids, anew, seed: number, style: found, made }) {
  change(() => map.replace(height, width, ids, anew));
  $("seed").value = number;
  useStyle(found);
  picture.update(made);
}

// ------------------------------------------------------------------------------------------------- events

function listen() {
  const click = (id, action) => $(id).addEventListener("click", action);
  $("size").addEventListener("input", showSize);
  for (const radio of document.querySelectorAll('input[name="tool"]')) {
    radio.addEventListener("change", () => useTool(radio.value));
  }
  click("undo", () => step(true));
  click("redo", () => step(false));
  click("zoom_in", () => view.zoomBy(1.5));
  click("zoom_out", () => view.zoomBy(1 / 1.5));
  click("zoom", () => view.reset());
  click("sample", startFromSample);
  click("clear", () => change(() => map.replace(map.height, map.width, map.ids.slice().fill(classes.chosen))));
  click("save_map", saveMap);
  click("save_picture", () => save(picture.file, "picture.png"));
  $("canvas_size").addEventListener("change", () => {
    change(() => map.resize(...$("canvas_size").value.split("x").map(Number)));
  });
  $("seed").addEventListener("input", () => useStyle(null));
  click("dice", newSeed);
  $("photo_shown").querySelector("button").addEventListener("click", () => useStyle(null));
  takeFiles($("open"), $("easel"), openMap);
  takeFiles($("photo"), $("result"), usePhoto);
  click("help", () => $("shortcuts").showModal());
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
  const actions = {
    "[": () => changeSize(1 / 1.25), "]": () => changeSize(1.25),
    "+": () => view.zoomBy(1.5), "=": () => view.zoomBy(1.5), "-": () => view.zoomBy(1 / 1.5), 0: () => view.reset(),
    x: () => classes.chooseBefore(), n: startFromSample, r: newSeed,
    h: () => $("pictures").firstElementChild?.focus(), c: () => picture.toggleCompare(), v: () => model.style_dims && picture.toggleSeveral(),
    "/": () => ($("search").hidden ? $("list").querySelector("input:checked") : $("search")).focus(),
    "?": () => $("shortcuts").showModal(),
    escape: () => easel.cancel() || picture.stop(),
  };
  if (/^[1-9]$/.test(key)) classes.chooseListed(key - 1);
  else if (TOOLS[key]) useTool(TOOLS[key]);
  else if (actions[key]) actions[key]();
  else return;
  event.preventDefault();
}

async function start() {
  model = await server.start();
  document.title = `${model.name} · imaginaire_spade`;
  const size = model.trained_size ? `${model.trained_size[1]} × ${model.trained_size[0]}` : "pictures of many sizes";
  $("model").textContent = `${model.name}, trained on ${size}, ${model.images_seen.toLocaleString("en")} images seen`;
  classes = new Classes(model.classes);
  for (const [height, width] of model.sizes) addSize(height, width);
  $("seed_field").hidden = $("dice").hidden = $("several").hidden = !model.style_dims;
  $("no_style").hidden = model.style_dims > 0;
  $("photo_field").hidden = !model.has_style_encoder;
  $("sample").hidden = !model.num_samples;
  $("eraser").hidden = model.dont_care === null;
  $("renew").hidden = !model.takes_local_noise;
  const [height, width] = model.sizes[0];
  map = new LabelMap(height, width, model.bytes_per_id, model.classes[0].id);
  view = new View([$("easel"), $("result")], (zoom) => {
    $("zoom").textContent = `${Math.round(100 * zoom)} %`;
    easel.updateRing();
  });
  easel = new Easel($("easel"), {
    tool, view, settled, size: () => $("size").valueAsNumber, changed: () => picture.update(),
    chosen: () => (tool() === "erase" ? model.dont_care : classes.chosen),
    picked: (id) => {
      classes.choose(id);
      if (tool() === "pick") useTool("brush");
    },
  });
  history = new History(bring);
  picture = new Picture({
    map: () => map, canvas: easel.canvas, seed, chooseSeed: useSeed, state, shown: note,
    generate: (other, signal) => {
      const code = other === null && style ? { style: style.code } : { seed: other ?? seed() };
      return server.generate(map, model.style_dims ? code : {}, signal);
    },
  });
  listen();
  document.querySelector("main").hidden = false;
  const found = kept();
  try {
    const { height, width, ids, anew = [] } = found ?? (model.num_samples ? await server.sample(sampleNumber++) : map);
    Object.assign(map, { height, width, ids, anew });
    $("seed").value = found?.seed ?? 0;
  } catch (error) {
    showError(error);
  }
  if (!model.num_samples && !found) showNotice(server.noSamples);
  shown();
}

start().catch(showError);
