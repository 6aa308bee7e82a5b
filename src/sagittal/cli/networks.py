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
        bare = config.single_scale()
        with torch.device("meta"):
            network = build_network(bare, shape[0], classes)
        rows.append((name, parameters(network), multiply_adds(network, (1, *shape))))
    if json:
        listed = [{"name": name, "parameters": count, "multiply_adds": macs} for name, count, macs in rows]
        print(jsonlib.dumps({"input": list(shape), "classes": classes, "networks": listed}))
        return 0
    table = Table("network", "parameters (M)", f"multiply-adds (G) at {input}", title="without deep supervision")
    for name, count, macs in rows:
        table.add_row(name, f"{count / 1e6:.2f}", f"{macs / 1e9:.1f}")
    Console().print(table)
    return 0
