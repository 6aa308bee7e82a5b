from __future__ import annotations

import re

import pytest

from sagittal.data.catalogue import CATALOGUE, public_dataset
from sagittal.data.convert import LAYOUTS
from sagittal.errors import DataError


def test_the_sets_of_both_papers_and_all_ten_tasks_are_there():
    tasks = {f"msd-task{number:02d}" for number in range(1, 11)}
    assert set(CATALOGUE) == tasks | {
        "btcv", "acdc", "amos22", "amos22-mr", "kits19", "kits23", "brats2021", "lits",
    }  # fmt: skip


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_entry_is_complete(name):
    entry = CATALOGUE[name]
    assert entry.name == name
    assert entry.layout in LAYOUTS
    assert entry.address.startswith("http") and entry.licence and entry.citation and entry.cases > 0
    assert (entry.access == "fetch") == bool(entry.downloads) == (not entry.how)
    for item in entry.downloads:
        assert item.url.startswith("https://")
        assert re.fullmatch(r"[\w.-]+\.(tar|zip)", item.name)
        assert (item.md5 is None) == (not item.md5_source)
        assert item.md5 is None or re.fullmatch("[0-9a-f]{32}", item.md5)
    if not any(item.md5 for item in entry.downloads):
        assert any("checksum" in line for line in entry.unverified)


def test_a_name_is_found_in_any_case_and_a_wrong_one_gets_the_closest():
    assert public_dataset("ACDC") is CATALOGUE["acdc"]
    with pytest.raises(DataError, match=r"msd-task4: not a data set of the catalogue. Did you mean 'msd-task"):
        public_dataset("msd-task4")
