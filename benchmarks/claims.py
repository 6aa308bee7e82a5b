"""Do the papers' claims hold at equal time? Pairs of runs that differ in one thing, several seeds, paired statistics.

    python benchmarks/claims.py plans DATASET OUT [--minutes 15] [--claims residual,kernel,...]
    python benchmarks/claims.py run   DATASET OUT [--seeds 0,1,2] [--claims ...]
    python benchmarks/claims.py table OUT

    python benchmarks/claims.py spacings DATASET OUT --claims unetr

Every variant gets the same minutes: `plans` fits its schedule on a quiet machine, `run` trains by it (see
training_runs.py), fold 0, seed by seed. Where the machine is not quiet, `run --processor-minutes 8` gives every
variant the same processor time instead, by what a step took of it. `table` compares variants with their reference:
the mean over held-out cases and labels of the difference in Dice, each case averaged over the seeds that both have,
with the 95 % interval of a bootstrap over cases and Wilcoxon's signed-rank test. `spacings` lets trained networks
predict on other grids than that of training. On a GPU, say so with --device cuda. Runs that are there are not made
again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from training_runs import facts_of, fit_plan, metrics_of, train


@dataclass(frozen=True)
class Variant:
    """One side of a comparison: a network and what is set of it."""

    name: str
    network: str
    settings: tuple[str, ...] = ()
    share: float = 1.0
    """Of the minutes."""
    start: str | None = None
    """The variant whose weights it starts from (UpKern where its kernels are smaller)."""

    @property
    def options(self) -> tuple[str, ...]:
        """Options of `sagittal train`."""
        return ("--network", self.network, *(word for text in self.settings for word in ("--set", text)))


S = Variant("mednext-s", "mednext-s")
SEGFORMER = Variant("segformer3d", "segformer3d")
CLAIMS: dict[str, tuple[str, tuple[Variant, ...]]] = {
    "residual": (
        "residual paths in MedNeXt's resampling blocks",
        (S, Variant("no-residual", "mednext-s", ("network.resampling_residual=false",))),
    ),
    "supervision": (
        "deep supervision",
        (S, Variant("no-supervision", "mednext-s", ("network.deep_supervision=false",))),
    ),
    "kernel": ("kernels of 5 in place of 3", (S, Variant("kernel-5", "mednext-s-k5"))),
    "upkern": (
        "kernels of 5 from scratch, against half of the time for kernels of 3 and half from there (UpKern)",
        (
            Variant("kernel-5", "mednext-s-k5"),
            Variant("kernel-3-half", "mednext-s", share=0.5),
            Variant("upkern", "mednext-s-k5", share=0.5, start="kernel-3-half"),
        ),
    ),
    "scaling": (
        "width, depth or kernel first",
        (
            S,
            Variant("wide", "mednext-s", ("network.channels=48",)),
            Variant("deep", "mednext-s", ("network.block_counts=4,4,4,4,4,4,4,4,4",)),
            Variant("expanded", "mednext-s", ("network.expansion_ratio=4",)),
            Variant("kernel-5", "mednext-s-k5"),
        ),
    ),
    "unetr": ("SegFormer3D against UNETR", (SEGFORMER, Variant("unetr", "unetr"))),
    "attention": (
        "SegFormer3D's two scales of attention",
        (SEGFORMER, Variant("paper-scale", "segformer3d", ("network.attention_scale=paper",))),
    ),
    "resolution": (
        "SegFormer3D's grid: half the scan's spacing, or the scan's own",
        (SEGFORMER, Variant("own-spacing", "segformer3d", ("preprocessing.spacing_mm=1.0,1.0,1.0",))),
    ),
}
OTHER_SPACINGS = (0.75, 1.5)
"""Times the spacing of training at which trained networks are asked to predict."""


def main() -> int:
    """Run the stage that the first argument names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("plans", "run", "spacings", "table"))
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="DATASET and OUT; for table OUT alone")
    parser.add_argument("--claims", default=",".join(CLAIMS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--processor-minutes", type=float, help="run: of training, in place of the fitted schedule")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    dataset, out = args.folders[0], args.folders[-1]
    out.mkdir(parents=True, exist_ok=True)
    claims = {name: CLAIMS[name] for name in args.claims.split(",")}
    variants = {variant.name: variant for _, members in claims.values() for variant in members}
    device = ("--device", args.device)
    match args.stage:
        case "plans":
            for variant in variants.values():
                minutes = args.minutes * variant.share
                fit_plan(dataset, out, variant.name, minutes, (*variant.options, *device))
        case "run":
            for seed in map(int, args.seeds.split(",")):
                for variant in variants.values():
                    start = () if variant.start is None else ("--init-from", str(out / f"{variant.start}-seed{seed}"))
                    steps = None if args.processor_minutes is None else _steps(out, variant, args.processor_minutes)
                    train(dataset, out, variant.name, seed, (*device, *start), steps=steps)
        case "spacings":
            for name in variants:
                for bundle in sorted(out.glob(f"{name}-seed*")):
                    if (bundle / "metrics.json").exists():
                        print(f"{bundle.name}: {other_spacings(dataset, bundle)}", flush=True)
        case "table":
            print(table(out, claims))
    return 0


def _steps(out: Path, variant: Variant, minutes: float) -> int:
    """Return how many steps of a variant take its share of these minutes of processor time."""
    return round(60 * minutes * variant.share / facts_of(out / f"{variant.name}.fitted.json").step_processor_s)


def other_spacings(dataset: Path, bundle: Path) -> str:
    """Predict the held-out cases on grids of other spacings than that of training; return the mean Dice of each."""
    from sagittal.bundle import read_bundle
    from sagittal.data.dataset import read_dataset
    from sagittal.inference.predictor import Predictor, load
    from sagittal.volumes import read_labels

    found, told = read_bundle(bundle), []
    engine = load(found, device="cpu").engine
    held_out = read_splits(bundle)
    for factor in (1.0, *OTHER_SPACINGS):
        spacing = tuple(edge * factor for edge in found.plan.preprocessing.spacing_mm)
        plan = found.plan.replace(preprocessing=found.plan.preprocessing.replace(spacing_mm=spacing))
        predictor = Predictor(plan, engine)
        dice = []
        for case in read_dataset(dataset).cases:
            if case.id in held_out:
                predicted, (wanted, _) = predictor.predict(case.images, mirror=False).array[0], read_labels(case.labels)
                for label in found.plan.dataset.labels:
                    one, other = predicted == label.values[0], wanted == label.values[0]
                    dice.append(2 * (one & other).sum() / max(one.sum() + other.sum(), 1))
        told.append(f"{factor:g} x spacing: Dice {np.mean(dice):.3f}")
    return ", ".join(told)


def read_splits(bundle: Path) -> frozenset[str]:
    """Return the ids of the cases that fold 0 of a run held out."""
    import json

    folds = json.loads((bundle.with_name(bundle.name + ".run") / "splits_final.json").read_text())
    return frozenset(folds[0]["val"])


def table(out: Path, claims: dict[str, tuple[str, tuple[Variant, ...]]]) -> str:
    """Return the Markdown table of the comparisons for which there are runs."""
    rows = ["| claim | variant | seeds | Dice | against the first | p |", "|---|---|---|---|---|---|"]
    for told, variants in claims.values():
        reference = scores(out, variants[0].name)
        for variant in variants:
            own = scores(out, variant.name)
            seeds = sorted(own.keys() & reference.keys())
            if seeds:
                rows.append(
                    _row(told, variant.name, [own[seed] for seed in seeds], [reference[seed] for seed in seeds])
                )
    return "\n".join(rows)


def scores(out: Path, name: str) -> dict[int, dict[str, float]]:
    """Return, for each seed, the Dice of each held-out case (by its hash), averaged over labels."""
    found = {}
    for bundle in sorted(out.glob(f"{name}-seed*")):
        if (bundle / "metrics.json").exists():
            cases = metrics_of(bundle)["folds"]["0"]["cases"]
            seed = int(bundle.name.rpartition("seed")[2])
            found[seed] = {
                case: float(np.mean([value for value in dice.values() if value is not None]))
                for case, dice in cases.items()
            }
    return found


def _row(told: str, name: str, own: list[dict[str, float]], reference: list[dict[str, float]]) -> str:
    from scipy.stats import wilcoxon

    cases = sorted(set.intersection(*(set(run) for run in (*own, *reference))))
    mine = np.array([[run[case] for case in cases] for run in own])
    dice = f"{mine.mean():.3f} ({', '.join(f'{run.mean():.3f}' for run in mine)})"
    difference = (mine - np.array([[run[case] for case in cases] for run in reference])).mean(0)
    if not difference.any():
        return f"| {told} | {name} | {len(own)} | {dice} | | |"
    draws = np.random.default_rng(0).integers(len(cases), size=(10_000, len(cases)))
    low, high = np.percentile(difference[draws].mean(1), (2.5, 97.5))
    shown = f"{100 * difference.mean():+.2f} points ({100 * low:+.2f} to {100 * high:+.2f})"
    return f"| {told} | {name} | {len(own)} | {dice} | {shown} | {wilcoxon(difference).pvalue:.2g} |"


if __name__ == "__main__":
    sys.exit(main())
