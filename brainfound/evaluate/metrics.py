"""All metrics under one name; the modules of each kind say how they are computed.

What cannot be scored is refused in one line (`UsageError`): non-finite values, shapes that differ, masks
that are not binary. What has no defined score is ``nan``, never a made-up number: AUROC of one class,
R² of a constant target, Pearson's r of a constant. A mean over cases should then say how many it left out.
"""

from brainfound.evaluate.classification_metrics import (
    auprc,
    auroc,
    balanced_accuracy,
    f1,
    macro_f1,
    mcc,
    sensitivity_at_specificity,
)
from brainfound.evaluate.regression_metrics import mae, pearson, r2, rmse, spearman
from brainfound.evaluate.segmentation_metrics import (
    Empty,
    dice,
    hd95,
    lesion_f1,
    relative_volume_error,
    surface_dice,
    volume_error_mm3,
)

__all__ = [
    "Empty",
    "auprc",
    "auroc",
    "balanced_accuracy",
    "dice",
    "f1",
    "hd95",
    "lesion_f1",
    "macro_f1",
    "mae",
    "mcc",
    "pearson",
    "r2",
    "relative_volume_error",
    "rmse",
    "sensitivity_at_specificity",
    "spearman",
    "surface_dice",
    "volume_error_mm3",
]
