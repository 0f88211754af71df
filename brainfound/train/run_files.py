"""What a run writes besides its log and checkpoints.

Of any run: recipe, facts, curves. Of pretraining also the export with its card; fine-tuning exports a bundle.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

import brainfound
from brainfound.data.checking.contract import InputContract
from brainfound.data.store import Store
from brainfound.errors import RecipeError, TrainingError
from brainfound.models import BrainFoundModel
from brainfound.models.quiet import transformers_quiet
from brainfound.recipes import Recipe, validate
from brainfound.report.cards import write_model_card
from brainfound.report.curves import plot_curves
from brainfound.report.run_folder import RunFolder
from brainfound.train.checkpoint import told_in_one_line, write_atomically
from brainfound.train.guard import GuardState
from brainfound.train.objectives.making import in_words

RECIPE_FILE = "recipe.yaml"
FACTS_FILE = "run.json"
EXPORT_FOLDER = "export"
EMBEDDINGS_FOLDER = "embeddings"
"""Where a run keeps what a frozen backbone says of its slices."""
DONE = "done"
"""The status of a run that came to its end."""
_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {name: version(name) for name in _LIBRARIES}
    return {"brainfound": brainfound.__version__, "python": platform.python_version(), **found}


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return (folder / RECIPE_FILE).is_file()


def start(folder: Path, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Write recipe.yaml and run.json; of a resumed run, keep when it was first started."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {**facts, "status": "running", "started": _now(), "versions": versions()}
    if (folder / FACTS_FILE).is_file():
        before = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        content |= {"started": before["started"], "resumed": [*before.get("resumed", []), _now()]}
    write_atomically(folder / FACTS_FILE, json.dumps(content, indent=2) + "\n")
    # Last: its presence says that there is a run to resume.
    write_atomically(folder / RECIPE_FILE, recipe.to_yaml())


def finish(folder: Path, status: str, exported_step: int | None, step: int) -> None:
    """Write how the run ended, and draw its curves."""
    facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    facts |= {"status": status, "ended": _now(), "step": step, "exported_step": exported_step}
    if rollbacks := RunFolder.read(folder).rollbacks:
        facts["rollbacks"] = [dict(event) for event in rollbacks]
    write_atomically(folder / FACTS_FILE, json.dumps(facts, indent=2) + "\n")
    plot_curves(folder)


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder came to its end and was exported."""
    facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    return facts["status"] == DONE and (folder / EXPORT_FOLDER).is_dir()


def saved_recipe(folder: Path) -> dict[str, Any]:
    """What the recipe of the run in a folder says.

    Raises:
        RecipeError: if it cannot be read.
    """
    path = folder / RECIPE_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        got = "an empty file" if content is None else f"a {type(content).__name__}"
    except (OSError, ValueError, yaml.YAMLError) as error:
        content, got = None, str(error)[:200]
    if not isinstance(content, dict):
        raise RecipeError(
            "the recipe of this run cannot be read",
            where=path,
            got=got,
            expected="keys and values",
            remedy="Put back the recipe that the run began with, or start again with another --out",
        )
    return content


def require_same(folder: Path, recipe: Recipe, store: Store, free: Sequence[str]) -> None:
    """Refuse to resume with a recipe or data that would make another run.

    Args:
        free: keys (or groups) that may differ.

    Raises:
        RecipeError: names the first key that differs, with both values.
        TrainingError: if the store holds other data.
    """
    # Validated, so that keys which did not exist when the run began have the value that means what it did.
    saved = validate(type(recipe), saved_recipe(folder))
    before = _flat(saved.model_dump(mode="json"))
    now = _flat(recipe.model_dump(mode="json"))
    for key in [*before, *(key for key in now if key not in before)]:
        is_free = any(key == name or key.startswith(f"{name}.") for name in free)
        if not is_free and before.get(key) != now.get(key):
            raise RecipeError(
                "differs from the run that is to be resumed",
                where=key,
                got=now.get(key),
                expected=before.get(key),
                remedy=f"Set it back, give {folder / RECIPE_FILE} as the recipe, or give another --out",
            )
    data_hash = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))["data_hash"]
    if data_hash != store.content_hash:
        raise TrainingError(
            "the store holds other data than the run began with",
            where=store.path,
            got=store.content_hash[:12],
            expected=data_hash[:12],
            remedy="Give the first store, or another --out",
        )


def export(
    folder: Path,
    recipe: Any,
    store: Store,
    model: BrainFoundModel,
    weights: Mapping[str, Tensor],
    step: int,
    guard: GuardState,
) -> Path:
    """Write export/ of pretraining: the encoder's weights in a model folder, with preprocessing, contract and card.

    It is written beside and renamed, so that export/ is always whole.

    Raises:
        TrainingError: if it cannot be written.
    """
    model.encoder.load_state_dict(weights)
    target = folder / EXPORT_FOLDER
    temporary = folder / f".{EXPORT_FOLDER}.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    card = _card_facts(recipe, store, model, step, guard)
    try:
        with told_in_one_line("the export", target):
            with transformers_quiet():
                model.eval().save_pretrained(temporary)
            store.preprocessing.save(temporary)
            InputContract.of(store).save(temporary)
            write_model_card(temporary, card)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # of a failure; a full disk needs the room
    return target


def _card_facts(recipe: Any, store: Store, model: BrainFoundModel, step: int, guard: GuardState) -> dict[str, Any]:
    source = recipe.init.source
    scores = {"first": guard.first_score, "best": guard.best_score, "last": guard.last_score}
    untouched = recipe.engine.steps == 0
    objective, exported = in_words(recipe.objective)
    trained = recipe.trained.in_words(model.encoder.num_layers)
    return {
        "name": recipe.name,
        "summary": "The starting checkpoint, untouched, as a BrainFound encoder (it has no task head)."
        if untouched
        else f"The {exported} of {objective} on brain MRI slices (it has no task head).",
        "kind": "encoder as it was before any training here" if untouched else "self-supervised encoder",
        "base_model": None if source == "none" else source,
        "backbone": model.config.backbone_config.model_type,
        "stem": model.config.stem,
        "aggregator": model.config.aggregator,
        "objective": "none" if untouched else objective,
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


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
