"""Recipes: YAML files that pick a combination of typed settings.

A recipe class derives from `Recipe` and lives beside the code that it configures. This module finds
a recipe file by name (in a clone, an editable install or a wheel), reads it, applies ``a.b=c``
overrides, validates it, and turns every failure into one line with a "did you mean".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module, resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from brainfound.errors import RecipeError, closest_name, did_you_mean

Room = Literal["train", "adapters", "model_cards"]
SUFFIX = ".yaml"
_NO_PRESET = "no_preset"


class Recipe(BaseModel):
    """Base of every recipe: frozen, typed, unknown keys refused.

    The docstring under a field is its help text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    lookalikes: ClassVar[Mapping[str, str]] = {}
    """Other recipes of the same room, as "module:class", and what to say of a file that holds one of those."""

    @classmethod
    def presets(cls) -> Mapping[str, Mapping[str, Any]]:
        """Names that may stand where a mapping of the fields does, and the fields that each stands for.

        A resolved recipe holds the fields, so a run stays what it was if a preset changes later.
        """
        return {}

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, given: Any) -> Any:
        presets = cls.presets() if isinstance(given, str) else {}
        if not presets:
            return given
        if given not in presets:
            raise PydanticCustomError(_NO_PRESET, "no such preset")
        return presets[given]

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
    try:
        return validate(recipe, content, overrides, where=path.name)
    except RecipeError:
        _reject_other_kind(recipe, content, path.name)
        raise


def _reject_other_kind(recipe: type[Recipe], content: Mapping[str, Any], where: str) -> None:
    """Refuse a file that is a recipe of another kind; called when something in it was refused."""
    if _is_valid(recipe, content):
        return
    for name, what in recipe.lookalikes.items():
        module, _, kind = name.partition(":")
        if _is_valid(getattr(import_module(module), kind), content):
            raise RecipeError(what, where=where) from None


def _is_valid(recipe: type[Recipe], content: Mapping[str, Any]) -> bool:
    return _error_of(recipe, content) is None


def _error_of(recipe: type[Recipe], content: Mapping[str, Any]) -> ValidationError | None:
    try:
        recipe.model_validate(content)
    except ValidationError as error:
        return error
    return None


def validate(
    recipe: type[AnyRecipe],
    content: Mapping[str, Any],
    overrides: Iterable[str] = (),
    where: str = "recipe",
) -> AnyRecipe:
    """Apply overrides to plain content and validate it as `recipe`."""
    overrides = list(overrides)
    changed: dict[str, Any] = _deep_copy(content)
    for text in overrides:
        _override(recipe, changed, text)
    try:
        return recipe.model_validate(changed)
    except ValidationError as error:
        keys = [text.partition("=")[0].strip() for text in overrides]
        raise _recipe_error(
            recipe, error, _ErrorLocation(where, keys, _error_of(recipe, content) if keys else error)
        ) from None


def _deep_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _deep_copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_deep_copy(item) for item in value]
    return value


def _override(recipe: type[Recipe], content: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError("an override must read key=value", where=f"--set {text}", remedy="Write --set optim.lr=1e-4")
    *parents, last = key.strip().split(".")
    node, kinds = content, [recipe]
    for parent in parents:
        fields = [kind.model_fields[parent] for kind in kinds if parent in kind.model_fields]
        kinds = [kind for field in fields for kind in _models_in(field.annotation) if issubclass(kind, Recipe)]
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if isinstance(child, str):  # a preset: what it stands for, and then one field of it otherwise
            child = node[parent] = _fields_of_preset(kinds, child, f"--set {text}: {parent}")
        if not isinstance(child, dict):
            raise RecipeError(
                "this key holds a value, not a group",
                where=f"--set {text}: {parent}",
                got=child,
                remedy=f"Set it as a whole: --set {parent}=VALUE",
            )
        node = child
    node[last] = _yaml_value(value)


def _fields_of_preset(kinds: Sequence[type[Recipe]], name: str, where: str) -> Any:
    """The fields that a group's preset stands for; the name itself where the group has no presets."""
    presets = {known: fields for kind in kinds for known, fields in kind.presets().items()}
    if presets and name not in presets:
        raise _preset_error(name, presets, where)
    return _deep_copy(presets.get(name, name))


def _preset_error(name: str, presets: Iterable[str], where: str) -> RecipeError:
    close = closest_name(name, presets)
    return RecipeError(
        "no such preset",
        where=where,
        got=repr(name),
        expected=f"one of {', '.join(presets)}, or a mapping",
        remedy=f"Did you mean {close}?" if close else None,
    )


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


@dataclass(frozen=True)
class _ErrorLocation:
    """Who is to be told of an error: the author of the file, or who wrote the overrides."""

    file: str
    keys: Sequence[str]
    """Of the overrides."""
    before: ValidationError | None
    """What is wrong without them."""

    def of(self, location: Sequence[str], refused: Sequence[Any], known_key: bool) -> str:
        """The place of an error at `location` (keys as users write them), which the library calls `refused`."""
        if self.before is None or tuple(refused) not in {tuple(error["loc"]) for error in self.before.errors()}:
            guilty = [key for key in self.keys if _one_holds_the_other(key.split("."), location)]
            if guilty and known_key and len(location) < min(key.count(".") + 1 for key in guilty):
                return " ".join(f"--set {key}" for key in guilty)  # a group whose values do not go together
            if guilty:
                return f"--set {'.'.join(location)}"
        return ": ".join(part for part in (self.file, ".".join(location)) if part)


def _one_holds_the_other(first: Sequence[str], second: Sequence[str]) -> bool:
    return all(one == other for one, other in zip(first, second, strict=False))


def _recipe_error(recipe: type[Recipe], error: ValidationError, place: _ErrorLocation) -> RecipeError:
    faults = [(fault, _walk(recipe, fault["loc"])) for fault in error.errors()]
    first, walked = faults[0]
    where = place.of(walked.keys, first["loc"], first["type"] != "extra_forbidden")
    if first["type"] == "extra_forbidden":
        known = [name for model in walked.models for name in model.model_fields]
        return RecipeError("unknown key", where=where, remedy=did_you_mean(walked.keys[-1], known))
    if first["type"] == "union_tag_invalid":
        tag, choice = first["ctx"]["tag"], first["ctx"]["discriminator"].strip("'")
        known = [kind.strip(" '") for kind in first["ctx"]["expected_tags"].split(",")]
        where = place.of([*walked.keys, choice], first["loc"], known_key=True)
        return RecipeError(f"unknown {choice} {tag!r}", where=where, remedy=did_you_mean(tag, known))
    if first["type"] == _NO_PRESET:
        presets = [
            name for kind in _models_in(walked.annotation) if issubclass(kind, Recipe) for name in kind.presets()
        ]
        return _preset_error(first["input"], presets, where)
    # What is wrong with a whole group its message says; the group itself would fill the line.
    has_value = first["type"] != "missing" and not isinstance(first.get("input"), Mapping)
    got = repr(first.get("input"))[:80] if has_value else None
    choices = _choices(walked.annotation)
    if choices and any(fault["type"] == "literal_error" and other.keys == walked.keys for fault, other in faults):
        close = closest_name(str(first["input"]), choices)
        return RecipeError(
            "no such choice",
            where=where,
            got=got,
            expected=f"one of {', '.join(choices)}",
            remedy=f"Did you mean {close}?" if close else None,
        )
    # The members of a union each complain about the same value.
    elsewhere = len({other.keys for _, other in faults}) - 1
    more = f" (and {elsewhere} more)" if elsewhere else ""
    return RecipeError(first["msg"].removeprefix("Value error, ") + more, where=where, got=got)


class _Walked(NamedTuple):
    """Where an error is."""

    keys: tuple[str, ...]
    """As a user writes them."""
    models: list[type[BaseModel]]
    """To which the last key belongs."""
    annotation: Any
    """The type of what is there; None where it is not known."""


def _walk(recipe: type[BaseModel], location: Sequence[Any]) -> _Walked:
    """Follow the location of an error.

    It holds more than the keys that a user writes: the tag of a discriminated union, which chooses among the
    union's members, and the name of a member of any other union. The models of such a union are all searched.
    """
    shown: list[str] = []
    models: list[type[BaseModel]] = [recipe]
    last: list[type[BaseModel]] = [recipe]
    tags: dict[str, type[BaseModel]] = {}
    annotation: Any = recipe
    for part in (str(part) for part in location if not str(part).startswith("function-")):
        if part in tags:
            models, tags = [tags[part]], {}
            annotation = models[0]
            continue
        is_key = any(part in model.model_fields for model in models)
        if not is_key and not tags and len(_members(annotation)) > 1:
            continue  # the name of a member, such as "bool" or "literal['auto']"
        shown.append(part)
        last = models
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        tags = {tag: model for field in fields for tag, model in _tagged(field).items()}
        annotation = fields[0].annotation if fields else None
        models = [model for field in fields for model in _models_in(field.annotation)] or models
    return _Walked(tuple(shown), last, annotation)


def _members(annotation: Any) -> list[Any]:
    """The types that a value may have, None left out."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [] if annotation is NoneType else [annotation]


def _choices(annotation: Any) -> list[str]:
    """What may be written where only some values are allowed; empty where a number or any text is."""
    members = _members(annotation)
    if not all(member is bool or get_origin(member) is Literal for member in members):
        return []
    values = [value for member in members for value in ((True, False) if member is bool else get_args(member))]
    return [str(value).lower() if isinstance(value, bool) else str(value) for value in values]


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
