"""Every protocol against the numbers of the tool itself.

benchmarks/oracles/protocols.py wrote those of libraries, protocol_scripts.py those of the challenges' own scripts.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sagittal.evaluation import CaseScore, ClassSet, EvaluationSettings, evaluate_case
from sagittal.evaluation.protocols import PROTOCOLS

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"
VALUES = (1, 2, 3)
DISTANCES = ("hd_mm", "hd95_mm", "hd95_vox", "asd_mm", "lesion_hd95_mm")
SINGLE_PRECISION = ("volume_ml", "volume_error_ml")
"""What scripts take from the header of a NIfTI file, whose voxel sizes have single precision."""
NNUNET_KEYS = {"dice": "Dice", "iou": "IoU", "tp": "TP", "fp": "FP", "fn": "FN", "tn": "TN"}


@pytest.fixture(scope="module")
def masks() -> ModuleType:
    path = ROOT / "benchmarks" / "oracles" / "protocol_masks.py"
    spec = importlib.util.spec_from_file_location("protocol_masks", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def golden(tool: str) -> Any:
    return json.loads((GOLDEN / f"protocols_{tool}.json").read_text())


def script(name: str) -> Any:
    """Return the numbers of a script, without where it is from."""
    numbers = json.loads((GOLDEN / f"scripts_{name}.json").read_text())
    assert numbers["source"]["script"] and len(numbers["source"]["sha256"]) == 64
    return {key: value for key, value in numbers.items() if key != "source"}


def renamed(cases: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """Keep of every case and class the numbers in `keys`, under our names."""
    return {
        case: {
            name: {ours: row[theirs] for theirs, ours in keys.items() if theirs in row} for name, row in rows.items()
        }
        for case, rows in cases.items()
    }


def scored(masks: ModuleType, classes: ClassSet, settings: EvaluationSettings) -> dict[str, CaseScore]:
    scores = {}
    for name, *_ in masks.CASES:
        reference, prediction, spacing_mm = masks.label_maps(name)
        scores[name] = evaluate_case(reference, prediction, spacing_mm, classes, case=name, settings=settings)
    return scores


def assert_agree(ours: float | None, theirs: float | str, key: str, where: str, *, single: bool = False) -> None:
    """Compare with the precision that the task of the metric allows; the tool's NaN and infinity are None here."""
    expected = float(theirs)
    if not math.isfinite(expected):
        assert ours is None, f"{where}: {key} is {ours}, the tool has {expected}"
        return
    close = (
        pytest.approx(expected, rel=1e-6, abs=1e-12)
        if single or key in (*DISTANCES, *SINGLE_PRECISION)
        else pytest.approx(expected, abs=1e-9)
    )
    assert ours == close, f"{where}: {key}"


def assert_cases_agree(
    scores: Mapping[str, CaseScore], cases: Mapping[str, Any], names: Mapping[str, str], *, single: bool = False
) -> None:
    """Compare every number of the tool; `names` are its names of the classes and ours."""
    assert set(cases) == set(scores)
    for case, classes in cases.items():
        assert set(classes) == set(names)
        for theirs, metrics in classes.items():
            score = scores[case].classes[names[theirs]]
            for key, value in metrics.items():
                assert_agree(score.metrics[key], value, key, f"{case}, {theirs}", single=single)


@pytest.mark.parametrize(
    ("oracle", "labels"),
    [("nnunet", {str(v): v for v in VALUES}), ("nnunet_ignore", {"1": 1, "(1, 2)": [1, 2], "ignore": 3})],
)
def test_nnunets_numbers(masks: ModuleType, oracle: str, labels: dict[str, Any]) -> None:
    protocol, theirs = PROTOCOLS["nnunet"], golden("nnunet")[oracle]
    classes = protocol.classes(ClassSet.of_mapping(labels))
    scores = scored(masks, classes, EvaluationSettings(protocol="nnunet"))
    back = {name: key for key, name in NNUNET_KEYS.items()}
    cases = {
        case: {
            name: {back.get(key, key): value for key, value in metrics.items()} for name, metrics in by_class.items()
        }
        for case, by_class in theirs["cases"].items()
    }
    assert_cases_agree(scores, cases, {name: name for name in classes.names})
    for key in protocol.metrics:
        means = protocol.means(key, classes.names, list(scores.values()))
        assert_agree(means.overall, theirs["overall"][NNUNET_KEYS.get(key, key)], key, "foreground_mean")
        for name in classes.names:
            assert_agree(means.classes[name], theirs["classes"][name][NNUNET_KEYS.get(key, key)], key, name)


def test_monais_numbers(masks: ModuleType) -> None:
    protocol, theirs = PROTOCOLS["monai"], golden("monai")["monai"]
    settings = EvaluationSettings(protocol="monai", tolerances_mm=(1.0, 2.4))
    classes = protocol.classes(VALUES)
    scores = scored(masks, classes, settings)
    names = {name: name for name in classes.names}
    assert_cases_agree(scores, theirs["cases"], names, single=True)
    for key in protocol.columns(settings):
        means = protocol.means(key, classes.names, list(scores.values()))
        assert_agree(means.overall, theirs["overall"][key], key, "mean", single=True)
        for name in classes.names:
            assert_agree(means.classes[name], theirs["classes"][name][key], key, name, single=True)


def test_captks_numbers(masks: ModuleType) -> None:
    classes = PROTOCOLS["brats2021"].classes(VALUES)
    scores = scored(masks, classes, EvaluationSettings(protocol="brats2021"))
    for key, ours in {"Sensitivity": "sensitivity", "Specificity": "specificity"}.items():
        theirs = renamed(script("captk")["cases"], {key: ours})
        assert_cases_agree(scores, theirs, {name: name for name in classes.names}, single=True)
    theirs = renamed(script("captk")["cases"], {"Dice": "dice", "Hausdorff95": "hd95_mm"})
    for case, rows in theirs.items():
        for name, row in rows.items():
            score = scores[case].classes[name]
            if score.outcome in ("missed", "false_alarm"):
                # CaPTk takes the diagonal of the image at hand; ours is always that of BraTS's images.
                assert row.pop("hd95_mm") == pytest.approx(math.hypot(*masks.SHAPE), rel=1e-12)
                assert score.metrics["hd95_mm"] == pytest.approx(math.hypot(240, 240, 155), rel=1e-12)
    assert_cases_agree(scores, theirs, {name: name for name in classes.names})


def test_numbers_of_the_program_that_captk_calls_for_hd95(masks: ModuleType) -> None:
    scores = scored(masks, PROTOCOLS["brats2021"].classes(VALUES), EvaluationSettings(protocol="brats2021"))
    compared = 0
    for case, rows in script("hausdorff95")["cases"].items():
        for region, row in rows.items():
            assert_agree(scores[case].classes[region].metrics["hd95_mm"], row["Hausdorff95"], "hd95_mm", case)
            compared += 1
    present = [score for case in scores.values() for score in case.classes.values() if score.outcome == "present"]
    assert compared == len(present) > 10


def test_numbers_of_nnunets_script_for_brats(masks: ModuleType) -> None:
    classes = PROTOCOLS["brats2021"].classes(VALUES)
    scores = scored(masks, classes, EvaluationSettings(protocol="brats2021"))
    theirs = renamed(script("nnunet_brats")["cases"], {"dice": "dice", "hd95": "hd95_mm"})
    assert_cases_agree(scores, theirs, {name: name for name in classes.names})


def test_numbers_and_means_of_nnformers_script(masks: ModuleType) -> None:
    protocol, theirs = PROTOCOLS["nnformer-synapse"], script("synapse")
    keys = {"Dice": "dice", "hd": "hd95_vox"}
    classes = protocol.classes(VALUES)
    names = {name.replace(" ", "_"): name for name in classes.names}
    scores = scored(masks, classes, EvaluationSettings(protocol=protocol.name))
    assert_cases_agree(scores, renamed(theirs["cases"], keys), names)
    for key, ours in keys.items():
        means = protocol.means(ours, classes.names, list(scores.values()))
        assert_agree(means.overall, theirs["overall"][key], ours, "overall")
        for name, own in names.items():
            assert_agree(means.classes[own], theirs["classes"][name][key], ours, name)


def test_numbers_of_acdcs_script(masks: ModuleType) -> None:
    classes = PROTOCOLS["acdc"].classes(VALUES)
    scores = scored(masks, classes, EvaluationSettings(protocol="acdc"))
    keys = {"Dice": "dice", "Volume": "volume_ml", "Err": "volume_error_ml"}
    assert_cases_agree(scores, renamed(script("acdc")["cases"], keys), {name: name for name in classes.names})


def test_numbers_of_the_acdc_script_with_distances(masks: ModuleType) -> None:
    classes = PROTOCOLS["acdc"].classes(VALUES)
    scores = scored(masks, classes, EvaluationSettings(protocol="acdc"))
    keys = {"dice": "dice", "hd": "hd_mm", "vol": "volume_ml", "vol_err": "volume_error_ml"}
    theirs = renamed(script("acdc_segmenter")["cases"], keys)
    for case, rows in theirs.items():
        for name, row in rows.items():
            if scores[case].classes[name].outcome in ("missed", "false_alarm"):
                # The one rule that isn't followed: a miss would have a better distance than most hits.
                assert row.pop("hd_mm") == 1.0
    assert_cases_agree(scores, theirs, {name: name for name in classes.names})


@pytest.mark.parametrize("tolerance_mm", [1.0, 2.4])
def test_numbers_of_surface_distance(masks: ModuleType, tolerance_mm: float) -> None:
    settings = EvaluationSettings(protocol="msd", tolerances_mm=(tolerance_mm,))
    scores = scored(masks, PROTOCOLS["msd"].classes(VALUES), settings)
    cases = {
        case: {
            name: {"dice": metrics["dice"], "nsd": metrics[f"nsd_{tolerance_mm:g}mm"]}
            for name, metrics in by_class.items()
        }
        for case, by_class in golden("surface_distance")["msd"]["cases"].items()
    }
    assert_cases_agree(scores, cases, {str(value): str(value) for value in VALUES})


BRATS_2023_KEYS = {
    "LesionWise_Score_Dice": "lesion_dice",
    "LesionWise_Score_HD95": "lesion_hd95_mm",
    "Num_TP": "lesions_tp",
    "Num_FP": "lesions_fp",
    "Num_FN": "lesions_fn",
    "Legacy_Dice": "dice",
    "Legacy_HD95": "hd95_mm",
    "Sensitivity": "sensitivity",
    "Specificity": "specificity",
}


@pytest.mark.parametrize(
    ("name", "challenge"),
    [
        ("brats2023", "GLI"),
        ("brats2023-ssa", "SSA"),
        ("brats2023-men", "MEN"),
        ("brats2023-ped", "PED"),
        ("brats2023-met", "MET"),
    ],
)
def test_numbers_of_the_script_of_brats_2023(masks: ModuleType, name: str, challenge: str) -> None:
    protocol, settings = PROTOCOLS[name], EvaluationSettings(protocol=name)
    classes = protocol.classes(VALUES)
    scores = scored(masks, classes, settings)
    for case, *_ in masks.LESION_CASES:
        scores[case] = evaluate_case(*masks.lesion_maps(case), (1.0, 1.0, 1.0), classes, case=case, settings=settings)
    assert set(BRATS_2023_KEYS.values()) == set(protocol.metrics)
    theirs = renamed(script("brats2023")[challenge], BRATS_2023_KEYS)
    assert_cases_agree(scores, theirs, {region: region for region in classes.names})


def test_the_masks_tell_the_parameters_of_brats_2023_apart() -> None:
    theirs = script("brats2023")
    assert theirs["GLI"] == theirs["SSA"] == theirs["PED"]
    for one, other in (("GLI", "MEN"), ("GLI", "MET"), ("MEN", "MET")):
        for key in ("LesionWise_Score_Dice", "LesionWise_Score_HD95", "Num_TP"):
            assert any(
                row[key] != theirs[other][case][region][key]
                for case, rows in theirs[one].items()
                for region, row in rows.items()
            ), f"{one}, {other}: {key}"
