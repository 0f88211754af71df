"""The tasks that a model can be fine-tuned for: one line each in `TASKS`.

A task is one object with its labels, head, loss, answer, scores and section of the recipe; `base.Task` is the contract.
`resolve` creates it once, from the training part, and the run passes it on to scores, bundle and predictor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from brainfound.data.store import Store
from brainfound.errors import UsageError, did_you_mean
from brainfound.finetuning.tasks.base import (
    MASK,
    AnswerCalibration,
    SavedTask,
    ScoringRecipe,
    TargetColumn,
    Task,
    TaskRecipe,
    VolumeTask,
)
from brainfound.finetuning.tasks.classification import Classification, ClassificationRecipe
from brainfound.finetuning.tasks.regression import Regression, RegressionRecipe
from brainfound.finetuning.tasks.segmentation import Segmentation, SegmentationRecipe

__all__ = [
    "MASK", "TASKS", "AnswerCalibration", "AnyTaskRecipe", "AutoTaskRecipe", "Classification", "ClassificationRecipe",
    "Regression", "RegressionRecipe", "ScoringRecipe", "Segmentation", "SegmentationRecipe", "TargetColumn", "Task",
    "VolumeTask", "from_dict", "resolve",
]  # fmt: skip

# In the order in which `task: auto` tries them.
TASKS: dict[str, type[Task]] = {task.kind: task for task in (Segmentation, Regression, Classification)}


class AutoTaskRecipe(TaskRecipe):
    """The kind that suits the target: segmentation for the mask, regression for numbers with many values, else
    classification; with default settings."""

    kind: Literal["auto"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _require_kind(cls, given: Any) -> Any:
        for key in given if isinstance(given, Mapping) else ():
            owners = [kind for kind, task in TASKS.items() if key in task.recipe.model_fields and key != "kind"]
            if owners:
                chosen = " or ".join(f"task.kind={kind}" for kind in owners)
                raise ValueError(f"the setting {key!r} needs the kind of the task: set {chosen} too")
        return given


def _spell_out(given: Any) -> Any:
    """Accept ``task: regression`` for ``task: {kind: regression}``; the default kind is auto."""
    if isinstance(given, str):
        return {"kind": given}
    return {"kind": "auto", **given} if isinstance(given, Mapping) else given


AnyTaskRecipe = Annotated[
    AutoTaskRecipe | ClassificationRecipe | RegressionRecipe | SegmentationRecipe,
    Field(discriminator="kind"),
    BeforeValidator(_spell_out),
]


def resolve(store: Store, train: Sequence[int], target: TargetColumn | str, recipe: TaskRecipe | str = "auto") -> Task:
    """Create the task of a target, with labels as in the training part.

    Args:
        train: indices of the sessions of the training part.
        target: a column, several 0/1 columns such as ``"edema,lesion"``, or ``"mask"``.
        recipe: the task's section of a recipe, or a kind with default settings.

    Raises:
        UsageError: no such column, or labels that cannot be learnt, such as a single class.
    """
    column = TargetColumn.find(store, target) if isinstance(target, str) else target
    kind = recipe if isinstance(recipe, str) else recipe.kind
    if kind == "auto":
        kind = next(name for name, task in TASKS.items() if task.suits(store, column))
    if kind not in TASKS:
        raise UsageError(f"no task {kind!r}", where="task", remedy=did_you_mean(kind, TASKS))
    task = TASKS[kind]
    if task.per_voxel != column.is_mask:
        raise UsageError(
            "only the mask can be segmented" if task.per_voxel else "the mask can only be segmented",
            where="target",
            got=f"{column.name!r} for a {kind}",
            remedy=f"Give the target {MASK!r} to a segmentation, and a column to any other task",
        )
    return task.resolve(store, train, column, recipe if isinstance(recipe, task.recipe) else task.recipe(kind=kind))


def from_dict(content: Mapping[str, Any]) -> Task:
    """The task of a bundle.json or run.json (`Task.to_dict`); TypeError or KeyError for other content."""
    saved = SavedTask(**{key: _as_tuples(value) for key, value in content.items()})
    return TASKS[saved.task].from_saved(saved)


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(part) for part in value) if isinstance(value, list) else value
