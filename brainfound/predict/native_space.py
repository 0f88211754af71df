"""Answers on the input's own grid, as files.

A segmentation is written on the grid and affine of the session's reference scan; beside every answer stands a
JSON with what was read, what was missing and what was found.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from brainfound.data.stack import Stack


def segmentation_image(stack: Stack, labels: np.ndarray) -> nib.Nifti1Image:
    """Label codes ``(S, H, W)`` on the stack's grid → an image on the reference scan's grid."""
    return stack.to_native(labels, order=0)


def probability_image(stack: Stack, probability: np.ndarray) -> nib.Nifti1Image:
    """A probability ``(S, H, W)`` on the stack's grid → an image on the reference scan's grid."""
    return stack.to_native(probability, order=1)


def voxel_mm3(image: nib.Nifti1Image) -> float:
    """The volume of a voxel in cubic millimetres."""
    return float(abs(np.linalg.det(image.affine[:3, :3])))


def volumes_mm3(image: nib.Nifti1Image, names: dict[int, str]) -> dict[str, float]:
    """The volume of each label of a native label map in cubic millimetres."""
    codes, counts = np.unique(np.asarray(image.dataobj), return_counts=True)
    found = dict(zip(codes.tolist(), counts.tolist(), strict=True))
    of_one = voxel_mm3(image)
    return {name: found.get(code, 0) * of_one for code, name in names.items() if code != 0}


def write_image(image: nib.Nifti1Image, path: Path) -> None:
    """Write an image whole or not at all."""
    temporary = path.with_name("." + path.name)
    nib.save(image, temporary)
    temporary.replace(path)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_name("." + path.name)
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
