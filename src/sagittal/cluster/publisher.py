"""A thread that puts a fold's newest checkpoint into a store while the fold is trained.

What is sent is first set aside: files that are written once by a second name, which costs nothing, and logs that grow
by a copy. So training may replace and remove its files meanwhile, and what is published belongs together.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from sagittal.cluster.carried_inputs import patiently
from sagittal.cluster.shared import Store
from sagittal.errors import ResourceError, SagittalError

LOOK_EVERY_S = 0.5
FIRST_WAIT_S = 2.0
"""Before what could not be published is tried again; doubled each time, up to a minute."""
LAST_S = 180.0
"""How long it is tried at the end of a fold before it counts as failed."""
_TRIES = 5
_WRITTEN_ONCE = (".safetensors", ".sha256")


class Publisher:
    """Publishes a fold's folder after each checkpoint while the block runs, and `last` all of it.

    Args:
        store: where to.
        name: of what is published.
        folder: of the fold.
        counts: tells whether this attempt at the fold still counts; one that does not publishes nothing.
        say: receives lines for a person.
    """

    def __init__(
        self, store: Store, name: str, folder: Path, counts: Callable[[], bool], say: Callable[[str], None]
    ) -> None:
        self._store, self._name, self._folder, self._counts, self._say = store, name, folder, counts, say
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="publish", daemon=True)

    def __enter__(self) -> Publisher:
        """Begin to look for checkpoints; one that is there already was fetched."""
        self._sent = newest_name(self._folder)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End after what is being sent."""
        self._over.set()
        self._thread.join()

    def last(self) -> None:
        """Publish the whole folder, which nobody writes any more.

        Raises:
            ResourceError: it can't be published; the folder is kept and named.
        """
        try:
            patiently(
                lambda: self._publish(self._folder), within_s=LAST_S, told=self._tell, first_s=min(FIRST_WAIT_S, LAST_S)
            )
        except SagittalError as error:
            kept = _kept(self._folder)
            raise ResourceError(
                f"what it made could not be put into the store ({error.message}). It lies in {kept} on its node: copy "
                f"that folder to {self._folder.name} of the run folder and go on with --resume.",
                code="not_published",
            ) from None

    def _watch(self) -> None:
        wait_s = FIRST_WAIT_S
        while not self._over.wait(LOOK_EVERY_S):
            newest = newest_name(self._folder)
            if newest is None or newest == self._sent:
                continue
            try:
                with tempfile.TemporaryDirectory(dir=self._folder.parent, ignore_cleanup_errors=True) as aside:
                    sent = set_aside(self._folder, Path(aside))
                    self._publish(Path(aside))
            except (SagittalError, OSError) as error:
                self._tell(error)
                if self._over.wait(wait_s):
                    return
                wait_s = min(2 * wait_s, 60.0)
            else:
                self._sent, wait_s = sent, FIRST_WAIT_S

    def _publish(self, folder: Path) -> None:
        if self._counts():
            self._store.publish(self._name, folder)

    def _tell(self, error: Exception) -> None:
        message = error.message if isinstance(error, SagittalError) else str(error)
        self._say(f"could not put the fold into the store; it is tried again: {message}")


def newest_name(folder: Path) -> str | None:
    """Return the name of the newest checkpoint that was finished, without its suffix; None where there is none."""
    return max((path.stem for path in folder.glob("checkpoint_*.sha256")), default=None)


def set_aside(folder: Path, target: Path) -> str | None:
    """Fill an empty folder with a fold's files as they are now, of its checkpoints the newest; return that one's name.

    Raises:
        ResourceError: checkpoints follow each other faster than they can be set aside.
    """
    for _ in range(_TRIES):
        newest = newest_name(folder)
        for path in sorted(folder.rglob("*")):
            old = path.name.startswith("checkpoint_") and path.stem != newest
            if not old and path.suffix != ".part" and path.is_file():
                _copy(path, target / path.relative_to(folder))
        # Best weights that it speaks of are dropped after the next one was written.
        if newest == newest_name(folder) and (newest is None or (target / f"{newest}.safetensors").is_file()):
            return newest
        shutil.rmtree(target)
        target.mkdir()
        time.sleep(0)
    raise ResourceError(f"{folder}: checkpoints are written faster than they can be sent.", code="store")


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if path.suffix in _WRITTEN_ONCE:
            try:
                os.link(path, target)
            except FileNotFoundError:
                raise
            except OSError:  # a disk without second names
                shutil.copyfile(path, target)
        else:
            shutil.copyfile(path, target)
    except FileNotFoundError:
        target.unlink(missing_ok=True)  # It was dropped meanwhile.


def _kept(folder: Path) -> Path:
    """Move a fold's folder to where it outlives the run's others on this node, and return where."""
    node = folder.parent.parent
    kept = node.with_name(f"{node.name.replace('-train-', '-kept-')}-{folder.parent.name}") / folder.name
    try:
        kept.parent.mkdir(mode=0o700, exist_ok=True)
        folder.rename(kept)
    except OSError:
        return folder
    return kept
