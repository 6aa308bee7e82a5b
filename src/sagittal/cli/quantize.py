"""`sagittal quantize`: a bundle's networks with 8-bit integers, made once and measured."""

from __future__ import annotations

from pathlib import Path


def quantize(bundle: Path, dataset: Path, /, *, cases: int = 16) -> int:
    """Make 8-bit networks of a bundle, for predict --precision int8, into the folder BUNDLE.int8 beside it.

    Half of the cases calibrate, the other half tell what it costs; refused above half a point of mean Dice. Where the
    processor has bfloat16, --precision bf16 is faster and needs none of this.

    Args:
        bundle: folder that `sagittal train` wrote
        dataset: folder with labelled cases and dataset.json, of which the networks were best not trained with half
        cases: how many to take at most, spread evenly
    """
    from sagittal.bundle import is_package, read_bundle
    from sagittal.errors import BundleError
    from sagittal.inference.engines import openvino_int8

    if is_package(bundle):
        raise BundleError(
            f"{bundle}: a package, beside which no 8-bit networks can lie. Expected a bundle's folder: "
            f"'sagittal package {bundle} --unpack FOLDER' makes one.",
            code="package",
        )
    read = read_bundle(bundle)
    openvino_int8.quantize(read, dataset, cases=cases, say=print)
    print(f"written: {openvino_int8.folder_of(read)} (sagittal predict --precision int8 uses it)")
    return 0
