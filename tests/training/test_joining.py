"""What lies where a bundle is to be written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sagittal.bundle import write_bundle
from sagittal.errors import BundleError
from sagittal.testing.plans import untrained_plan, untrained_spec
from sagittal.training.joining import bundle_at


def test_a_folder_or_file_of_the_users_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/notes.txt").write_text("mine")
    for taken in (tmp_path / "own", tmp_path / "own/notes.txt"):
        with pytest.raises(BundleError, match=r"is no bundle.* would be lost\. .*Choose another --out\.") as caught:
            bundle_at(taken)
        assert caught.value.code == "would_overwrite"
        assert caught.value.message.startswith(f"{taken}: ")


def test_nothing_and_an_empty_folder_are_no_bundle_and_a_bundle_is_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert bundle_at(tmp_path / "empty") is bundle_at(tmp_path / "new") is None
    plan = untrained_plan("segformer3d", untrained_spec(2), patch_size=(32, 32, 32))
    written = write_bundle(tmp_path / "b", plan=plan, weights={"all": {"bias": np.zeros(2, np.float32)}}, metrics={})
    found = bundle_at(written)
    assert found is not None and found.weight_names == ("all",)
