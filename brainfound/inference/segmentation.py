"""A segmentation of a stack → label maps, masks, probabilities and volumes on the grid of the reference scan.

Axis legend: S slices, K classes (or overlapping labels), H W pixels, X Y Z voxels of the scan as stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from jaxtyping import Integer
from scipy import ndimage

from brainfound.data.label_names import mirrored_channels
from brainfound.data.preprocessing.stack import Stack
from brainfound.errors import UsageError
from brainfound.finetuning.tasks import Task
from brainfound.finetuning.tasks.segmentation import OverlappingSegmentation, Segmentation
from brainfound.inference.prediction import volumes_mm3, voxel_mm3
from brainfound.models.stack_prediction import InferenceAugmentation, StackPrediction

# The volume of a voxel comes from an affine in float32, so that 27 mm³ may read as 27.000001.
_ROUNDING = 1e-6


def without_small_components(
    labels: Integer[np.ndarray, "X Y Z"], voxel_mm3: float, min_volume_mm3: float
) -> tuple[Integer[np.ndarray, "X Y Z"], dict[int, int]]:
    """Remove small connected components; returns the labels and the number of removed components per label code.

    Voxels of one code that share a face, an edge or a corner are connected (26 neighbours). Removed voxels become 0.
    """
    kept = labels.copy()
    removed: dict[int, int] = {}
    for code, box in enumerate(ndimage.find_objects(labels.astype(np.int32)), start=1):
        if box is None:
            continue
        pieces, count = ndimage.label(labels[box] == code, structure=np.ones((3, 3, 3)))
        volumes_mm3 = np.bincount(pieces.ravel(), minlength=count + 1) * voxel_mm3
        small = volumes_mm3 < min_volume_mm3 * (1 - _ROUNDING)
        small[0] = False  # other codes
        kept[box][small[pieces]] = 0
        removed[code] = int(small.sum())
    return kept, removed


@dataclass(frozen=True)
class SegmentationOptions:
    """Options of a segmentation; all are off by default.

    Attributes:
        flips: average with the left-right mirrored slices, in which labels that name a side are exchanged, see
            `brainfound.data.label_names.mirrored_channels`. Not for codes without names that have a side.
        overlap: average over four positions of the patch grid, half a patch apart.
        min_volume_mm3: connected components below this volume are removed from label maps and masks, on the grid of
            the scan; probabilities stay unchanged.
        class_probabilities: keep the probability of each class or label, not only that of the foreground.
    """

    flips: bool = False
    overlap: bool = False
    min_volume_mm3: float = 0.0
    class_probabilities: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.min_volume_mm3 < float("inf"):
            raise UsageError(
                "the smallest volume must be a number of at least 0", where="min_volume_mm3", got=self.min_volume_mm3
            )

    def augmentation(self, target: Task | None) -> InferenceAugmentation:
        """The variants to average; UsageError if mirrored slices cannot be read for the labels of the target."""
        mirrored = mirrored_channels(target.names) if self.flips and isinstance(target, Segmentation) else ()
        return InferenceAugmentation(self.flips, self.overlap, mirrored)


def build_segmentation_fields(
    stack: Stack, answer: StackPrediction, target: Segmentation, options: SegmentationOptions
) -> dict[str, Any]:
    """The segmentation fields of a `Prediction`: answer, image or masks, probability, probabilities."""
    assert answer.foreground_probability is not None
    fields: dict[str, Any] = {"probability": stack.to_native(answer.foreground_probability, order=1)}
    if isinstance(target, OverlappingSegmentation):
        fields |= _masks(stack, answer, target, options)
    else:
        fields |= _label_map(stack, answer, target, options)
    if options.flips or options.overlap:
        fields["answer"] |= {"averaged": [name for name in ("flips", "overlap") if getattr(options, name)]}
    return fields


def _label_map(
    stack: Stack, answer: StackPrediction, target: Segmentation, options: SegmentationOptions
) -> dict[str, Any]:
    assert answer.classes is not None
    names = dict(zip(target.codes, target.names, strict=True))
    image, removed = _apply_min_volume(stack.to_native(target.decode_mask(answer.classes), order=0), options)
    content: dict[str, Any] = {
        "labels": {str(code): name for code, name in names.items()},
        **({"regions": target.region_codes} if target.regions else {}),
        "volumes_mm3": volumes_mm3(image, names),
    }
    if options.min_volume_mm3:
        content |= _removal(options, {name: removed.get(code, 0) for code, name in names.items() if code != 0})
    probabilities = {}
    if answer.class_probabilities is not None:
        for k, code in enumerate(target.codes[1:], start=1):
            probabilities[str(code)] = stack.to_native(answer.class_probabilities[:, k], order=1)
    return {"answer": content, "image": image, "probabilities": probabilities}


def _masks(
    stack: Stack, answer: StackPrediction, target: OverlappingSegmentation, options: SegmentationOptions
) -> dict[str, Any]:
    assert answer.labels is not None
    masks, volumes, removed = {}, {}, {}
    for k, name in enumerate(target.names):
        mask, counts = _apply_min_volume(stack.to_native(answer.labels[:, k].astype(np.uint8), order=0), options)
        masks[name], removed[name] = mask, counts.get(1, 0)
        volumes[name] = volumes_mm3(mask, {1: name})[name]
    content: dict[str, Any] = {"regions": target.region_codes, "volumes_mm3": volumes}
    if options.min_volume_mm3:
        content |= _removal(options, removed)
    probabilities = {}
    if answer.class_probabilities is not None:
        for k, name in enumerate(target.names):
            probabilities[name] = stack.to_native(answer.class_probabilities[:, k], order=1)
    return {"answer": content, "masks": masks, "probabilities": probabilities}


def _apply_min_volume(image: nib.Nifti1Image, options: SegmentationOptions) -> tuple[nib.Nifti1Image, dict[int, int]]:
    if not options.min_volume_mm3:
        return image, {}
    kept, removed = without_small_components(np.asarray(image.dataobj), voxel_mm3(image), options.min_volume_mm3)
    return nib.Nifti1Image(kept, image.affine, image.header), removed


def _removal(options: SegmentationOptions, counts: dict[str, int]) -> dict[str, Any]:
    return {"min_volume_mm3": options.min_volume_mm3, "removed_components": counts}
