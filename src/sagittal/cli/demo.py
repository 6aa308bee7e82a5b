"""`sagittal demo`: the main job on real data, from scans to a report, in a few minutes without a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sagittal.data.heads import HeadsDescription
    from sagittal.report.page import Page
    from sagittal.training.run import TrainResult

MARKER = "sagittal-demo.txt"


def demo(*, out: Path = Path("sagittal-demo"), network: str = "mednext-s", budget: str = "3m") -> int:
    """Make a small data set of MR heads, train on it, predict held-out heads and write a report.

    Args:
        out: folder for data, bundle, predictions and report; an earlier demo there is replaced
        network: name of the network; `sagittal networks` lists them
        budget: time for training, planning and preprocessing included
    """
    from sagittal.cli.options import parse_duration_s
    from sagittal.data.heads import make_heads, mean_label_map_dice
    from sagittal.errors import DataError
    from sagittal.inference.folder import predict_folder
    from sagittal.inference.predictor import load
    from sagittal.inference.run_report import Choices
    from sagittal.plan.networks import network_config
    from sagittal.report.evaluation import Beside, evaluate
    from sagittal.training.run import train
    from sagittal.training.stages import RunOptions

    network_config(network)
    budget_s = parse_duration_s(budget)
    _make_room(out)
    data = out / "data"
    print(f"demo: making MR heads in {data}", flush=True)
    description = make_heads(data)
    floor = mean_label_map_dice(data)
    print(f"demo: {description.sentences()}", flush=True)
    print(f"demo: floor {floor:.4f}, the Dice of the mean label map, which looks at no image", flush=True)
    result = train(data, out / "bundle", network=network, fold="none", budget_s=budget_s, options=RunOptions(say=_say))
    if not result.complete:
        print("demo: stopped before its end")
        return 130 if result.ended == "interrupted" else 75
    print("demo: predicting the held-out heads", flush=True)
    predicted = predict_folder(
        load(out / "bundle"),
        data / "imagesTs",
        out / "predictions",
        choices=Choices(mirror=False),
        on_case=_say,
    )
    if predicted.failures:
        raise DataError(f"demo: {predicted.failures[0].message}")
    evaluation = evaluate(
        out / "predictions",
        data / "labelsTs",
        out / "report",
        beside=Beside(images=data / "imagesTs"),
        page=_page(result, description, floor, out),
    )
    dice = evaluation.summary.mean["dice"]
    assert dice is not None, "every held-out head has tissue"
    print(f"report: {(out / 'report' / 'report.html').resolve()} dice {dice:.4f} floor {floor:.4f}")
    return 0


def _page(result: TrainResult, description: HeadsDescription, floor: float, out: Path) -> Page:
    from sagittal.report.page import Page
    from sagittal.training.log import read_log

    plan = result.plan
    return Page(
        title=f"Demo: {plan.network_name} on MR heads",
        lead=(
            f"{plan.network_name} was trained on {description.train_cases} heads and predicted "
            f"{description.test_cases} others, whose contrasts it had not seen."
        ),
        floor=floor,
        floor_note="the mean label map of the training heads, which looks at no image",
        notes=(
            description.sentences(),
            "All heads come from one averaged head: this shows that the network learns and that the pipeline works; it "
            "says nothing about its accuracy on patients.",
        ),
        facts={
            "Data": {"source": description.source, "licence": description.licence, "seed": description.seed},
            "Training": {
                "steps": plan.schedule.steps,
                "batch": plan.training.batch_size,
                "patch (D, H, W)": " x ".join(map(str, plan.patch.size)),
                "device": result.metrics["folds"]["none"]["device"],
                "seconds": result.metrics["folds"]["none"]["seconds"],
            },
        },
        curve=read_log(out / "bundle.run" / "fold_none" / "log.jsonl"),
    )


def _make_room(out: Path) -> None:
    from sagittal.errors import DataError
    from sagittal.plan.base import write_atomically

    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise DataError(
            f"{out}: exists and is no earlier demo. Choose another folder with --out.", code="would_overwrite"
        )
    shutil.rmtree(out, ignore_errors=True)
    write_atomically(out / MARKER, b"Made by 'sagittal demo', which replaces this folder when it runs again.\n")


def _say(line: object) -> None:
    print(line, flush=True)
