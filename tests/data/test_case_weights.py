from __future__ import annotations

from pathlib import Path

import pytest
from cached_cases import make_plan

from sagittal.data.case_weights import CaseWeights, read_case_weights, require_same_weights
from sagittal.errors import DataError

CASES = ("a", "b", "c d")


def write(folder: Path, text: str) -> Path:
    path = folder / "case_weights.csv"
    path.write_text(text)
    return path


def test_a_folder_without_the_file_has_no_weights(tmp_path: Path) -> None:
    assert read_case_weights(tmp_path, CASES) is None


def test_listed_cases_have_their_weight_and_others_one(tmp_path: Path) -> None:
    path = write(tmp_path, "weight, case ,note\n2.5, a,x\n0, c d,\n".replace(" case ", " case"))
    weights = read_case_weights(tmp_path, CASES)
    assert weights is not None
    assert [weights.of(case) for case in CASES] == [2.5, 1.0, 0.0]
    assert read_case_weights(path, CASES) == weights


def test_the_hash_is_of_what_is_said_not_of_the_bytes(tmp_path: Path) -> None:
    write(tmp_path, "case,weight\na,2\nb,0.5\n")
    one = read_case_weights(tmp_path, CASES)
    write(tmp_path, "\ufeffweight,case\r\n5e-1,b\r\n2.0,a\r\n")
    other = read_case_weights(tmp_path, CASES)
    assert one is not None
    assert other is not None
    assert one.sha256 == other.sha256
    assert one.sha256 != CaseWeights({"a": 2.0, "b": 0.25}).sha256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,share\na,1\n", "columns case, share"),
        ("", "columns none"),
        ("case,weight\na,1\nz,1\n", "line 3: no case 'z'"),
        ("case,weight\na,1\na,2\n", "line 3: a is listed above"),
        ("case,weight\na,-1\n", "weight of a is '-1'"),
        ("case,weight\na,nan\n", "weight of a is 'nan'"),
        ("case,weight\na,inf\n", "weight of a is 'inf'"),
        ("case,weight\na,much\n", "weight of a is 'much'"),
        ("case,weight\na\n", "weight of a is ''"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, text)
    with pytest.raises(DataError, match=rf"case_weights.csv: .*{message}.*Expected.*Correct") as caught:
        read_case_weights(tmp_path, CASES)
    assert caught.value.code == "case_weights"


def test_a_file_that_was_named_must_be_there_and_be_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        read_case_weights(tmp_path / "other.csv", CASES)
    (tmp_path / "other.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="can't be read"):
        read_case_weights(tmp_path / "other.csv", CASES)


def test_a_plan_trains_with_the_weights_it_was_made_with_or_not_at_all() -> None:
    weights, plain = CaseWeights({"a": 2.0}), make_plan((8, 8, 8)).training
    planned = plain.replace(case_weights_sha256=weights.sha256)
    assert require_same_weights(plain, None) is None
    assert require_same_weights(plain, weights) is None
    assert require_same_weights(planned, weights) is weights
    with pytest.raises(DataError, match="there are none now"):
        require_same_weights(planned, None)
    with pytest.raises(DataError, match="they are others now"):
        require_same_weights(planned, CaseWeights({"a": 3.0}))
