"""Metrics, their uncertainty, and the comparison and ranking of systems.

They need numpy, scipy, scikit-learn, pandas and jaxtyping, so a score can be recomputed without torch.

Invalid input is refused in one line (`UsageError`): non-finite values, shapes that differ, masks that are not binary.
An undefined score is ``nan``: AUROC of one class, R² of a constant target, Pearson's r of a constant. A mean over cases
should then report how many it left out.
"""

from brainfound.metrics.classification import (
    auprc,
    auroc,
    balanced_accuracy,
    f1,
    macro_f1,
    mcc,
    sensitivity_at_specificity,
)
from brainfound.metrics.comparison import compare, compare_pairs, score_intervals
from brainfound.metrics.ranking import rank, task_ranks
from brainfound.metrics.registry import METRICS
from brainfound.metrics.regression import mae, pearson, r2, rmse, spearman
from brainfound.metrics.segmentation import (
    Empty,
    clean_negative,
    dice,
    hd95,
    lesion_f1,
    relative_volume_error,
    surface_dice,
    volume_error_mm3,
)
from brainfound.metrics.statistics import (
    DelongTest,
    FoldTest,
    Interval,
    bootstrap_interval,
    delong_interval,
    delong_test,
    fold_t_test,
    holm,
    paired_permutation_test,
)

__all__ = [
    "METRICS", "DelongTest", "Empty", "FoldTest", "Interval", "auprc", "auroc", "balanced_accuracy",
    "bootstrap_interval", "clean_negative", "compare", "compare_pairs", "delong_interval", "delong_test", "dice", "f1",
    "fold_t_test", "hd95", "holm", "lesion_f1", "macro_f1", "mae", "mcc", "paired_permutation_test", "pearson", "r2",
    "rank", "relative_volume_error", "rmse", "score_intervals", "sensitivity_at_specificity", "spearman",
    "surface_dice", "task_ranks", "volume_error_mm3",
]  # fmt: skip

# A metric that is added to the registry needs no line here.
_ADDED = {row.function.__name__: row.function for row in METRICS.values() if row.function.__name__ not in __all__}
globals().update(_ADDED)
__all__ += list(_ADDED)
