"""`sagittal import-nnunet`: a trained model of nnU-Net v2 becomes a bundle that predicts the same."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sagittal.cli.options import Settings, parse_settings_option


def import_nnunet(
    folder: Path,
    *,
    out: Path,
    fold: list[str] | None = None,
    checkpoint: Literal["final", "best"] | None = None,
    settings: Settings = None,
) -> int:
    """Make a bundle of a trained model of nnU-Net v2; no code in its files is run.

    Args:
        folder: the trained model, for example nnUNetTrainer__nnUNetPlans__3d_fullres
        out: the bundle to write
        fold: 0, 1, ... or all; may be repeated (default: every numbered fold that is finished, else all)
        checkpoint: final or best (default: final, or best where no fold is finished)
    """
    from sagittal.training.import_nnunet import Selection
    from sagittal.training.import_nnunet import import_nnunet as make_bundle

    selection = Selection(checkpoint, fold, parse_settings_option(settings))
    result = make_bundle(folder, out, selection, say=print)
    print(f"bundle: {result.bundle}")
    return 0
