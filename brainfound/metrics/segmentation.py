"""Metrics of a segmented structure.

Prediction and reference are binary masks of one shape with any number of axes; `spacing_mm`, the distance between voxel
centres, has one value per axis in the same order. Anything else raises `UsageError`. A structure that is absent from
one or both masks is scored by convention, so the convention is an argument: name it in comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy import ndimage

from brainfound.errors import UsageError
from brainfound.metrics.input_checks import get_convention_score, mask_pair, validate_spacing

Empty = Literal["one", "nan", "zero"]
_EMPTY_SCORE = {"one": 1.0, "nan": float("nan"), "zero": 0.0}

NoError = Literal["zero", "nan"]
"""The error of two empty masks."""
_NO_ERROR = {"zero": 0.0, "nan": float("nan")}

# NIfTI headers hold float32: 1.0 mm may be read as 1.0000001 mm, and must be within a tolerance of 1 mm.
_DISTANCE_SLACK_MM = 1e-5


def dice(prediction: Any, reference: Any, empty: Empty = "one") -> float:
    """Dice overlap of two binary masks, 2|A ∩ B| / (|A| + |B|).

    Two empty masks score ``"one"`` (fomo-metrics), ``"nan"`` (nnU-Net, SSL3D) or ``"zero"``; one empty
    mask scores 0.

    Source: L. R. Dice, "Measures of the amount of ecologic association between species", Ecology 1945.
    """
    predicted, expected = mask_pair(prediction, reference)
    empty_score = get_convention_score(empty, _EMPTY_SCORE, "empty")
    total = int(predicted.sum()) + int(expected.sum())
    if total == 0:
        return empty_score
    return 2.0 * int((predicted & expected).sum()) / total


def surface_dice(
    prediction: Any, reference: Any, spacing_mm: Sequence[float], tolerance_mm: float = 1.0, empty: Empty = "one"
) -> float:
    """Normalised surface distance: the share of both surfaces within `tolerance_mm` of the other surface.

    The surface is the boundary voxels: those with a face neighbour outside the mask, or outside the array. Distances
    are Euclidean, in mm, between voxel centres; each boundary voxel counts the same, and a distance equal to the
    tolerance is within it. Most toolkits and challenges compute this discrete form. The original weights surface
    elements by area, which differs by a few hundredths on anisotropic or very small objects. Two empty masks are scored
    as in `dice` (here fomo-metrics uses ``"zero"``).

    Source: S. Nikolov et al., "Clinically applicable segmentation of head and neck anatomy for radiotherapy",
    J Med Internet Res 2021 (arXiv:1809.04430), surface DSC at a tolerance.
    """
    predicted, expected = mask_pair(prediction, reference)
    spacing = validate_spacing(spacing_mm, predicted.ndim)
    if not (np.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise UsageError("the tolerance is invalid", where="tolerance_mm", got=tolerance_mm, expected="0 or more")
    empty_score = get_convention_score(empty, _EMPTY_SCORE, "empty")
    if not predicted.any() and not expected.any():
        return empty_score
    if not predicted.any() or not expected.any():
        return 0.0
    distances_mm = np.concatenate(_surface_distances_mm(predicted, expected, spacing))
    return float((distances_mm <= tolerance_mm + _DISTANCE_SLACK_MM).mean())


def hd95(
    prediction: Any,
    reference: Any,
    spacing_mm: Sequence[float],
    percentile: float = 95.0,
    empty: NoError = "zero",
    one_empty: Literal["inf", "diagonal", "nan"] = "inf",
) -> float:
    """Robust Hausdorff distance in mm: the distance between the surfaces without the worst 5%.

    The 95th percentile, interpolated between ranks, of the distances from the boundary voxels (as in `surface_dice`) of
    one mask to the nearest of the other; the larger of the two directions. Pooling both directions before the
    percentile, as others do, hides a small missed part.

    Args:
        percentile: 100 is the Hausdorff distance itself.
        empty: the score of two empty masks, ``"zero"`` or ``"nan"``.
        one_empty: the score if only one mask is empty: ``"inf"``, since there is no nearest voxel; ``"diagonal"`` of
            the array in mm, the penalty of BraTS; or ``"nan"``, which a mean leaves out, so missing is rewarded.

    Source: D. P. Huttenlocher et al., "Comparing images using the Hausdorff distance", IEEE TPAMI 1993 (the
    percentile, section III); A. A. Taha and A. Hanbury, BMC Med Imaging 2015.
    """
    predicted, expected = mask_pair(prediction, reference)
    spacing = validate_spacing(spacing_mm, predicted.ndim)
    if not 0 <= percentile <= 100:
        raise UsageError("not a percentile", where="percentile", got=percentile, expected="0 to 100")
    empty_score = get_convention_score(empty, _NO_ERROR, "empty")
    missed = {"inf": float("inf"), "diagonal": float(np.linalg.norm(spacing * predicted.shape)), "nan": float("nan")}
    missed_score = get_convention_score(one_empty, missed, "one_empty")
    if not predicted.any() and not expected.any():
        return empty_score
    if not predicted.any() or not expected.any():
        return missed_score
    directions = _surface_distances_mm(predicted, expected, spacing)
    return float(max(np.percentile(distances, percentile) for distances in directions))


def lesion_f1(
    prediction: Any, reference: Any, empty: Empty = "one", touching: Literal["corners", "faces"] = "corners"
) -> float:
    """F1 over lesions instead of voxels: a small lesion counts as much as a large one.

    A lesion is a connected component, by ``"corners"`` (26 neighbours in 3-D) or ``"faces"`` (6). A reference lesion is
    found if it overlaps the prediction, else missed; a predicted lesion without overlap is false. F1 is
    2 found / (2 found + false + missed). Two empty masks are scored as in `dice`.

    Source: the matching rule of the ISLES 2022 challenge (M. R. Hernandez Petzsche et al., Sci Data 2022).
    """
    predicted, expected = mask_pair(prediction, reference)
    empty_score = get_convention_score(empty, _EMPTY_SCORE, "empty")
    reach = get_convention_score(touching, {"faces": 1, "corners": max(predicted.ndim, 1)}, "touching")
    if not predicted.any() and not expected.any():
        return empty_score
    structure = ndimage.generate_binary_structure(predicted.ndim, int(reach))
    num_found, num_missed = _count_detected(expected, predicted, structure)
    num_false = _count_detected(predicted, expected, structure)[1]
    return 2 * num_found / (2 * num_found + num_false + num_missed)


def volume_error_mm3(
    prediction: Any, reference: Any, spacing_mm: Sequence[float], signed: bool = False, empty: NoError = "zero"
) -> float:
    """Absolute difference of the two volumes, in mm³; with `signed`, prediction − reference, whose mean is the bias."""
    predicted, expected = mask_pair(prediction, reference)
    voxel_mm3 = float(np.prod(validate_spacing(spacing_mm, predicted.ndim)))
    empty_score = get_convention_score(empty, _NO_ERROR, "empty")
    num_predicted, num_expected = int(predicted.sum()), int(expected.sum())
    if num_predicted == num_expected == 0:
        return empty_score
    error = (num_predicted - num_expected) * voxel_mm3
    return error if signed else abs(error)


def relative_volume_error(
    prediction: Any,
    reference: Any,
    signed: bool = False,
    empty: NoError = "zero",
    reference_empty: Literal["inf", "nan"] = "inf",
) -> float:
    """Difference of the two volumes as a share of the reference; 1 for a missed structure.

    With `signed`, (prediction − reference) / reference, whose mean is the bias. `reference_empty` is the error where
    only the reference is empty.
    """
    predicted, expected = mask_pair(prediction, reference)
    empty_score = get_convention_score(empty, _NO_ERROR, "empty")
    conventions = {"inf": float("inf"), "nan": float("nan")}
    without_reference = get_convention_score(reference_empty, conventions, "reference_empty")
    num_predicted, num_expected = int(predicted.sum()), int(expected.sum())
    if num_expected == 0:
        return without_reference if num_predicted else empty_score
    error = (num_predicted - num_expected) / num_expected
    return error if signed else abs(error)


def clean_negative(prediction: Any, reference: Any) -> float:
    """Whether a case without the structure was left unmarked: 1 or 0; ``nan`` where the reference has the structure.

    Its mean over cases is their specificity.
    """
    predicted, expected = mask_pair(prediction, reference)
    return float("nan") if expected.any() else float(not predicted.any())


def _surface_distances_mm(
    predicted: np.ndarray, expected: np.ndarray, spacing: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Distances from the boundary voxels of each mask to the nearest of the other; neither mask is empty."""
    # Both surfaces lie in the bounding box, so cropping to it changes no distance.
    window = ndimage.find_objects((predicted | expected).astype(np.uint8))[0]
    surface_p, surface_r = _boundary(predicted[window]), _boundary(expected[window])
    # The distance transform measures from each voxel to the nearest zero, hence the inversion.
    return (
        ndimage.distance_transform_edt(~surface_r, sampling=spacing)[surface_p],
        ndimage.distance_transform_edt(~surface_p, sampling=spacing)[surface_r],
    )


def _count_detected(lesions: np.ndarray, other: np.ndarray, structure: np.ndarray) -> tuple[int, int]:
    """Numbers of components of a mask with and without a voxel in the other mask."""
    components, num_components = ndimage.label(lesions, structure)
    num_touched = int(np.count_nonzero(np.unique(components[other])))
    return num_touched, int(num_components) - num_touched


def _boundary(mask: np.ndarray) -> np.ndarray:
    # Erosion treats the outside of the array as background, so an object at its edge has a boundary there.
    return mask & ~ndimage.binary_erosion(mask)
