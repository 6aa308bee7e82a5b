"""Which series a rule means."""

from __future__ import annotations

import pytest

from sagittal.errors import PlanError
from sagittal.serve.arrivals import Arrival, parse_rule

LIVER = Arrival("1.2.3", "1.2", "CT", "Portal Venous LIVER 1.0", "Abdomen", "ABDOMEN", 40)


@pytest.mark.parametrize(
    "text",
    [
        "modality=CT",
        "modality=ct, description~liver",
        "modality=CT,study=abdomen,body-part=Abdomen,images>39",
        "model=a,modality=CT,description~portal,description~1.0",
    ],
)
def test_a_rule_that_matches(text: str) -> None:
    assert parse_rule(text).matches(LIVER)


@pytest.mark.parametrize(
    "text",
    ["modality=MR", "modality=CT,description=liver", "modality=CT,images>40", "modality=CT,study~head,body-part~abd"],
)
def test_a_rule_that_does_not_match(text: str) -> None:
    assert not parse_rule(text).matches(LIVER)


@pytest.mark.parametrize(
    "text",
    [
        *("", "CT", "description~liver", "modality~CT", "modality=SEG", "modality=CT,modality=MR", "modality=CT,"),
        *("modality=CT,images>x", "modality=CT,images=3", "modality=CT,descripton~liver", "modality=CT,study>3"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(PlanError, match=r"--watch-rule .*Write for example modality=CT"):
        parse_rule(text)


def test_a_rule_names_its_model_and_uids_become_no_paths() -> None:
    assert parse_rule("modality=CT,model=liver").model == "liver" and parse_rule("modality=CT").model is None
    assert LIVER.is_sound
    for uid in ("", "1", "1.2/3", "../1.2", "1.2.", "1." * 33 + "1", "1.2\n"):
        assert not Arrival(uid, "1.2", "CT").is_sound and not Arrival("1.2", uid, "CT").is_sound
