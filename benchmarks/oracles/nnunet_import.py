"""Make small models with nnU-Net and predict with them; runs in an environment of its own that has nnunetv2 2.8.

    python nnunet_import.py OUT --dataset HIPPOCAMPUS [--spacing 1.3,0.9,1.1] [--architecture resenc] [--steps 60]
    python nnunet_import.py OUT --synthetic same|other [...]

OUT/model is then nnU-Net's folder of a trained model, OUT/scans holds cases that it has not seen, and OUT/predictions
what nnU-Net predicts of them, mirrored, on the CPU. Planning and preprocessing are nnU-Net's; only the plan's widths
and window are made small and its spacing may be set. --steps 0 leaves the weights random. `--synthetic` draws volumes
of two channels (CT and another) with voxels four times longer than wide: `same` all of 4 mm, `other` of 3.2 to 5 mm, so
that slices are resampled too. OUT/predictions_alike is the same with two deliberate differences taken away: sums in
fp32 instead of fp16, and logits interpolated between slices instead of repeated.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
NAME = "Dataset001_Small"
PROCESSES = "nnUNet_n_proc_DA"
TRAINING, HELD_OUT = 12, 6
EPOCHS = 3


def main() -> None:
    """Draw or take the cases, train, predict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--synthetic", choices=["same", "other"])
    parser.add_argument("--spacing", type=lambda text: [float(value) for value in text.split(",")])
    parser.add_argument("--architecture", choices=["plain", "resenc"], default="plain")
    parser.add_argument("--window", type=float, default=2 / 3, help="share of the planned one (default: 2/3)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--folds", type=int, default=1)
    given = parser.parse_args()
    work = given.out / "work"
    for name in FOLDERS:
        (work / name).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str((work / name).resolve())
    os.environ[PROCESSES] = "1"
    raw = work / "nnUNet_raw" / NAME
    if given.synthetic:
        draw(raw, given.out / "scans", given.synthetic == "other")
    else:
        take(given.dataset, raw, given.out / "scans")
    plans = plan(work, given)
    for fold in range(given.folds):
        model = train(plans, work, fold, given.steps)
    shutil.copytree(model, given.out / "model", dirs_exist_ok=True)
    predict(given.out, tuple(range(given.folds)), "predictions")
    predict(given.out, tuple(range(given.folds)), "predictions_alike", alike=True)


def take(dataset: Path, raw: Path, scans: Path) -> None:
    """Take every tenth case of a data set."""
    declared = json.loads((dataset / "dataset.json").read_text())
    ending = declared["file_ending"]
    cases = sorted(path.name.removesuffix(ending) for path in (dataset / "labelsTr").glob(f"*{ending}"))
    cases = cases[:: len(cases) // (TRAINING + HELD_OUT)][: TRAINING + HELD_OUT]
    for folder in (raw / "imagesTr", raw / "labelsTr", scans):
        folder.mkdir(parents=True, exist_ok=True)
    for case in cases[:TRAINING]:
        shutil.copy(dataset / "imagesTr" / f"{case}_0000{ending}", raw / "imagesTr")
        shutil.copy(dataset / "labelsTr" / f"{case}{ending}", raw / "labelsTr")
    for case in cases[TRAINING:]:
        shutil.copy(dataset / "imagesTr" / f"{case}_0000{ending}", scans)
    (raw / "dataset.json").write_text(json.dumps({**declared, "numTraining": TRAINING}))


def draw(raw: Path, scans: Path, other_slices: bool) -> None:
    """Draw ellipsoids of two kinds in noise, in voxels four times longer than wide."""
    import numpy as np

    random = np.random.default_rng(3)
    for folder in (raw / "imagesTr", raw / "labelsTr", scans):
        folder.mkdir(parents=True, exist_ok=True)
    for number in range(TRAINING + HELD_OUT):
        slice_mm = random.uniform(3.2, 5.0) if other_slices else 4.0
        plane_mm = random.uniform(0.8, 1.2)
        spacing = (slice_mm, plane_mm, plane_mm)
        shape = tuple(round(size) for size in (64 / slice_mm, *random.uniform(50, 62, 2) / plane_mm))
        mm = np.stack(np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij"))
        labels = np.zeros(shape, np.uint8)
        for value in (1, 2):
            for _ in range(2):
                centre = random.uniform((14, 14, 14), (50, 40, 40))[:, None, None, None]
                radii = random.uniform((8, 6, 6), (14, 12, 12))[:, None, None, None]
                labels[(((mm - centre) / radii) ** 2).sum(0) < 1] = value
        ct = -50 + 120.0 * (labels == 1) + 40.0 * (labels == 2) + random.normal(0, 40, shape)
        mr = 100 + 30.0 * (labels == 1) + 90.0 * (labels == 2) + random.normal(0, 20, shape)
        border = np.zeros(shape, bool)
        border[1:-1, 4:-4, 4:-4] = True
        trained = number < TRAINING
        images, case = raw / "imagesTr" if trained else scans, f"case_{number:02d}"
        for channel, values in enumerate((ct, mr)):
            save(
                (values * border).astype(np.float32),
                spacing[::-1],
                images / f"{case}_{channel:04d}.nii.gz",
            )
        if trained:
            save(
                labels * border.astype(np.uint8),
                spacing[::-1],
                raw / "labelsTr" / f"{case}.nii.gz",
            )
    declared = {
        "channel_names": {"0": "CT", "1": "other"},
        "labels": {"background": 0, "large": 1, "small": 2},
        "numTraining": TRAINING,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(declared))


def save(values, spacing, path: Path) -> None:
    """Write an array (D, H, W) with its spacing in x, y, z."""
    import SimpleITK

    image = SimpleITK.GetImageFromArray(values)
    image.SetSpacing([float(length) for length in spacing])
    SimpleITK.WriteImage(image, str(path))


def plan(work: Path, given) -> dict:
    """Let nnU-Net plan, make the network small, and prepare the cases."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api

    api.extract_fingerprints([1], num_processes=1, show_progress_bar=False)
    api.plan_experiments([1])
    folder = work / "nnUNet_preprocessed" / NAME
    path = folder / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    configuration["batch_size"] = 2
    if given.spacing:
        configuration["spacing"] = given.spacing
    architecture = configuration["architecture"]
    arguments = architecture["arch_kwargs"]
    stages = arguments["n_stages"]
    arguments["features_per_stage"] = [8 * 2**stage for stage in range(stages)]
    # Less than the planned window, so that most cases take several.
    divisors = [1, 1, 1]
    for stride in arguments["strides"]:
        divisors = [a * b for a, b in zip(divisors, stride, strict=True)]
    configuration["patch_size"] = [
        max(by, round(size * given.window / by) * by)
        for size, by in zip(configuration["patch_size"], divisors, strict=True)
    ]
    if given.architecture == "resenc":
        architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
        del arguments["n_conv_per_stage"]
        arguments["n_blocks_per_stage"] = [1, 2, 2, 2, 2, 2, 2][:stages]
        arguments["n_conv_per_stage_decoder"] = [1] * (stages - 1)
    path.write_text(json.dumps(plans))
    api.preprocess([1], configurations=("3d_fullres",), num_processes=(1,))
    return plans


def train(plans: dict, work: Path, fold: int, steps: int) -> Path:
    """Train by nnU-Net's trainer and return the model's folder."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    # Planning takes this as a number of threads, training as processes beside this one.
    os.environ[PROCESSES] = "0"
    torch.manual_seed(fold)
    declared = json.loads((work / "nnUNet_raw" / NAME / "dataset.json").read_text())
    trainer = nnUNetTrainer(plans | {"continue_training": False}, "3d_fullres", fold, declared, torch.device("cpu"))
    trainer.num_epochs, trainer.num_iterations_per_epoch = EPOCHS, max(1, steps // EPOCHS)
    trainer.num_val_iterations_per_epoch = 1
    trainer.on_train_start()
    if steps:
        for _ in range(trainer.num_epochs):
            trainer.on_epoch_start()
            trainer.on_train_epoch_start()
            outputs = [
                trainer.train_step(next(trainer.dataloader_train)) for _ in range(trainer.num_iterations_per_epoch)
            ]
            trainer.on_train_epoch_end(outputs)
            with torch.no_grad():
                trainer.on_validation_epoch_start()
                trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
            trainer.on_epoch_end()
            print("loss", float(outputs[-1]["loss"]), flush=True)
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    return Path(trainer.output_folder_base)


def predict(out: Path, folds: tuple[int, ...], name: str, *, alike: bool = False) -> None:
    """Predict the held-out cases as `nnUNetv2_predict -device cpu` does, or as it would without two of its choices."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    (out / name).mkdir(exist_ok=True)
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(out / "model"), folds, "checkpoint_final.pth")
    if alike:
        predictor.configuration_manager.configuration["resampling_fn_probabilities_kwargs"]["order_z"] = 1
        # What its accumulators are made with.
        torch.half = torch.float32
    predictor.predict_from_files_sequential(str(out / "scans"), str(out / name))


if __name__ == "__main__":
    main()
