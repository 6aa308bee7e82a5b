"""`sagittal plan`: every number of a training, with its reason, before it starts."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from sagittal.cli.options import Settings, known_folder, parse_settings_option, require_known_names

if TYPE_CHECKING:
    from sagittal.plan import Plan


def plan(
    dataset: Path,
    *,
    network: str | None = None,
    config: Literal["3d", "3d-low", "2d"] = "3d",
    preset: str | None = None,
    out: Path = Path("plan.json"),
    memory_gib: float = 8.0,
    splits: Path | None = None,
    settings: Settings = None,
    explain: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Measure a data set and plan a training for it.

    Args:
        dataset: folder in nnU-Net's layout
        network: name of the network, by default the preset's, else mednext-s; `sagittal networks` lists them
        config: volumes, volumes at a coarser spacing where a patch shows little of a case, or slices
        preset: a protocol to start from: mednext-paper, segformer3d-paper, segformer3d-repository or nnunet
        out: the plan to write
        memory_gib: memory that a training step may use
        splits: own splits, as nnU-Net's splits_final.json; one in the data set's folder is taken without being named
        explain: print every number with its reason
        json: print every number with its reason as JSON, and the rest on stderr
    """
    from sagittal.data.dataset import read_dataset
    from sagittal.training.choice import PlanChoice
    from sagittal.training.stages import RunOptions, check, describe, find_plan

    require_known_names(network, preset)
    say = _say_aside if json else print
    options = RunOptions(memory_gib=memory_gib, splits=splits, known=known_folder(), say=say)
    choice = PlanChoice(network=network, settings=parse_settings_option(settings), configuration=config, preset=preset)
    data = read_dataset(dataset)
    check(data, options)
    made, _ = find_plan(data, None, choice, options)
    made.write(out)
    if json:
        print(json_module.dumps({"plan": str(out), "fields": _fields(made)}, indent=2))
    elif explain:
        for field in _fields(made):
            print(f"  {field['name']} = {json_module.dumps(field['value'])}\n      {field['reason']}")
    say(f"{out}: {describe(made)}")
    return 0


def _fields(made: Plan) -> list[dict[str, object]]:
    from sagittal.planning import explain

    return [dict(field._asdict()) for field in explain(made)]


def _say_aside(line: str) -> None:
    print(line, file=sys.stderr)
