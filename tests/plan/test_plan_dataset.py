from __future__ import annotations

import pytest
from example_plan import CLASSES, REGIONS
from pydantic import ValidationError

from sagittal.plan import DatasetSpec, Label


def test_what_classes_declare():
    assert (CLASSES.has_regions, CLASSES.num_outputs) == (False, 3)
    assert CLASSES.foreground_values == {2, 300}
    assert CLASSES.declared_values == {0, 2, 9, 300}


def test_what_regions_declare():
    assert (REGIONS.has_regions, REGIONS.num_outputs) == (True, 2)
    assert REGIONS.declared_values == {0, 1, 2, 4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "", "values": (1,)}, "needs a name"),
        ({"name": "a", "values": ()}, "between 1 and 65535"),
        ({"name": "a", "values": (0, 1)}, "between 1 and 65535"),
        ({"name": "a", "values": (65536,)}, "between 1 and 65535"),
        ({"name": "a", "values": (2, 1)}, "ascending and distinct"),
        ({"name": "a", "values": (1, 1)}, "ascending and distinct"),
    ],
)
def test_a_label_is_checked(fields, message):
    with pytest.raises(ValidationError, match=message):
        Label(**fields)


def labels(*values: int | tuple[int, ...], name: str = "label") -> tuple[Label, ...]:
    return tuple(
        Label(name=f"{name} {i}", values=value if isinstance(value, tuple) else (value,))
        for i, value in enumerate(values)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_names": ()}, "at least one channel"),
        ({"labels": ()}, "at least one foreground label"),
        ({"labels": (Label(name="a", values=(1,)), Label(name="a", values=(2,)))}, "label names must differ"),
        ({"labels": labels(1, 9)}, "ignore value 9 is also a foreground value"),
        ({"labels": labels((1, 2))}, "need regions_class_order"),
        ({"labels": labels(2, 1)}, "distinct values in ascending order"),
        ({"labels": labels(1, 1)}, "distinct values in ascending order"),
        ({"regions_class_order": (1,)}, "1 values for 2 regions"),
    ],
)
def test_a_declaration_is_checked(changes, message):
    with pytest.raises(ValidationError, match=message):
        CLASSES.replace(**changes)


@pytest.mark.parametrize("label_map", [((2, -1),), ((2, -1), (300, 70000)), ((9, -9),)])
def test_a_label_map_is_kept(label_map):
    spec = CLASSES.replace(label_map=label_map)
    assert DatasetSpec.from_json(spec.to_json()) == spec


def test_without_a_label_map_nothing_of_it_is_written():
    assert "label_map" not in CLASSES.to_json()


@pytest.mark.parametrize(
    ("label_map", "told"),
    [
        (((4, -1),), "declared label values"),
        (((0, -1),), "other than 0"),
        (((300, -2), (2, -1)), "declared label values"),
        (((2, 5),), "outside of 0..65535"),
        (((2, -1), (300, -1)), "distinct"),
    ],
)
def test_a_label_map_that_can_not_be_undone_is_refused(label_map, told):
    with pytest.raises(ValidationError, match=told):
        CLASSES.replace(label_map=label_map)
