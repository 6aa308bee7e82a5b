"""`sagittal networks`: which there are, and what they cost."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from sagittal.cli.options import parse_input_shape


def networks(
    *,
    input: Annotated[str, Parameter(help="channels and D, H, W")] = "1x128x128x128",
    classes: int = 3,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """List the networks with their parameters and multiply-adds at a stated input.

    Parameters
    ----------
    classes: outputs of the network, background included
    json: print a JSON list instead of a table
    """
    import json as jsonlib

    import torch
    from rich.console import Console
    from rich.table import Table

    from sagittal.networks.build import build_network
    from sagittal.networks.cost import multiply_adds, parameters
    from sagittal.plan.networks import NETWORKS

    shape = parse_input_shape(input)
    rows = []
    for name, config in NETWORKS.items():
        bare = config.replace(deep_supervision=False) if config.kind == "mednext" else config
        with torch.device("meta"):
            network = build_network(bare, shape[0], classes)
        rows.append(
            {"name": name, "parameters": parameters(network), "multiply_adds": multiply_adds(network, (1, *shape))}
        )
    if json:
        print(jsonlib.dumps({"input": list(shape), "classes": classes, "networks": rows}))
        return 0
    table = Table("network", "parameters (M)", f"multiply-adds (G) at {input}", title="without deep supervision")
    for row in rows:
        table.add_row(str(row["name"]), f"{row['parameters'] / 1e6:.2f}", f"{row['multiply_adds'] / 1e9:.1f}")
    Console().print(table)
    return 0
