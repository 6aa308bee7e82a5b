from __future__ import annotations

import pytest

from sagittal.cli import progress
from sagittal.cli.progress import ProgressLines, time_in_words


def test_a_line_comes_every_ten_seconds_at_most_and_has_no_escape_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [100.0], list[str]()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines = ProgressLines(4, said.append)
    for second in range(26):
        now[0] = 100.0 + second
        lines.window("case_a", second, 60)
        if second == 15:
            lines.case()
    assert said == [
        "case_a: window 10 of 60; 0 of 4 cases done; 0:00:10",
        "case_a: window 20 of 60; 1 of 4 cases done; 0:00:20",
    ]
    assert "\x1b" not in "".join(said)


@pytest.mark.parametrize(("seconds", "told"), [(0.9, "0:00:00"), (61.0, "0:01:01"), (100000.0, "27:46:40")])
def test_times_are_told_in_hours_minutes_and_seconds(seconds: float, told: str) -> None:
    assert time_in_words(seconds) == told
