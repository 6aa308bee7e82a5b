// The pictures: NiiVue in one or two panes, labels as layers, outlines upon them, wheel, keys and pointer.

import { drawContours } from './contours.js';
import { make } from './dom.js';
import { connectTouch } from './touch.js';

export const VIEWS = { multi: 3, axial: 0, coronal: 1, sagittal: 2, render: 4 };
const THROUGH = { axial: 2, coronal: 1, sagittal: 0 }; // the RAS axis that slices follow
const ACROSS = { axial: 0, coronal: 0, sagittal: 1 };
const LIBRARY = 'static/niivue.umd.js';
const LABEL_INTENT = 1002; // NIfTI: an index into a table, never blended between neighbours

let loading = null;

/** Load the library when something is first looked at: 2 MB that the form does not need. */
function library() {
  loading ??= new Promise((resolve, reject) => {
    const script = make('script', { src: LIBRARY });
    script.addEventListener('load', () => {
      // Its log has one level for all; the first viewer sets it.
      new globalThis.niivue.Niivue({ logLevel: 'error' });
      resolve(globalThis.niivue);
    });
    script.addEventListener('error', () => reject(new Error('The viewer could not be loaded from the service.')));
    document.head.append(script);
  });
  return loading;
}

/** Leave out calls that WebGL refuses anyway, with a complaint each: mirrored tiles have a negative width. */
function quieten(gl) {
  for (const name of ['scissor', 'viewport']) {
    const call = gl[name].bind(gl);
    gl[name] = (x, y, width, height) => (width < 0 || height < 0 ? undefined : call(x, y, width, height));
  }
}

/** What a person looks at. Events: `moved` (position), `intensity` (window), `view`, `plane`, `labels`, `drawn`, `window`. */
export class Viewer extends EventTarget {
  #stage;
  #panes = [];
  #image = null;
  #sets = [];
  #volumes = new Map();
  #hidden = new Set();

  view = 'multi';
  plane = 'axial';
  opacity = 0.5;
  isOutlined = false;
  isRadiological = true;
  areLabelsOn = true;
  shown = [];
  isSideBySide = false;

  constructor(stage) {
    super();
    this.#stage = stage;
  }

  get panes() {
    return this.#panes;
  }

  get main() {
    return this.#panes[0]?.nv;
  }

  get isReady() {
    return Boolean(this.main?.volumes.length);
  }

  /** Show an image {name, buffer} and label sets {name, buffer, labels: [{name, value, color}]}. */
  async show(image, sets) {
    this.close();
    this.#image = await this.#read(image);
    this.#sets = sets;
    await Promise.all(sets.map((set) => this.#labelsOf(set)));
    await this.arrange(sets.length ? [sets[0]] : [], false);
  }

  /** Give everything back: pictures are large. */
  close() {
    this.#panes.forEach(({ nv }) => nv.cleanup());
    this.#stage.replaceChildren();
    this.#panes = [];
    this.#image = null;
    this.#sets = [];
    this.#volumes.clear();
    this.#hidden.clear();
  }

  async #read({ name, buffer }) {
    const { NVImage } = await library();
    return NVImage.loadFromUrl({ url: name, name, buffer, colormap: 'gray' });
  }

  async #labelsOf(set) {
    if (!this.#volumes.has(set)) {
      const volume = await this.#read({ name: set.file ?? 'labels.nii.gz', buffer: set.buffer });
      volume.hdr.intent_code = LABEL_INTENT;
      this.#volumes.set(set, volume);
    }
    return this.#volumes.get(set);
  }

  /** Choose which label sets are shown, in one pane or each in its own. */
  async arrange(sets, isSideBySide) {
    const position = this.isReady ? this.positionMm() : null;
    const window = this.#image && this.#panes.length ? [this.#image.cal_min, this.#image.cal_max] : null;
    for (const set of sets) await this.#labelsOf(set);
    this.shown = sets;
    this.isSideBySide = isSideBySide && sets.length > 1;
    const groups = this.isSideBySide ? sets.map((set) => [set]) : [sets];
    this.#panes.forEach(({ nv }) => nv.cleanup());
    this.#stage.replaceChildren();
    this.#panes = [];
    for (const group of groups) this.#panes.push(await this.#pane(group, groups.length > 1));
    const all = this.#panes.map(({ nv }) => nv);
    for (const nv of all) nv.broadcastTo(all.filter((other) => other !== nv), { '2d': true, '3d': true, cal_min: true, cal_max: true });
    this.#paint();
    this.setView(this.view);
    this.setSides(this.isRadiological);
    if (window) this.setWindow(...window);
    this.goToMm(position ?? this.#centre());
  }

  async #pane(sets, hasTitle) {
    const { Niivue } = await library();
    const canvas = make('canvas', { 'aria-label': 'Pictures of the scan. Arrow keys move through slices; question mark tells all keys.', role: 'img' });
    const lines = make('canvas', { className: 'lines', 'aria-hidden': 'true' });
    const title = hasTitle ? [make('p', { className: 'title' }, sets[0].name)] : [];
    const box = make('div', { className: 'pane' }, canvas, lines, ...title);
    this.#stage.append(box);
    const nv = new Niivue({
      backColor: [0, 0, 0, 1],
      crosshairColor: [1, 0.69, 0.24, 0.8],
      crosshairWidth: 0.35,
      crosshairWidthUnit: 'percent',
      crosshairGap: 8,
      show3Dcrosshair: true,
      isColorbar: false,
      multiplanarShowRender: 1,
      multiplanarLayout: 2,
      multiplanarPadPixels: 3,
      sagittalNoseLeft: true,
      showAllOrientationMarkers: true,
      dragAndDropEnabled: false,
      isResizeCanvas: true,
      isAntiAlias: true,
      fontColor: [0.87, 0.91, 0.94, 1],
      isCornerOrientationText: false,
      logLevel: 'error',
    });
    // 8: cross, 9: level and width, 3: move the picture
    nv.opts.mouseEventConfig = { leftButton: { primary: 8, withShift: 3, withCtrl: 9 }, rightButton: 9, centerButton: 3 };
    nv.opts.touchEventConfig = { singleTouch: 8, doubleTouch: 3 };
    // A finger that rests must not change the window (this is the longest that a timer takes), and one that comes back
    // soon moves the cross again.
    Object.assign(nv.opts, { longTouchTimeout: 2 ** 31 - 1, doubleTouchTimeout: 0 });
    await nv.attachToCanvas(canvas);
    quieten(nv.gl);
    const draw = nv.drawScene.bind(nv);
    const pane = { nv, canvas, lines, sets, box };
    nv.drawScene = () => {
      const drawn = draw();
      this.#outline(pane);
      return drawn;
    };
    nv.onLocationChange = (place) => this.dispatchEvent(new CustomEvent('moved', { detail: place }));
    nv.onIntensityChange = () => this.#toldWindow(nv);
    canvas.addEventListener('mouseup', () => this.#toldWindow(nv));
    // Before the library's own keys, some of which open boxes.
    box.addEventListener('keydown', (event) => this.#key(event), true);
    box.addEventListener('keyup', (event) => event.stopPropagation(), true);
    canvas.addEventListener('pointerdown', (event) => this.#planeAt(nv, event));
    connectTouch(box, (from, to, factor) => this.#twoFingers(nv, from, to, factor));
    nv.addVolume(this.#image.clone());
    for (const set of sets) nv.addVolume((await this.#labelsOf(set)).clone());
    return pane;
  }

  #toldWindow(nv) {
    const [volume] = nv.volumes;
    if (volume) this.dispatchEvent(new CustomEvent('intensity', { detail: { min: volume.cal_min, max: volume.cal_max } }));
  }

  #onCanvas(nv, x, y) {
    const box = nv.canvas.getBoundingClientRect();
    return [(x - box.left) * nv.uiData.dpr, (y - box.top) * nv.uiData.dpr];
  }

  /** Arrows follow the plane that was last touched. */
  #planeAt(nv, event) {
    const tile = nv.tileIndex(...this.#onCanvas(nv, event.clientX, event.clientY));
    const kind = nv.screenSlices[tile]?.axCorSag;
    const plane = ['axial', 'coronal', 'sagittal'][kind];
    if (!plane || plane === this.plane) return;
    this.plane = plane;
    this.dispatchEvent(new Event('plane'));
  }

  /** Give labels their colours, hidden ones none. */
  #paint() {
    for (const { nv, sets } of this.#panes) {
      nv.overlayAlphaShader = this.#drawsLines ? 0 : 1;
      sets.forEach((set, index) => {
        const volume = nv.volumes[index + 1];
        const table = { R: [0], G: [0], B: [0], A: [0], I: [0], labels: ['background'] };
        for (const { name, value, color } of set.labels) {
          const isShown = this.areLabelsOn && !this.#hidden.has(name);
          [table.R, table.G, table.B].forEach((list, part) => list.push(parseInt(color.slice(1 + 2 * part, 3 + 2 * part), 16)));
          table.A.push(isShown ? 255 : 0);
          table.I.push(value);
          table.labels.push(name);
        }
        volume.setColormapLabel(table);
        volume.opacity = this.opacity;
      });
      if (nv.volumes.length) nv.updateGLVolume();
    }
  }

  get #drawsLines() {
    return this.isOutlined || (this.shown.length > 1 && !this.isSideBySide);
  }

  #outline({ nv, lines, sets }) {
    const drawn = this.#drawsLines && this.areLabelsOn ? sets : [];
    drawContours(
      lines,
      nv,
      drawn.map((set, index) => ({
        volume: nv.volumes[index + 1],
        colors: new Map(set.labels.filter(({ name }) => !this.#hidden.has(name)).map(({ value, color }) => [value, color])),
        isDashed: index > 0,
      })).filter(({ volume }) => volume),
    );
  }

  isLabelShown(name) {
    return !this.#hidden.has(name);
  }

  showLabels(names, isShown) {
    for (const name of names) this.#hidden[isShown ? 'delete' : 'add'](name);
    this.#paint();
  }

  setLabelsOn(isOn) {
    this.areLabelsOn = isOn;
    this.#paint();
    this.dispatchEvent(new Event('labels'));
  }

  setOpacity(share) {
    this.opacity = share;
    this.#paint();
  }

  setOutlined(isOutlined) {
    this.isOutlined = isOutlined;
    this.#paint();
    this.dispatchEvent(new Event('drawn'));
  }

  setView(name) {
    this.view = name;
    if (name in THROUGH) this.plane = name;
    for (const { nv } of this.#panes) nv.setSliceType(VIEWS[name]);
    this.dispatchEvent(new Event('view'));
  }

  setSides(isRadiological) {
    this.isRadiological = isRadiological;
    for (const { nv } of this.#panes) nv.setRadiologicalConvention(isRadiological);
  }

  /** Return {min, max, low, high}: of all values, and of what the library would show by itself. */
  range() {
    const { global_min: min, global_max: max, robust_min: low, robust_max: high } = this.#image;
    return { min, max, low, high };
  }

  setWindow(min, max) {
    this.#image.cal_min = min;
    this.#image.cal_max = max;
    for (const { nv } of this.#panes) {
      nv.volumes[0].cal_min = min;
      nv.volumes[0].cal_max = max;
      nv.updateGLVolume();
    }
    this.#toldWindow(this.main);
  }

  positionMm() {
    return [...this.main.frac2mm(this.main.scene.crosshairPos)].slice(0, 3);
  }

  #centre() {
    return [...this.main.frac2mm([0.5, 0.5, 0.5])].slice(0, 3);
  }

  goToMm(position) {
    for (const { nv } of this.#panes) {
      nv.scene.crosshairPos = nv.mm2frac(position);
      nv.createOnLocationChange();
      nv.drawScene();
    }
  }

  /** Move by voxels along a RAS axis, not beyond the scan. */
  step(axis, voxels) {
    const { main } = this;
    const here = [...main.frac2vox(main.scene.crosshairPos)];
    const last = main.volumes[0].dimsRAS[axis + 1] - 1;
    here[axis] = Math.max(0, Math.min(last, here[axis] + voxels));
    main.scene.crosshairPos = main.vox2frac(here);
    this.goToMm(this.positionMm());
  }

  /** Return the slice of the plane in use that the cross is in: {plane, index from 0, count}. */
  slice() {
    const axis = THROUGH[this.plane];
    const { main, plane } = this;
    return { plane, index: main.frac2vox(main.scene.crosshairPos)[axis], count: main.volumes[0].dimsRAS[axis + 1] };
  }

  goToSlice(index) {
    this.step(THROUGH[this.plane], index - this.slice().index);
  }

  zoom(factor) {
    for (const { nv } of this.#panes) {
      this.#enlarge(nv, factor, this.positionMm());
      this.#enlarge3D(nv, factor);
    }
  }

  /** Make slices larger around a place (mm), which stays where it is; factor 0: as large as they fit. */
  #enlarge(nv, factor, place) {
    const [x, y, z, now] = nv.scene.pan2Dxyzmm;
    const next = factor ? Math.max(0.5, Math.min(12, now * factor)) : 1;
    // What is at mm is seen at next * mm + shift. Small pictures stand in the middle.
    const shift = next > 1 ? [x, y, z].map((part, axis) => part + (now - next) * place[axis]) : this.#centre().map((part) => (1 - next) * part);
    nv.setPan2Dxyzmm([...shift, next]);
  }

  #enlarge3D(nv, factor) {
    nv.setScale(factor ? Math.max(0.5, Math.min(4, nv.volScaleMultiplier * factor)) : 1);
  }

  #twoFingers(nv, from, to, factor) {
    const [before, after] = [from, to].map(({ x, y }) => this.#onCanvas(nv, x, y));
    const fractions = [before, after].map(([x, y]) => nv.canvasPos2frac([x, y]));
    if (fractions.some(([x]) => x < 0)) {
      if (nv.inRenderTile(...after) >= 0) this.#panes.forEach((pane) => this.#enlarge3D(pane.nv, factor));
      return;
    }
    const [left, reached] = fractions.map((fraction) => nv.frac2mm(fraction));
    for (const pane of this.#panes) {
      const [x, y, z, now] = pane.nv.scene.pan2Dxyzmm;
      pane.nv.setPan2Dxyzmm([...[x, y, z].map((part, axis) => part + now * (reached[axis] - left[axis])), now]);
      this.#enlarge(pane.nv, factor, left);
    }
  }

  /** Go to the voxel of a label that lies nearest to the middle of it; false where there is none. */
  goToLabel(set, value) {
    const volume = this.#volumes.get(set);
    const [, width, height] = volume.hdr.dims;
    const { img } = volume;
    let count = 0;
    const sums = [0, 0, 0];
    const at = (index) => [index % width, Math.floor(index / width) % height, Math.floor(index / (width * height))];
    for (let index = img.indexOf(value); index >= 0; index = img.indexOf(value, index + 1)) {
      count += 1;
      at(index).forEach((part, axis) => { sums[axis] += part; });
    }
    if (!count) return false;
    const middle = sums.map((sum) => sum / count);
    let [best, least] = [null, Infinity];
    for (let index = img.indexOf(value); index >= 0; index = img.indexOf(value, index + 1)) {
      const place = at(index);
      const far = place.reduce((sum, part, axis) => sum + (part - middle[axis]) ** 2, 0);
      if (far < least) [best, least] = [place, far];
    }
    const { affine } = volume.hdr;
    this.goToMm([0, 1, 2].map((row) => affine[row][0] * best[0] + affine[row][1] * best[1] + affine[row][2] * best[2] + affine[row][3]));
    return true;
  }

  /** Return the labels under the cross, set by set. */
  labelsHere(place) {
    const pane = this.#panes.find(({ nv }) => nv.volumes[0]?.id === place.values[0]?.id) ?? this.#panes[0];
    return pane.sets.flatMap((set, index) => {
      const value = Math.round(place.values[index + 1]?.value ?? 0);
      return set.labels.filter((label) => label.value === value).map(({ name }) => name);
    });
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.key === 'Tab' || event.key === '?' || !this.isReady) return;
    event.stopPropagation();
    const { dimsRAS } = this.main.volumes[0];
    const through = THROUGH[this.plane];
    const across = ACROSS[this.plane];
    const turn = (azimuth, elevation) => this.#panes.forEach(({ nv }) => nv.setRenderAzimuthElevation(nv.scene.renderAzimuth + azimuth, nv.scene.renderElevation + elevation));
    const is3D = this.view === 'render';
    const views = Object.keys(VIEWS);
    const deeds = {
      ArrowUp: () => (is3D ? turn(0, 5) : this.step(through, 1)),
      ArrowDown: () => (is3D ? turn(0, -5) : this.step(through, -1)),
      ArrowLeft: () => (is3D ? turn(-5, 0) : this.step(across, -1)),
      ArrowRight: () => (is3D ? turn(5, 0) : this.step(across, 1)),
      PageUp: () => this.step(through, 10),
      PageDown: () => this.step(through, -10),
      Home: () => this.step(through, -dimsRAS[through + 1]),
      End: () => this.step(through, dimsRAS[through + 1]),
      p: () => {
        this.plane = { axial: 'coronal', coronal: 'sagittal', sagittal: 'axial' }[this.plane];
        this.dispatchEvent(new Event('plane'));
      },
      l: () => this.setLabelsOn(!this.areLabelsOn),
      o: () => this.setOutlined(!this.isOutlined),
      w: () => this.dispatchEvent(new Event('window')),
      '+': () => this.zoom(1.25),
      '=': () => this.zoom(1.25),
      '-': () => this.zoom(0.8),
      0: () => this.zoom(0),
      ...Object.fromEntries(views.map((view, index) => [String(index + 1), () => this.setView(view)])),
    };
    const deed = deeds[event.key] ?? deeds[event.key.toLowerCase()];
    if (!deed) return;
    event.preventDefault();
    deed();
  }
}
