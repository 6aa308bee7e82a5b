from __future__ import annotations

import pytest
from pydicom.sr._concepts_dict import concepts

from sagittal.errors import DataError
from sagittal.volumes.dicom_codes import (
    ABNORMAL,
    ANATOMY,
    KNOWN_CODES,
    PRIVATE,
    TISSUE,
    code_of,
    parse_code,
    private_code,
    told,
)


def test_every_code_of_the_table_has_the_meaning_that_the_standard_gives_it():
    meanings: dict[tuple[str, str], set[str]] = {}
    for scheme, keywords in concepts.items():
        for entries in keywords.values():
            for value, (meaning, _) in entries.items():
                meanings.setdefault((scheme, value), set()).add(meaning.lower())
    wrong = [code for code in KNOWN_CODES if code.meaning.lower() not in meanings.get((code.scheme, code.value), ())]
    assert wrong == []
    assert len(KNOWN_CODES) > 150


@pytest.mark.parametrize(
    ("name", "value", "side", "place"),
    [
        ("liver", "10200004", None, None),
        ("kidney_left", "64033007", "Left", None),
        ("right kidney", "64033007", "Right", None),
        ("Parotid_R", "45289007", "Right", None),
        ("lung_upper_lobe_left", "45653009", "Left", None),
        ("lung_middle_lobe_right", "72481006", None, None),
        ("heart_atrium_left", "82471001", None, None),
        ("left ventricle", "87878005", None, None),
        ("vertebrae_L5", "49668003", None, None),
        ("rib_left_3", "113197003", "Left", None),
        ("arota", "15825003", None, None),
        ("postcava", "64131007", None, None),
        ("cancer", "108369006", None, None),
        ("liver tumour", "108369006", None, "10200004"),
        ("hepatic tumors", "108369006", None, "10200004"),
        ("hepatic vessels", "59820001", None, "10200004"),
        ("kidney_cyst_left", "367643001", "Left", "64033007"),
        ("left lung nodule", "27925004", "Left", "39607008"),
        ("enhancing tumor", "C113842", None, None),
        ("edema", "79654002", None, None),
        ("WMH", "110702", None, None),
        ("PZ", "279706003", None, None),
    ],
)
def test_names_of_public_data_sets_have_codes(name, value, side, place):
    concept = code_of(name)
    assert concept.kind.value == value
    assert (concept.side and concept.side.meaning) == side
    assert (concept.place and concept.place.value) == place


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("prostate/uterus", ANATOMY),
        ("portal vein and splenic vein", ANATOMY),
        ("colon cancer primaries", ABNORMAL),
        ("iliopsoas_left", ANATOMY),
        ("left right kidney", ANATOMY),
        ("LV", ANATOMY),
    ],
)
def test_other_names_are_kept_under_a_private_scheme(name, category):
    concept = code_of(name)
    assert (concept.kind.scheme, concept.kind.meaning, concept.category) == (PRIVATE, name, category)
    assert len(concept.kind.value) <= 16 and concept.side is None


def test_private_codes_differ_where_names_do():
    names = ["iliopsoas_left", "iliopsoas_right", "a?", "a!", "ä", "ö", "x" * 30, "x" * 31, "l" * 100]
    values = [private_code(name).value for name in names]
    assert len(set(values)) == len(names) and max(map(len, values)) <= 16
    assert private_code("hip_left").value == "HIP_LEFT"


def test_a_declared_code_goes_before_the_table():
    concept = code_of("mass", {"mass": "SCT:35566002:Hematoma"})
    assert (concept.kind.value, concept.category) == ("35566002", ABNORMAL)
    assert code_of("bone", {"bone": "SCT:71341001:Femur bone"}).kind.meaning == "Femur bone"
    kidney = code_of("kidney_left", {"kidney_left": "SCT:64033007:Kidney"})
    assert kidney.side is not None and kidney.side.meaning == "Left"
    assert code_of("x", {"x": "99ACME:1:x: y"}).kind.meaning == "x: y"
    assert code_of("stent", {"other": "SCT:1:One"}).kind.scheme == PRIVATE
    assert code_of("bones", {"bones": "SCT:3138006:Bone"}).category == TISSUE


@pytest.mark.parametrize("text", ["Liver", "SCT:10200004", "SCT::Liver", "X" * 17 + ":1:Liver", "SCT:1:a\\b", "SCT:1:"])
def test_a_declared_code_that_can_not_be_read_is_refused(text):
    with pytest.raises(DataError, match="SCHEME:VALUE:MEANING"):
        parse_code(text, "liver")


def test_texts_become_what_dicom_strings_may_hold():
    assert told("a\\b\nc  d", 64) == "a b c d"
    assert told("x" * 80, 64) == "x" * 61 + "..."
    assert told("\n", 64) == "unnamed"
