"""What nnU-Net makes of a data set; runs in an environment of its own that has nnunetv2 2.8 installed.

    python nnunet.py reference DATASET OUT [--spacing D,H,W]   fingerprint, plans and prepared cases of a data set
    python nnunet.py time DATASET OUT.json D,H,W               seconds and peak memory of preparing its one case

`reference` writes OUT/fingerprint.json, OUT/plans.json and OUT/cases/CASE.npz (data float32 (C, D, H, W), seg (D, H,
W)); `--spacing` overrides the target spacing as `-overwrite_target_spacing` does. `time` is called by
benchmarks/preprocess.py. nnU-Net is called through its own functions and never a dependency of this project.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path


def nnunet_folders(work: Path) -> None:
    """Point nnU-Net to folders of its own; it reads these variables when it is imported."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (work / name).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(work / name)


def reference(dataset: Path, out: Path, spacing: list[float] | None) -> None:
    """Write nnU-Net's fingerprint, plans and prepared arrays of `dataset`."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        nnunet_folders(work)
        (work / "nnUNet_raw" / "Dataset001_Reference").symlink_to(dataset.resolve())
        from nnunetv2.experiment_planning import plan_and_preprocess_api as api
        from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        api.extract_fingerprints([1], num_processes=2, show_progress_bar=False)
        api.plan_experiments([1], overwrite_target_spacing=spacing)
        made = work / "nnUNet_preprocessed" / "Dataset001_Reference"
        (out / "cases").mkdir(parents=True, exist_ok=True)
        shutil.copy(made / "dataset_fingerprint.json", out / "fingerprint.json")
        shutil.copy(made / "nnUNetPlans.json", out / "plans.json")
        save_cases(dataset, out, PlansManager(str(out / "plans.json")), DefaultPreprocessor(verbose=False))


def save_cases(dataset: Path, out: Path, plans, preprocessor) -> None:
    """Prepare each case as nnU-Net's 3d_fullres does and save its arrays."""
    import numpy as np
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    declared = json.loads((dataset / "dataset.json").read_text())
    configuration = plans.get_configuration("3d_fullres")
    for name, files in get_filenames_of_train_images_and_targets(str(dataset), declared).items():
        data, seg, _ = preprocessor.run_case(files["images"], files["label"], plans, configuration, declared)
        np.savez(out / "cases" / f"{name}.npz", data=data.astype(np.float32), seg=seg[0])


def time_case(folder: Path, out: Path, target_mm: list[float]) -> None:
    """Prepare the one case of a data set as a worker of nnU-Net does, and write what it took.

    The plan is as nnU-Net makes it for one CT, with the numbers that benchmarks/preprocess.py gives our own.
    """
    with tempfile.TemporaryDirectory(dir=folder) as work:
        nnunet_folders(Path(work))
        from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        plans = PlansManager(ct_plan(target_mm))
        declared = json.loads((folder / "dataset.json").read_text())
        preprocessor = DefaultPreprocessor(verbose=False)
        began = time.perf_counter()
        preprocessor.run_case_save(
            str(Path(work) / "case"),
            [str(folder / "imagesTr" / "case_0000.nii.gz")],
            str(folder / "labelsTr" / "case.nii.gz"),
            plans,
            plans.get_configuration("3d_fullres"),
            declared,
        )
        seconds = time.perf_counter() - began
    out.write_text(json.dumps({"seconds": seconds, "peak_mib": peak_mib()}))


def peak_mib() -> float:
    """Return the most memory that this process ever held; `ru_maxrss` would count what its parent held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def ct_plan(target_mm: list[float]) -> dict:
    """Return the part of nnU-Net's plans that preprocessing reads."""

    def resampling(**options) -> dict:
        return {"order_z": 0, "force_separate_z": None, **options}

    return {
        "dataset_name": "Dataset001_Reference",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {"mean": 0.0, "std": 200.0, "percentile_00_5": -400.0, "percentile_99_5": 400.0}
        },
        "configurations": {
            "3d_fullres": {
                "data_identifier": "reference",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": [128, 128, 128],
                "spacing": target_mm,
                "normalization_schemes": ["CTNormalization"],
                "use_mask_for_norm": [False],
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": resampling(is_seg=False, order=3),
                "resampling_fn_seg_kwargs": resampling(is_seg=True, order=1),
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities_kwargs": resampling(is_seg=False, order=1),
                "architecture": {"network_class_name": "", "arch_kwargs": {}, "_kw_requires_import": []},
            }
        },
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("reference")
    first.add_argument("dataset", type=Path)
    first.add_argument("out", type=Path)
    first.add_argument("--spacing", type=lambda text: [float(value) for value in text.split(",")])
    second = commands.add_parser("time")
    second.add_argument("folder", type=Path)
    second.add_argument("out", type=Path)
    second.add_argument("spacing", type=lambda text: [float(value) for value in text.split(",")])
    given = parser.parse_args()
    if given.command == "reference":
        reference(given.dataset, given.out, given.spacing)
    else:
        time_case(given.folder, given.out, given.spacing)


if __name__ == "__main__":
    sys.exit(main())
