from __future__ import annotations

from typing import Any

from sagittal.bundle.card import data_license_in, model_card
from sagittal.plan import DatasetSpec, Label, Plan
from sagittal.testing.plans import untrained_plan


def test_card_tells_what_counts(plan: Plan, metrics: dict[str, Any]) -> None:
    card = model_card(plan, metrics, parameters=4525251, data_license="CC BY 4.0")
    for text in (
        "research use. Not a medical device",
        "Data set: untrained",
        "Training cases: 16",
        "Channels: channel_0",
        "Licence of the data: CC BY 4.0",
        "| class_1 | 1 | 0.875 |",
        "| class_2 | 2 | not measured |",
        "| mean | | 0.875 |",
        "4 cases of fold 0, which training never saw",
        "Parameters: 4,525,251",
        "16 x 24 x 32 voxels",
        "1 x 1 x 1 mm",
        "segformer3d",
    ):
        assert text in card
    assert card.endswith("\n")


def test_unknowns_are_called_unknown(plan: Plan) -> None:
    card = model_card(plan, {"dice": "oops"}, parameters=1)
    assert "Licence of the data: unknown" in card
    assert "Training cases: unknown" in card
    assert "have not been validated" in card
    assert card.count("not measured") == 3


def test_regions_show_the_value_that_is_written() -> None:
    labels = (Label(name="whole", values=(1, 2)), Label(name="core", values=(2,)))
    spec = DatasetSpec(name="r", channel_names=("T1",), labels=labels, regions_class_order=(1, 2), file_ending=".nii")
    card = model_card(untrained_plan("mednext-s", spec), {"dice": {"whole": 1}}, parameters=1)
    assert "| whole | 1 | 1.000 |" in card and "| core | 2 | not measured |" in card


def test_names_can_not_break_the_table() -> None:
    spec = DatasetSpec(
        name="evil\n# Cleared for clinical use",
        channel_names=("a",),
        labels=(Label(name="x | y\n| z", values=(1,)),),
        file_ending=".nii",
    )
    card = model_card(untrained_plan("mednext-s", spec), {}, parameters=1)
    assert "\n# Cleared" not in card
    assert "| x \\| y \\| z | 1 | not measured |" in card


def test_the_licence_is_read_back_from_the_card(plan: Plan, metrics: dict[str, Any]) -> None:
    for told, expected in (("CC BY 4.0", "CC BY 4.0"), (None, None), ("a\n- b", "a - b")):
        assert data_license_in(model_card(plan, metrics, parameters=1, data_license=told)) == expected
    assert data_license_in("# another card") is None
