"""`sagittal plan`: every number of a training, with its reason, before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sagittal.cli.options import Settings, known_folder, parse_settings_option


def plan(
    dataset: Path,
    *,
    network: str = "mednext-s",
    out: Path = Path("plan.json"),
    memory_gib: float = 8.0,
    splits: Path | None = None,
    settings: Settings = None,
    explain: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Measure a data set and plan a training for it.

    Parameters
    ----------
    dataset: folder in nnU-Net's layout
    network: name of the network; `sagittal networks` lists them
    out: the plan to write
    memory_gib: memory that a training step may use
    splits: own splits, as nnU-Net's splits_final.json; one in the data set's folder is taken without being named
    explain: print every number with its reason
    """
    from sagittal.data.dataset import read_dataset
    from sagittal.training.stages import PlanChoice, RunOptions, check, describe, find_plan

    options = RunOptions(memory_gib=memory_gib, splits=splits, known=known_folder(), say=print)
    data = read_dataset(dataset)
    check(data, options)
    made, _ = find_plan(data, None, PlanChoice(network=network, settings=parse_settings_option(settings)), options)
    made.write(out)
    if explain:
        for name, reason in made.reasons.items():
            print(f"  {name}: {reason}")
    print(f"{out}: {describe(made)}")
    return 0
