"""The steps of `brainfound prepare` written with TorchIO and with MONAI, for the benchmark only.

For each session, as `Preprocessing` does by default:

    1. read every contrast, turn it to the closest RAS orientation
    2. find the head
    3. its 0.5 and 99.5 percentiles become 0 and 255; clip; outside of the head 0
    4. the first contrast gives the grid: the wanted spacing, 224 × 224 around the middle of the head's box,
       the slices that the head spans
    5. bring the other contrasts onto that grid, trilinearly
    6. round to bytes, (S, C, H, W), save

Written to be fast where the tool leaves a choice: the grid is cropped first and the others are resampled onto the
crop, not onto the whole volume; resampling in MONAI is in float32, not in its default float64; transforms are made
once and not per session. Neither tool has a transform that finds a head in air. Both are therefore measured with two
functions for step 2: BrainFound's own, so that the step is the same for all three, and the same steps written with
ITK's filters, which is what it costs without BrainFound.

Axis legend: X left → right, Y posterior → anterior, Z inferior → superior; S slices, C contrasts, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from brainfound.data.preprocessing.foreground import foreground
from brainfound.data.preprocessing.settings import Preprocessing

FindHead = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Takes a RAS volume and its affine, returns the head as a mask."""

PrepareSession = Callable[[Mapping[str, Path], Path], None]
"""Takes contrast → file, and the .npy file to write."""


def find_head(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The head in a RAS volume ``(X, Y, Z)``, as BrainFound finds it."""
    return foreground(np.ascontiguousarray(volume, dtype=np.float32), np.asarray(affine, dtype=np.float64))


def find_head_with_itk(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The same steps with ITK's filters: on a 3-mm grid Otsu's threshold, the largest component, closed and filled."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(volume, dtype=np.float32))
    spacing_mm = np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)
    # ITK's axes run against numpy's.
    coarse = sitk.BinShrink(image, [max(round(3 / float(step)), 1) for step in spacing_mm[::-1]])
    bright = sitk.OtsuThreshold(coarse, 0, 1, 256)
    largest = sitk.RelabelComponent(sitk.ConnectedComponent(bright), sortByObjectSize=True) == 1
    closed = sitk.BinaryDilate(sitk.BinaryMorphologicalClosing(largest, [2, 2, 2]), [1, 1, 1])
    filled = sitk.BinaryFillhole(closed)
    head = sitk.GetArrayFromImage(filled)
    for z in range(head.shape[2]):
        head[:, :, z] = sitk.GetArrayFromImage(sitk.BinaryFillhole(sitk.GetImageFromArray(head[:, :, z])))
    solid = sitk.GetImageFromArray(head)
    solid.CopyInformation(filled)
    return sitk.GetArrayFromImage(sitk.Resample(solid, image, sitk.Transform(), sitk.sitkNearestNeighbor)).astype(bool)


def to_bytes(volumes: list[np.ndarray]) -> np.ndarray:
    """RAS volumes ``(X, Y, Z)`` on one grid → ``(S, C, H, W)`` uint8; row 0 is anterior, column 0 left."""
    return np.stack([np.rint(v.transpose(2, 1, 0)[:, ::-1]).astype(np.uint8) for v in volumes], axis=1)


def torchio_preparation(preprocessing: Preprocessing, find_head: FindHead = find_head) -> PrepareSession:
    """What prepares one session with TorchIO."""
    import torchio as tio

    to_ras = tio.ToCanonical()
    scale = tio.Compose(
        [
            tio.RescaleIntensity((0, 255), percentiles=preprocessing.percentiles, masking_method="head"),
            tio.Mask(masking_method="head"),
        ]
    )

    def scaled(file: Path) -> tio.Subject:
        subject = to_ras(tio.Subject(image=tio.ScalarImage(file)))
        head = find_head(subject.image.data[0].numpy(), subject.image.affine)
        subject.add_image(tio.LabelMap(tensor=head[None].astype(np.uint8), affine=subject.image.affine), "head")
        return scale(subject)

    def run(files: Mapping[str, Path], out: Path) -> None:
        volumes = []
        reference = None
        for contrast in preprocessing.contrasts:
            if contrast not in files:
                continue
            subject = scaled(files[contrast])
            if reference is None:
                if not np.allclose(subject.spacing, preprocessing.spacing_mm, atol=1e-4):
                    subject = tio.Resample(preprocessing.spacing_mm, antialias=True)(subject)
                slices = np.flatnonzero(subject.head.data[0].numpy().any(axis=(0, 1)))
                height, width = preprocessing.size
                shape = (width, height, int(slices[-1] - slices[0]) + 1)
                reference = tio.CropOrPad(shape, mask_name="head")(subject).image
                volumes.append(reference.data[0].numpy())
            else:
                subject.remove_image("head")
                volumes.append(tio.Resample(reference, antialias=True)(subject).image.data[0].numpy())
        np.save(out, to_bytes(volumes))

    return run


def monai_preparation(preprocessing: Preprocessing, find_head: FindHead = find_head) -> PrepareSession:
    """What prepares one session with MONAI."""
    import torch
    from monai.data import MetaTensor
    from monai.transforms import (
        Compose,
        CropForegroundd,
        EnsureChannelFirst,
        LoadImage,
        Orientation,
        ResampleToMatch,
        ResizeWithPadOrCropd,
        ScaleIntensityRangePercentiles,
        Spacingd,
    )

    load = Compose(
        [LoadImage("NibabelReader", image_only=True), EnsureChannelFirst(), Orientation(axcodes="RAS", labels=None)]
    )
    low, high = preprocessing.percentiles
    scale = ScaleIntensityRangePercentiles(low, high, 0, 255, clip=True)
    match = ResampleToMatch(mode="bilinear", padding_mode="zeros", dtype=np.float32)
    height, width = preprocessing.size
    both = ("image", "head")
    match_spacing = Spacingd(both, preprocessing.spacing_mm, mode=("bilinear", "nearest"), dtype=np.float32)
    crop = Compose(
        [CropForegroundd(both, source_key="head", allow_smaller=True), ResizeWithPadOrCropd(both, (width, height, -1))]
    )

    def scaled(file: Path) -> tuple[MetaTensor, torch.Tensor]:
        image = load(file)
        head = torch.from_numpy(find_head(image[0].numpy(), image.affine.numpy()))[None]
        # The transform knows no mask, so it is given the head's voxels; the rest stays 0.
        values = torch.zeros_like(image.as_tensor())
        values[head] = scale(image.as_tensor()[head]).as_tensor()
        return MetaTensor(values, meta=image.meta), head

    def run(files: Mapping[str, Path], out: Path) -> None:
        volumes = []
        reference = None
        for contrast in preprocessing.contrasts:
            if contrast not in files:
                continue
            image, head = scaled(files[contrast])
            if reference is None:
                pair = {"image": image, "head": MetaTensor(head.to(torch.uint8), meta=image.meta)}
                if not np.allclose(image.pixdim.numpy(), preprocessing.spacing_mm, atol=1e-4):
                    pair = match_spacing(pair)
                reference = crop(pair)["image"]
                volumes.append(reference[0].numpy())
            else:
                volumes.append(match(image, reference)[0].numpy())
        np.save(out, to_bytes(volumes))

    return run


def agreement(ours: np.ndarray, theirs: np.ndarray, reach: int = 2) -> dict[str, object]:
    """Correlation of two stacks' pixels inside the head, at the best whole-voxel shift of at most ``reach``.

    The tools round the middle of the head's box to a voxel in different ways, and masks that differ at the rim move
    that middle; either moves a stack by a voxel or two and changes nothing else.
    """
    depth = min(len(ours), len(theirs))
    size = (depth, *ours.shape[2:])

    def cut(stack: np.ndarray, shift: tuple[int, ...], step: int) -> np.ndarray:
        rows = [slice(reach + s, n - reach + s, step) for s, n in zip(shift, size, strict=True)]
        return stack[rows[0], :, rows[1], rows[2]].astype(np.float32)

    def correlations(shift: tuple[int, ...], step: int) -> list[float]:
        fixed, moved = cut(ours, (0, 0, 0), step), cut(theirs, shift, step)
        inside = (fixed[:, 0] > 0) | (moved[:, 0] > 0)
        return [float(np.corrcoef(fixed[:, c][inside], moved[:, c][inside])[0, 1]) for c in range(fixed.shape[1])]

    shifts = [tuple(int(n) - reach for n in index) for index in np.ndindex(*(2 * reach + 1,) * 3)]
    best = max(shifts, key=lambda shift: min(correlations(shift, 3)))
    return {
        "correlation_per_contrast": [round(value, 4) for value in correlations(best, 1)],
        "shift_voxels": best,
        "slices": [len(ours), len(theirs)],
    }
