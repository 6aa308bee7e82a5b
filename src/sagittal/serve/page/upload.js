// The form: a scan, a model, options; then what is sent, and how far it is.

import * as api from './api.js';
import { announce, bytesInWords, find, make, showProblem, swatch } from './dom.js';
import { filesOfDrop, guessChannels, inWords, recognise } from './scan.js';
import { zipOf } from './zip.js';

let models = [];
let chosen = null;
let listed = null;
let sending = null;
let mark = '';
let onJob = () => {};

/** What is asked for now is another job. What is sent again unchanged keeps its mark, and makes no second one. */
const renewMark = () => {
  mark = api.newMark();
};

const model = () => models.find((each) => each.name === find('model').value) ?? models[0];

/** Connect the form; `submitted` gets each new job and what its scan is called here. */
export function connectUpload(submitted) {
  onJob = submitted;
  for (const id of ['files', 'folder']) {
    find(id).addEventListener('change', () => {
      take([...find(id).files]);
      // The same choice again is a change, too.
      find(id).value = '';
    });
  }
  addEventListener('dragover', (event) => {
    event.preventDefault();
    document.body.classList.add('dragging');
  });
  addEventListener('dragleave', (event) => event.relatedTarget || document.body.classList.remove('dragging'));
  addEventListener('drop', (event) => {
    event.preventDefault();
    document.body.classList.remove('dragging');
    if (find('upload').hidden || sending) return;
    filesOfDrop(event.dataTransfer).then(take, () => showProblem('What was dropped can’t be read.'));
  });
  find('model').addEventListener('change', showModel);
  find('upload').addEventListener('change', renewMark);
  find('upload').addEventListener('submit', (event) => {
    event.preventDefault();
    if (!find('start').disabled) submit();
  });
  find('stop-sending').addEventListener('click', () => sending?.abort());
}

/** Fill in the models that are served. */
export function showModels(found) {
  models = found;
  find('model').replaceChildren(...found.map((each) => make('option', { value: each.name }, each.name)));
  find('model').disabled = found.length < 2;
  showModel();
}

function showModel() {
  const { network, channels, labels, license, mean_dice: dice, options } = model();
  const facts = [
    `${network}, takes ${channels.join(', ')}${dice === null ? '' : `, mean Dice ${dice.toFixed(3)} where it was tested`}; licence of its data: ${license}`,
  ].map((text) => make('p', { className: 'hint' }, text));
  const chips = labels.map(({ name, color }) => make('span', {}, swatch(color), name));
  find('model-facts').replaceChildren(...facts, make('div', { className: 'chips', 'aria-label': 'Labels' }, ...chips));
  for (const name of ['fast', 'mirror']) find(name).closest('label').hidden = !options[name];
  find('options').hidden = !options.fast && !options.mirror;
  renewMark();
  if (listed && find('series-list').dataset.channels !== channels.join()) showSeries();
  offer();
}

async function take(files) {
  showProblem('');
  renewMark();
  forgetSeries();
  try {
    chosen = files.length ? await recognise(files) : chosen;
  } catch (error) {
    chosen = null;
    showProblem(error.message);
  }
  offer();
}

/** Show what was chosen and whether it can be sent. */
function offer() {
  const count = model().channels.length;
  find('chosen').hidden = !chosen;
  find('channels').hidden = chosen?.kind !== 'images' || count < 2;
  if (chosen) {
    const size = chosen.files.reduce((sum, file) => sum + file.size, 0);
    find('chosen').textContent = `Chosen: ${inWords(chosen)} (${bytesInWords(size)})`;
  }
  const needed = count === 1 ? 'one file' : `${count} files, one per channel (${model().channels.join(', ')})`;
  const fits = !chosen || chosen.kind !== 'images' || chosen.files.length === count;
  if (chosen?.kind === 'images' && count > 1 && fits) offerChannels();
  else find('channel-list').replaceChildren();
  find('start').disabled = !chosen || !fits || Boolean(sending);
  find('start').textContent = listed ? 'Segment this series' : 'Segment';
  find('start-hint').textContent = !chosen ? 'Choose a scan first.' : fits ? '' : `This model takes ${needed}; ${chosen.files.length} were chosen.`;
}

function offerChannels() {
  const { channels } = model();
  const guessed = guessChannels(chosen.files, channels);
  const rows = channels.flatMap((channel, index) => {
    const select = make('select', { id: `channel-${index}` }, ...chosen.files.map((file, number) => make('option', { value: String(number) }, file.name)));
    select.value = String(guessed[index]);
    return [make('label', { htmlFor: select.id }, channel), select];
  });
  find('channel-list').replaceChildren(make('div', { className: 'pairs' }, ...rows));
}

const options = () => {
  const found = {};
  if (model().options.fast) found.fast = find('fast').checked;
  if (model().options.mirror) found.mirror = find('mirror').checked;
  return found;
};

async function submit() {
  showProblem('');
  const called = inWords(chosen);
  begin();
  try {
    const job = listed ? await submitSeries() : await submitFiles();
    if (job) {
      chosen = null;
      renewMark();
      forgetSeries();
      onJob(job, called);
    }
  } catch (error) {
    if (error.code !== 'aborted') showProblem(error.message);
    else announce(error.message);
    if (error.status === 404 && listed) forgetSeries();
  } finally {
    sending = null;
    find('sending').hidden = true;
    offer();
  }
}

function begin() {
  sending = new AbortController();
  find('start').disabled = true;
  find('sending').hidden = false;
  told('Sending', 0);
}

function told(words, share) {
  find('sent-words').textContent = `${words}: ${Math.floor(100 * share)} %`;
  find('sent').value = share;
}

async function submitFiles() {
  if (chosen.kind !== 'images') return submitStudy();
  const form = new FormData();
  const order = [...find('channel-list').querySelectorAll('select')].map((select) => Number(select.value));
  if (new Set(order).size < order.length) throw new Error('One file stands for two channels. Choose another for each.');
  for (const index of order.length ? order : [0]) {
    const file = chosen.files[index];
    // Bytes tell the service what it is; a name of a patient stays here.
    form.append('image', file, 'image');
  }
  form.append('model', model().name);
  form.append('options', JSON.stringify(options()));
  return post('api/v1/jobs', form);
}

const post = (address, form) =>
  api.send(address, form, {
    mark: address.endsWith('jobs') ? mark : '',
    signal: sending.signal,
    onProgress: (share) => told(share < 1 ? 'Sending' : 'Sent; the service looks at it', share),
  });

/** Send a study and learn its series; go on by itself where there is nothing to choose. */
async function submitStudy() {
  const { signal } = sending;
  let archive = chosen.files[0];
  if (chosen.kind === 'dicom') {
    archive = await zipOf(chosen.files, (share) => {
      if (signal.aborted) throw new api.Refused('Stopped. Nothing was kept.', 0, 'aborted');
      told('Packing', share);
    });
  }
  const form = new FormData();
  form.append('image', archive, 'study.zip');
  let found;
  try {
    found = await post('api/v1/series', form);
  } catch (error) {
    if (error.status !== 415 || chosen.kind !== 'zip') throw error;
    // A zip of something else, which a job may take all the same.
    form.append('model', model().name);
    form.append('options', JSON.stringify(options()));
    return post('api/v1/jobs', form);
  }
  const usable = found.series.filter((each) => each.usable);
  if (!usable.length) {
    const why = [...new Set(found.series.map((each) => each.why_not))].slice(0, 3).join('; ');
    throw new Error(`No series in it can be used: ${why || 'there are none'}`);
  }
  listed = { ...found, usable };
  if (usable.length === 1 && model().channels.length === 1) return submitSeries();
  showSeries();
  find('series-list').querySelector('input:enabled').focus();
  announce(`${usable.length} series can be used. Choose one${model().channels.length > 1 ? ' per channel' : ''}.`);
  return null;
}

function submitSeries() {
  const { channels } = model();
  const names = channels.map((_, index) => document.querySelector(`[name="series-${index}"]:checked`)?.value ?? (channels.length === 1 ? listed.usable[0].series_uid : ''));
  if (names.includes('')) throw new Error(`Choose a series for ${channels[names.indexOf('')]}.`);
  if (new Set(names).size < names.length) throw new Error('One series stands for two channels. Choose another for each.');
  return api.submitUpload(listed.upload, model().name, { ...options(), series_uid: names.join(',') }, mark);
}

function showSeries() {
  const { channels } = model();
  const groups = channels.map((channel, index) => {
    const rows = listed.series.map((each, number) => seriesRow(each, index, number));
    const title = channels.length > 1 ? [make('h3', {}, channel)] : [];
    return make('div', { role: 'radiogroup', 'aria-label': `Series for ${channel}` }, ...title, ...rows);
  });
  find('series-list').replaceChildren(...groups);
  find('series-list').dataset.channels = channels.join();
  find('series').hidden = false;
}

function seriesRow(each, channel, number) {
  // With several channels nothing is chosen beforehand: nobody would notice a wrong guess.
  const first = model().channels.length === 1 ? listed.series.findIndex((other) => other.usable) : -1;
  const id = `series-${channel}-${number}`;
  const input = make('input', { type: 'radio', id, name: `series-${channel}`, value: each.series_uid, disabled: !each.usable, checked: number === first });
  const size = each.shape ? `${each.shape.join(' × ')} voxels` : `${each.frames} pictures`;
  const spacing = each.spacing_mm ? `, ${each.spacing_mm.map((value) => Number(value.toPrecision(3))).join(' × ')} mm` : '';
  const words = [each.series_number, each.modality, each.description || 'no description'].filter((text) => text !== null).join(' · ');
  const more = each.usable ? `${size}${spacing}` : `can’t be used: ${each.why_not}`;
  return make('label', { className: `check${each.usable ? '' : ' unusable'}`, htmlFor: id }, input, make('span', {}, words, make('small', {}, more)));
}

function forgetSeries() {
  listed = null;
  find('series').hidden = true;
  find('series-list').replaceChildren();
}
