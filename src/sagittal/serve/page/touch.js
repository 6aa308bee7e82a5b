// Two fingers on a picture move it and, apart or together, make it larger or smaller. One finger is the library's.

const middleOf = ([a, b]) => ({ x: (a.clientX + b.clientX) / 2, y: (a.clientY + b.clientY) / 2, apart: Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY) });

/** Tell `moved` from where to where (x, y in CSS pixels of the window) two fingers went, and by what factor apart. */
export function connectTouch(box, moved) {
  let last = null;
  let isOurs = false;
  const follow = (event) => {
    isOurs ||= event.touches.length > 1;
    if (!isOurs) return;
    // The library would scroll by it, and a finger that stays would make the cross jump.
    event.stopPropagation();
    event.preventDefault();
    const now = event.touches.length === 2 ? middleOf(event.touches) : null;
    if (now && last) moved(last, now, now.apart / Math.max(1, last.apart));
    last = now;
  };
  const end = (event) => {
    last = null;
    // It must hear of the last finger, since it saw the first one.
    if (isOurs && event.touches.length) event.stopPropagation();
    else isOurs = false;
  };
  for (const kind of ['touchstart', 'touchmove']) box.addEventListener(kind, follow, { capture: true, passive: false });
  for (const kind of ['touchend', 'touchcancel']) box.addEventListener(kind, end, { capture: true });
}
