// A zip archive of files as they are, without packing: the service unpacks it, and what lies between is this machine or
// its network. Layout after APPNOTE.TXT of PKWARE, version 2.0.

const TABLE = Uint32Array.from({ length: 256 }, (_, index) => {
  let value = index;
  for (let bit = 0; bit < 8; bit += 1) value = value & 1 ? 0xedb88320 ^ (value >>> 1) : value >>> 1;
  return value;
});
const MOST_FILES = 0xfffe;
const MOST_BYTES = 0xfffffffe;

/** CRC-32 as zip has it. */
export function crc32(bytes) {
  let value = 0xffffffff;
  for (let index = 0; index < bytes.length; index += 1) value = TABLE[(value ^ bytes[index]) & 0xff] ^ (value >>> 8);
  return (value ^ 0xffffffff) >>> 0;
}

function record(signature, fields, name = '') {
  const text = new TextEncoder().encode(name);
  const length = 4 + fields.reduce((sum, [size]) => sum + size, 0);
  const view = new DataView(new ArrayBuffer(length + text.length));
  view.setUint32(0, signature, true);
  let place = 4;
  for (const [size, value] of fields) {
    if (size === 2) view.setUint16(place, value, true);
    else view.setUint32(place, value, true);
    place += size;
  }
  new Uint8Array(view.buffer).set(text, length);
  return view.buffer;
}

/**
 * Return a zip of files as a Blob, which points at them: memory holds one file at a time.
 * Names are numbers: those of patients' folders stay here.
 */
export async function zipOf(files, onProgress = () => {}) {
  const total = files.reduce((sum, file) => sum + file.size + 120, 22);
  if (files.length > MOST_FILES || total > MOST_BYTES) {
    throw new Error('More than 65,000 files or 4 GB. Choose the folder of one study.');
  }
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const [index, file] of files.entries()) {
    const name = `${String(index + 1).padStart(6, '0')}.dcm`;
    const sum = crc32(new Uint8Array(await file.arrayBuffer()));
    // Version 2.0, no flags, stored, 1 January 1980.
    const common = [[2, 20], [2, 0], [2, 0], [2, 0], [2, 0x21], [4, sum], [4, file.size], [4, file.size], [2, name.length], [2, 0]];
    const head = record(0x04034b50, common, name);
    parts.push(head, file);
    directory.push(record(0x02014b50, [[2, 20], ...common, [2, 0], [2, 0], [2, 0], [4, 0], [4, offset]], name));
    offset += head.byteLength + file.size;
    onProgress((index + 1) / files.length);
  }
  const size = directory.reduce((sum, entry) => sum + entry.byteLength, 0);
  const count = files.length;
  const end = record(0x06054b50, [[2, 0], [2, 0], [2, count], [2, count], [4, size], [4, offset], [2, 0]]);
  return new Blob([...parts, ...directory, end], { type: 'application/zip' });
}
