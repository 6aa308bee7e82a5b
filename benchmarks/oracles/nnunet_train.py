"""Train nnU-Net for a stated time; runs in an environment of its own that has nnunetv2 2.8 installed.

    python nnunet_train.py DATASET OUT --minutes 60 [--steps N] [--seed 0] [--processes 2]

nnU-Net has no schedule by time. A few steps are measured, then its polynomial decay is spread over as many as fit into
the minutes, in `EPOCHS` epochs (its rate falls once per epoch); or over N steps where `--steps` says so. Planning,
preprocessing and the validation at the end do not count towards the time, which favours nnU-Net. The split is fold 0 of
its own five. A run that was stopped goes on at its last epoch. OUT/predictions holds the held-out cases as nnU-Net
predicts them (mirrored), OUT/result.json the times.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

EPOCHS = 20
VALIDATION_STEPS = 1
MEASURED = 4


def main() -> None:
    """Plan, prepare, train and validate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--steps", type=int, help="train so many, whatever they take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="for augmentation and preprocessing")
    parser.add_argument("--measure-only", action="store_true", help="print the seconds of a step and end")
    args = parser.parse_args()
    work = args.out / "work"
    folders = {name: str(work / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for folder in folders.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    os.environ.update({**folders, "nnUNet_n_proc_DA": str(args.processes)})
    raw = work / "nnUNet_raw" / "Dataset001_Compared"
    if not raw.exists():
        raw.symlink_to(args.dataset.resolve())
    trainer = make_trainer(work, args.processes, args.seed)
    step_s = measure_step_s(trainer)
    print(f"a step takes {step_s:.3f} s", flush=True)
    if args.measure_only:
        return
    steps = args.steps or int(args.minutes * 60 / step_s)
    trainer.num_epochs = min(EPOCHS, steps)
    trainer.num_iterations_per_epoch = max(1, round(steps / trainer.num_epochs))
    began = time.monotonic()
    result = train(args, trainer)
    result |= {"step_s": step_s, "seconds": time.monotonic() - began}
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")


def make_trainer(work: Path, processes: int, seed: int):
    """Plan and prepare where that is missing, and return nnU-Net's own trainer for fold 0 of 3d_fullres."""
    import numpy as np
    import torch
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    made = work / "nnUNet_preprocessed" / "Dataset001_Compared"
    if not (made / "nnUNetPlans_3d_fullres").exists():
        api.extract_fingerprints([1], num_processes=processes, show_progress_bar=False)
        api.plan_experiments([1])
        api.preprocess([1], configurations=("3d_fullres",), num_processes=(processes,))
        shutil.copy(work / "nnUNet_raw" / "Dataset001_Compared" / "dataset.json", made / "dataset.json")
    torch.manual_seed(seed)
    np.random.seed(seed)
    plans = json.loads((made / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    declared = json.loads((made / "dataset.json").read_text())
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, declared, device=torch.device("cpu"))
    trainer.num_val_iterations_per_epoch = VALIDATION_STEPS
    trainer.save_every = 1
    return trainer


def measure_step_s(trainer) -> float:
    """Return the fastest of a few training steps; the weights are drawn anew afterwards."""
    import torch

    trainer.on_train_start()
    seconds = []
    weights = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    for _ in range(MEASURED):
        batch = next(trainer.dataloader_train)
        began = time.monotonic()
        trainer.train_step(batch)
        seconds.append(time.monotonic() - began)
    trainer.network.load_state_dict(weights)
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    return min(seconds[1:])


def train(args, trainer) -> dict:
    """Do what nnU-Net's own loop does, then let it predict the held-out cases."""
    import torch

    # The schedule was made for another number of epochs.
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    trainer.lr_scheduler.max_steps = trainer.num_epochs
    losses = []
    latest = Path(trainer.output_folder, "checkpoint_latest.pth")
    if latest.exists():
        trainer.load_checkpoint(str(latest))
        print(f"goes on at epoch {trainer.current_epoch}", flush=True)
    for epoch in range(trainer.current_epoch, trainer.num_epochs):
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        steps = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(trainer.num_iterations_per_epoch)]
        trainer.on_train_epoch_end(steps)
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            checks = [trainer.validation_step(next(trainer.dataloader_val)) for _ in range(VALIDATION_STEPS)]
            trainer.on_validation_epoch_end(checks)
        trainer.on_epoch_end()
        losses.append(float(steps[-1]["loss"]))
        print(f"epoch {epoch + 1}/{trainer.num_epochs}: loss {losses[-1]:.3f}", flush=True)
    trainer.on_train_end()
    began = time.monotonic()
    trainer.perform_actual_validation(False)
    predictions = args.out / "predictions"
    predictions.mkdir(exist_ok=True)
    for path in Path(trainer.output_folder, "validation").glob("*.nii.gz"):
        shutil.copy(path, predictions / path.name)
    return {
        "steps": trainer.num_epochs * trainer.num_iterations_per_epoch,
        "batch_size": trainer.configuration_manager.batch_size,
        "validation_s": time.monotonic() - began,
        "losses": losses,
    }


if __name__ == "__main__":
    sys.exit(main())
