from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

import pytest
from small_scans import ball_case, write_dataset

from sagittal.data import known
from sagittal.data.dataset import content_hash, read_dataset
from sagittal.data.fingerprint import extract_fingerprint
from sagittal.data.known import known_digests, known_fingerprint


@pytest.fixture
def dataset(tmp_path: Path):
    return write_dataset(tmp_path / "scans", {name: ball_case((9, 11, 14), seed) for seed, name in enumerate("ab")})


def test_an_unchanged_data_set_is_not_read_again(dataset, tmp_path):
    store = tmp_path / "known"
    first, was_known = known_fingerprint(dataset, store, workers=1)
    assert not was_known and first == extract_fingerprint(dataset, workers=1)
    with (
        patch.object(known, "extract_fingerprint", side_effect=AssertionError),
        patch.object(known, "digest_of", side_effect=AssertionError),
    ):
        assert known_fingerprint(read_dataset(dataset.folder), store, workers=1) == (first, True)
        assert content_hash(dataset, known_digests(dataset, store)) == first.content_sha256


def test_a_changed_file_is_measured_again(dataset, tmp_path):
    store = tmp_path / "known"
    first, _ = known_fingerprint(dataset, store, workers=1)
    image = dataset.cases[0].images[0]
    other = dataset.cases[1].images[0].read_bytes()
    image.write_bytes(other)
    os.utime(image, ns=(1, 1))
    second, was_known = known_fingerprint(read_dataset(dataset.folder), store, workers=1)
    assert not was_known and second.content_sha256 != first.content_sha256
    with patch.object(known, "digest_of", side_effect=AssertionError):
        assert content_hash(dataset, known_digests(dataset, store)) == content_hash(dataset)


def test_the_axis_order_has_a_fingerprint_of_its_own(dataset, tmp_path):
    store = tmp_path / "known"
    known_fingerprint(dataset, store, workers=1)
    stored, was_known = known_fingerprint(dataset, store, workers=1, orientation="stored")
    assert not was_known and stored.orientation == "stored"


def test_a_damaged_memory_is_replaced_and_an_unwritable_one_does_no_harm(dataset, tmp_path):
    store = tmp_path / "known"
    first, _ = known_fingerprint(dataset, store, workers=1)
    (path,) = store.glob("fingerprint-*.json")
    path.write_text("{")
    assert known_fingerprint(dataset, store, workers=1) == (first, False)
    assert known_fingerprint(dataset, store, workers=1) == (first, True)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert known_fingerprint(dataset, blocked, workers=1) == (first, False)
    (files,) = store.glob("files-*.json")
    files.write_text("[")
    assert known_digests(dataset, store) == known_digests(dataset, None)
