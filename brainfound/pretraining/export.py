"""The export of a pretraining run: the encoder as a model folder, with preprocessing, input contract and card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from brainfound.data.checking.contract import InputContract
from brainfound.data.store import Store
from brainfound.models import BrainFoundModel
from brainfound.models.hub import silence_transformers
from brainfound.pretraining.monitoring.guard import GuardState
from brainfound.pretraining.objectives.base import Objective
from brainfound.pretraining.recipe import PretrainRecipe
from brainfound.report.cards import write_model_card
from brainfound.training.checkpoint import wrap_write_errors
from brainfound.training.run_folder import EXPORT_FOLDER, versions


def export(
    folder: Path,
    recipe: PretrainRecipe,
    store: Store,
    model: BrainFoundModel,
    objective: Objective,
    weights: Mapping[str, Tensor],
    step: int,
    guard: GuardState,
) -> Path:
    """Write export/ of pretraining: the encoder's weights in a model folder, with preprocessing, contract and card.

    It is written under another name and then renamed, so that export/ is always whole.

    Args:
        model: of which the export has the configuration.
        weights: of its encoder.
        step: at which they were reached.

    Raises:
        TrainingError: if it cannot be written.
    """
    model.encoder.load_state_dict(weights)
    target = folder / EXPORT_FOLDER
    temporary = folder / f".{EXPORT_FOLDER}.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    card = _card_facts(recipe, store, model, objective, step, guard)
    try:
        with wrap_write_errors("the export", target):
            with silence_transformers():
                model.eval().save_pretrained(temporary)
            store.preprocessing.save(temporary)
            InputContract.of(store).save(temporary)
            write_model_card(temporary, card)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after a failure; a full disk needs the room
    return target


def _card_facts(
    recipe: PretrainRecipe, store: Store, model: BrainFoundModel, objective: Objective, step: int, guard: GuardState
) -> dict[str, Any]:
    source = recipe.init.source
    scores = {"first": guard.first_score, "best": guard.best_score, "last": guard.last_score}
    untouched = recipe.engine.steps == 0
    described, exported = objective.describe(), objective.exported_name
    trained = recipe.trained.describe(model.encoder.num_layers)
    return {
        "name": recipe.name,
        "summary": "The starting checkpoint, untouched, as a BrainFound encoder (it has no task head)."
        if untouched
        else f"The {exported} of {described} on brain MRI slices (it has no task head).",
        "kind": "encoder as it was before any training here" if untouched else "self-supervised encoder",
        "base_model": None if source == "none" else source,
        "backbone": model.config.backbone_config.model_type,
        "stem": model.config.stem,
        "aggregator": model.config.aggregator,
        "objective": "none" if untouched else described,
        "trained part": None if untouched else trained,
        "contrasts": list(store.contrasts),
        "preprocessing": store.preprocessing.model_dump(mode="json"),
        "recipe": recipe.name,
        "steps": step,
        "data_hash": store.content_hash,
        "num_sessions": len(store),
        "num_subjects": int(store.sessions["subject"].nunique()),
        "num_slices": store.num_slices,
        "seed": recipe.seed,
        "versions": versions(),
        "metrics": [
            {
                "metric": f"{name} probe of the {exported.removeprefix('EMA ')}",
                "value": value,
                "data": "the pretraining store, split by subject",
            }
            for name, value in scores.items()
            if value is not None
        ],
        "start": "new weights" if source == "none" else None,
        "guard": {key: value for key, value in asdict(guard).items() if value is not None and "step" in key}
        | ({"rollbacks": guard.rollbacks, "lr_scale": guard.lr_scale} if guard.rollbacks else {}),
    }
