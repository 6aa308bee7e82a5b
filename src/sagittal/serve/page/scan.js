// What was dropped or chosen: images, one per channel, or a DICOM study.

const IMAGE = /\.(nii|nii\.gz|nrrd|mha|mgh|mgz)$/i;
const ZIP = /\.zip$/i;

async function startsWith(file, offset, text) {
  const bytes = new Uint8Array(await file.slice(offset, offset + text.length).arrayBuffer());
  return String.fromCharCode(...bytes) === text;
}

const isDicom = (file) => startsWith(file, 128, 'DICM');

/** Return all files of a drop, those in folders too. Entries must be taken before the first pause. */
export async function filesOfDrop(transfer) {
  const entries = [...transfer.items].filter((item) => item.kind === 'file').map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile());
  const found = [];
  const pending = entries.filter(Boolean);
  while (pending.length) {
    const entry = pending.shift();
    if (entry instanceof File) found.push(entry);
    else if (entry.isFile) found.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
    else {
      const reader = entry.createReader();
      // A reader gives a hundred entries at a time.
      for (;;) {
        const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
        if (!some.length) break;
        pending.push(...some);
      }
    }
  }
  return found;
}

/**
 * Return {kind: 'images', files} or {kind: 'zip' | 'dicom', files}, or throw in words.
 * `names` tells the kind of images only; the service looks at bytes.
 */
export async function recognise(given) {
  const files = given.filter((file) => file.size > 0 && !file.name.startsWith('.') && file.name !== 'DICOMDIR');
  if (!files.length) throw new Error('There is no file in it.');
  if (files.length === 1 && (ZIP.test(files[0].name) || (await startsWith(files[0], 0, 'PK\u0003\u0004')))) {
    return { kind: 'zip', files };
  }
  const images = files.filter((file) => IMAGE.test(file.name));
  if (images.length) {
    if (images.length !== files.length) throw new Error(`${images.length} of ${files.length} files are images that this page knows by name. Choose only these, or only DICOM.`);
    return { kind: 'images', files: images.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true })) };
  }
  const marks = await Promise.all(files.map(isDicom));
  const dicom = files.filter((_, index) => marks[index]);
  // Some old DICOM files lack the mark; the service finds out.
  if (dicom.length || files.length > 1) return { kind: 'dicom', files: dicom.length ? dicom : files };
  return { kind: 'images', files };
}

/** Return what was chosen in words. */
export function inWords({ kind, files }) {
  if (kind === 'images') return files.map((file) => file.name).join(', ');
  if (kind === 'zip') return files[0].name;
  const folder = files[0].webkitRelativePath?.split('/')[0];
  return `${files.length} DICOM file${files.length === 1 ? '' : 's'}${folder ? ` in ${folder}` : ''}`;
}

/** Guess which file is which channel: by nnU-Net's _0000 or the channel's name in the file's, else in order. */
export function guessChannels(files, channels) {
  return channels.map((channel, index) => {
    const number = `_${String(index).padStart(4, '0')}.`;
    const byNumber = files.findIndex((file) => file.name.includes(number));
    const word = new RegExp(`(^|[^a-z0-9])${channel.replace(/[^a-z0-9]/gi, '.')}([^a-z0-9]|$)`, 'i');
    const byName = files.findIndex((file) => word.test(file.name));
    return byNumber >= 0 ? byNumber : byName >= 0 ? byName : Math.min(index, files.length - 1);
  });
}
