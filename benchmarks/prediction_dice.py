"""What do the choices of a prediction cost in Dice? A fold's held-out cases, predicted in several ways and compared.

    python benchmarks/prediction_dice.py DATASET BUNDLE OUT --fold 0 [--int8 BUNDLE_OF_sagittal_quantize]

The bundle's run folder (BUNDLE.run, which `sagittal train` leaves) names the held-out cases. Each way is a run of
`sagittal predict`; `sagittal compare` then tells the differences with their intervals over cases. Cases on which the
recipe was chosen flatter all ways alike. What is there already is not predicted again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

WAYS = {
    "mirrored": (),
    "not-mirrored": ("--no-mirror",),
    "fast": ("--fast",),
    "bf16": ("--precision", "bf16", "--no-mirror"),
    "torch": ("--engine", "torch", "--no-mirror"),
}


def main() -> int:
    """Predict the held-out cases in every way and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--int8", type=Path, help="the same bundle after sagittal quantize")
    args = parser.parse_args()
    splits = args.bundle.with_name(args.bundle.name + ".run") / "splits_final.json"
    held_out = json.loads(splits.read_text())[args.fold]["val"]
    scans, references = args.out / "scans", args.out / "references"
    for case in held_out:
        link(args.dataset / "imagesTr", scans, f"{case}_*")
        link(args.dataset / "labelsTr", references, f"{case}.*")
    runs = {name: (args.bundle, options) for name, options in WAYS.items()}
    if args.int8 is not None:
        runs["int8"] = (args.int8, ("--precision", "int8", "--no-mirror"))
    for name, (bundle, options) in runs.items():
        subprocess.run(
            [*sagittal("predict"), str(bundle), str(scans), "--out", str(args.out / name), *options], check=True
        )
    folders = [str(args.out / name) for name in runs]
    labels = ("--labels", str(args.dataset / "dataset.json"))
    told = ("--reference", str(references), "--out", str(args.out / "comparison"))
    return subprocess.run([*sagittal("compare"), *folders, *told, *labels], check=False).returncode


def sagittal(verb: str) -> list[str]:
    """Return the beginning of a command line."""
    return [sys.executable, "-m", "sagittal", verb]


def link(source: Path, target: Path, pattern: str) -> None:
    """Make the files of a case appear in another folder."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.glob(pattern):
        if not (target / path.name).exists():
            (target / path.name).symlink_to(path.resolve())


if __name__ == "__main__":
    sys.exit(main())
