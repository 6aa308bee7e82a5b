// Small things that every part of the page needs of the document.

export const find = (id) => document.getElementById(id);

/** Make an element; children are elements or text, never markup, so that nothing of a file or a service can be run. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Tell readers of the screen; sighted people see it elsewhere. */
export function announce(text) {
  find('announcer').textContent = text;
}

/** Show what went wrong; nothing hides it. */
export function showProblem(text) {
  find('problem').textContent = text;
  find('problem').hidden = !text;
  if (text) find('problem').scrollIntoView({ block: 'nearest' });
}

/** Show one of the page's parts. */
export function showPart(id) {
  for (const part of ['key-form', 'upload', 'job', 'result']) find(part).hidden = part !== id;
}

export function bytesInWords(bytes) {
  const units = ['B', 'kB', 'MB', 'GB'];
  const step = bytes > 0 ? Math.min(3, Math.floor(Math.log10(bytes) / 3)) : 0;
  return `${(bytes / 1000 ** step).toFixed(step ? 1 : 0)} ${units[step]}`;
}

/** 1234.5 -> 1234, 12.34 -> 12.3, 0.1234 -> 0.123 */
export function millilitres(value) {
  if (value === undefined || value === null) return '–';
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value === 0 ? '0' : value.toFixed(value >= 1 ? 2 : 3);
}

export function timeInWords(iso) {
  const time = new Date(iso);
  const isToday = time.toDateString() === new Date().toDateString();
  const day = isToday ? {} : { day: 'numeric', month: 'short' };
  return time.toLocaleString(undefined, { hour: '2-digit', minute: '2-digit', ...day });
}

export const swatch = (color) => {
  const element = make('span', { className: 'swatch', 'aria-hidden': 'true' });
  element.style.backgroundColor = color;
  return element;
};
