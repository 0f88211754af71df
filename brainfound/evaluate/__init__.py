"""How good an answer is: metrics, their uncertainty, the comparison and the ranking of systems.

Only numpy, scipy, scikit-learn and pandas are used here, so a score can be recomputed without torch.
The package is also a verb: ``brainfound.evaluate(model, data=…)`` scores a model (see
`brainfound.callable_room`).
"""

from brainfound.callable_room import make_callable
from brainfound.evaluate.comparison import compare, compare_pairs, score_intervals
from brainfound.evaluate.delong import DelongTest, delong_interval, delong_test
from brainfound.evaluate.fold_test import FoldTest, fold_t_test
from brainfound.evaluate.metrics import (
    auprc,
    auroc,
    balanced_accuracy,
    dice,
    f1,
    hd95,
    lesion_f1,
    macro_f1,
    mae,
    mcc,
    pearson,
    r2,
    relative_volume_error,
    rmse,
    sensitivity_at_specificity,
    spearman,
    surface_dice,
    volume_error_mm3,
)
from brainfound.evaluate.ranking import rank, task_ranks
from brainfound.evaluate.statistics import Interval, bootstrap_interval, holm, paired_permutation_test

__all__ = [
    "DelongTest",
    "FoldTest",
    "Interval",
    "auprc",
    "auroc",
    "balanced_accuracy",
    "bootstrap_interval",
    "compare",
    "compare_pairs",
    "delong_interval",
    "delong_test",
    "dice",
    "f1",
    "fold_t_test",
    "hd95",
    "holm",
    "lesion_f1",
    "macro_f1",
    "mae",
    "mcc",
    "paired_permutation_test",
    "pearson",
    "r2",
    "rank",
    "relative_volume_error",
    "rmse",
    "score_intervals",
    "sensitivity_at_specificity",
    "spearman",
    "surface_dice",
    "task_ranks",
    "volume_error_mm3",
]

# The function stands on a higher floor (it runs a model); it is imported when it is called, not here.
make_callable(__name__, "brainfound.predict.evaluation:evaluate")
