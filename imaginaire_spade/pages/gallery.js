// The enlarged view: one label map with its images, as large as they fit. Without it a click opens the file.

const view = document.querySelector("dialog");
const cells = view.querySelector(".cells");
const entries = [...document.querySelectorAll("figure")];
const [previous, next, close] = ["previous", "next", "close"].map((id) => document.getElementById(id));
let number = 0;

function show(wanted) {
  number = Math.max(0, Math.min(entries.length - 1, wanted));
  cells.replaceChildren(...[...entries[number].querySelectorAll(".cell")].map((cell) => cell.cloneNode(true)));
  view.querySelector("output").textContent = entries[number].querySelector("figcaption").textContent;
  previous.disabled = number === 0;
  next.disabled = number === entries.length - 1;
  if (!view.open) view.showModal();
  if (document.activeElement.disabled) close.focus();
  for (const film of cells.querySelectorAll("video")) film.play().catch(() => {}); // where that is allowed
  fit();
  history.replaceState(null, "", `#p${number}`);
}

/** Choose the number of columns with which the images are largest. */
function fit() {
  const count = cells.children.length;
  const { naturalWidth, naturalHeight } = cells.querySelector("img");
  const ratio = naturalWidth / naturalHeight || 1;
  const gap = 8, caption = 28;
  const room = { width: view.clientWidth - 24, height: view.clientHeight - view.firstElementChild.offsetHeight - 12 };
  let best = 0, columns = 1;
  for (let tried = 1; tried <= count; tried++) {
    const rows = Math.ceil(count / tried);
    const wide = Math.min(room.width / tried - gap, (room.height / rows - gap - caption) * ratio);
    if (wide > best) [best, columns] = [wide, tried];
  }
  cells.style.gridTemplateColumns = `repeat(${columns}, ${Math.floor(best)}px)`;
}

document.querySelector("main").addEventListener("click", (event) => {
  const cell = event.target.closest("a.cell");
  if (!cell || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  show(entries.indexOf(cell.closest("figure")));
});

/** Leave out a photo that could not be copied. */
function leaveOut(photo) {
  const cells = photo.parentElement, { style } = photo.closest("figure");
  photo.remove();
  const columns = Math.min(cells.children.length, style.getPropertyValue("--columns"));
  style.setProperty("--columns", columns);
  style.setProperty("--left", (columns - (cells.children.length % columns)) % columns);
  style.setProperty("--odd", cells.children.length % 2);
}

const leaveOutBroken = (image) => image.matches("main .photo img") && leaveOut(image.closest(".photo"));
document.addEventListener("error", (event) => event.target.matches && leaveOutBroken(event.target), true);
for (const image of document.images) if (image.complete && !image.naturalWidth) leaveOutBroken(image);

cells.addEventListener("load", fit, true);
addEventListener("resize", () => view.open && fit());
previous.addEventListener("click", () => show(number - 1));
next.addEventListener("click", () => show(number + 1));
close.addEventListener("click", () => view.close());
cells.addEventListener("click", (event) => event.target === cells && view.close());
view.addEventListener("keydown", (event) => {
  const moves = { ArrowLeft: number - 1, ArrowRight: number + 1, Home: 0, End: entries.length - 1 };
  if (!(event.key in moves) || event.target.matches("video")) return;
  event.preventDefault();
  show(moves[event.key]);
});
view.addEventListener("close", () => {
  cells.replaceChildren();
  history.replaceState(null, "", location.pathname + location.search);
  entries[number].querySelector("a.cell").focus();
});
const asked = entries.findIndex((entry) => `#${entry.id}` === location.hash);
if (asked >= 0) show(asked);
