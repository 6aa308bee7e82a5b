"""What `sagittal serve` is told to watch."""

from __future__ import annotations

from pathlib import Path

import pytest

from sagittal.cli.serve import PACS_VARIABLE, Watching
from sagittal.errors import DataError, PlanError, SagittalError

URL, RULE = "http://pacs:8042/dicom-web", "modality=CT"


def test_without_a_place_nothing_is_watched() -> None:
    assert Watching().settings() is None


def test_options_become_settings_and_credentials_come_from_a_file_or_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PACS_VARIABLE, "a:b:c")
    found = Watching(watch_dicomweb=URL, watch_rule=RULE, watch_every="2m", watch_since_days=3).settings()
    assert found is not None and (found.dicomweb, found.credentials, found.every_s) == (URL, "a:b:c", 120)
    assert found.since_days == 3
    (tmp_path / "word").write_text("d:e\n")
    found = Watching(watch_dicomweb=URL, watch_rule=RULE, watch_credentials=tmp_path / "word").settings()
    assert found is not None and found.credentials == "d:e"
    found = Watching(watch_folder=tmp_path, watch_rule=RULE).settings()
    assert found is not None and found.folder == tmp_path and found.credentials is None


@pytest.mark.parametrize(
    ("watching", "code"),
    [
        (Watching(watch_rule=RULE), "usage"),
        (Watching(watch_every="5s"), "usage"),
        (Watching(watch_since_days=0), "usage"),
        (Watching(watch_credentials=Path("/nowhere/word")), "usage"),
        (Watching(watch_folder=Path("/in"), watch_rule=RULE, watch_since_days=1), "usage"),
        (Watching(watch_folder=Path("/in"), watch_rule=RULE, watch_credentials=Path("/nowhere/word")), "usage"),
        (Watching(watch_dicomweb=URL), "usage"),
        (Watching(watch_dicomweb=URL, watch_folder=Path("/in"), watch_rule=RULE), "usage"),
        (Watching(watch_dicomweb="pacs", watch_rule=RULE), "usage"),
        (Watching(watch_dicomweb=URL, watch_rule="CT"), "watch_rule"),
        (Watching(watch_dicomweb=URL, watch_rule=RULE, watch_every="soon"), "bad_duration"),
        (Watching(watch_dicomweb=URL, watch_rule=RULE, watch_credentials=Path("/nowhere/word")), "pacs_credentials"),
    ],
)
def test_what_makes_no_sense_is_refused(watching: Watching, code: str) -> None:
    with pytest.raises((PlanError, DataError)) as caught:
        watching.settings()
    assert caught.value.code == code


@pytest.mark.parametrize("word", ["word", "a:b\nc:d"])
def test_credentials_that_are_none_are_refused_and_not_repeated(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PACS_VARIABLE, word)
    with pytest.raises(SagittalError, match="USER:PASSWORD") as caught:
        Watching(watch_dicomweb=URL, watch_rule=RULE).settings()
    assert word not in caught.value.message
