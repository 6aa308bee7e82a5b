"""Dice of whole held-out cases against the time that training took, for several networks and for nnU-Net.

    python benchmarks/time_to_dice.py plans  DATASET OUT [--minutes 15]
    python benchmarks/time_to_dice.py run    DATASET OUT [--networks ...] [--seeds 0,1,2]
    python benchmarks/time_to_dice.py nnunet DATASET OUT --nnunet-python PYTHON [--minutes 15,60] [--seeds 0]
    python benchmarks/time_to_dice.py table  OUT

`plans` starts `sagittal train --budget`, one network after the other, on a machine that does nothing else, lets each
measure its step and fit its schedule, and stops it. `run` trains by these plans to their end, seed by seed: the same
steps whatever else the machine does meanwhile, and so, with as many threads,
the weights that the quiet machine would have got in the minutes. `nnunet` measures a step of nnU-Net in its own
environment and trains it by a schedule that fits.
`table` prints what there is, as Markdown. Everything is of fold 0 (nnU-Net's split); runs that are there are not made
again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

from training_runs import facts_of, fit_plan, mean_dice, train

NETWORKS = ("mednext-s", "segformer3d", "plainconvunet")
CPU = ("--device", "cpu")


def main() -> int:
    """Run the stage that the first argument names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("plans", "run", "nnunet", "table"))
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="DATASET and OUT; for table OUT alone")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--minutes", default="15")
    parser.add_argument("--nnunet-python", default="python")
    parser.add_argument("--measure-only", action="store_true", help="nnunet: measure a step and keep it, train nothing")
    args = parser.parse_args()
    networks, seeds = args.networks.split(","), [int(seed) for seed in args.seeds.split(",")]
    out = args.folders[-1]
    out.mkdir(parents=True, exist_ok=True)
    match args.stage:
        case "plans":
            for network in networks:
                fit_plan(args.folders[0], out, network, float(args.minutes), ("--network", network, *CPU))
        case "run":
            for seed in seeds:
                for network in networks:
                    train(args.folders[0], out, network, seed, CPU)
        case "nnunet":
            step_s = nnunet_step_s(args.folders[0], out, args.nnunet_python)
            for minutes in () if args.measure_only else [float(text) for text in args.minutes.split(",")]:
                for seed in seeds:
                    train_nnunet(args.folders[0], out, args.nnunet_python, minutes, seed, step_s)
        case "table":
            print(table(out))
    return 0


def nnunet_step_s(dataset: Path, out: Path, python: str) -> float:
    """Return the seconds of a step of nnU-Net, measured once and kept."""
    target = out / "nnunet.json"
    if not target.exists():
        measuring = nnunet_command(dataset, out / "nnunet", python, "--measure-only")
        said = subprocess.run(measuring, check=True, text=True, capture_output=True).stdout
        step_s = float(said.split("a step takes ")[1].split(" s")[0])
        target.write_text(json.dumps({"step_s": step_s}) + "\n")
    return float(json.loads(target.read_text())["step_s"])


def nnunet_command(dataset: Path, out: Path, python: str, *options: str) -> list[str]:
    """Return the command line of nnU-Net's training."""
    return [python, str(Path(__file__).parent / "oracles" / "nnunet_train.py"), str(dataset), str(out), *options]


def train_nnunet(dataset: Path, out: Path, python: str, minutes: float, seed: int, step_s: float) -> None:
    """Train nnU-Net for as many steps as the minutes hold, and score its predictions as ours are scored."""
    folder = out / f"nnunet-{minutes:g}min-seed{seed}"
    if not (folder / "result.json").exists():
        steps = str(int(minutes * 60 / step_s))
        subprocess.run(nnunet_command(dataset, folder, python, "--steps", steps, "--seed", str(seed)), check=True)
    # Only the held-out cases have predictions, and a reference without one is an error.
    predictions, references = folder / "predictions", folder / "references"
    references.mkdir(exist_ok=True)
    for prediction in predictions.iterdir():
        if not (references / prediction.name).exists():
            (references / prediction.name).symlink_to((dataset / "labelsTr" / prediction.name).resolve())
    scored = [sys.executable, "-m", "sagittal", "evaluate", str(predictions), str(references)]
    subprocess.run([*scored, "--out", str(folder / "report")], check=True)


def table(out: Path) -> str:
    """Return the Markdown table of all runs in OUT."""
    rows = ["| method | minutes | steps | Dice by seed | mean |", "|---|---|---|---|---|"]
    for path in sorted(out.glob("*.fitted.json")):
        network, facts = path.name.removesuffix(".fitted.json"), facts_of(path)
        finished = [found.parent for found in sorted(out.glob(f"{network}-seed*/metrics.json"))]
        # A run that was stopped leaves a bundle without a score.
        dice = [score for score in map(mean_dice, finished) if score is not None]
        if dice:
            rows.append(row(network, facts.minutes, facts.steps, dice))
    for minutes in sorted({folder.name.split("-")[1] for folder in out.glob("nnunet-*min-seed*")}):
        folders = [folder for folder in sorted(out.glob(f"nnunet-{minutes}-seed*")) if (folder / "report").exists()]
        dice = [nnunet_dice(folder) for folder in folders]
        if dice:
            steps = json.loads((folders[0] / "result.json").read_text())["steps"]
            rows.append(row("nnU-Net 2.8", float(minutes.removesuffix("min")), steps, dice))
    return "\n".join(rows)


def nnunet_dice(folder: Path) -> float:
    """Return the mean over labels of the Dice of nnU-Net's predictions."""
    return float(json.loads((folder / "report" / "metrics.json").read_text())["summary"]["mean"]["dice"])


def row(name: str, minutes: float, steps: int, dice: list[float]) -> str:
    """Return a line of the table."""
    seeds = ", ".join(f"{value:.3f}" for value in dice)
    return f"| {name} | {minutes:g} | {steps} | {seeds} | **{mean(dice):.3f}** |"


if __name__ == "__main__":
    sys.exit(main())
