"""The way from logits to labels in other software, to be measured beside ours; runs in that software's environment.

    python predict.py nnunet D,H,W CLASSES SCALE      nnU-Net's exporter: logits resampled to D,H,W by order 1, arg-max
    python predict.py monai  D,H,W CLASSES WINDOW     MONAI's sliding_window_inference over D,H,W, then arg-max

The network is left out: nnU-Net gets logits on a grid that is SCALE times coarser, MONAI a predictor that copies its
window to every class. Neither is a dependency of this project. Printed is a line of JSON; benchmarks/predict.py, which
calls this, samples the memory.
"""

import argparse
import json
import time
from functools import partial
from types import SimpleNamespace


def nnunet(shape: list[int], classes: int, scale: float) -> float:
    """Return the seconds that the exporter takes."""
    import numpy as np
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    coarse = [max(1, round(size / scale)) for size in shape]
    logits = np.random.default_rng(0).standard_normal((classes, *coarse), dtype=np.float32)
    resample = partial(resample_data_or_seg_to_shape, is_seg=False, order=1, order_z=0, force_separate_z=None)
    labels = {"background": 0, **{f"class_{value}": value for value in range(1, classes)}}
    began = time.perf_counter()
    convert_predicted_logits_to_segmentation_with_correct_shape(
        logits,
        SimpleNamespace(transpose_forward=[0, 1, 2], transpose_backward=[0, 1, 2]),
        SimpleNamespace(spacing=[scale] * 3, resampling_fn_probabilities=resample),
        LabelManager(labels, regions_class_order=None),
        {
            "spacing": [1.0, 1.0, 1.0],
            "shape_after_cropping_and_before_resampling": shape,
            "shape_before_cropping": shape,
            "bbox_used_for_cropping": [[0, size] for size in shape],
        },
        num_threads_torch=2,
    )
    return time.perf_counter() - began


def monai(shape: list[int], classes: int, window: int) -> float:
    """Return the seconds of the sliding window around a network that takes none."""
    import torch
    from monai.inferers import sliding_window_inference

    image = torch.randn((1, 1, *shape), generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    with torch.inference_mode():
        logits = sliding_window_inference(
            image,
            (window,) * 3,
            1,
            lambda given: given.expand(-1, classes, -1, -1, -1).contiguous(),
            overlap=0.5,
            mode="gaussian",
        )
        logits.argmax(dim=1)
    return time.perf_counter() - began


def main() -> None:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["nnunet", "monai"])
    parser.add_argument("shape", type=lambda text: [int(size) for size in text.split(",")])
    parser.add_argument("classes", type=int)
    parser.add_argument("number", type=float)
    given = parser.parse_args()
    if given.what == "nnunet":
        seconds = nnunet(given.shape, given.classes, given.number)
    else:
        seconds = monai(given.shape, given.classes, int(given.number))
    print(json.dumps({"seconds": round(seconds, 2)}))


if __name__ == "__main__":
    main()
