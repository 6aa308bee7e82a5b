"""What tests of the service share: a client for it, scans, and what a worker would do."""

from __future__ import annotations

import functools
import gc
import io
import json
import sys
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np

from sagittal.serve.jobs import Job, Outcome, ResultFile
from sagittal.serve.service import Service
from sagittal.testing.datasets import AFFINE, TINY_SETTINGS
from sagittal.volumes import Volume

with warnings.catch_warnings():
    # It would rather have another HTTP client; httpx is the one that is kept by its community.
    warnings.simplefilter("ignore")
    from starlette.testclient import TestClient

# The makers of DICOM series lie beside the tests of the readers.
sys.path.append(str(Path(__file__).parents[1] / "volumes"))

__all__ = ["TestClient"]

SHAPE = (9, 12, 10)
TINY = {name: value for name, value in TINY_SETTINGS.items() if name.startswith(("network.", "patch."))}


PATIENCE_S = 120.0
"""For what another process does."""


class NobodyWorks:
    """A supervisor that computes nothing; tests do what a worker would."""

    workers = 1

    def __init__(self) -> None:
        self.ready_workers, self.is_stopping, self.wakes = 1, False, 0

    def start(self) -> None:
        pass

    def wake(self) -> None:
        self.wakes += 1

    def stop(self, grace_s: float) -> None:
        self.is_stopping = True


def scan_bytes(seed: int = 0, suffix: str = ".nii.gz", folder: Path | None = None) -> bytes:
    """Return a small scan as a file's bytes."""
    assert folder is not None
    array = np.random.default_rng(seed).normal(100, 20, SHAPE).astype(np.float32)
    return Volume(array[None], AFFINE).write(folder / f"made{suffix}").read_bytes()


def service(client: TestClient) -> Service:
    found = client.app.state.service  # type: ignore[attr-defined]
    assert isinstance(found, Service)
    return found


def send(client: TestClient, *images: bytes, options: Any = None, **more: Any) -> Any:
    """Submit images and return the response."""
    files = [("image", (f"DOE^JOHN_{number}.nii", io.BytesIO(image))) for number, image in enumerate(images)]
    data = {} if options is None else {"options": json.dumps(options)}
    return client.post("/api/v1/jobs", files=files, data=data | more.pop("data", {}), **more)


def error_of(response: Any, status: int, code: str) -> str:
    """Check that a response is an error in the one shape, and return its message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"type", "code", "message"}
    assert body["error"]["code"] == code, body
    message = body["error"]["message"]
    assert "DOE" not in message and "/serve/" not in message and "Traceback" not in message
    return str(message)


def compute(client: TestClient, content: bytes = b"labels") -> Job:
    """Do what a worker does with the job that waits longest."""
    held = service(client)
    job = held.store.claim("worker")
    assert job is not None
    folder = held.settings.job_folder(job.id) / "results"
    folder.mkdir()
    (folder / "labels.nii.gz").write_bytes(content)
    file = ResultFile(
        name="labels.nii.gz", format="nifti", media_type="application/gzip", bytes=len(content), sha256="a" * 64
    )
    assert held.store.finish(job.id, "worker", Outcome(volumes_ml={"class_1": 1.5}, flags=("look",), results=(file,)))
    return held.store.get(job.id)


def until(look: Callable[[], Any]) -> Any:
    """Return what `look` gives once it gives something."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if (found := look()) is not None:
            return found
        time.sleep(0.02)
    raise AssertionError("it took too long")


def held_by(*roots: object) -> Counter[str]:
    """Count by type what objects hold, and what that holds in turn.

    Classes, functions and modules are not entered, nor caches that have a limit. SQLite's connections keep weak
    references to cursors that are gone, some hundred at the most.
    """
    gc.collect()
    seen, found, left = {id(roots)}, Counter[str](), list(roots)
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, type | FunctionType | ModuleType | weakref.ref):
            continue
        if isinstance(one, functools._lru_cache_wrapper) and one.cache_info().maxsize is not None:
            continue
        seen.add(id(one))
        found[f"{type(one).__module__}.{type(one).__qualname__}"] += 1
        left += gc.get_referents(one)
    return found
