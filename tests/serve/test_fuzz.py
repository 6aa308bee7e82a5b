"""Five hundred damaged scans: each is refused in the one shape, read after all, or ends its job with a stated error."""

from __future__ import annotations

import gzip
import io
import json
import logging
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import SHAPE, TestClient, scan_bytes, send, service

from dicom_scans import SECRET, write_series  # isort: skip - beside the tests of the readers
from sagittal.serve.settings import Limits
from sagittal.serve.worker import JobTask, Task, Worker, failure_of
from sagittal.testing.datasets import AFFINE
from sagittal.volumes import Volume

pytestmark = pytest.mark.slow
NUMBER = 500
Bytes = Callable[[np.random.Generator, bytes], bytes]


def _flip(rng: np.random.Generator, content: bytes) -> bytes:
    changed = bytearray(content)
    # Mostly in the header, where it hurts.
    reach = len(content) if rng.random() < 0.3 else min(len(content), 800)
    for place in rng.integers(0, reach, int(rng.integers(1, 12))):
        changed[place] = int(rng.integers(0, 256))
    return bytes(changed)


def _cut(rng: np.random.Generator, content: bytes) -> bytes:
    return content[: int(rng.integers(0, len(content)))]


def _grow(rng: np.random.Generator, content: bytes) -> bytes:
    place, more = int(rng.integers(0, len(content))), rng.integers(0, 256, int(rng.integers(1, 5000)), dtype=np.uint8)
    return content[:place] + more.tobytes() + content[place:]


def _repeat(rng: np.random.Generator, content: bytes) -> bytes:
    start, stop = sorted(int(place) for place in rng.integers(0, len(content), 2))
    return content[:stop] + content[start:]


def _extreme(rng: np.random.Generator, content: bytes) -> bytes:
    """Write the numbers that break arithmetic over a word of the header."""
    value = [b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", struct.pack("<f", float("nan")),
             struct.pack("<f", float("inf")), b"\0\0\0\0", b"9999"][int(rng.integers(0, 7))]  # fmt: skip
    place = int(rng.integers(0, min(len(content), 600) - 4))
    return content[:place] + value + content[place + 4 :]


MUTATIONS: tuple[Bytes, ...] = (_flip, _flip, _extreme, _extreme, _cut, _grow, _repeat)


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    array = np.random.default_rng(0).integers(0, 500, (1, *SHAPE)).astype(np.int16)
    folder = write_series(tmp_path_factory.mktemp("series"), Volume(array, AFFINE), modality="CT")
    return [path.read_bytes() for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    return {suffix: scan_bytes(suffix=suffix, folder=folder) for suffix in (".nii", ".nii.gz", ".nrrd", ".mha")}


@pytest.fixture(scope="module")
def reader(tiny_bundle: Path) -> Worker:
    """A worker that reads as any other; that it has no network yet saves the time."""
    task = Task(
        models={"tiny": str(tiny_bundle)}, device="cpu", engine="auto", precision="fp32", threads=1, memory_gib=1.0,
        cache_folder=None, unpacked_bytes=64 << 20, allowed_folders=(), debug=False,
    )  # fmt: skip
    return Worker(task, lambda **message: None)


def _zipped(slices: list[bytes]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for number, content in enumerate(slices):
            archive.writestr(f"{SECRET}/{number}", content)
    return target.getvalue()


def _damaged(rng: np.random.Generator, number: int, whole: dict[str, bytes], slices: list[bytes]) -> bytes:
    mutate = MUTATIONS[int(rng.integers(0, len(MUTATIONS)))]
    match number % 10:
        case 0 | 1 | 2:
            return mutate(rng, whole[".nii"])
        case 3:
            return mutate(rng, whole[".nii.gz"])
        case 4:  # damaged before it was packed
            return gzip.compress(mutate(rng, whole[".nii"]), 1)
        case 5:
            return mutate(rng, whole[".nrrd" if rng.random() < 0.5 else ".mha"])
        case 6:
            return mutate(rng, slices[0])
        case 7:
            return mutate(rng, _zipped(slices))
        case _:  # a slice or two of a series
            changed = list(slices)
            for place in rng.integers(0, len(slices), int(rng.integers(1, 3))):
                changed[place] = mutate(rng, changed[place])
            return _zipped(changed)


def _read(client: TestClient, reader: Worker, job: str) -> dict[str, str] | None:
    """Do what a worker does before it computes; return what the job would have failed with."""
    held = service(client)
    stored, folder = held.store.get(job), held.settings.job_folder(job)
    task = JobTask(id=job, model="tiny", options=stored.options, input=stored.input, folder=str(folder),
                   out=str(folder / "attempt"))  # fmt: skip
    try:
        reader.read(task, held.models["tiny"].bundle)
    except Exception as error:
        return failure_of(error, task)
    return None


def test_five_hundred_damaged_scans_are_refused_or_read_and_nothing_is_told(
    served: Callable[..., TestClient],
    reader: Worker,
    whole: dict[str, bytes],
    slices: list[bytes],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    limits = Limits(upload_bytes=4 << 20, unpacked_bytes=64 << 20, files=50, queued=NUMBER, free_bytes=0)
    client, rng, ends = served(limits=limits), np.random.default_rng(2026), Counter[Any]()
    with caplog.at_level(logging.DEBUG):
        for number in range(NUMBER):
            answer = send(client, _damaged(rng, number, whole, slices))
            told: Any = answer.json()
            if answer.status_code == 202:
                told = _read(client, reader, told["id"])
                ends["read" if told is None else told["code"]] += 1
            else:
                assert answer.status_code in (400, 413, 415, 422), f"{number}: {answer.status_code} {answer.text}"
                assert told.keys() == {"error"} and told["error"].keys() == {"type", "code", "message"}
                ends[answer.status_code] += 1
            text = json.dumps(told)
            assert '"bug"' not in text, f"{number}: {text}"
            assert not any(secret in text for secret in (SECRET, "DOE", str(tmp_path), "/serve/")), f"{number}: {text}"
    logged = caplog.text + service(client).settings.audit_file.read_text()
    assert SECRET not in logged and "DOE" not in logged and str(tmp_path) not in logged
    assert list(service(client).settings.uploads_folder.iterdir()) == []
    # Damage of every kind was met: at the door, by the reader, and some that does no harm.
    assert ends[422] > 50 and ends["read"] > 50 and ends[415] > 5, ends
    assert sum(count for end, count in ends.items() if end not in ("read", 400, 413, 415, 422)) > 20, ends
