// What stands around the pictures: views, windows, labels with their volumes, comparison, the place of the cross.

import { announce, find, make, millilitres, swatch } from './dom.js';

const VIEW_NAMES = { multi: 'All', axial: 'Axial', coronal: 'Coronal', sagittal: 'Sagittal', render: '3D' };
// Level and width in Hounsfield units, as radiology uses them.
const CT_WINDOWS = {
  'soft tissue': [40, 400],
  lung: [-600, 1500],
  bone: [500, 2000],
  brain: [40, 80],
};
const LEAST_OF_CT = -500; // air; other scans have no such values

let viewer = null;
let scan = null;

const current = () => scan.sets[Number(find('set').value) || 0];
const other = () => scan.sets[Number(find('other').value)] ?? null;
const isComparing = () => find('other').value !== '' && other() !== null && other() !== current();

/** Connect the controls to a viewer. */
export function connectControls(found) {
  viewer = found;
  const views = Object.entries(VIEW_NAMES).map(([view, name]) => {
    const button = make('button', { type: 'button', 'data-view': view, 'aria-pressed': 'false' }, name);
    button.addEventListener('click', () => viewer.setView(view));
    return button;
  });
  find('views').replaceChildren(...views);
  viewer.addEventListener('view', () => views.forEach((button) => button.setAttribute('aria-pressed', String(button.dataset.view === viewer.view))));
  viewer.addEventListener('moved', ({ detail }) => showPlace(detail));
  for (const event of ['moved', 'view', 'plane']) viewer.addEventListener(event, showSlice);
  find('slice').addEventListener('input', () => viewer.goToSlice(Number(find('slice').value)));
  viewer.addEventListener('intensity', ({ detail }) => showWindow(detail));
  viewer.addEventListener('plane', () => announce(`Arrows go through ${viewer.plane} slices.`));
  viewer.addEventListener('labels', () => announce(viewer.areLabelsOn ? 'Labels on' : 'Labels off'));
  viewer.addEventListener('drawn', () => { find('drawn').value = viewer.isOutlined ? 'outlines' : 'filled'; });
  viewer.addEventListener('window', nextPreset);
  find('preset').addEventListener('change', () => applyPreset(find('preset').value));
  for (const id of ['level', 'width']) find(id).addEventListener('input', setWindowBySliders);
  find('sides').addEventListener('change', () => viewer.setSides(find('sides').value === 'radiological'));
  find('drawn').addEventListener('change', () => viewer.setOutlined(find('drawn').value === 'outlines'));
  find('opacity').addEventListener('input', setOpacity);
  find('all-labels').addEventListener('change', () => {
    viewer.showLabels(namesOf(), find('all-labels').checked);
    showLabels();
  });
  for (const id of ['set', 'other', 'how']) find(id).addEventListener('change', arrange);
}

/** Show what a scan has: {sets, isCt, others: [{name, load}], compare}. */
export async function showControls(found) {
  scan = found;
  const options = scan.sets.map(({ name }, index) => make('option', { value: String(index) }, name));
  find('set').replaceChildren(...options);
  find('set-box').hidden = scan.sets.length < 2;
  const comparable = scan.sets.map(({ name }, index) => make('option', { value: String(index) }, name));
  const others = (scan.others ?? []).map(({ name }, index) => make('option', { value: `other-${index}` }, name));
  find('other').replaceChildren(make('option', { value: '' }, 'nothing'), ...comparable, ...others);
  find('compare-box').hidden = scan.sets.length < 2 && !others.length;
  find('how').value = 'outlines';
  if (scan.compare && scan.sets.length > 1) find('other').value = '1';
  offerPresets();
  setOpacity();
  viewer.setOutlined(false);
  viewer.setView(viewer.view);
  find('side').hidden = !scan.sets.length && find('downloads-box').hidden;
  find('labels-title').parentElement.hidden = !scan.sets.length;
  await arrange();
}

async function arrange() {
  const picked = find('other').value;
  if (picked.startsWith('other-')) await loadOther(Number(picked.slice(6)));
  if (!scan.sets.length) return viewer.arrange([], false);
  for (const option of find('other').options) option.disabled = option.value !== '' && option.value === find('set').value;
  const isBoth = isComparing();
  find('how-box').hidden = !isBoth;
  const isSide = isBoth && find('how').value === 'side';
  find('drawn').parentElement.hidden = isBoth && !isSide;
  find('compare-words').hidden = !isBoth || isSide;
  find('compare-words').textContent = isBoth ? `Solid: ${current().name}. Dashed: ${other().name}.` : '';
  showLabels();
  await viewer.arrange(isBoth ? [current(), other()] : [current()], isSide);
  return undefined;
}

/** Fetch the labels of another job; from then on they are a set like any other. */
async function loadOther(index) {
  const chosen = scan.others[index];
  find('other').disabled = true;
  try {
    const set = await chosen.load();
    scan.sets.push(set);
    const option = [...find('other').options].find(({ value }) => value === `other-${index}`);
    option.value = String(scan.sets.length - 1);
    find('other').value = option.value;
  } catch (error) {
    find('other').value = '';
    announce(error.message);
  } finally {
    find('other').disabled = false;
  }
}

const namesOf = () => [...new Set([current(), ...(isComparing() ? [other()] : [])].flatMap(({ labels }) => labels.map(({ name }) => name)))];

function showLabels() {
  const sets = isComparing() ? [current(), other()] : [current()];
  find('other-head').hidden = sets.length < 2;
  find('volume-head').textContent = sets.length < 2 ? 'mL' : 'solid mL';
  find('other-head').textContent = 'dashed mL';
  const rows = namesOf().map((name, index) => labelRow(name, sets, index));
  find('labels').querySelector('tbody').replaceChildren(...rows);
  const shown = namesOf().filter((name) => viewer.isLabelShown(name)).length;
  find('all-labels').checked = shown > 0;
  find('all-labels').indeterminate = shown > 0 && shown < rows.length;
}

function labelRow(name, sets, index) {
  const label = sets.flatMap(({ labels }) => labels).find((each) => each.name === name);
  const box = make('input', { type: 'checkbox', id: `label-${index}`, checked: viewer.isLabelShown(name), 'aria-label': `Show ${name}` });
  box.addEventListener('change', () => {
    viewer.showLabels([name], box.checked);
    showLabels();
    find(`label-${index}`).focus();
  });
  const go = make('button', { type: 'button', title: `Go to ${name}` }, name);
  go.addEventListener('click', () => {
    const set = sets.find(({ labels }) => labels.some((each) => each.name === name));
    const found = viewer.goToLabel(set, label.value);
    announce(found ? `At ${name}` : `There is no ${name} in this scan.`);
    if (!found) find('here').textContent = `no ${name} in this scan`;
  });
  const volumes = sets.map(({ volumes: all }) => make('td', { className: 'number' }, millilitres(all?.[name])));
  return make('tr', {}, make('th', { scope: 'row' }, make('span', { className: 'name' }, box, swatch(label.color), go)), ...volumes);
}

function setOpacity() {
  find('opacity-value').textContent = `${find('opacity').value} %`;
  viewer.setOpacity(Number(find('opacity').value) / 100);
}

function offerPresets() {
  const { min, max, low, high } = viewer.range();
  const isCt = scan.isCt ?? min <= LEAST_OF_CT;
  const names = [...(isCt ? Object.keys(CT_WINDOWS) : ['automatic']), 'full', 'own'];
  find('preset').replaceChildren(...names.map((name) => make('option', { value: name, disabled: name === 'own' }, name)));
  const span = Math.max(max - min, 1e-6);
  const whole = isCt || span > 50;
  const step = whole ? 1 : span / 500;
  Object.assign(find('level'), { min: String(isCt ? Math.min(min, -1000) : min), max: String(isCt ? Math.max(max, 1500) : max), step: String(step) });
  Object.assign(find('width'), { min: String(step), max: String(Math.max(span, isCt ? 2500 : 0)), step: String(step) });
  scan.windows = { ...CT_WINDOWS, automatic: [(low + high) / 2, high - low], full: [(min + max) / 2, span] };
  applyPreset(names[0]);
}

function applyPreset(name) {
  const [level, width] = scan.windows[name];
  viewer.setWindow(level - width / 2, level + width / 2);
  find('preset').value = name;
}

function nextPreset() {
  const names = [...find('preset').options].map(({ value }) => value).filter((name) => name !== 'own');
  applyPreset(names[(names.indexOf(find('preset').value) + 1) % names.length]);
  announce(`Window: ${find('preset').value}`);
}

function setWindowBySliders() {
  const [level, width] = [Number(find('level').value), Number(find('width').value)];
  viewer.setWindow(level - width / 2, level + width / 2);
}

function showWindow({ min, max }) {
  const [level, width] = [(min + max) / 2, max - min];
  const short = (value) => String(Number(value.toPrecision(4)));
  for (const [id, value] of [['level', level], ['width', width]]) {
    if (document.activeElement !== find(id)) find(id).value = String(value);
    find(`${id}-value`).textContent = short(value);
  }
  const isNear = ([l, w]) => Math.abs(l - level) < 0.01 * w + 1e-6 && Math.abs(w - width) < 0.01 * w + 1e-6;
  const known = [...find('preset').options].find(({ value }) => scan?.windows && scan.windows[value] && isNear(scan.windows[value]));
  find('preset').value = known?.value ?? 'own';
}

/** The slider is how a finger goes through the slices of one plane. */
function showSlice() {
  find('slices').hidden = !viewer.isReady || viewer.view === 'render';
  if (find('slices').hidden) return;
  const { plane, index, count } = viewer.slice();
  const words = `${index + 1} of ${count}`;
  Object.assign(find('slice'), { max: String(count - 1), value: String(index), ariaValueText: words });
  find('slice-plane').textContent = VIEW_NAMES[plane];
  find('slice-value').textContent = words;
}

function showPlace(place) {
  const [x, y, z] = place.mm;
  const side = (value, ends) => `${Math.abs(value).toFixed(1)} ${value < 0 ? ends[0] : ends[1]}`;
  find('position').textContent = `${side(x, 'LR')}, ${side(y, 'PA')}, ${side(z, 'IS')} mm`;
  const value = place.values[0]?.value;
  const unit = find('preset').options[0]?.value === 'soft tissue' ? ' HU' : '';
  find('value').textContent = value === undefined ? '' : `value ${Number(value.toPrecision(5))}${unit}`;
  find('here').textContent = [...new Set(viewer.labelsHere(place))].join(' / ') || (scan?.sets.length ? 'no label' : '');
}
