// The page: which part is seen, and where what is shown comes from: jobs of the service, or files of `sagittal view`.

import * as api from './api.js';
import { connectControls, showControls } from './controls.js';
import { announce, bytesInWords, find, make, showPart, showProblem, timeInWords } from './dom.js';
import { connectJobs, ended, follow, nameOf, refreshList, remember } from './jobs.js';
import { connectUpload, showModels } from './upload.js';
import { Viewer } from './viewer.js';

const FORMATS = {
  nifti: 'NIfTI', json: 'JSON', png: 'picture', seg: 'DICOM segmentation', labelmap: 'DICOM label map',
  rtstruct: 'DICOM RTSTRUCT', overview: 'DICOM overview', sr: 'DICOM report of volumes',
};
const NAMES = { 'labels.nii.gz': 'Labels, NIfTI', 'image.nii.gz': 'Scan, NIfTI', 'volumes.json': 'Volumes, JSON', 'preview.png': 'Overview, picture' };

export const viewer = new Viewer(find('stage'));
let models = [];
let shownJob = '';

find('open-help').addEventListener('click', () => find('help').showModal());
addEventListener('keydown', (event) => {
  const isTyping = event.target.matches?.('input[type="password"], select');
  if (event.key === '?' && !isTyping && !find('help').open) {
    event.preventDefault();
    find('help').showModal();
  }
});
connectControls(viewer);
if (document.documentElement.dataset.mode === 'files') startFiles();
else startService();

async function startService() {
  connectUpload((job, name) => {
    remember(job, name);
    location.hash = `#job=${job.id}`;
  });
  connectJobs(showResult);
  addEventListener('hashchange', route);
  addEventListener('key-needed', askForKey);
  find('key-form').addEventListener('submit', (event) => {
    event.preventDefault();
    api.setKey(find('key').value.trim());
    find('key').value = '';
    begin();
  });
  await begin();
}

async function begin() {
  showProblem('');
  try {
    models = await api.models();
  } catch (error) {
    if (error.status === 401) askForKey();
    else {
      showProblem(`${error.message} Trying again.`);
      setTimeout(begin, 3000);
    }
    return;
  }
  showModels(models);
  find('jobs').hidden = false;
  await refreshList();
  route();
}

function askForKey() {
  if (api.hasKey()) showProblem('This key is not valid here.');
  api.forgetKey();
  find('jobs').hidden = true;
  showPart('key-form');
  find('key').focus();
}

/** The address says what is seen, so that a reload, a bookmark and going back lead to the same. */
function route() {
  showProblem('');
  const id = /^#job=([0-9a-f]{32})$/.exec(location.hash)?.[1] ?? '';
  if (id !== shownJob) viewer.close();
  shownJob = '';
  follow(id);
  if (!id) showPart('upload');
  document.title = id ? 'Job · Sagittal' : 'Sagittal';
}

async function setOf(job, name) {
  const model = models.find((each) => each.name === job.model);
  const result = job.results.find((each) => each.name === 'labels.nii.gz');
  const names = Object.keys(job.volumes_ml);
  const labels = (model?.labels ?? []).filter((label) => !names.length || names.includes(label.name));
  return { name, labels, volumes: job.volumes_ml, file: result.name, buffer: await api.bytesOf(result.href) };
}

async function showResult(job) {
  if (shownJob === job.id) return;
  shownJob = job.id;
  const name = nameOf(job) ?? job.model;
  document.title = `${name} · Sagittal`;
  find('result-title').textContent = name;
  find('result-words').textContent = `${job.model} · ${timeInWords(job.ended)}${job.expires ? ` · kept until ${timeInWords(job.expires)}` : ''}`;
  find('flags').replaceChildren(...job.flags.map((flag) => make('li', {}, flag)));
  find('flags').hidden = !job.flags.length;
  showDownloads(job);
  showPart('result');
  const isCt = /^ct\b/i.test(models.find((each) => each.name === job.model)?.channels[0] ?? '') || undefined;
  const others = ended().filter((each) => each.id !== job.id).map((each) => {
    const called = `${nameOf(each) ?? each.model}, ${timeInWords(each.created)}`;
    return { name: called, load: () => setOf(each, called) };
  });
  await present(async (onProgress) => ({
    image: { name: 'image.nii.gz', buffer: await api.bytesOf(job.results.find((each) => each.name === 'image.nii.gz').href, onProgress) },
    sets: [await setOf(job, job.model)],
    others,
    isCt,
  }), () => shownJob === job.id);
  announce(`Done: ${name}`);
}

function showDownloads(job) {
  const rows = job.results.map(({ name, format, bytes, href }) => {
    const link = make('a', { href, download: name }, NAMES[name] ?? FORMATS[format] ?? name);
    link.addEventListener('click', (event) => {
      if (!api.hasKey()) return;
      event.preventDefault();
      api.save(href, name).catch((error) => showProblem(error.message));
    });
    return make('li', {}, link, make('small', {}, bytesInWords(bytes)));
  });
  find('downloads').replaceChildren(...rows);
}

/** Load and show; `isWanted` tells whether somebody has gone elsewhere meanwhile. */
async function present(load, isWanted = () => true) {
  find('loading').hidden = false;
  find('loading').textContent = 'Loading the pictures';
  try {
    const found = await load((share) => { find('loading').textContent = `Loading the pictures: ${Math.floor(100 * share)} %`; });
    if (!isWanted()) return;
    await viewer.show(found.image, found.sets);
    if (!isWanted()) return;
    await showControls(found);
  } catch (error) {
    showProblem(`The pictures can’t be shown: ${error.message ?? error}`);
  } finally {
    find('loading').hidden = true;
  }
}

async function startFiles() {
  let listing;
  try {
    listing = await api.filesToView();
  } catch (error) {
    showProblem(error.message);
    return;
  }
  find('downloads-box').hidden = true;
  find('job-actions').hidden = true;
  document.title = `${listing.title} · Sagittal`;
  find('result-title').textContent = listing.title;
  find('result-words').textContent = listing.words;
  showPart('result');
  await present(async (onProgress) => ({
    image: { name: 'image.nii', buffer: await api.bytesOf(listing.image, onProgress) },
    sets: await Promise.all(listing.sets.map(async ({ name, href, labels, volumes_ml: volumes }) => ({ name, labels, volumes, file: 'labels.nii.gz', buffer: await api.bytesOf(href) }))),
    isCt: listing.is_ct ?? undefined,
    compare: listing.compare,
  }));
}
