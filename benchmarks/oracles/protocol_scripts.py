"""What the challenges' own scripts make of the masks of protocol_masks.py: fetched, run as they are, not kept here.

    python protocol_scripts.py brats2023 FOLDER/eval.py            rachitsaluja/BraTS-2023-Metrics, all five challenges
    python protocol_scripts.py synapse FOLDER/inference_synapse.py   282857341/nnFormer, nnformer/
    python protocol_scripts.py acdc FOLDER/metrics_acdc.py           the challenge's own (C. Zotti, 2017)
    python protocol_scripts.py acdc_segmenter FOLDER/metrics_acdc.py baumgach/acdc_segmenter, which adds distances
    python protocol_scripts.py captk FOLDER/lsb.cxx                  CBICA/CaPTk, compiled to FOLDER/lsb: see below
    python protocol_scripts.py hausdorff95 FOLDER/Hausdorff95.py     CBICA/HausdorffCLI, which CaPTk calls for HD95
    python protocol_scripts.py nnunet_brats FOLDER/Task082_BraTS_2020.py  nnunet 1.7.1, nnunet/dataset_conversion/

Each is imported, or run as a program, in an environment that has what it needs (its versions are printed), on NIfTI
files or arrays of the seeded masks. Printed is JSON: where the script is from (--source), its SHA-256, versions, and
its numbers under its own names; NaN and infinity as strings. tests/golden/metrics/scripts_NAME.json holds what was
printed. What a script imports from beside itself (surface_distance, utils) has to lie there.

CaPTk as a whole is a large program with a build of its own. lsb.cxx is its function GetBraTSLabelStatistics with those
that it calls (cbicaITKUtilities.h, cbicaUtilities.cpp), and a main that reads two label maps and prints
REGION,METRIC,VALUE; compiled with ITK. The function runs FOLDER/Hausdorff95, the program of CBICA/HausdorffCLI.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from protocol_masks import CASES, LESION_CASES, label_maps, lesion_maps

NAMES = [case[0] for case in CASES]
LESION_NAMES = [case[0] for case in LESION_CASES]
REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
CHALLENGES = ("GLI", "SSA", "MEN", "PED", "MET")
STRUCTURES = ("LV", "RV", "MYO")
PACKAGES = ("numpy", "scipy", "pandas", "nibabel", "SimpleITK", "MedPy", "connected-components-3d", "nnunet")


def brats2023(script: Path) -> dict:
    """Score both kinds of masks, those of anisotropic spacing too, with the parameters of every challenge."""
    module = _module(script)
    found = {challenge: {} for challenge in CHALLENGES}
    for name in [*NAMES, *LESION_NAMES]:
        reference, prediction, spacing = label_maps(name) if name in NAMES else (*lesion_maps(name), (1.0, 1.0, 1.0))
        with tempfile.TemporaryDirectory() as work:
            paths = [str(_saved(Path(work) / "prediction.nii.gz", prediction, spacing))]
            paths.append(str(_saved(Path(work) / "reference.nii.gz", reference, spacing)))
            for challenge in CHALLENGES:
                table = module.get_LesionWiseResults(*paths, f"BraTS-{challenge}")
                found[challenge][name] = table.set_index("Labels").to_dict("index")
    return found


def synapse(script: Path) -> dict:
    """Score every organ of every case, and take the script's means: it writes those in full, single cases rounded."""
    module = _module(script)
    organs = ("spleen", "right_kidney", "left_kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas")
    cases = {}
    with _folders("labelsTs", "inferTs/all") as (references, predictions):
        for name in NAMES:
            masks = [
                module.process_label(module.read_nii(str(folder / f"{name}.nii.gz")))
                for folder in (predictions, references)
            ]
            cases[name] = {
                organ: {"Dice": module.dice(prediction, reference), "hd": module.hd(prediction, reference)}
                for organ, prediction, reference in zip(organs, *masks, strict=True)
            }
        module.test("all")
        lines = (predictions / "dice_pre.txt").read_text().rsplit("Mean_Dice", 1)[1].splitlines()
    means = {
        organ: {
            kind: next(
                float(line.removeprefix(f"{kind}_{organ}")) for line in lines if line.startswith(f"{kind}_{organ}")
            )
            for kind in ("Dice", "hd")
        }
        for organ in organs
    }
    overall = {kind: float(lines[-place].split(":")[1]) for kind, place in (("Dice", 2), ("hd", 1))}
    return {"cases": cases, "classes": means, "overall": overall}


def acdc(script: Path) -> dict:
    """Score the folders of all cases; the script writes a table."""
    import pandas

    module = _module(script)
    with _folders("reference", "prediction") as (references, predictions):
        module.main(str(references), str(predictions))
        rows = pandas.read_csv(next(Path().glob("results_*.csv")), index_col="Name").to_dict("index")
    keys = (("Dice", "Dice {}"), ("Volume", "Volume {}"), ("Err", "Err {}(ml)"))
    return {
        "cases": {
            name: {part: {key: row[column.format(part)] for key, column in keys} for part in STRUCTURES}
            for name, row in rows.items()
        }
    }


def acdc_segmenter(script: Path) -> dict:
    """Score the folders of all cases with the extension that measures distances."""
    module = _module(script)
    with _folders("reference", "prediction") as (references, predictions):
        rows = module.compute_metrics_on_directories_raw(str(references), str(predictions)).to_dict("records")
    cases = {name: {} for name in NAMES}
    for row in rows:
        cases[row["filename"].removesuffix(".nii.gz")][row["struc"].upper()] = {
            key: row[key] for key in ("dice", "hd", "assd", "vol", "vol_err")
        }
    return {"cases": cases}


def captk(script: Path) -> dict:
    """Run the compiled function on every case, reference first as the challenge did, with 4 for enhancing tumour."""
    renumbered = np.array([0, 1, 2, 4], np.uint8)
    cases = {name: {region: {} for region in REGIONS} for name in NAMES}
    with tempfile.TemporaryDirectory() as work:
        for name in NAMES:
            *maps, spacing = label_maps(name)
            paths = [
                str(_saved(Path(work) / f"{i}.nii.gz", renumbered[labels], spacing)) for i, labels in enumerate(maps)
            ]
            result = subprocess.run([str(script.with_suffix("")), *paths], capture_output=True, text=True, check=True)
            for region, metric, value in (line.split(",") for line in result.stdout.splitlines()):
                if region in REGIONS and metric in ("Dice", "Hausdorff95", "Sensitivity", "Specificity"):
                    cases[name][region][metric] = float(value)
    return {"cases": cases}


def hausdorff95(script: Path) -> dict:
    """Run the program for every region that both masks have; it has no rule for empty ones, CaPTk has."""
    cases = {name: {} for name in NAMES}
    with tempfile.TemporaryDirectory() as work:
        for name in NAMES:
            *maps, spacing = label_maps(name)
            for region, values in REGIONS.items():
                masks = [np.isin(labels, values).astype(np.uint8) for labels in maps]
                if all(mask.any() for mask in masks):
                    files = [_saved(Path(work) / f"{i}.nii.gz", mask, spacing) for i, mask in enumerate(masks)]
                    command = [sys.executable, str(script), "-gt", str(files[0]), "-m", str(files[1])]
                    result = subprocess.run(command, capture_output=True, text=True, check=True)
                    cases[name][region] = {"Hausdorff95": float(result.stdout)}
    return {"cases": cases}


def nnunet_brats(script: Path) -> dict:
    """Score every case; nnU-Net's numbers for BraTS are 1 oedema, 2 core, 3 enhancing."""
    module = _module(script)
    renumbered = np.array([0, 2, 1, 3], np.uint8)
    cases = {}
    for name in NAMES:
        reference, prediction, _ = label_maps(name)
        row = module.evaluate_BraTS_case(renumbered[prediction], renumbered[reference])
        cases[name] = {
            region: {"dice": row[place], "hd95": row[place + 3]} for place, region in enumerate(("WT", "TC", "ET"))
        }
    return {"cases": cases}


def _module(script: Path):
    """Import a script by its path; what lies beside it can be imported by it, and what lies beside this file can't."""
    sys.path[0] = str(script.parent)
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _saved(path: Path, labels: np.ndarray, spacing: tuple) -> Path:
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(labels.T, np.diag([*spacing[::-1], 1.0])), path)
    return path


@contextlib.contextmanager
def _folders(*names: str):
    """Write the references and the predictions of all cases below a working folder that is left again."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        folders = [Path(work) / name for name in names]
        for case in NAMES:
            *maps, spacing = label_maps(case)
            for folder, labels in zip(folders, maps, strict=True):
                _saved(folder / f"{case}.nii.gz", labels, spacing)
        try:
            yield folders
        finally:
            os.chdir(before)


def _versions() -> dict:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    number = float(value)
    return number if math.isfinite(number) else str(number)


TOOLS = {tool.__name__: tool for tool in (brats2023, synapse, acdc, acdc_segmenter, captk, hausdorff95, nnunet_brats)}


def main() -> None:
    """Run one script and print its numbers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("script", type=Path)
    parser.add_argument("--source", default="", help="where the script is from: repository, commit, path")
    given = parser.parse_args()
    script = given.script.resolve()
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        numbers = _plain(TOOLS[given.tool](script))
    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    source = {"script": given.source, "sha256": digest, "versions": _versions()}
    print(json.dumps({"source": source, **numbers}, indent=1))


if __name__ == "__main__":
    main()
