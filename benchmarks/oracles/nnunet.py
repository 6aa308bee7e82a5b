"""What nnU-Net makes of a data set; runs in an environment of its own that has nnunetv2 2.8 installed.

    python nnunet.py reference DATASET OUT [--spacing D,H,W]   fingerprint, plans and prepared cases of a data set
    python nnunet.py time CASE_FOLDER OUT.json                 seconds and peak memory of preparing one case

`reference` writes OUT/fingerprint.json, OUT/plans.json and OUT/cases/CASE.npz (data float32 (C, D, H, W), seg (D, H,
W)); `--spacing` overrides the target spacing as `-overwrite_target_spacing` does. `time` reads the folder that
benchmarks/preprocess.py makes. nnU-Net is called through its own functions and never a dependency of this project.
"""

import argparse
import json
import os
import resource
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
        from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

        api.extract_fingerprints([1], num_processes=2, show_progress_bar=False)
        api.plan_experiments([1], overwrite_target_spacing=spacing)
        made = work / "nnUNet_preprocessed" / "Dataset001_Reference"
        (out / "cases").mkdir(parents=True, exist_ok=True)
        shutil.copy(made / "dataset_fingerprint.json", out / "fingerprint.json")
        shutil.copy(made / "nnUNetPlans.json", out / "plans.json")
        save_cases(dataset, out, PlansManager(str(out / "plans.json")), DefaultPreprocessor(verbose=False))
        del get_filenames_of_train_images_and_targets


def save_cases(dataset: Path, out: Path, plans, preprocessor) -> None:
    """Prepare each case as nnU-Net's 3d_fullres does and save its arrays."""
    import numpy as np
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    declared = json.loads((dataset / "dataset.json").read_text())
    configuration = plans.get_configuration("3d_fullres")
    for name, files in get_filenames_of_train_images_and_targets(str(dataset), declared).items():
        data, seg, _ = preprocessor.run_case(files["images"], files["label"], plans, configuration, declared)
        np.savez(out / "cases" / f"{name}.npz", data=data.astype(np.float32), seg=seg[0])


def time_case(folder: Path, out: Path) -> None:
    """Prepare the case that `folder` describes, as nnU-Net's workers do, and write what it took."""
    with tempfile.TemporaryDirectory() as work:
        nnunet_folders(Path(work))
        from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        plans = PlansManager(str(folder / "nnunet_plans.json"))
        declared = json.loads((folder / "dataset.json").read_text())
        configuration = plans.get_configuration("3d_fullres")
        preprocessor = DefaultPreprocessor(verbose=False)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        preprocessor.run_case_save(
            str(Path(work) / "case"),
            [str(folder / "imagesTr" / "case_0000.nii.gz")],
            str(folder / "labelsTr" / "case.nii.gz"),
            plans,
            configuration,
            declared,
        )
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out.write_text(json.dumps({"seconds": seconds, "peak_mib": peak / 1024, "import_mib": before / 1024}))


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
    given = parser.parse_args()
    if given.command == "reference":
        reference(given.dataset, given.out, given.spacing)
    else:
        time_case(given.folder, given.out)


if __name__ == "__main__":
    sys.exit(main())
