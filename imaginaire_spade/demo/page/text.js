// Label maps as text: as they are sent to the server, and kept for a reload.

/** Of {height, width, ids}. */
export function fieldsOf({ height, width, ids }) {
  const bytes = new Uint8Array(ids.buffer, ids.byteOffset, ids.byteLength);
  let text = "";
  for (let start = 0; start < bytes.length; start += 8192) {
    text += String.fromCharCode(...bytes.subarray(start, start + 8192));
  }
  return { height, width, labels: btoa(text) };
}

export function mapOf({ labels, ...fields }, bytesPerId) {
  const bytes = Uint8Array.from(atob(labels), (character) => character.charCodeAt(0));
  return { ...fields, ids: bytesPerId === 1 ? bytes : new Uint16Array(bytes.buffer) };
}
