"""Explanation maps of one session on the scan's own grid.

Axis legend: S slices that are read, C contrasts, h w patch rows and columns, X Y Z voxels of the reference scan.

Explanations are not evidence. Attention shows where a model looks, not why it answers as it does (Jain and Wallace,
"Attention is not explanation", NAACL 2019), and a gradient map can look convincing without depending on the
trained weights (Adebayo et al., "Sanity checks for saliency maps", NeurIPS 2018).
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
from brainfound.data.checking.rules import Level
from brainfound.data.preprocessing.stack import Stack
from brainfound.errors import UsageError, did_you_mean
from brainfound.finetuning.tasks import Task, VolumeTask
from brainfound.inference.explanation_methods import (
    ExplanationInputs,
    component_maps,
    gradient_times_input,
    principal_components,
    scale_to_unit_range,
    slice_weights,
    weighs_slices,
)
from brainfound.inference.prediction import file_stem, require_new, write_image, write_json
from brainfound.models.model import BrainFoundForSegmentation
from brainfound.models.stack_prediction import infer_embedded, unwrap_peft

METHODS = ("slice-attention", "rollout", "gradient", "pca")
CAUTION = (
    "An explanation shows where a model looks or what its score hangs on. It is no evidence of disease, and none that "
    "the answer is right."
)


@dataclass(frozen=True)
class Explanation:
    """Maps of one session, and their numbers.

    Attributes:
        maps: method → image on the reference scan's grid and affine, float32. ``gradient`` has a fourth axis over
            the model's contrasts, ``pca`` one over three components.
        numbers: method → plain values.
        answer: the model's answer; empty for an encoder and for a segmentation.
        slices: the slices of the prepared stack that were read, inferior to superior; the others show the nearest one.
        positions_mm: positions of those slices along the stack, 0 at its middle.
        contrasts, missing: contrasts that were read, and contrasts of the model that were absent.
        notes, rejected, model_hash, settings: as in `Prediction`.
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
    input_level: Level | None = None
    name: str = ""
    model_hash: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Numbers, contrasts and notes, for JSON."""
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
            "model_hash": self.model_hash,
            "settings": self.settings,
            "input_level": self.input_level,
            "caution": CAUTION,
            "not_a_medical_device": True,
        }

    def save(self, folder: str | Path, name: str | None = None, *, overwrite: bool = False) -> list[Path]:
        """Write ``NAME_METHOD.nii.gz`` of each map and ``NAME_explanation.json``; returns the files, the JSON last.

        NAME and errors are as for `Prediction.save`.
        """
        folder = Path(folder)
        name = name or self.name or file_stem(self.subject, self.session) or "session"
        require_new(folder / f"{name}_explanation.json", overwrite)
        folder.mkdir(parents=True, exist_ok=True)
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
    """The requested methods, each once; None: all that fit the model.

    Args:
        class_name: the class whose score the gradient follows; None: the most probable one.

    Raises:
        UsageError: an unknown method or class, or a method that does not fit the model.
    """
    if method is None:
        chosen = tuple(name for name in METHODS if not _unsupported_reason(name, model, target))
    else:
        chosen = tuple(dict.fromkeys([method] if isinstance(method, str) else method))
        if not chosen:
            raise UsageError("no method is given", where="method", expected=", ".join(METHODS))
    for name in chosen:
        if name not in METHODS:
            raise UsageError(f"unknown method {name!r}", where="method", remedy=did_you_mean(name, METHODS))
        if reason := _unsupported_reason(name, model, target):
            possible = [other for other in METHODS if not _unsupported_reason(other, model, target)]
            raise UsageError(reason, where=f"method {name}", remedy=f"This model can give: {', '.join(possible)}")
    if class_name is not None:
        _require_class(class_name, target, chosen)
    return chosen


def _unsupported_reason(method: str, model: nn.Module, target: Task | None) -> str:
    """Why a method does not fit a model; empty if it does."""
    inner: Any = unwrap_peft(model)
    if isinstance(inner, BrainFoundForSegmentation):
        return {
            "slice-attention": "a segmentation weighs no slices",
            "rollout": "a segmentation does not read the class token, whose attention the rollout follows",
            "gradient": "a segmentation has a score for every voxel, not one to follow back",
        }.get(method, "")
    if method == "slice-attention" and not weighs_slices(model):
        return f"the aggregator {inner.config.aggregator!r} of the model weighs no slices"
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
) -> Explanation:
    """Explain a stack.

    Args:
        model: a BrainFound model, or a PEFT model around one; left unchanged, in evaluation mode.
        stack: prepared with the model's own preprocessing.
        target: the model's task; None for an encoder.
        num_slices: evenly spaced slices to read; None for all. A segmentation always reads all.
        method, class_name: see `choose_methods`.

    Raises:
        UsageError: as for `choose_methods`. ModelError: the stack does not fit the model, or a map is not finite.
    """
    methods = choose_methods(model, target, method, class_name)
    model.eval()
    segmentation = isinstance(unwrap_peft(model), BrainFoundForSegmentation)
    inputs = ExplanationInputs(
        model, stack, evenly_spaced_slices(len(stack.pixels), None if segmentation else num_slices)
    )
    encoded = inputs.encode_all(rollout="rollout" in methods, features="pca" in methods)
    maps: dict[str, np.ndarray] = {}
    numbers: dict[str, dict[str, Any]] = {}
    answer: dict[str, Any] = {}
    weights = None if segmentation else slice_weights(model, encoded.embeddings, inputs.batch.positions_mm)
    if "slice-attention" in methods:
        assert weights is not None, "the methods were checked"
        maps["slice-attention"], numbers["slice-attention"] = _slice_attention(inputs, weights)
    if encoded.rollout is not None:
        maps["rollout"], numbers["rollout"] = _rollout(inputs, encoded.rollout, weights)
    if target is not None and not segmentation:
        prediction = infer_embedded(
            model, {"slice_embeddings": encoded.embeddings[None], "positions_mm": inputs.batch.positions_mm}
        )
        assert isinstance(target, VolumeTask)
        answer = target.format_answer(prediction)
        answer = {name: answer[name] for name in ("target", "value", "probabilities") if name in answer}
    if "gradient" in methods:
        assert isinstance(target, VolumeTask)
        maps["gradient"], numbers["gradient"] = _gradient(inputs, encoded.embeddings, target, class_name, answer)
    if encoded.features is not None:
        maps["pca"], numbers["pca"] = _components(inputs, encoded.features)
    present = stack.present_contrasts
    return Explanation(
        maps={name: stack.native_image(values.astype(np.float32, copy=False)) for name, values in maps.items()},
        numbers=numbers,
        answer=answer,
        slices=tuple(inputs.index.tolist()),
        positions_mm=tuple(stack.positions_mm[inputs.index].tolist()),
        contrasts=present,
        missing=tuple(c for c in stack.contrasts if c not in present),
        subject=stack.subject,
        session=stack.session,
    )


def _slice_attention(inputs: ExplanationInputs, weights: Tensor) -> tuple[np.ndarray, dict[str, Any]]:
    values = weights.float().cpu().numpy()
    _, height, width = inputs.stack.grid
    # Nearest neighbour, so that each voxel has the weight of one slice.
    image = inputs.to_native(np.broadcast_to(values[:, None, None], (len(values), height, width)), order=0)
    return image, {"weights": values.tolist()}


def _rollout(inputs: ExplanationInputs, rollout: Tensor, weights: Tensor | None) -> tuple[np.ndarray, dict[str, Any]]:
    share = rollout.new_full((len(rollout),), 1 / len(rollout)) if weights is None else weights.to(rollout)
    # Relative to a uniform share: 1 is the mean over all patches.
    values = (rollout * share[:, None, None]).cpu().numpy() * rollout.numel()
    return inputs.to_native(inputs.to_pixels(values)), {"weighted_by_slice_attention": weights is not None}


def _gradient(
    inputs: ExplanationInputs, embeddings: Tensor, target: VolumeTask, class_name: str | None, answer: dict[str, Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    contrasts = inputs.stack.contrasts
    name, read_score = target.explained_score(answer, class_name)
    values, score = gradient_times_input(inputs, embeddings, read_score)
    total = dict(zip(contrasts, values.sum(axis=(0, 2, 3), dtype=np.float64).tolist(), strict=True))
    image = np.stack([inputs.to_native(inputs.to_pixels(values[:, c])) for c in range(len(contrasts))], axis=-1)
    return image, {"of": name, "score": score, "volumes": list(contrasts), "sum": total}


def _components(inputs: ExplanationInputs, features: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    scores, ratio = principal_components(features)
    image = component_maps(inputs, scale_to_unit_range(scores), inputs.foreground())
    return image, {"explained_variance_ratio": ratio.tolist(), "num_patches": len(features)}
