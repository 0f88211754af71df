"""What the model card of a fine-tuned model says, from what its run knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from brainfound.adapters.attach import AdapterRecipe
from brainfound.data.store import Store
from brainfound.models import BrainFoundConfig
from brainfound.recipes import load
from brainfound.train.head_recipes import loss_name
from brainfound.train.run_files import versions
from brainfound.train.targets import Target


def finetuned_card(
    recipe: Any,
    store: Store,
    parts: Mapping[str, np.ndarray],
    target: Target,
    config: BrainFoundConfig,
    source: str,
    scores: Mapping[str, Any],
    step: int,
) -> dict[str, Any]:
    """Facts for `brainfound.report.cards.write_model_card`.

    Args:
        recipe: of the run.
        parts: the split, as store indices.
        config: of the model.
        source: what the run started from: Hub id or folder.
        scores: as `brainfound.train.session_scores.write_scores` returns them.
        step: steps that were trained.
    """
    subjects = store.sessions["subject"]
    used = np.concatenate(list(parts.values()))
    sizes = {
        part: f"{len(index)} sessions of {subjects.iloc[index].nunique()} subjects" for part, index in parts.items()
    }
    where = f"test part ({sizes['test']})"
    method = load(AdapterRecipe, recipe.adapter, "adapters").method
    baselines = [name for name in ("trivial", "frozen") if name in scores]
    return {
        "name": recipe.name,
        "summary": f"Fine-tuned for {target.task} of {target.column}; its scores are of subjects that it never saw.",
        "kind": f"fine-tuned for {target.task}",
        "base_model": source,
        "base_model_relation": "finetune" if method in ("full", "last_blocks") else "adapter",
        "backbone": config.backbone_config.model_type,
        **({} if config.slice_features == "cls" else {"slice features": config.slice_features}),
        "stem": config.stem,
        "aggregator": None if target.task == "segmentation" else config.aggregator,
        "adapter": recipe.adapter,
        "objective": loss_name(target.task, config),
        "labels": list(target.names) or f"{target.column}, {target.mean:.4g} ± {target.std:.4g} in the training part",
        "contrasts": list(store.shown),
        "preprocessing": store.preprocessing.model_dump(mode="json"),
        "recipe": recipe.name,
        "steps": step,
        "data_hash": store.content_hash,
        "num_sessions": len(used),
        "num_subjects": int(subjects.iloc[used].nunique()),
        "seed": recipe.seed,
        "versions": versions(),
        "metrics": [
            {"metric": name, "value": value, **{f"{b} baseline": scores[b].get(name) for b in baselines}, "data": where}
            for name, value in scores["scores"].items()
        ],
        "target": target.column,
        "split": sizes,
        "split seed": recipe.split.seed,
        "model_code": (
            'from brainfound.adapters import load_bundle\n\nmodel = load_bundle("path/to/this/folder").model'
        ),
    }
