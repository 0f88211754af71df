"""Recipes: YAML files that pick a combination of typed settings.

A recipe class derives from `Recipe` and lives beside the code that it configures. This module finds
a recipe file by name (in a clone, an editable install or a wheel), reads it, applies ``a.b=c``
overrides, validates it, and turns every failure into one line with a "did you mean".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from brainfound.errors import RecipeError, did_you_mean

Room = Literal["train", "adapters", "model_cards"]
SUFFIX = ".yaml"


class Recipe(BaseModel):
    """Base of every recipe: frozen, typed, unknown keys refused.

    The docstring under a field is its help text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def to_yaml(self) -> str:
        """The resolved recipe as YAML, in the order of the fields."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


@cache
def recipe_folder(room: Room) -> Path:
    """The folder that holds a room's recipes: the repository's root folder of that name, or its copy in the wheel."""
    package = Path(str(resources.files("brainfound")))
    in_wheel = package / "_recipes" / room
    if in_wheel.is_dir():
        return in_wheel
    in_clone = package.parent / room
    if (package.parent / "pyproject.toml").is_file() and in_clone.is_dir():
        return in_clone
    raise RecipeError(
        f"the {room} recipes are missing from this installation",
        where=package,
        remedy="Reinstall brainfound",
    )


def available(room: Room) -> dict[str, Path]:
    """The recipes of a room, name → file."""
    return {path.stem: path for path in sorted(recipe_folder(room).glob(f"*{SUFFIX}"))}


def find(name_or_path: str | Path, room: Room) -> Path:
    """The file of a recipe given by path or by name.

    Raises:
        RecipeError: if there is no such file or name.
    """
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"} and path.is_file():
        return path
    known = available(room)
    stem = path.name.removesuffix(SUFFIX)
    if stem in known and path.parent == Path("."):
        return known[stem]
    if path.suffix in {".yaml", ".yml"} and path.parent != Path("."):
        raise RecipeError(
            "no such recipe file", where=path, remedy="Check the path, or give a name from `brainfound list recipes`"
        )
    raise RecipeError(f"no {room} recipe named {str(name_or_path)!r}", remedy=did_you_mean(stem, known))


def load(
    recipe: type[AnyRecipe],
    name_or_path: str | Path,
    room: Room,
    overrides: Iterable[str] = (),
) -> AnyRecipe:
    """Find, read, override and validate a recipe.

    Args:
        recipe: the class that validates it.
        name_or_path: a name known to `available`, or a YAML file.
        room: the room in which names are looked up.
        overrides: ``"a.b=c"`` strings; the value is read as YAML.

    Raises:
        RecipeError: names the file and the key, what came and what was expected.
    """
    path = find(name_or_path, room)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"not valid YAML: {error}", where=path, remedy="Mend the file") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise RecipeError("a recipe must be a mapping", where=path, got=type(content).__name__)
    return validate(recipe, content, overrides, where=path.name)


def validate(
    recipe: type[AnyRecipe],
    content: Mapping[str, Any],
    overrides: Iterable[str] = (),
    where: str = "recipe",
) -> AnyRecipe:
    """Apply overrides to plain content and validate it as `recipe`."""
    changed: dict[str, Any] = _deep_copy(content)
    for text in overrides:
        _override(changed, text)
    try:
        return recipe.model_validate(changed)
    except ValidationError as error:
        raise _recipe_error(recipe, error, where) from None


def _deep_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _deep_copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_deep_copy(item) for item in value]
    return value


def _override(content: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError("an override must read key=value", where=f"--set {text}", remedy="Write --set optim.lr=1e-4")
    *parents, last = key.strip().split(".")
    node = content
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise RecipeError(
                "this key holds a value, not a group",
                where=f"--set {text}: {parent}",
                got=child,
                remedy=f"Set it as a whole: --set {parent}=VALUE",
            )
        node = child
    node[last] = _yaml_value(value)


def _yaml_value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value is not valid YAML: {error}", where=f"--set …={text}") from error
    if isinstance(value, str):
        # YAML 1.1 reads 1e-4 as text; people mean a number.
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _recipe_error(recipe: type[Recipe], error: ValidationError, where: str) -> RecipeError:
    first = error.errors()[0]
    location, models = _walk(recipe, [part for part in first["loc"] if not str(part).startswith("function-")])
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        known = [name for model in models for name in model.model_fields]
        return RecipeError("unknown key", where=f"{where}: {key}", remedy=did_you_mean(location[-1], known))
    if first["type"] == "union_tag_invalid":
        tag, choice = first["ctx"]["tag"], first["ctx"]["discriminator"].strip("'")
        known = [kind.strip(" '") for kind in first["ctx"]["expected_tags"].split(",")]
        return RecipeError(
            f"unknown {choice} {tag!r}", where=f"{where}: {key}.{choice}", remedy=did_you_mean(tag, known)
        )
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    got = None if first["type"] == "missing" else repr(first.get("input"))[:80]
    return RecipeError(
        first["msg"].removeprefix("Value error, ") + more, where=f"{where}: {key}" if key else where, got=got
    )


def _walk(recipe: type[BaseModel], location: Sequence[Any]) -> tuple[list[str], list[type[BaseModel]]]:
    """Where an error is, in keys that a user writes, and the models that its last key belongs to.

    A validator puts the tag of a discriminated union into the location, as if it were a key; here it
    chooses among the union's members. The members of other unions are all searched.
    """
    shown: list[str] = []
    models: list[type[BaseModel]] = [recipe]
    last: list[type[BaseModel]] = [recipe]
    tags: dict[str, type[BaseModel]] = {}
    for part in map(str, location):
        if part in tags:
            models, tags = [tags[part]], {}
            continue
        shown.append(part)
        last = models
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        tags = {tag: model for field in fields for tag, model in _tagged(field).items()}
        models = [model for field in fields for model in _models_in(field.annotation)] or models
    return shown, last


def _tagged(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """The members of a discriminated union by their tags; nothing for any other field."""
    name = field.discriminator
    if not isinstance(name, str):
        return {}
    return {
        str(tag): model
        for model in _models_in(field.annotation)
        for tag in get_args(model.model_fields[name].annotation)
    }


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
