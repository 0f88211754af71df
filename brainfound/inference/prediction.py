"""The prediction for one session, and its files on the grid of the reference scan.

Axis legend: D width.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from brainfound.data.checking.rules import Level
from brainfound.data.label_names import file_label
from brainfound.errors import UsageError
from brainfound.files import write_atomically, writing


def voxel_mm3(image: nib.Nifti1Image) -> float:
    """The volume of a voxel in cubic millimetres."""
    return float(abs(np.linalg.det(image.affine[:3, :3])))


def volumes_mm3(image: nib.Nifti1Image, names: dict[int, str]) -> dict[str, float]:
    """The volume of each label of a native label map in cubic millimetres."""
    codes, counts = np.unique(np.asarray(image.dataobj), return_counts=True)
    num_voxels = dict(zip(codes.tolist(), counts.tolist(), strict=True))
    volume = voxel_mm3(image)
    return {name: num_voxels.get(code, 0) * volume for code, name in names.items() if code != 0}


def write_image(image: nib.Nifti1Image, path: Path) -> None:
    """Write an image atomically."""
    with writing(path) as temporary:
        nib.save(image, temporary)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


_MAX_NAME_BYTES = 200
"""Bytes of a file name before its ending; file systems allow 255 with it."""


@dataclass(frozen=True)
class Prediction:
    """A model's answer for one session.

    Attributes:
        task: classification, regression, segmentation or embedding.
        answer: plain values: class and probabilities, value, label volumes in mm³, …
        image: for a segmentation, the label codes on the reference scan's own grid and affine; None where labels
            overlap.
        masks: for a segmentation with overlapping labels, a mask of 0 and 1 of each region, on the same grid.
        probability: for a segmentation, the foreground probability (where labels overlap, the largest of them), on
            the same grid.
        probabilities: for a segmentation, on request, the probability of each label by its code (where there are
            several) or of each region by its name.
        embedding: for an encoder, the volume embedding ``(D,)``.
        tokens: for an encoder, on request, arrays by name; see `brainfound.inference.tokens.session_tokens`.
        contrasts, missing: contrasts that were read, and contrasts of the model that were absent.
        notes: remarks on the scans; ✗ what is unfit for the model, ! what needs a look.
        rejected: scans of the session that cannot be used, with the reason.
        input_level: the gravest finding of the model's input contract; None if the scans were not compared with one.
        name: for its files, of scans that were given as files.
        model_hash: of the weights that gave the answer.
        settings: the options of the predictor that gave it, as plain values.
    """

    task: str
    answer: dict[str, Any]
    contrasts: tuple[str, ...]
    missing: tuple[str, ...]
    image: nib.Nifti1Image | None = None
    probability: nib.Nifti1Image | None = None
    embedding: np.ndarray | None = None
    subject: str = ""
    session: str = ""
    notes: tuple[str, ...] = field(default=())
    rejected: tuple[str, ...] = field(default=())
    masks: dict[str, nib.Nifti1Image] = field(default_factory=dict)
    probabilities: dict[str, nib.Nifti1Image] = field(default_factory=dict)
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    input_level: Level | None = None
    name: str = ""
    model_hash: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Answer, contrasts and notes, for JSON."""
        return {
            "task": self.task,
            "subject": self.subject,
            "session": self.session,
            **self.answer,
            "contrasts": list(self.contrasts),
            "missing_contrasts": list(self.missing),
            "rejected": list(self.rejected),
            "notes": list(self.notes),
            "input_level": self.input_level,
            "model_hash": self.model_hash,
            "settings": self.settings,
            "not_a_medical_device": True,
        }

    def without_images(self) -> Prediction:
        """The same prediction without images and tokens."""
        return replace(self, image=None, probability=None, masks={}, probabilities={}, tokens={})

    def save(
        self, folder: str | Path, name: str | None = None, *, probabilities: bool = False, overwrite: bool = False
    ) -> list[Path]:
        """Write ``NAME.json``, images and vectors; returns the files, the JSON last.

        ``NAME_dseg.nii.gz`` holds label codes; where labels overlap, ``NAME_label-REGION_mask.nii.gz`` each region
        (the letters and digits of its name).
        With ``probabilities`` also ``NAME_probability.nii.gz``, and ``NAME_label-LABEL_probability.nii.gz`` of each
        code or region in `probabilities`. An embedding is ``NAME_embedding.npy``, tokens are ``NAME_tokens.npz``.
        The default NAME is that of the first file, or the subject and session. UsageError: it is there already, and
        ``overwrite`` is False.
        """
        folder = Path(folder)
        name = name or self.name or file_stem(self.subject, self.session) or "prediction"
        require_new(folder / f"{name}.json", overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        images = {} if self.image is None else {"dseg": self.image}
        images |= {f"label-{file_label(region)}_mask": mask for region, mask in self.masks.items()}
        if probabilities and self.probability is not None:
            images["probability"] = self.probability
            images |= {f"label-{file_label(label)}_probability": image for label, image in self.probabilities.items()}
        written = []
        for ending, image in images.items():
            written.append(folder / f"{name}_{ending}.nii.gz")
            write_image(image, written[-1])
        if self.embedding is not None:
            written.append(folder / f"{name}_embedding.npy")
            np.save(written[-1], self.embedding)
        if self.tokens:
            written.append(folder / f"{name}_tokens.npz")
            arrays: dict[str, Any] = self.tokens
            with writing(written[-1]) as temporary:
                np.savez(temporary, **arrays)
        written.append(folder / f"{name}.json")
        settings = self.settings | {"probabilities": probabilities and self.probability is not None}
        write_json(self.to_dict() | {"settings": settings}, written[-1])
        return written


def require_new(file: Path, overwrite: bool) -> None:
    """Raise a UsageError if an answer has been written to this file before, unless it may be overwritten."""
    if file.exists() and not overwrite:
        raise UsageError(
            "an answer of this name already exists", where=file, remedy="Give another folder or name, or overwrite"
        )


def file_stem(subject: str, session: str) -> str:
    """The name of a session's files, ``SUBJECT_ses-SESSION``.

    A subject that is not a valid file name, such as ``../x``, becomes a plain name with a hash, so that two subjects
    with the same plain name do not overwrite each other.

    >>> file_stem("sub-01", "1"), file_stem("../x", "1")
    ('sub-01_ses-1', '-x_ses-1-3c2f0059')
    """
    name = "_".join(part for part in (subject, session and f"ses-{session}") if part)
    plain = re.sub(r"[^\w .+=@-]", "-", name).lstrip(".")
    if plain == name and "_ses-" not in subject and len(name.encode()) <= _MAX_NAME_BYTES:
        return name
    return f"{plain[:50]}-{hashlib.sha256(json.dumps([subject, session]).encode()).hexdigest()[:8]}"
