"""Explanations in space: what a model looks at in one session, as maps on the scan's own grid.

Axis legend: S slices that are read, C contrasts, h w patch rows and columns, X Y Z voxels of the reference scan.

Explanations are not evidence. Attention says where a model looks, not what its answer follows from (Jain and Wallace,
"Attention is not explanation", NAACL 2019), and a gradient map can look convincing while it shows little of what was
learnt (Adebayo et al., "Sanity checks for saliency maps", NeurIPS 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from torch import Tensor, nn

from brainfound.data.batches import evenly_spaced_slices
from brainfound.data.preprocessing.stack import Stack
from brainfound.errors import UsageError, did_you_mean
from brainfound.finetuning.tasks import Task, VolumeTask
from brainfound.inference.explanation_methods import (
    WEIGHING_AGGREGATORS,
    ExplanationInputs,
    component_maps,
    gradient_times_input,
    principal_components,
    scale_to_unit_range,
    slice_weights,
)
from brainfound.inference.prediction import file_stem, write_image, write_json
from brainfound.models.model import BrainFoundForSegmentation
from brainfound.models.stack_inference import infer_embedded, unwrap_peft

METHODS = ("slice-attention", "rollout", "gradient", "pca")
CAUTION = (
    "An explanation shows where a model looks or what its score hangs on. It is no evidence of disease, and none that "
    "the answer is right."
)


@dataclass(frozen=True)
class Explanation:
    """Maps of one session, and the numbers behind them.

    Attributes:
        maps: method → image on the reference scan's grid and affine, float32. ``gradient`` has a fourth axis of the
            model's contrasts, ``pca`` one of three components.
        numbers: method → plain values.
        answer: what the model says of the session; empty of an encoder and of a segmentation.
        slices: the slices of the prepared stack that were read, from below; the others show their nearest.
        positions_mm: where those slices lie along the stack, 0 in its middle.
        contrasts, missing: the contrasts that were read, and those of the model that were not there.
        notes, rejected: as of a `Prediction`.
    """

    maps: dict[str, nib.Nifti1Image]
    numbers: dict[str, dict[str, Any]]
    answer: dict[str, Any]
    slices: tuple[int, ...]
    positions_mm: tuple[float, ...]
    contrasts: tuple[str, ...]
    missing: tuple[str, ...]
    subject: str = ""
    session: str = ""
    notes: tuple[str, ...] = field(default=())
    rejected: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The numbers and how they came about, for JSON."""
        return {
            "subject": self.subject,
            "session": self.session,
            "answer": self.answer,
            **self.numbers,
            "slices": list(self.slices),
            "positions_mm": list(self.positions_mm),
            "contrasts": list(self.contrasts),
            "missing_contrasts": list(self.missing),
            "rejected": list(self.rejected),
            "notes": list(self.notes),
            "caution": CAUTION,
            "not_a_medical_device": True,
        }

    def save(self, folder: str | Path, name: str | None = None) -> list[Path]:
        """Write ``NAME_METHOD.nii.gz`` of each map and ``NAME_explanation.json``; returns the files, the JSON last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = name or file_stem(self.subject, self.session) or "session"
        written = []
        for method, image in self.maps.items():
            written.append(folder / f"{name}_{method}.nii.gz")
            write_image(image, written[-1])
        written.append(folder / f"{name}_explanation.json")
        write_json(self.to_dict(), written[-1])
        return written


def choose_methods(
    model: nn.Module, target: Task | None, method: str | Sequence[str] | None, class_name: str | None = None
) -> tuple[str, ...]:
    """The methods that are asked for, each once; None: all that the model can give.

    Args:
        class_name: the class whose score the gradient is to follow; None: the most probable one.

    Raises:
        UsageError: a method is unknown, or the model cannot give it; or the model has no such class.
    """
    if method is None:
        chosen = tuple(name for name in METHODS if not _unsupported_reason(name, model, target))
    else:
        chosen = tuple(dict.fromkeys([method] if isinstance(method, str) else method))
        if not chosen:
            raise UsageError("no method was asked for", where="method", expected=", ".join(METHODS))
    for name in chosen:
        if name not in METHODS:
            raise UsageError(f"unknown method {name!r}", where="method", remedy=did_you_mean(name, METHODS))
        if obstacle := _unsupported_reason(name, model, target):
            possible = [other for other in METHODS if not _unsupported_reason(other, model, target)]
            raise UsageError(obstacle, where=f"method {name}", remedy=f"This model can give: {', '.join(possible)}")
    if class_name is not None:
        _require_class(class_name, target, chosen)
    return chosen


def _unsupported_reason(method: str, model: nn.Module, target: Task | None) -> str:
    """Why a model cannot give an explanation; empty if it can."""
    inner: Any = unwrap_peft(model)
    if isinstance(inner, BrainFoundForSegmentation):
        return {
            "slice-attention": "a segmentation weighs no slices",
            "rollout": "a segmentation does not read the class token, whose attention the rollout follows",
            "gradient": "a segmentation has a score for every voxel, not one to follow back",
        }.get(method, "")
    aggregator = inner.config.aggregator
    if method == "slice-attention" and aggregator not in WEIGHING_AGGREGATORS:
        return f"the aggregator {aggregator!r} of the model weighs no slices"
    if method == "gradient" and target is None:
        return "an encoder has no score to follow back"
    return ""


def _require_class(class_name: str, target: Task | None, methods: tuple[str, ...]) -> None:
    if "gradient" not in methods or target is None or not target.names:
        raise UsageError(
            "a class is for the gradient of a classification", where="class", got=class_name, remedy="Leave it out"
        )
    if class_name not in target.names:
        raise UsageError(
            f"the model has no class {class_name!r}", where="class", remedy=did_you_mean(class_name, target.names)
        )


def explain_stack(
    model: nn.Module,
    stack: Stack,
    target: Task | None = None,
    num_slices: int | None = None,
    method: str | Sequence[str] | None = None,
    class_name: str | None = None,
    notes: tuple[str, ...] = (),
    rejected: tuple[str, ...] = (),
) -> Explanation:
    """Explain what a model makes of a stack.

    Args:
        model: a BrainFound model, or a PEFT model around one; it is left as it was, in evaluation mode.
        stack: prepared with the model's own preprocessing.
        target: how its answers read; None for an encoder.
        num_slices: evenly spaced slices to read; None for all. A segmentation always reads all.
        method, class_name: see `choose_methods`.
        notes, rejected: passed on.

    Raises:
        UsageError: as `choose_methods`. ModelError: the stack does not fit the model, or a map is not finite.
    """
    methods = choose_methods(model, target, method, class_name)
    model.eval()
    segmentation = isinstance(unwrap_peft(model), BrainFoundForSegmentation)
    read = ExplanationInputs(
        model, stack, evenly_spaced_slices(len(stack.pixels), None if segmentation else num_slices)
    )
    encode_all = read.encode_all(rollout="rollout" in methods, features="pca" in methods)
    maps: dict[str, np.ndarray] = {}
    numbers: dict[str, dict[str, Any]] = {}
    answer: dict[str, Any] = {}
    weights = None if segmentation else slice_weights(model, encode_all.embeddings, read.batch.positions_mm)
    if "slice-attention" in methods:
        assert weights is not None, "the methods were checked"
        maps["slice-attention"], numbers["slice-attention"] = _slice_attention(read, weights)
    if encode_all.rollout is not None:
        maps["rollout"], numbers["rollout"] = _rollout(read, encode_all.rollout, weights)
    if target is not None and not segmentation:
        said = infer_embedded(
            model, {"slice_embeddings": encode_all.embeddings[None], "positions_mm": read.batch.positions_mm}
        )
        assert isinstance(target, VolumeTask)
        answer = target.format_answer(said)
        answer = {name: answer[name] for name in ("target", "value", "probabilities") if name in answer}
    if "gradient" in methods:
        assert isinstance(target, VolumeTask)
        maps["gradient"], numbers["gradient"] = _gradient(read, encode_all.embeddings, target, class_name, answer)
    if encode_all.features is not None:
        maps["pca"], numbers["pca"] = _components(read, encode_all.features)
    present = tuple(c for c, here in zip(stack.contrasts, stack.present, strict=True) if here)
    return Explanation(
        maps={name: _image(values, stack) for name, values in maps.items()},
        numbers=numbers,
        answer=answer,
        slices=tuple(read.index.tolist()),
        positions_mm=tuple(stack.positions_mm[read.index].tolist()),
        contrasts=present,
        missing=tuple(c for c in stack.contrasts if c not in present),
        subject=stack.subject,
        session=stack.session,
        notes=notes,
        rejected=rejected,
    )


def _slice_attention(read: ExplanationInputs, weights: Tensor) -> tuple[np.ndarray, dict[str, Any]]:
    values = weights.float().cpu().numpy()
    _, height, width = read.stack.grid
    # The nearest voxel and no mean of two, so that every voxel has the weight of a slice.
    image = read.to_native(np.broadcast_to(values[:, None, None], (len(values), height, width)), order=0)
    return image, {"weights": values.tolist()}


def _rollout(read: ExplanationInputs, rollout: Tensor, weights: Tensor | None) -> tuple[np.ndarray, dict[str, Any]]:
    share = rollout.new_full((len(rollout),), 1 / len(rollout)) if weights is None else weights.to(rollout)
    # Relative to an even share of all patches that were read: 1 is neither more nor less than the others.
    values = (rollout * share[:, None, None]).cpu().numpy() * rollout.numel()
    return read.to_native(read.to_pixels(values)), {"weighted_by_slice_attention": weights is not None}


def _gradient(
    read: ExplanationInputs, embeddings: Tensor, target: VolumeTask, class_name: str | None, answer: dict[str, Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    contrasts = read.stack.contrasts
    name, read_score = target.explained_score(answer, class_name)
    values, score = gradient_times_input(read, embeddings, read_score)
    total = dict(zip(contrasts, values.sum(axis=(0, 2, 3), dtype=np.float64).tolist(), strict=True))
    image = np.stack([read.to_native(read.to_pixels(values[:, c])) for c in range(len(contrasts))], axis=-1)
    return image, {"of": name, "score": score, "volumes": list(contrasts), "sum": total}


def _components(read: ExplanationInputs, features: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    scores, ratio = principal_components(features)
    image = component_maps(read, scale_to_unit_range(scores), read.foreground())
    return image, {"explained_variance_ratio": ratio.tolist(), "num_patches": len(features)}


def _image(values: np.ndarray, stack: Stack) -> nib.Nifti1Image:
    image = nib.Nifti1Image(values.astype(np.float32, copy=False), stack.native_affine)
    image.header.set_xyzt_units("mm")
    return image
