"""How good an answer is: metrics, their uncertainty, and the ranking of systems.

Only numpy, scipy, scikit-learn and pandas are used here, so a score can be recomputed without torch.
The package is also a verb: ``brainfound.evaluate(model, data=…)`` scores a model (see
`brainfound.callable_room`).
"""

from brainfound.callable_room import make_callable
from brainfound.evaluate.metrics import auroc, balanced_accuracy, dice, mae, pearson, r2, surface_dice
from brainfound.evaluate.ranking import rank, task_ranks
from brainfound.evaluate.statistics import Interval, bootstrap_interval, paired_permutation_test

__all__ = [
    "Interval",
    "auroc",
    "balanced_accuracy",
    "bootstrap_interval",
    "dice",
    "mae",
    "paired_permutation_test",
    "pearson",
    "r2",
    "rank",
    "surface_dice",
    "task_ranks",
]

# The function stands on a higher floor (it runs a model); it is imported when it is called, not here.
make_callable(__name__, "brainfound.predict.evaluation:evaluate")
