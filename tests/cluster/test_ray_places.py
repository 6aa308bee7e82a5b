"""What --on takes, and what it says of what it does not take."""

from __future__ import annotations

import pytest

from sagittal.cluster.places import Place, parse_place
from sagittal.errors import PlanError

WRITTEN = {
    "ray": Place("ray"),
    "ray:local": Place("ray", "local"),
    "ray:10.0.0.1:6379": Place("ray", "10.0.0.1:6379"),
    "ray:[fe80::1]:6379": Place("ray", "[fe80::1]:6379"),
    "ray://head.example:10001": Place("ray", "ray://head.example:10001"),
    "slurm": Place("slurm"),
    "slurm:partition=gpu,time=8:00:00,gpus=1": Place(
        "slurm", settings={"partition": "gpu", "time": "8:00:00", "gpus": "1"}
    ),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_a_place_is_read_and_written_as_users_write_it(text: str) -> None:
    place = parse_place(text)
    assert place == WRITTEN[text]
    assert str(place) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rya", "Did you mean 'ray'?"),
        ("kubernetes", "unknown place"),
        ("ray:", "no address"),
        ("ray:head", "no address"),
        ("ray:head:", "no address"),
        ("ray:head:70000", "no address"),
        ("ray://", "no address"),
        ("ray://a b:1", "no address"),
        ("slurm:", "not NAME=VALUE"),
        ("slurm:gpu", "not NAME=VALUE"),
        ("slurm:time=", "not NAME=VALUE"),
        ("slurm:a=1,a=2", "given twice"),
    ],
)
def test_what_is_no_place_is_told_with_what_would_be(text: str, says: str) -> None:
    with pytest.raises(PlanError, match=r"^--on ") as told:
        parse_place(text)
    assert says in told.value.message
    assert told.value.code == "options"
