"""Every statistic of a comparison in words: the report prints them, so that no number stands without its definition."""

from __future__ import annotations

from sagittal.evaluation.paired import EXACT_WILCOXON
from sagittal.evaluation.pairing import PAIRING_RULES
from sagittal.evaluation.ranking import RULES

STATISTICS_RULES: tuple[tuple[str, str], ...] = (
    (
        "Difference",
        "First method minus second, over the cases that both have. Its 95 % interval is a bias-corrected and "
        "accelerated (BCa) bootstrap over patients; all scans of a patient are drawn together.",
    ),
    (
        "Wilcoxon",
        "Signed-rank test on one difference per patient (mean over the patient's cases, and over classes where the "
        "mean is tested), two-sided. Zeros are left out, ties share their mean rank. Exact up to "
        f"{EXACT_WILCOXON} ranked differences, above by the normal approximation with the correction for ties and "
        "without one for continuity.",
    ),
    (
        "Permutation",
        "Sign flips of whole patients, two-sided, of the mean difference. All patterns where they are few, else random "
        "ones with the found pattern among them.",
    ),
    (
        "Holm",
        "Both p values are corrected for the number of pairs of methods, within one metric and class. They are not "
        "corrected for looking at several metrics and classes: choose the one that counts beforehand.",
    ),
    (
        "Better",
        "Called so where Wilcoxon's p after Holm's correction is below 0.05 and mean and ranks point the same way.",
    ),
    (
        "Effect sizes",
        "Matched-pairs rank-biserial correlation: (ranks for the first minus ranks for the second) / all ranks. "
        "Cohen's d_z: mean difference over the standard deviation of the differences.",
    ),
    (
        "Equivalence",
        "Two one-sided t tests on one difference per patient: equal where the 90 % interval lies within the margin. "
        "Not better is not the same as equal.",
    ),
    (
        "Patients needed",
        "From the standard deviation of the paired differences by the noncentral t distribution: for a two-sided "
        "paired t test at 5 % to show a true difference of the margin; for the two one-sided tests to show equality "
        "where there is no difference. Simulated: share of successes in studies of that size drawn from the "
        "differences found.",
    ),
    *((title, text) for title, text in RULES.values()),
    (
        "Stability",
        "Patients are drawn with replacement and methods ranked anew: the share of draws in which a method has each "
        "rank, and Kendall's tau-b with the ranks on all patients (1: never another order). In the draws, tests use "
        "the normal approximation.",
    ),
    *PAIRING_RULES,
)
"""Title and text, in the order in which they are shown."""
