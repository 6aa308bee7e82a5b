// What the page says to the service. Addresses are relative, so that the service may lie below any path of a proxy.

const KEY = 'sagittal-key';

/** What the service, or the connection to it, answered instead of what was asked for. */
export class Refused extends Error {
  constructor(message, status = 0, code = 'connection') {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const setKey = (key) => sessionStorage.setItem(KEY, key);
export const forgetKey = () => sessionStorage.removeItem(KEY);
export const hasKey = () => Boolean(sessionStorage.getItem(KEY));

function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { 'X-API-Key': key, ...more } : more;
}

function refusedBy(status, text) {
  try {
    const { message, code } = JSON.parse(text).error;
    return new Refused(message, status, code);
  } catch {
    return new Refused(`The service answered with status ${status} and no words.`, status, 'status');
  }
}

async function ask(address, options = {}) {
  let answer;
  try {
    answer = await fetch(address, { ...options, headers: headers(options.headers) });
  } catch {
    throw new Refused('The service does not answer. Is it running, and is the network there?');
  }
  if (!answer.ok) throw refusedBy(answer.status, await answer.text());
  return answer;
}

const json = async (address, options) => (await ask(address, options)).json();

export const models = async () => (await json('api/v1/models')).models;
export const job = (id) => json(`api/v1/jobs/${id}`);
export const jobs = (after) => json(`api/v1/jobs?limit=50${after ? `&after=${after}` : ''}`);
export const cancel = (id) => json(`api/v1/jobs/${id}/cancel`, { method: 'POST' });
export const remove = (id) => ask(`api/v1/jobs/${id}`, { method: 'DELETE' });
export const filesToView = () => json('files.json');

/** A word that marks a request, so that it makes one job however often it is sent. */
export function newMark() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

/** Ask for a job of an upload whose series were listed. */
export const submitUpload = (upload, model, options, mark) =>
  json('api/v1/jobs', {
    method: 'POST',
    headers: { 'Content-Type': 'application/json', 'Idempotency-Key': mark },
    body: JSON.stringify({ upload, model, options }),
  });

/** Send a form; `onProgress` gets the share that was sent. `fetch` tells nothing of that. */
export function send(address, form, { onProgress, signal, mark }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open('POST', address);
    const sent = mark ? { 'Idempotency-Key': mark } : {};
    for (const [name, value] of Object.entries(headers(sent))) request.setRequestHeader(name, value);
    request.upload.addEventListener('progress', (event) => event.lengthComputable && onProgress(event.loaded / event.total));
    request.addEventListener('load', () => {
      if (request.status >= 200 && request.status < 300) resolve(JSON.parse(request.responseText));
      else reject(refusedBy(request.status, request.responseText));
    });
    request.addEventListener('error', () => reject(new Refused('The connection broke while the scan was sent. Send it again: it makes one job only.')));
    request.addEventListener('abort', () => reject(new Refused('Stopped. Nothing was kept.', 0, 'aborted')));
    signal.addEventListener('abort', () => request.abort());
    request.send(form);
  });
}

/** Read a file of the service whole. */
export async function bytesOf(href, onProgress = () => {}) {
  const answer = await ask(href);
  const total = Number(answer.headers.get('Content-Length')) || 0;
  if (!answer.body || !total) return answer.arrayBuffer();
  const whole = new Uint8Array(total);
  let filled = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (filled + value.length > total) return answerAgain(href);
    whole.set(value, filled);
    filled += value.length;
    onProgress(filled / total);
  }
  return filled === total ? whole.buffer : answerAgain(href);
}

// A proxy that packs answers makes the stated length wrong.
const answerAgain = async (href) => (await ask(href)).arrayBuffer();

/** Save a file of the service; a link can't send the key. */
export async function save(href, name) {
  const address = URL.createObjectURL(await (await ask(href)).blob());
  const link = document.createElement('a');
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}
