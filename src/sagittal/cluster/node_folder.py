"""A node's own folder for a run whose nodes share no disk: folds of one node fetch what they need once, together.

    TMPDIR/sagittal-RUN-NODE/in-use        locked by each fold while it is there
                            /inputs        prepared cases, scans, weights to start from; shared by the node's folds
                            /got, /locks   which of the inputs are there; who fetches one
                            /run-ATTEMPT   as OUT.run on one machine, with the folder of one fold

A worker that predicts has one for itself, locked likewise, with the bundle, its scans and results.

It holds what patients gave, so nobody but its owner can look into it.
"""

from __future__ import annotations

import importlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sagittal.errors import ResourceError
from sagittal.plan.base import cannot_write, write_atomically
from sagittal.plan.lock import alone

LEFT_S = 3600.0
"""A folder in which no fold was for so long was left by a run whose command or node was lost."""
END_S = 10.0
"""How long it is waited for processes that are being ended, before a run's folders are removed."""
_START = "sagittal-"
_RUNS = ("train-*", "predict-*")
_IN_USE = "in-use"
# Ray's nodes on Windows are for trying things out; there, folds of one node may fetch the same twice.
_locks: Any = importlib.import_module("fcntl") if os.name == "posix" else None


class NodeFolder:
    """The folder of one run on this node.

    Args:
        path: see `node_folder`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.inputs = path, path / "inputs"

    def once(self, name: str, content: str, fetch: Callable[[], object]) -> bool:
        """Fetch one of the inputs, unless a fold of this node has; wait where one is at it. Tell whether it was done.

        Args:
            name: of the input.
            content: hash of what it holds.
            fetch: writes it below `inputs`.
        """
        got = self.path / "got" / name
        with alone(self.path / "locks" / name):
            if got.is_file() and got.read_text(encoding="ascii") == content:
                return False
            fetch()
            write_atomically(got, content.encode())
            return True


@contextmanager
def node_folder(run: str, node: str) -> Iterator[NodeFolder]:
    """Yield this node's folder of a run, which stays until `removing`; first drop what lost runs left.

    Args:
        run: its name in the store.
        node: Ray's name of the node, as several may be on one machine, or of a worker that shares it with no other.

    Raises:
        ResourceError: the folder can't be made, or belongs to somebody else.
    """
    path = Path(tempfile.gettempdir()) / f"{_START}{run}-{node}"
    remove_left(path)
    with _present(path):
        yield NodeFolder(path)


def remove_left(mine: Path) -> None:
    """Remove folders of this user's other runs in which no fold and no worker was for an hour."""
    for path in (path for run in _RUNS for path in mine.parent.glob(_START + run)):
        file = path / _IN_USE
        with suppress(OSError):
            if path == mine or _locks is None or not _is_own(path) or time.time() - file.stat().st_mtime < LEFT_S:
                continue
            with file.open("rb") as opened:
                _locks.flock(opened, _locks.LOCK_EX | _locks.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)


def removing(run: str) -> Callable[[], None]:
    """Return what removes a run's folders from a node, pickled by value: a worker that removes need not load torch.

    Processes that are in them are being ended, and could write once more: their locks are waited for.
    """
    start, in_use, end_s = _START, _IN_USE, END_S

    def remove() -> None:
        import importlib  # noqa: PLC0415 - it runs on a node that gets this function and nothing around it
        import os  # noqa: PLC0415
        import shutil  # noqa: PLC0415
        import tempfile  # noqa: PLC0415
        import time  # noqa: PLC0415
        from contextlib import suppress  # noqa: PLC0415
        from pathlib import Path  # noqa: PLC0415

        locks: Any = importlib.import_module("fcntl") if os.name == "posix" else None
        until = time.monotonic() + end_s
        for path in Path(tempfile.gettempdir()).glob(f"{start}{run}-*"):
            with suppress(OSError), (path / in_use).open("rb") as file:
                while locks is not None:
                    try:
                        locks.flock(file, locks.LOCK_EX | locks.LOCK_NB)
                        break
                    except BlockingIOError:
                        if time.monotonic() > until:
                            break
                    time.sleep(0.05)
            shutil.rmtree(path, ignore_errors=True)

    return remove


@contextmanager
def _present(path: Path) -> Iterator[None]:
    """Hold a folder while the block runs, so that nobody takes it for one that was left."""
    while True:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_own(path):
                raise ResourceError(f"{path}: is not a folder of this user alone. Remove it, or set another TMPDIR.")
            file = (path / _IN_USE).open("ab")
        except OSError as error:
            raise cannot_write(path, error, note="TMPDIR says where it lies.") from None
        with file:
            if _locks is not None:
                _locks.flock(file, _locks.LOCK_SH)
            if _is_there(file.fileno(), path / _IN_USE):
                os.utime(path / _IN_USE)
                try:
                    yield
                finally:
                    with suppress(OSError):
                        os.utime(path / _IN_USE)
                return
        # It was removed between being made and being locked.


def _is_there(descriptor: int, path: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except OSError:
        return False


def _is_own(path: Path) -> bool:
    found = path.lstat()
    mine = os.name != "posix" or (found.st_uid == os.getuid() and not found.st_mode & 0o077)
    return stat.S_ISDIR(found.st_mode) and mine
