"""Metrics, their uncertainty, and the comparison and ranking of systems.

Only numpy, scipy, scikit-learn and pandas are used here, so a score can be recomputed without torch. The functions of
the metrics are exported from `brainfound.metrics.registry`.

Invalid input is refused in one line (`UsageError`): non-finite values, shapes that differ, masks that are not binary.
An undefined score is ``nan``: AUROC of one class, R² of a constant target, Pearson's r of a constant. A mean over cases
should then report how many it left out.
"""

from typing import TYPE_CHECKING

from brainfound.metrics.classification import f1, sensitivity_at_specificity
from brainfound.metrics.comparison import compare, compare_pairs, score_intervals
from brainfound.metrics.ranking import rank, task_ranks
from brainfound.metrics.registry import METRICS
from brainfound.metrics.segmentation import Empty
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

if TYPE_CHECKING:  # a type checker does not see what the registry exports
    from brainfound.metrics.classification import *  # noqa: F403
    from brainfound.metrics.regression import *  # noqa: F403
    from brainfound.metrics.segmentation import *  # noqa: F403

_FUNCTIONS = {metric.function.__name__: metric.function for metric in METRICS.values()}
globals().update(_FUNCTIONS)

__all__ = [
    "METRICS",
    "DelongTest",
    "Empty",
    "FoldTest",
    "Interval",
    "bootstrap_interval",
    "compare",
    "compare_pairs",
    "delong_interval",
    "delong_test",
    "f1",
    "fold_t_test",
    "holm",
    "paired_permutation_test",
    "rank",
    "score_intervals",
    "sensitivity_at_specificity",
    "task_ranks",
]
__all__ += sorted(_FUNCTIONS)
