// PNG files of label maps: integers, never colours where the file has ids. (A browser's own decoder gives colours alone.)

const SIGNATURE = [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a];
const CHANNELS = { 0: 1, 2: 3, 3: 1 }; // of colour types: grey, RGB, palette
const MAX_PIXELS = 50_000_000;

/** {height, width, channels, values}: a grey or palette file's values as they are stored, or RGB of 8 bits. */
export async function readPNG(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (SIGNATURE.some((byte, place) => bytes[place] !== byte)) throw new Error("It is no PNG file.");
  const parts = [];
  for (let place = 8; place + 12 <= bytes.length; ) {
    const length = view.getUint32(place);
    const name = String.fromCharCode(...bytes.subarray(place + 4, place + 8));
    if (name === "IDAT") parts.push(bytes.subarray(place + 8, place + 8 + length));
    place += 12 + length;
  }
  const [width, height] = [view.getUint32(16), view.getUint32(20)];
  const [depth, type, , , interlaced] = bytes.subarray(24, 29);
  const channels = CHANNELS[type];
  if (!channels || interlaced || (channels === 3 && depth !== 8)) {
    throw new Error("It is a PNG of another kind: save it as 8-bit ids (grey or palette) or RGB, without interlacing.");
  }
  if (width * height > MAX_PIXELS) throw new Error(`It has ${width} × ${height} pixels, which are too many.`);
  const stride = Math.ceil((width * channels * depth) / 8);
  const raw = await passed(parts, new DecompressionStream("deflate"), height * (stride + 1));
  const rows = unfiltered(raw, height, stride, Math.max(1, (channels * depth) / 8));
  return { height, width, channels, values: samples(rows, height, width * channels, stride, depth) };
}

/** Undo the filters of the rows (PNG specification, 9.2). */
function unfiltered(raw, height, stride, step) {
  const rows = new Uint8Array(height * stride);
  for (let y = 0; y < height; y++) {
    const filter = raw[y * (stride + 1)], row = y * stride;
    for (let x = 0; x < stride; x++) {
      const left = x >= step ? rows[row + x - step] : 0;
      const up = y ? rows[row - stride + x] : 0;
      const corner = y && x >= step ? rows[row - stride + x - step] : 0;
      const predicted = [0, left, up, (left + up) >> 1, paeth(left, up, corner)][filter];
      rows[row + x] = raw[y * (stride + 1) + 1 + x] + predicted;
    }
  }
  return rows;
}

function paeth(left, up, corner) {
  const estimate = left + up - corner;
  const [a, b, c] = [left, up, corner].map((value) => Math.abs(estimate - value));
  return a <= b && a <= c ? left : b <= c ? up : corner;
}

function samples(rows, height, perRow, stride, depth) {
  if (depth === 8) return rows;
  const values = new Uint16Array(height * perRow);
  for (let y = 0, place = 0; y < height; y++) {
    for (let x = 0; x < perRow; x++, place++) {
      if (depth === 16) values[place] = (rows[y * stride + 2 * x] << 8) | rows[y * stride + 2 * x + 1];
      else values[place] = (rows[y * stride + ((x * depth) >> 3)] >> (8 - depth - ((x * depth) & 7))) & (2 ** depth - 1);
    }
  }
  return values;
}

/** A PNG file of ids: with a palette, {id: [r, g, b]}, or grey of 16 bits if there is none. */
export async function writePNG({ height, width }, ids, palette) {
  const size = palette ? 1 : 2;
  const raw = new Uint8Array(height * (size * width + 1));
  const view = new DataView(raw.buffer);
  for (let y = 0, place = 0; y < height; y++) {
    place++; // no filter
    for (let x = 0; x < width; x++, place += size) {
      if (palette) raw[place] = ids[y * width + x];
      else view.setUint16(place, ids[y * width + x]);
    }
  }
  const header = new Uint8Array(13);
  new DataView(header.buffer).setUint32(0, width);
  new DataView(header.buffer).setUint32(4, height);
  header.set([8 * size, palette ? 3 : 0], 8);
  const parts = [new Uint8Array(SIGNATURE), chunk("IHDR", header)];
  if (palette) {
    const colours = new Uint8Array(768);
    for (const [id, colour] of Object.entries(palette)) colours.set(colour, 3 * id);
    parts.push(chunk("PLTE", colours));
  }
  parts.push(chunk("IDAT", await passed([raw], new CompressionStream("deflate"))), chunk("IEND", new Uint8Array()));
  return new Blob(parts, { type: "image/png" });
}

function chunk(name, content) {
  const bytes = new Uint8Array(12 + content.length), view = new DataView(bytes.buffer);
  view.setUint32(0, content.length);
  bytes.set([...name].map((letter) => letter.charCodeAt(0)), 4);
  bytes.set(content, 8);
  let crc = -1;
  for (const byte of bytes.subarray(4, 8 + content.length)) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  view.setInt32(8 + content.length, ~crc);
  return bytes;
}

/** What a stream makes of parts; `length` bytes are wanted of it, if given. */
async function passed(parts, stream, length) {
  let bytes;
  try {
    bytes = new Uint8Array(await new Response(new Blob(parts).stream().pipeThrough(stream)).arrayBuffer());
  } catch {
    throw new Error("It is a damaged PNG file.");
  }
  if (length !== undefined && bytes.length !== length) throw new Error("It is a damaged PNG file.");
  return bytes;
}
