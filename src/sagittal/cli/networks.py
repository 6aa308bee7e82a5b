"""`sagittal networks`: which there are, what they cost, and what their papers say about both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from sagittal.cli.options import parse_input_shape

if TYPE_CHECKING:
    from sagittal.plan.networks import NetworkConfig
    from sagittal.report.cost_tables import Cost
    from sagittal.report.text_table import TextTable

INPUT = "1x128x128x128"
CLASSES = 3

Shown = tuple["TextTable", dict[str, Any]]
"""A table, and the same for --json."""


def networks(
    *,
    input: Annotated[str | None, Parameter(help=f"channels and D, H, W; {INPUT} by default")] = None,
    classes: int | None = None,
    network: Annotated[
        list[str] | None, Parameter(negative="", help="only this network; may be repeated; all by default")
    ] = None,
    paper: Annotated[bool, Parameter(negative="")] = False,
    picture: Path | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
    markdown: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """List the networks with their parameters, multiply-adds and activation memory at a stated input.

    Multiply-adds are of convolutions, linear layers and the two products of attention; linear interpolation (8 for
    each voxel and channel that it makes) has a column of its own. Activation memory is everything that a step holds
    but weights and their gradients, batch 1, float32, on PyTorch's own operators.

    Args:
        classes: outputs of the network, background included; 3 by default
        paper: set what is computed beside the figures that both papers publish, at the inputs they belong to
        picture: write the picture of parameters against published Dice to this SVG file
        json: print JSON instead of a table
        markdown: print the table in Markdown
    """
    from sagittal.errors import PlanError

    if (paper and picture is not None) or (json and markdown):
        raise PlanError("--paper and --picture exclude each other, and so do --json and --markdown.", code="options")
    if (paper or picture is not None) and (input is not None or classes is not None):
        raise PlanError(
            "--input and --classes go with neither --paper nor --picture, whose figures belong to inputs of their own.",
            code="options",
        )
    if classes is not None and classes < 1:
        raise PlanError(f"--classes {classes}: expected a number of at least 1.", code="options")
    if picture is not None and picture.suffix.lower() != ".svg":
        raise PlanError(
            f"--picture {picture}: expected a file that ends in .svg; no other format is drawn.", code="options"
        )
    if picture is not None:
        shown = _draw(picture)
        if not (json or markdown):
            print(f"{picture}: written. --markdown and --json list its points with their sources.")
            return 0
    elif paper:
        shown = _beside_the_papers(network)
    else:
        shown = _list(network, parse_input_shape(input or INPUT), classes or CLASSES)
    _print(shown, as_json=json, as_markdown=markdown)
    return 0


def _list(names: list[str] | None, shape: tuple[int, ...], classes: int) -> Shown:
    from sagittal.report.cost_tables import cost_table

    chosen = _chosen(names)
    costs = {name: _cost(chosen[name], shape, classes, memory=True) for name in _with_progress(chosen)}
    listed = [{"name": name, **_as_json(cost)} for name, cost in costs.items()]
    return cost_table(costs, shape, classes), {"input": list(shape), "classes": classes, "networks": listed}


def _beside_the_papers(names: list[str] | None) -> Shown:
    from sagittal.report.cost_tables import paper_table
    from sagittal.report.published import PUBLISHED_COSTS

    chosen = _chosen(names)
    rows = {row.name: row for row in PUBLISHED_COSTS if names is None or row.network in chosen}
    computed = []
    for name in _with_progress(rows):
        row = rows[name]
        cost = None
        if row.network is not None:
            cost = _cost(_fitted(chosen[row.network], row.input_shape), row.input_shape, row.outputs, memory=False)
        computed.append((row, cost))
    listed = [{"published": asdict(row), "computed": _as_json(cost)} for row, cost in computed]
    return paper_table(computed), {"networks": listed}


def _draw(path: Path) -> Shown:
    from sagittal.plan.base import write_atomically
    from sagittal.report.cost_tables import score_table
    from sagittal.report.published import SCORE_SETS
    from sagittal.report.scatter import picture

    write_atomically(path, picture(SCORE_SETS).encode())
    return score_table(SCORE_SETS), {"picture": str(path), "sets": [asdict(scores) for scores in SCORE_SETS]}


def _chosen(names: list[str] | None) -> Mapping[str, NetworkConfig]:
    from sagittal.plan.networks import NETWORKS, network_config

    return NETWORKS if names is None else {name.lower(): network_config(name) for name in names}


def _cost(config: NetworkConfig, shape: tuple[int, ...], classes: int, *, memory: bool) -> Cost | str:
    """Return what the network costs, or why that can't be said: a package that is not installed, an unfit input."""
    import torch

    from sagittal.errors import SagittalError
    from sagittal.networks.build import build_network
    from sagittal.networks.cost import activation_memory_bytes, parameters, work
    from sagittal.report.cost_tables import Cost

    batch = (1, *shape)
    try:
        with torch.device("meta"):
            network = build_network(config.single_scale(), shape[0], classes)
        arithmetic = work(network, batch)
        return Cost(
            parameters=parameters(network),
            multiply_adds=arithmetic.products,
            multiply_adds_as_published=arithmetic.products_as_published,
            interpolation_multiply_adds=arithmetic.interpolation,
            training_activation_bytes=activation_memory_bytes(network, batch, training=True) if memory else None,
            inference_activation_bytes=activation_memory_bytes(network, batch, training=False) if memory else None,
        )
    except SagittalError as error:
        return error.message


def _fitted(config: NetworkConfig, shape: tuple[int, ...]) -> NetworkConfig:
    """Return the configuration for a row of a paper: UNETR was given one position for each patch of the input."""
    from sagittal.plan.networks import UNETRConfig

    if isinstance(config, UNETRConfig):
        d, h, w = (-(-size // 16) * 16 for size in shape[1:])
        return config.replace(input_size=(d, h, w))
    return config


def _as_json(cost: Cost | str | None) -> dict[str, Any]:
    if isinstance(cost, str):
        return {"error": cost}
    return {} if cost is None else {key: value for key, value in asdict(cost).items() if value is not None}


def _with_progress(names: Iterable[str]) -> Iterable[str]:
    """Go through `names`, with a bar on a terminal: each takes a second or two."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(list(names), "Counting", console=console, transient=True, disable=not console.is_terminal)


def _print(shown: Shown, *, as_json: bool, as_markdown: bool) -> None:
    import json

    from rich.box import SIMPLE_HEAD
    from rich.console import Console, JustifyMethod
    from rich.table import Table
    from rich.text import Text

    table, listed = shown
    if as_json:
        print(json.dumps(listed))
        return
    if as_markdown:
        print(table.markdown())
        return
    drawn = Table(title=table.title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in table.header:
        justify: JustifyMethod = "right" if name in table.numeric else "left"
        # A header's words stand below each other, so that the table fits a terminal of 80 columns.
        # Only notes may be broken: a size or figure cut short says something else.
        drawn.add_column(name.replace(" ", "\n"), justify=justify, vertical="bottom", no_wrap=name != "notes")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    console = Console()
    console.print(drawn)
    for number, note in enumerate(table.notes, 1):
        console.print(f"{number}. {note}", markup=False, highlight=False)
