"""Plans of other versions: brought up to date, or refused with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from sagittal.errors import PlanError
from sagittal.plan.migrations import MIGRATIONS, SCHEMA_VERSION, migrate
from sagittal.plan.plan import Plan
from sagittal.testing.plans import untrained_plan, untrained_spec


def test_each_version_is_taken_one_step_at_a_time() -> None:
    steps = {1: lambda tree: {**tree, "b": tree["a"]}, 2: lambda tree: {**tree, "c": tree["b"] + 1}}
    old = {"schema_version": 1, "a": 5}
    assert migrate(old, source="x", newest=3, migrations=steps) == {"schema_version": 3, "a": 5, "b": 5, "c": 6}
    assert old == {"schema_version": 1, "a": 5}


def test_every_older_version_has_its_step() -> None:
    assert set(MIGRATIONS) == set(range(1, SCHEMA_VERSION))
    assert Plan.model_fields["schema_version"].default == SCHEMA_VERSION


@pytest.mark.parametrize(
    ("version", "told"), [(SCHEMA_VERSION + 1, "newer Sagittal"), (0, "expected 1"), ("1", "expected 1")]
)
def test_other_versions_are_refused(tmp_path: Path, version: object, told: str) -> None:
    plan = untrained_plan("segformer3d", untrained_spec(2))
    path = tmp_path / "plan.json"
    shown = f'"{version}"' if isinstance(version, str) else version
    path.write_text(plan.to_json().replace('"schema_version": 1', f'"schema_version": {shown}'))
    with pytest.raises(PlanError, match=told):
        Plan.read(path)


def test_what_is_no_plan_is_told_so(tmp_path: Path) -> None:
    for text, told in (('{"labels": {}}', "schema_version is None"), ("[1]", "not a plan"), ("{", "not a plan")):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(PlanError, match=told):
            Plan.read(tmp_path / "p.json")
