// What the page says: errors, notices that stay until they are put away.

export const $ = (id) => document.getElementById(id);

/** Show a text until it is put away, or another takes its place. */
export function showNotice(text) {
  $("notice").firstElementChild.textContent = text;
  $("notice").hidden = !text;
}

export function showError(error) {
  $("error").firstElementChild.textContent = error.message;
  $("error").hidden = false;
}

/** An event handler whose errors are shown in the page. */
export const told = (action) => async (event) => {
  $("error").hidden = true;
  try {
    await action(event);
  } catch (error) {
    showError(error);
  }
};

for (const id of ["error", "notice"]) {
  const message = document.getElementById(id);
  message.querySelector("button").addEventListener("click", () => (message.hidden = true));
}
