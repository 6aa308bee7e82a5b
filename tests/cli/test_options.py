from __future__ import annotations

import pytest

from sagittal.cli.options import threads_given


@pytest.mark.parametrize(("text", "threads"), [("6", 6), ("0", None), ("many", None), ("", None), ("4,2", None)])
def test_threads_are_taken_from_the_environment_where_it_names_a_number(
    text: str, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert threads_given() == threads
