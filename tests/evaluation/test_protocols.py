"""What protocols score, how they take means, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sagittal.errors import DataError
from sagittal.evaluation import (
    CaseScore,
    ClassScore,
    ClassSet,
    Evaluation,
    EvaluationSettings,
    evaluate_case,
    metrics_of,
)
from sagittal.evaluation.columns import OWN_MEANS, rules_of
from sagittal.evaluation.protocols import PROTOCOLS, Protocol
from sagittal.evaluation.protocols.msd import TASKS, task_of

SPACING_MM = (2.5, 0.7, 1.1)


def regions_of(name: str, labels: dict[str, Any] | Sequence[int]) -> dict[str, tuple[int, ...]]:
    given = ClassSet.of_mapping(labels) if isinstance(labels, dict) else labels
    return {label.name: label.values for label in PROTOCOLS[name].classes(given).labels}


def case_score(case: str, **values: float | None) -> CaseScore:
    """A case whose classes `a` and `b` have these Dice; a value of None is a miss."""
    return CaseScore(
        case=case,
        shape=(3, 4, 5),
        spacing_mm=SPACING_MM,
        classes={
            name: ClassScore(
                reference_ml=1.0, prediction_ml=0.0 if value is None else 1.0, metrics={"dice": value, "asd_mm": value}
            )
            for name, value in values.items()
        },
    )


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
class TestEveryProtocol:
    def test_is_registered_under_its_name(self, protocol: Protocol) -> None:
        assert PROTOCOLS[protocol.name] is protocol

    def test_tells_what_it_is(self, protocol: Protocol) -> None:
        assert protocol.source.endswith(".") and protocol.mean_rule.endswith(".") and protocol.peculiar
        assert set(protocol.headline) <= set(protocol.metrics)
        for metric in protocol.metrics.values():
            texts = (metric.definition, metric.empty_reference, metric.empty_prediction, metric.both_empty)
            assert all(text.endswith(".") for text in texts)

    def test_has_dice_by_which_cases_are_ranked(self, protocol: Protocol) -> None:
        assert "dice" in protocol.metrics

    def test_gives_the_columns_of_an_evaluation(self, protocol: Protocol) -> None:
        columns = metrics_of(EvaluationSettings(protocol=protocol.name))
        told = [(key, metric.definition, metric.source) for key, metric in columns.items()]
        assert told == [(key, metric.definition, metric.source) for key, metric in protocol.metrics.items()]

    def test_replaces_the_rules_of_means_by_its_own(self, protocol: Protocol) -> None:
        rules = dict(rules_of(EvaluationSettings(protocol=protocol.name)))
        assert rules["Means"] == protocol.mean_rule and protocol.source in rules["Protocol"]
        assert "Interval" in rules and not set(OWN_MEANS) & set(rules)
        assert set(OWN_MEANS) <= {name for name, _ in rules_of(EvaluationSettings())}

    def test_scores_any_pair_of_masks_as_finite_or_undefined(self, protocol: Protocol) -> None:
        rng = np.random.RandomState(0)
        full = rng.randint(0, 4, (5, 7, 6)).astype(np.uint8)
        nothing = np.zeros_like(full)
        classes = protocol.classes((1, 2, 3))
        for reference, prediction in ((full, full), (full, nothing), (nothing, full), (nothing, nothing)):
            settings = EvaluationSettings(protocol=protocol.name)
            score = evaluate_case(reference, prediction, SPACING_MM, classes, settings=settings)
            for found in score.classes.values():
                assert list(found.metrics) == list(protocol.metrics)
                assert all(value is None or math.isfinite(value) for value in found.metrics.values())


def test_an_unknown_protocol_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="Did you mean 'nnunet'"):
        metrics_of(EvaluationSettings(protocol="nnunett"))


DIAGONAL_MM = math.hypot(9 * SPACING_MM[0], 8 * SPACING_MM[1], 7 * SPACING_MM[2])
RULES = [
    # protocol, metric, value where both are empty, of a false alarm, of a miss
    ("nnunet", "dice", None, 0.0, 0.0),
    ("nnunet", "iou", None, 0.0, 0.0),
    ("nnunet", "tn", 504.0, 378.0, 378.0),
    ("monai", "dice", None, None, 0.0),
    ("monai", "hd95_mm", None, None, None),
    ("monai", "asd_mm", None, None, None),
    ("monai", "nsd_2mm", None, 0.0, 0.0),
    ("brats2021", "dice", 1.0, 0.0, 0.0),
    ("brats2021", "hd95_mm", 0.0, 373.12866, 373.12866),
    ("brats2021", "sensitivity", 1.0, 0.0, 0.0),
    ("brats2021", "specificity", 1.0, 0.75, 1.0),
    ("brats2023", "lesion_dice", 1.0, 0.0, 0.0),
    ("brats2023", "lesion_hd95_mm", 0.0, 374.0, 374.0),
    ("brats2023", "dice", 1.0, 0.0, 0.0),
    ("brats2023", "hd95_mm", 0.0, 374.0, 374.0),
    ("msd", "dice", None, 0.0, 0.0),
    ("msd", "nsd", None, 0.0, 0.0),
    ("nnformer-synapse", "dice", 1.0, 0.0, 0.0),
    ("nnformer-synapse", "hd95_vox", 0.0, 0.0, 0.0),
    ("acdc", "dice", 1.0, 0.0, 0.0),
    ("acdc", "hd_mm", 0.0, DIAGONAL_MM, DIAGONAL_MM),
    ("acdc", "volume_ml", 0.0, 0.24255, 0.0),
    ("acdc", "volume_error_ml", 0.0, 0.24255, -0.24255),
]


@pytest.mark.parametrize(("name", "key", "both", "false_alarm", "missed"), RULES)
def test_rules_for_empty_masks(
    name: str, key: str, both: float | None, false_alarm: float | None, missed: float | None
) -> None:
    """A box of 126 voxels in an image of 504, or nothing."""
    nothing = np.zeros((9, 8, 7), np.uint8)
    box = nothing.copy()
    box[1:8, 2:5, 1:7] = 3
    settings = EvaluationSettings(protocol=name)
    classes = PROTOCOLS[name].classes((1, 2, 3))
    last = classes.labels[2].name
    for reference, prediction, expected in (
        (nothing, nothing, both),
        (nothing, box, false_alarm),
        (box, nothing, missed),
    ):
        found = evaluate_case(reference, prediction, SPACING_MM, classes, settings=settings).classes[last].metrics[key]
        assert found == (None if expected is None else pytest.approx(expected, rel=1e-7))


BRATS = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
BRATS_2023 = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
DECATHLON = {"WT": (1, 2, 3), "TC": (2, 3), "ET": (3,)}


class TestBratsRegions:
    @pytest.mark.parametrize(
        ("labels", "regions"),
        [
            ((1, 2, 4), BRATS),
            ((1, 2, 3), BRATS_2023),
            ((4,), BRATS),
            ((1, 2), {"WT": (1, 2, 3, 4), "TC": (1, 3, 4), "ET": (3, 4)}),
            ({"NCR": 1, "ED": 2, "ET": 4}, BRATS),
            ({"NETC": 1, "SNFH": 2, "ET": 3}, BRATS_2023),
            ({"edema": 1, "non-enhancing tumor": 2, "enhancing tumour": 3}, DECATHLON),
            ({"whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": 3}, DECATHLON),
            ({"enhancing": 3, "core": [2, 3], "whole": [1, 2, 3], "background": 0}, DECATHLON),
        ],
    )
    def test_are_found_by_name_then_by_value(self, labels: Any, regions: dict[str, tuple[int, ...]]) -> None:
        assert regions_of("brats2021", labels) == regions
        assert list(regions_of("brats2021", labels)) == ["WT", "TC", "ET"]

    @pytest.mark.parametrize("labels", [(1, 2, 3, 4), (1, 5), {"liver": 1, "tumor": 2}, {"WT": [1, 2], "TC": 1}])
    def test_other_classes_are_refused(self, labels: Any) -> None:
        with pytest.raises(DataError, match="BraTS scores whole tumour") as caught:
            regions_of("brats2021", labels)
        assert caught.value.code == "protocol_classes"

    def test_the_ignore_value_is_kept(self) -> None:
        given = ClassSet.of_mapping({"NCR": 1, "ED": 2, "ET": 4, "ignore": 7})
        assert PROTOCOLS["brats2021"].classes(given).ignore_value == 7


class TestSynapse:
    def test_eight_of_thirteen_organs_by_value(self) -> None:
        assert regions_of("nnformer-synapse", range(1, 14)) == {
            "spleen": (1,),
            "right kidney": (2,),
            "left kidney": (3,),
            "gallbladder": (4,),
            "liver": (6,),
            "stomach": (7,),
            "aorta": (8,),
            "pancreas": (11,),
        }

    def test_by_name_whatever_the_values(self) -> None:
        names = ["aorta", "gallbladder", "Kidney_Left", "kidney right", "liver", "pancreas", "spleen", "stomach"]
        found = regions_of("nnformer-synapse", {name: value for value, name in enumerate(names, 1)})
        assert found["aorta"] == (1,) and found["left kidney"] == (3,) and found["right kidney"] == (4,)

    @pytest.mark.parametrize("labels", [range(1, 9), (1, 14), {"spleen": 1, "liver": 6}])
    def test_what_may_be_another_numbering_is_refused(self, labels: Any) -> None:
        with pytest.raises(DataError, match="nnFormer scores eight organs") as caught:
            regions_of("nnformer-synapse", labels)
        assert caught.value.code == "protocol_classes"


class TestAcdc:
    def test_structures_by_value_and_by_name(self) -> None:
        assert regions_of("acdc", (1, 2, 3)) == {"RV": (1,), "MYO": (2,), "LV": (3,)}
        named = {"left ventricle": 1, "Myocardium": 2, "right ventricle": 3}
        assert regions_of("acdc", named) == {"RV": (3,), "MYO": (2,), "LV": (1,)}

    @pytest.mark.parametrize("labels", [(1, 4), {"RV": 1, "LV": 3}])
    def test_other_classes_are_refused(self, labels: Any) -> None:
        with pytest.raises(DataError, match="ACDC scores right ventricle"):
            regions_of("acdc", labels)

    def test_a_miss_is_the_diagonal_and_not_dropped(self) -> None:
        reference = np.zeros((4, 5, 6), np.uint8)
        reference[1:3, 1:3, 1:3] = 1
        settings = EvaluationSettings(protocol="acdc")
        classes = PROTOCOLS["acdc"].classes((1, 2, 3))
        score = evaluate_case(reference, np.zeros_like(reference), SPACING_MM, classes, settings=settings)
        diagonal = math.dist((0, 0, 0), [n * mm for n, mm in zip((4, 5, 6), SPACING_MM, strict=True)])
        assert score.classes["RV"].metrics["hd_mm"] == pytest.approx(diagonal, rel=1e-12)


class TestDecathlon:
    @pytest.mark.parametrize("task", TASKS)
    def test_tolerances_are_those_of_the_task_whose_classes_these_are(self, task: str) -> None:
        names, tolerance_mm = TASKS[task]
        classes = ClassSet.of_mapping({name: value for value, name in enumerate(names, 1)})
        assert task_of(classes) == task
        settled = PROTOCOLS["msd"].settings(EvaluationSettings(protocol="msd"), classes)
        assert settled.class_tolerances_mm == tuple((name, tolerance_mm) for name in names)

    def test_given_tolerances_go_first(self) -> None:
        classes = ClassSet.of_mapping({"spleen": 1})
        for given in (
            EvaluationSettings(protocol="msd", tolerances_mm=(1.5,)),
            EvaluationSettings(protocol="msd", tolerances_mm=(2.0,)),
            EvaluationSettings(protocol="msd", class_tolerances_mm=(("spleen", 1.5),)),
        ):
            assert PROTOCOLS["msd"].settings(given, classes) == given

    def test_settings_of_another_protocol_leave_open_what_they_left_open(self) -> None:
        classes = ClassSet.of_mapping({"spleen": 1})
        assert PROTOCOLS["msd"].settings(EvaluationSettings(), classes).class_tolerances_mm == (("spleen", 3.0),)

    def test_classes_of_no_task_are_refused_without_a_tolerance(self) -> None:
        with pytest.raises(DataError, match="Task04_Hippocampus: Anterior, Posterior") as caught:
            PROTOCOLS["msd"].settings(EvaluationSettings(protocol="msd"), ClassSet.of_values((1, 2)))
        assert caught.value.code == "protocol_tolerance"

    def test_other_protocols_leave_the_settings(self) -> None:
        given = EvaluationSettings(protocol="nnunet")
        assert PROTOCOLS["nnunet"].settings(given, ClassSet.of_values((1,))) == given


class TestMeans:
    def test_classes_of_cases_or_cases_of_classes(self) -> None:
        """Worked by hand: a is 0.2 and undefined, b is 0.4 and 0.8."""
        cases = [case_score("x", a=0.2, b=0.4), case_score("y", a=None, b=0.8)]
        by_class = PROTOCOLS["nnunet"].means("dice", ["a", "b"], cases)
        assert by_class.overall == pytest.approx((0.2 + 0.6) / 2)
        assert by_class.classes == {"a": pytest.approx(0.2), "b": pytest.approx(0.6)}
        by_case = PROTOCOLS["monai"].means("dice", ["a", "b"], cases)
        assert by_case.overall == pytest.approx((0.3 + 0.8) / 2)
        assert by_case.classes == by_class.classes

    def test_a_class_that_is_defined_in_no_case(self) -> None:
        cases = [case_score("x", a=None, b=0.4)]
        assert PROTOCOLS["nnunet"].means("dice", ["a", "b"], cases) == (None, {"a": None, "b": 0.4})
        assert PROTOCOLS["msd"].means("dice", ["a", "b"], cases) == (0.4, {"a": None, "b": 0.4})
        assert PROTOCOLS["monai"].means("dice", ["a", "b"], cases) == (0.4, {"a": 0.0, "b": 0.4})

    def test_infinite_values_are_not_dropped(self) -> None:
        cases = [case_score("x", a=None, b=0.4), case_score("y", a=1.0, b=0.4)]
        assert PROTOCOLS["monai"].means("asd_mm", ["a", "b"], cases) == (None, {"a": None, "b": 0.4})

    @pytest.mark.parametrize("name", PROTOCOLS)
    def test_no_cases(self, name: str) -> None:
        means = PROTOCOLS[name].means("dice", ["a"], [])
        nothing = 0.0 if name == "monai" else None
        assert means == (nothing, {"a": nothing})


def test_the_table_of_an_evaluation_has_the_means_of_its_protocol() -> None:
    """Dice 0.5 and absent, then missed and 1: MONAI takes cases first, our own table classes."""
    full = np.zeros((4, 5, 6), np.uint8)
    full[1:3, 1:3, 1:3] = 1
    half, both = full.copy(), full.copy()
    half[2] = 0
    both[1:3, 4] = 2
    only_second = np.where(both == 2, both, 0)
    names = {"one": 1, "two": 2}
    for protocol, expected in (("monai", (2 / 3 + 0.5) / 2), ("nnunet", (1 / 3 + 1) / 2)):
        settings = EvaluationSettings(protocol=protocol)
        classes = PROTOCOLS[protocol].classes(ClassSet.of_mapping(names))
        cases = [
            evaluate_case(reference, prediction, SPACING_MM, classes, case=case, settings=settings)
            for case, reference, prediction in (("x", full, half), ("y", both, only_second))
        ]
        found = Evaluation.of_cases(classes, cases, settings=settings)
        assert found.summary.mean["dice"] == pytest.approx(expected)
        assert found.summary.classes["one"].metrics["dice"].mean == pytest.approx(1 / 3)
        assert (found.summary.low["dice"] is None) == (protocol == "monai")
        assert Evaluation.from_json(found.to_json()) == found
