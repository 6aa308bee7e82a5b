// Outlines of labels, drawn as lines upon the slices: between two voxels of different labels, in the colour of the label.
//
// The 3D library could colour border voxels, but it takes neighbours of the next slices for border, too, so that the
// ends of an organ fill up. Lines also tell two label sets apart where they lie on one another: solid and dashed.

const AXES = { 0: [0, 1, 2], 1: [0, 2, 1], 2: [1, 2, 0] }; // axial, coronal, sagittal: across, up, through

/**
 * Return what turns voxels of one image's grid (RAS order) into places of another's data: a 3 x 4 matrix of rows,
 * and the strides of its axes.
 */
function bridge(back, labels) {
  const [matRAS, toLabels] = [back.matRAS, labels.matRAS];
  const inverse = invert(toLabels);
  const rows = [];
  for (let row = 0; row < 3; row += 1) {
    const line = [0, 0, 0, 0];
    for (let column = 0; column < 4; column += 1) {
      for (let inner = 0; inner < 4; inner += 1) line[column] += inverse[row * 4 + inner] * matRAS[inner * 4 + column];
    }
    rows.push(line);
  }
  return rows;
}

/** Invert an affine matrix, 4 x 4 in rows. */
function invert(m) {
  const [a, b, c, , d, e, f, , g, h, i] = m;
  const [A, B, C] = [e * i - f * h, c * h - b * i, b * f - c * e];
  const [D, E, F] = [f * g - d * i, a * i - c * g, c * d - a * f];
  const [G, H, I] = [d * h - e * g, b * g - a * h, a * e - b * d];
  const scale = 1 / (a * A + b * D + c * G);
  const rows = [[A, B, C], [D, E, F], [G, H, I]].map((row) => row.map((value) => value * scale));
  const shift = rows.map((row) => -(row[0] * m[3] + row[1] * m[7] + row[2] * m[11]));
  return [...rows[0], shift[0], ...rows[1], shift[1], ...rows[2], shift[2], 0, 0, 0, 1];
}

/** Return the labels in a plane of the scan's grid, row by row, of the nearest voxel of the label map; 0 outside. */
export function plane(back, labels, kind, through) {
  const [across, up, third] = AXES[kind];
  const dims = back.dimsRAS.slice(1, 4);
  const [width, height] = [dims[across], dims[up]];
  const rows = bridge(back, labels);
  const other = labels.dimsRAS.slice(1, 4);
  const { img2RASstart: start, img2RASstep: step, img } = labels;
  const base = start[0] + start[1] + start[2];
  const found = new Int32Array(width * height);
  for (let v = 0; v < height; v += 1) {
    for (let u = 0; u < width; u += 1) {
      let place = base;
      let isInside = true;
      for (let axis = 0; axis < 3; axis += 1) {
        const row = rows[axis];
        const at = Math.round(row[across] * u + row[up] * v + row[third] * through + row[3]);
        if (at < 0 || at >= other[axis]) isInside = false;
        place += at * step[axis];
      }
      found[v * width + u] = isInside ? img[place] : 0;
    }
  }
  return { width, height, found };
}

/** Draw the outlines of label sets upon the slices of a viewer. A set is {volume, colors: Map value -> colour, isDashed}. */
export function drawContours(canvas, viewer, sets) {
  const ratio = viewer.uiData.dpr || 1;
  const context = canvas.getContext('2d');
  if (canvas.width !== viewer.canvas.width || canvas.height !== viewer.canvas.height) {
    canvas.width = viewer.canvas.width;
    canvas.height = viewer.canvas.height;
  }
  context.clearRect(0, 0, canvas.width, canvas.height);
  const [back] = viewer.volumes;
  if (!back || !sets.length) return;
  const voxel = viewer.frac2vox(viewer.scene.crosshairPos);
  for (const tile of viewer.screenSlices) {
    if (!(tile.axCorSag in AXES) || !tile.leftTopMM) continue;
    drawTile(context, viewer, back, tile, voxel, sets, ratio);
  }
}

function drawTile(context, viewer, back, tile, voxel, sets, ratio) {
  const [across, up, third] = AXES[tile.axCorSag];
  const box = tile.leftTopWidthHeight;
  const [left, wide] = box[2] < 0 ? [box[0] + box[2], -box[2]] : [box[0], box[2]];
  const dims = back.dimsRAS.slice(1, 4);
  const onScreen = (u, v) => {
    const fraction = [0, 0, 0];
    fraction[across] = u / dims[across];
    fraction[up] = v / dims[up];
    fraction[third] = (voxel[third] + 0.5) / dims[third];
    const mm = viewer.frac2mm(fraction);
    const x = (mm[across] - tile.leftTopMM[0]) / tile.fovMM[0];
    const y = (mm[up] - tile.leftTopMM[1]) / tile.fovMM[1];
    return [left + (box[2] < 0 ? 1 - x : x) * wide, box[1] + (1 - y) * box[3]];
  };
  const zero = onScreen(0, 0);
  const [one, two] = [onScreen(1, 0), onScreen(0, 1)];
  context.save();
  context.beginPath();
  context.rect(left, box[1], wide, box[3]);
  context.clip();
  context.setTransform(one[0] - zero[0], one[1] - zero[1], two[0] - zero[0], two[1] - zero[1], zero[0], zero[1]);
  const paths = sets.map((set) => [set, edges(plane(back, set.volume, tile.axCorSag, voxel[third]), set.colors)]);
  // Lines are as wide as they are on the screen, not as voxels are.
  const transform = context.getTransform();
  context.setTransform(1, 0, 0, 1, 0, 0);
  for (const [set, byLabel] of paths) {
    context.setLineDash(set.isDashed ? [5 * ratio, 4 * ratio] : []);
    for (const [value, path] of byLabel) {
      const placed = new Path2D();
      placed.addPath(path, transform);
      context.lineWidth = 3.2 * ratio;
      context.strokeStyle = '#000a';
      if (!set.isDashed) context.stroke(placed);
      context.lineWidth = 1.7 * ratio;
      context.strokeStyle = set.colors.get(value);
      context.stroke(placed);
    }
  }
  context.restore();
}

/** Return a path by label: the sides of its voxels beyond which another label lies. Runs become one line. */
function edges({ width, height, found }, colors) {
  const paths = new Map();
  const at = (u, v) => (u < 0 || v < 0 || u >= width || v >= height ? 0 : found[v * width + u]);
  const line = (value, ...ends) => {
    if (!colors.has(value)) return;
    if (!paths.has(value)) paths.set(value, new Path2D());
    paths.get(value).moveTo(ends[0], ends[1]);
    paths.get(value).lineTo(ends[2], ends[3]);
  };
  for (const isRow of [true, false]) {
    const [outer, inner] = isRow ? [height, width] : [width, height];
    for (let border = 0; border <= outer; border += 1) {
      for (const side of [-1, 0]) {
        let from = 0;
        let current = 0;
        for (let along = 0; along <= inner; along += 1) {
          const here = isRow ? at(along, border + side) : at(border + side, along);
          const there = isRow ? at(along, border - 1 - side) : at(border - 1 - side, along);
          const value = along < inner && here !== there ? here : 0;
          if (value === current) continue;
          if (current) line(current, ...(isRow ? [from, border, along, border] : [border, from, border, along]));
          [from, current] = [along, value];
        }
      }
    }
  }
  return paths;
}
