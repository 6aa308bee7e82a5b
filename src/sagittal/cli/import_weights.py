"""`sagittal import-weights`: weights that another program trained become a bundle."""

from __future__ import annotations

from pathlib import Path

from sagittal.cli.options import Settings, parse_settings_option


def import_weights(
    file: Path,
    *,
    out: Path,
    network: str | None = None,
    plan: Path | None = None,
    dataset: Path | None = None,
    settings: Settings = None,
) -> int:
    """Make a bundle of a weights file (.pth, .pt, .model, .safetensors); no code in it is run.

    Args:
        file: a state dict or a checkpoint, under the official names or, of MedNeXt, MONAI's
        out: the bundle to write
        network: name of the network that the weights are of; `sagittal networks` lists them
        plan: the plan that they were trained by, instead of --network
        dataset: a data set's folder or its dataset.json, for the names of channels and labels
    """
    from sagittal.training.import_weights import Knowledge
    from sagittal.training.import_weights import import_weights as make_bundle

    known = Knowledge(network=network, plan=plan, dataset=dataset, settings=parse_settings_option(settings))
    result = make_bundle(file, out, known, say=print)
    print(f"bundle: {result.bundle}")
    return 0
