from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from sagittal.data.dataset import parse_spec
from sagittal.errors import DataError
from sagittal.inference.outputs import declaration
from sagittal.inference.subset import chosen_spec
from sagittal.plan.dataset import DatasetSpec

CONTENT = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "liver": 1, "tumour": 2},
    "file_ending": ".nii.gz",
    "codes": {"liver": "SCT:10200004:Liver", "tumour": "99X:1:A: b"},
}


def test_codes_are_read_kept_and_written_again():
    spec = parse_spec(CONTENT, "dataset.json", "x")
    assert dict(spec.codes) == CONTENT["codes"]
    assert DatasetSpec.from_json(spec.to_json()) == spec
    assert json.loads(declaration(spec))["codes"] == CONTENT["codes"]
    assert chosen_spec(spec, ["liver"]).codes == (("liver", "SCT:10200004:Liver"),)


def test_without_codes_nothing_of_them_is_written():
    spec = parse_spec({key: value for key, value in CONTENT.items() if key != "codes"}, "dataset.json", "x")
    assert "codes" not in spec.to_json() and "codes" not in json.loads(declaration(spec))


@pytest.mark.parametrize(
    ("codes", "told"),
    [
        ({"spleen": "SCT:78961009:Spleen"}, r"declared label each, got \['spleen'\]"),
        ({"liver": "Liver"}, "SCHEME:VALUE:MEANING"),
        ({"liver": "SCT:10200004:" + "x" * 65}, "SCHEME:VALUE:MEANING"),
        ({"liver": "SCT:10200004:a\\b"}, "SCHEME:VALUE:MEANING"),
        ({"liver": 1}, "codes is"),
        (["liver"], "codes is"),
    ],
)
def test_codes_that_make_no_sense_are_refused(codes, told):
    with pytest.raises(DataError, match=told):
        parse_spec({**CONTENT, "codes": codes}, "dataset.json", "x")


def test_a_label_has_one_code():
    spec = parse_spec(CONTENT, "dataset.json", "x")
    with pytest.raises(ValidationError, match="declared label each"):
        spec.replace(codes=(("liver", "SCT:1:A"), ("liver", "SCT:2:B")))
