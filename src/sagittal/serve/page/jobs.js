// Jobs: the list of them, and the one that is looked at, followed until it has ended.

import * as api from './api.js';
import { announce, find, make, showPart, showProblem, timeInWords } from './dom.js';

const NAMES = 'sagittal-names';
const STATES = { queued: 'waits', running: 'runs', done: 'done', failed: 'failed', cancelled: 'cancelled' };
const STAGES = { queued: 'Waits', reading: 'Reading the scan', computing: 'Computing', writing: 'Writing the results' };
const FIRST_LOOK_MS = 400;
const LAST_LOOK_MS = 2000;
const LIST_LOOK_MS = 5000;

let shown = '';
let timer = 0;
let asked = 0; // an answer counts where nothing was asked after it
let onDone = () => {};
let listed = [];
let next = null;

export const hasEnded = (job) => ['done', 'failed', 'cancelled'].includes(job.state);

/** The scan's name as it was chosen in this tab; the service never gets it. */
export const nameOf = (job) => JSON.parse(sessionStorage.getItem(NAMES) ?? '{}')[job.id];

export function remember(job, name) {
  sessionStorage.setItem(NAMES, JSON.stringify({ ...JSON.parse(sessionStorage.getItem(NAMES) ?? '{}'), [job.id]: name }));
}

/** Connect the buttons; `done` gets a job that is to be looked at. */
export function connectJobs(done) {
  onDone = done;
  find('cancel').addEventListener('click', () => act(api.cancel));
  for (const button of document.querySelectorAll('.delete')) button.addEventListener('click', () => deleteShown(button));
  find('more-jobs').addEventListener('click', async () => {
    const more = await api.jobs(next).catch((error) => showProblem(error.message));
    if (!more) return;
    listed = [...listed, ...more.jobs];
    next = more.next;
    showList();
  });
  find('history-box').open = matchMedia('(min-width: 1101px)').matches;
  setInterval(() => document.hidden || refreshList(), LIST_LOOK_MS);
}

/** Read the list anew; earlier pages that were asked for stay. */
export async function refreshList() {
  let found;
  try {
    found = await api.jobs();
  } catch {
    return; // the next look will tell
  }
  const last = found.jobs.at(-1)?.created ?? '';
  const earlier = found.next ? listed.filter((job) => job.created < last) : [];
  listed = [...found.jobs, ...earlier];
  if (!earlier.length) next = found.next;
  showList();
}

export const ended = () => listed.filter((job) => job.state === 'done');

function showList() {
  const focused = document.activeElement?.closest('#history a')?.hash;
  const rows = listed.map((job) => {
    const state = job.state === 'running' ? `runs, ${Math.floor(100 * job.progress)} %` : STATES[job.state];
    const name = nameOf(job);
    const words = `${timeInWords(job.created)} · ${name ? `${job.model} · ` : ''}${state}`;
    const link = make('a', { href: `#job=${job.id}` }, name ?? job.model, make('span', { className: `state ${job.state}` }, words));
    if (job.id === shown) link.setAttribute('aria-current', 'page');
    return make('li', {}, link);
  });
  find('history').replaceChildren(...rows);
  if (focused) find('history').querySelector(`a[href="${focused}"]`)?.focus();
  find('no-jobs').hidden = listed.length > 0;
  find('more-jobs').hidden = !next;
}

/** Follow a job until it has ended; the empty id follows none. */
export function follow(id) {
  clearTimeout(timer);
  shown = id;
  showList();
  if (!id) return;
  find('job-error').hidden = true;
  find('job-words').textContent = 'Asking for it';
  look(id, FIRST_LOOK_MS);
}

async function look(id, pause) {
  const mine = ++asked;
  let job;
  try {
    job = await api.job(id);
  } catch (error) {
    if (id !== shown || mine !== asked) return;
    if (error.status === 401) return void dispatchEvent(new Event('key-needed'));
    if (error.status >= 400 && error.status < 500) {
      showPart('upload');
      return showProblem(error.message);
    }
    find('job-words').textContent = `${error.message} Trying again.`;
    showPart('job');
    timer = setTimeout(look, LAST_LOOK_MS, id, LAST_LOOK_MS);
    return;
  }
  if (id === shown && mine === asked) told(job, pause);
}

function told(job, pause) {
  show(job);
  if (!hasEnded(job)) timer = setTimeout(look, pause, job.id, Math.min(LAST_LOOK_MS, pause * 1.3));
}

function show(job) {
  const isOver = hasEnded(job);
  find('cancel').hidden = isOver;
  find('job').querySelector('.delete').hidden = !isOver;
  if (job.state === 'done') {
    refreshList();
    onDone(job);
    return;
  }
  showPart('job');
  find('job-title').textContent = nameOf(job) ?? `Job of ${timeInWords(job.created)}`;
  find('job-progress').hidden = isOver;
  find('job-progress').value = job.progress;
  const words = inWords(job);
  if (find('job-words').textContent !== words) find('job-words').textContent = words;
  find('job-error').hidden = !job.error;
  if (job.error && find('job-error').textContent !== job.error.message) find('job-error').textContent = job.error.message;
  if (isOver) {
    refreshList();
    announce(`The job ${STATES[job.state]}.`);
  }
}

function inWords(job) {
  const again = job.attempt > 1 ? ` (attempt ${job.attempt})` : '';
  if (job.state === 'queued') {
    const before = job.queue_position === null ? 0 : job.queue_position;
    return `${job.model}: waits, number ${Math.max(1, before)} in the queue${again}`;
  }
  if (job.state === 'running') return `${job.model}: ${STAGES[job.stage].toLowerCase()}, ${Math.floor(100 * job.progress)} %${again}`;
  return job.state === 'failed' ? `${job.model}: failed` : `${job.model}: cancelled`;
}

async function act(request) {
  const id = shown;
  const mine = ++asked;
  clearTimeout(timer);
  try {
    const job = await request(id);
    if (id === shown && mine === asked) told(job, FIRST_LOOK_MS);
  } catch (error) {
    showProblem(error.message);
    if (id === shown && mine === asked) look(id, FIRST_LOOK_MS);
  }
}

/** Delete at the second press, so that no result is lost to one that was meant for something else. */
async function deleteShown(button) {
  if (!button.dataset.asked) {
    button.dataset.asked = 'yes';
    button.textContent = 'Delete it for good? Press again';
    setTimeout(() => {
      delete button.dataset.asked;
      button.textContent = 'Delete this job';
    }, 4000);
    return;
  }
  try {
    await api.remove(shown);
    listed = listed.filter((job) => job.id !== shown);
    location.hash = '#new';
  } catch (error) {
    showProblem(error.message);
  }
}
