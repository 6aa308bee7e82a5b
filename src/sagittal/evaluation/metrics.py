"""The metrics without parameters, each with its definition and its rules in words.

One literal table: the numbers, the columns of the CSV and the text in the report all come from it, so that a metric
can't be shown without its definition. A new metric is a function on `MaskPair` and an entry here. Which of them an
evaluation has is told by `columns.metrics_of`.
"""

from __future__ import annotations

from sagittal.evaluation import agreement, boundary, skeleton
from sagittal.evaluation.pair import MaskPair, Metric

__all__ = ["AGGREGATION_RULES", "METRICS", "MaskPair", "Metric"]

FALSE_ALARM_IS_ZERO = "0: a false alarm counts in full."
MISS_IS_ZERO = "0: a miss counts in full and is never dropped from a mean."
FALSE_ALARM_IS_DIAGONAL = "The diagonal of the image in mm, the worst that it allows."
MISS_IS_DIAGONAL = "The diagonal of the image in mm: a miss can never improve a mean."
UNDEFINED = "Undefined: shown as a dash, counted apart, left out of the mean."
SURFACE_VOXEL = "A surface voxel has one of its six neighbours outside of the mask or beyond the image."


def _dice(pair: MaskPair) -> float | None:
    return pair.counts.dice


def _iou(pair: MaskPair) -> float | None:
    return pair.counts.iou


def _precision(pair: MaskPair) -> float | None:
    return pair.counts.precision


def _recall(pair: MaskPair) -> float | None:
    return pair.counts.recall


def _volume_error_ml(pair: MaskPair) -> float | None:
    counts = pair.counts
    return (counts.prediction - counts.reference) * pair.voxel_ml if any(counts) else None


def _volume_error_percent(pair: MaskPair) -> float | None:
    counts = pair.counts
    return 100.0 * (counts.prediction - counts.reference) / counts.reference if counts.reference else None


def _kappa(pair: MaskPair) -> float | None:
    return agreement.kappa(pair.counts, pair.counted_vox)


def _hd_mm(pair: MaskPair) -> float | None:
    return pair.distances.hd_mm if pair.distances else _diagonal_mm(pair)


def _hd95_mm(pair: MaskPair) -> float | None:
    return pair.distances.hd95_mm if pair.distances else _diagonal_mm(pair)


def _assd_mm(pair: MaskPair) -> float | None:
    return pair.distances.assd_mm if pair.distances else _diagonal_mm(pair)


def _diagonal_mm(pair: MaskPair) -> float | None:
    return pair.diagonal_mm if any(pair.counts) else None


def _boundary_iou(pair: MaskPair) -> float | None:
    return boundary.boundary_iou(pair.reference, pair.prediction, pair.spacing_mm, pair.image_shape)


def _cldice(pair: MaskPair) -> float | None:
    return skeleton.cldice(pair.reference, pair.prediction)


METRICS: dict[str, Metric] = {
    "dice": Metric(
        title="Dice",
        unit="",
        higher_is_better=True,
        digits=3,
        compute=_dice,
        definition="Twice the voxels that both masks share, divided by the sum of the voxels of each: "
        "2 |R ∩ P| / (|R| + |P|). 1 is perfect, 0 is no overlap.",
        empty_reference=FALSE_ALARM_IS_ZERO,
        empty_prediction=MISS_IS_ZERO,
        both_empty=UNDEFINED,
        source="L. R. Dice, Ecology 26 (1945).",
        group="overlap",
    ),
    "iou": Metric(
        title="IoU",
        unit="",
        higher_is_better=True,
        digits=3,
        compute=_iou,
        definition="Voxels that both masks share, divided by the voxels that either has: |R ∩ P| / |R ∪ P|. "
        "1 is perfect, 0 is no overlap.",
        empty_reference=FALSE_ALARM_IS_ZERO,
        empty_prediction=MISS_IS_ZERO,
        both_empty=UNDEFINED,
        source="P. Jaccard, Bulletin de la Société vaudoise des sciences naturelles 37 (1901).",
        group="overlap",
    ),
    "precision": Metric(
        title="Precision",
        unit="",
        higher_is_better=True,
        digits=3,
        compute=_precision,
        definition="Share of the prediction's voxels that the reference has too: |R ∩ P| / |P|.",
        empty_reference=FALSE_ALARM_IS_ZERO,
        empty_prediction="0, though nothing was claimed: a miss is never dropped from a mean.",
        both_empty=UNDEFINED,
        source="C. J. van Rijsbergen, Information Retrieval (1979), chapter 7; also called positive predictive value.",
        group="overlap",
    ),
    "recall": Metric(
        title="Recall",
        unit="",
        higher_is_better=True,
        digits=3,
        compute=_recall,
        definition="Share of the reference's voxels that the prediction has too: |R ∩ P| / |R|.",
        empty_reference="0, though nothing could be found: a false alarm counts in full.",
        empty_prediction=MISS_IS_ZERO,
        both_empty=UNDEFINED,
        source="C. J. van Rijsbergen, Information Retrieval (1979), chapter 7; also called sensitivity.",
        group="overlap",
    ),
    "volume_error_ml": Metric(
        title="Volume error",
        unit="mL",
        higher_is_better=None,
        digits=2,
        compute=_volume_error_ml,
        definition="Volume of the prediction less that of the reference, in mL. Above 0 the prediction is too large, "
        "below 0 too small. Errors of opposite sign cancel in a mean: that mean is the bias.",
        empty_reference="The volume of the prediction.",
        empty_prediction="Minus the volume of the reference.",
        both_empty=UNDEFINED,
        source="A. A. Taha and A. Hanbury, BMC Medical Imaging 15 (2015), with the sign kept.",
        group="volume",
    ),
    "volume_error_percent": Metric(
        title="Volume error",
        unit="%",
        higher_is_better=None,
        digits=1,
        compute=_volume_error_percent,
        definition="Volume of the prediction less that of the reference, in percent of the reference: "
        "100 (|P| - |R|) / |R|. Errors of opposite sign cancel in a mean: that mean is the bias.",
        empty_reference="Undefined, for there is no percentage of nothing: left out of the mean, counted among the "
        "false alarms of the class, and in full in the volume error in mL.",
        empty_prediction="-100: a miss is never dropped from a mean.",
        both_empty=UNDEFINED,
        source="T. Heimann et al., IEEE Transactions on Medical Imaging 28 (2009), with the sign kept.",
        group="volume",
    ),
    "kappa": Metric(
        title="Cohen's κ",
        unit="",
        higher_is_better=True,
        digits=3,
        compute=_kappa,
        definition="Agreement of the two masks beyond chance, over all voxels of the image that are not ignored: "
        "(p - e) / (1 - e), where p is the share of voxels on which both agree and e the share on which two masks of "
        "these sizes agree by chance. 1 is perfect, 0 is chance, below 0 is worse. It grows with the background of the "
        "image: values from differently cropped images can't be compared.",
        empty_reference="0: an empty mask agrees by chance alone.",
        empty_prediction="0: an empty mask agrees by chance alone, so a miss counts and stays in the mean.",
        both_empty=UNDEFINED,
        source="J. Cohen, Educational and Psychological Measurement 20 (1960). As scikit-learn's cohen_kappa_score.",
        group="overlap",
    ),
    "hd_mm": Metric(
        title="HD",
        unit="mm",
        higher_is_better=False,
        digits=2,
        compute=_hd_mm,
        definition="The greatest of all distances from a surface voxel of one mask to the nearest surface voxel of the "
        f"other, in either direction, between voxel centres in mm. {SURFACE_VOXEL} 0 is perfect; a single stray "
        "voxel decides it.",
        empty_reference=FALSE_ALARM_IS_DIAGONAL,
        empty_prediction=MISS_IS_DIAGONAL,
        both_empty=UNDEFINED,
        source="D. P. Huttenlocher et al., IEEE Transactions on Pattern Analysis and Machine Intelligence 15 (1993). "
        "As MONAI's compute_hausdorff_distance.",
        group="surface",
    ),
    "hd95_mm": Metric(
        title="HD95",
        unit="mm",
        higher_is_better=False,
        digits=2,
        compute=_hd95_mm,
        definition="From every surface voxel of one mask the distance to the nearest surface voxel of the other, "
        "between voxel centres in mm; the 95th percentile (linear interpolation) in either direction; the larger of "
        f"the two. {SURFACE_VOXEL} 0 is perfect.",
        empty_reference=FALSE_ALARM_IS_DIAGONAL,
        empty_prediction=MISS_IS_DIAGONAL,
        both_empty=UNDEFINED,
        source="As MONAI's compute_hausdorff_distance(percentile=95) and Metrics Reloaded (Maier-Hein et al., Nature "
        "Methods 21, 2024). medpy pools both directions before it takes the percentile: its values differ.",
        group="surface",
    ),
    "assd_mm": Metric(
        title="ASSD",
        unit="mm",
        higher_is_better=False,
        digits=2,
        compute=_assd_mm,
        definition="The mean of all distances from the surface voxels of either mask to the nearest surface voxel of "
        "the other, between voxel centres in mm; both directions pooled, so that the larger surface weighs more. "
        f"{SURFACE_VOXEL} 0 is perfect.",
        empty_reference=FALSE_ALARM_IS_DIAGONAL,
        empty_prediction=MISS_IS_DIAGONAL,
        both_empty=UNDEFINED,
        source="As MONAI's compute_average_surface_distance(symmetric=True) and Metrics Reloaded (Maier-Hein et al., "
        "Nature Methods 21, 2024). So does medpy since 0.5; before, its "
        "assd took the mean of the two directed means.",
        group="surface",
    ),
    "boundary_iou": Metric(
        title="Boundary IoU",
        unit="",
        higher_is_better=True,
        digits=3,
        compute=_boundary_iou,
        definition="IoU of two shells: the voxels of each mask whose centre lies within d of a voxel centre outside of "
        "the mask (beyond the image is outside), its surface voxels at least. d is 2 % of the diagonal of the image in "
        "mm. It falls with the same error of the outline whatever the size of the structure.",
        empty_reference=FALSE_ALARM_IS_ZERO,
        empty_prediction=MISS_IS_ZERO,
        both_empty=UNDEFINED,
        source="B. Cheng et al., CVPR 2021, whose erosion with a square becomes a Euclidean distance in mm here.",
        group="shape",
    ),
    "cldice": Metric(
        title="clDice",
        unit="",
        higher_is_better=True,
        digits=3,
        compute=_cldice,
        definition="Centreline Dice, for vessels and other tubes: the harmonic mean of the share of the prediction's "
        "skeleton that lies in the reference and the share of the reference's skeleton that lies in the prediction. "
        "The skeleton is that of scikit-image's skeletonize (Lee et al. 1994); a mask of which that leaves nothing is "
        "its own skeleton.",
        empty_reference=FALSE_ALARM_IS_ZERO,
        empty_prediction=MISS_IS_ZERO,
        both_empty=UNDEFINED,
        source="S. Shit et al., clDice, CVPR 2021.",
        group="shape",
    ),
}
"""Every metric without parameters by its key, which is also its column in metrics.csv and its name in metrics.json."""

AGGREGATION_RULES: tuple[tuple[str, str], ...] = (
    (
        "Mean of a class",
        "The mean over all cases in which the metric is defined; n is their number. Misses and false alarms are in it "
        "with the values above.",
    ),
    (
        "Mean foreground",
        "The mean over classes of the mean of each class, so that a rare class weighs as much as a common one. A class "
        "that is defined in no case is left out. Background is never a class.",
    ),
    (
        "Interval",
        "Where the mean would lie for other patients of the same kind: bias-corrected and accelerated bootstrap, 95 %, "
        "5000 draws of whole patients. None where fewer than two patients have a value.",
    ),
    (
        "Best, median, worst",
        "Cases in the order of their mean Dice over the classes that are defined in them.",
    ),
    (
        "Ignored voxels",
        "Voxels that the reference marks as ignore are taken out of the reference and of the prediction before "
        "anything is counted or measured.",
    ),
    ("Volume", "Number of voxels times the volume of a voxel, in millilitres."),
)
"""How numbers become means: what a reader has to know beside the metrics themselves."""
