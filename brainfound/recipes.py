"""Recipes: YAML files that choose typed settings.

A recipe class derives from `Recipe` and lives next to the code that it configures. `load` finds a recipe file by name
(in a clone, an editable install or a wheel), applies ``a.b=c`` overrides, validates the result, and turns every failure
into one line: the place, the value received, the value expected, and the nearest known name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib import import_module, resources
from operator import eq
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from brainfound.errors import ModelError, RecipeError, closest_name, did_you_mean, mistaken_for
from brainfound.files import require_json

Room = Literal["train", "adapters", "model_cards"]
"""The root folders that hold recipes."""
_LISTS: dict[Room, str] = {"train": "recipes", "adapters": "adapters"}
"""Room → the argument of `brainfound list` that names its recipes."""
SUFFIX = ".yaml"
_NO_PRESET = "no_preset"
"""Type of the validation error for an unknown preset."""
_EXPONENT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][+-]?[0-9]+")


class Recipe(BaseModel):
    """Base of every recipe: frozen, typed, unknown keys refused. The docstring under a field is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    lookalikes: ClassVar[Mapping[str, str]] = {}
    """Other recipe classes of the same room, as "module:class" → the error for a file that holds such a recipe."""

    @classmethod
    def presets(cls) -> Mapping[str, Mapping[str, Any]]:
        """Preset → its fields. A resolved recipe holds the fields, so a later change of a preset does not affect it."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _keep_yes_from_numbers(cls, given: Any) -> Any:
        """Turn true and false into words where a number is due: pydantic would take them for 1 and 0."""
        if not isinstance(given, Mapping):
            return given
        kinds = {name: set(_members(field.annotation)) for name, field in cls.model_fields.items()}
        numbers = {name for name, members in kinds.items() if {int, float} & members and bool not in members}
        return {k: str(v).lower() if isinstance(v, bool) and k in numbers else v for k, v in given.items()}

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, given: Any) -> Any:
        presets = cls.presets() if isinstance(given, str) else {}
        if not presets:
            return given
        if given not in presets:
            raise PydanticCustomError(_NO_PRESET, "no such preset")
        return presets[given]

    def to_yaml(self) -> str:
        """The resolved recipe as YAML, in the order of the fields."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def save_json(self, path: Path) -> Path:
        """Write the fields as a JSON file that travels with a model."""
        path.write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
        return path


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


@cache
def recipe_folder(room: Room) -> Path:
    """The folder with the recipes of a room: the root folder of that name, or its copy in the wheel."""
    package = Path(str(resources.files("brainfound")))
    if (in_wheel := package / "_recipes" / room).is_dir():
        return in_wheel
    if (package.parent / "pyproject.toml").is_file() and (in_clone := package.parent / room).is_dir():
        return in_clone
    what = f"the {room} recipes are missing from this installation"
    raise RecipeError(what, where=package, remedy="Reinstall brainfound")


def available(room: Room) -> dict[str, Path]:
    """The recipes of a room, name → file."""
    return {path.stem: path for path in sorted(recipe_folder(room).glob(f"*{SUFFIX}"))}


def find(name_or_path: str | Path, room: Room) -> Path:
    """The file of a recipe, given by path or by name; RecipeError if there is none."""
    path = Path(name_or_path)
    is_yaml = path.suffix in {".yaml", ".yml"}
    if is_yaml and path.is_file():
        return path
    known = available(room)
    stem = path.name.removesuffix(SUFFIX)
    if stem in known and path.parent == Path("."):
        return known[stem]
    if is_yaml and path.parent != Path("."):
        remedy = "Check the path, or give a name from `brainfound list recipes`"
        raise RecipeError("no such recipe file", where=path, remedy=remedy)
    if path.exists():
        remedy = f"Give a name from `brainfound list {_LISTS[room]}`, or a YAML file"
        raise RecipeError(mistaken_for(path, "a recipe"), where=path, remedy=remedy)
    kind = "adapter" if room == "adapters" else "training"
    for other in _LISTS:
        if other != room and stem in available(other):
            raise RecipeError(f"{stem} is no {kind} recipe", remedy=f"`brainfound list {_LISTS[room]}` names those")
    remedy = _suggestion(stem, known) or f"`brainfound list {_LISTS[room]}` names those that there are"
    raise RecipeError(f"no {kind} recipe named {str(name_or_path)!r}", remedy=remedy)


def read_kind(name_or_path: str | Path, room: Room) -> str | None:
    """The kind that a recipe file states, such as "auto"; None without one. RecipeError if there is no such recipe."""
    try:
        content = yaml.safe_load(find(name_or_path, room).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None  # `load` names the fault
    return content.get("kind") if isinstance(content, dict) else None


def load(recipe: type[AnyRecipe], name_or_path: str | Path, room: Room, overrides: Iterable[str] = ()) -> AnyRecipe:
    """Find a recipe by path, or by name in a room, apply ``"a.b=c"`` overrides (``c`` is YAML), and validate it.

    Raises:
        RecipeError: with the file and the key, the value received and the value expected.
    """
    path = find(name_or_path, room)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = f"not valid YAML: {describe_yaml_fault(error)}"
        raise RecipeError(what, where=path, remedy="Correct the file") from error
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=path, remedy="Give a file") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        got, remedy = f"a {type(content).__name__}", "Write keys and values: key: value"
        raise RecipeError("a recipe must be a mapping", where=path, got=got, remedy=remedy)
    try:
        return validate(recipe, content, overrides, where=path.name)
    except RecipeError:
        if _validation_error(recipe, content) is not None:
            _refuse_lookalike(recipe, content, path.name)
        raise


def validate(
    recipe: type[AnyRecipe], content: Mapping[str, Any], overrides: Iterable[str] = (), where: str = "recipe"
) -> AnyRecipe:
    """Apply overrides to plain content and validate it, like `load`; errors call the file ``where``."""
    overrides = list(overrides)
    changed = deepcopy(dict(content))
    for text in overrides:
        _override(recipe, changed, text)
    try:
        return recipe.model_validate(changed)
    except ValidationError as error:
        keys = [text.partition("=")[0].strip() for text in overrides]
        file_error = _validation_error(recipe, content)
        file_errors = frozenset(tuple(item["loc"]) for item in (file_error.errors() if file_error else ()))
        raise _recipe_error(recipe, error, _Source(where, keys, file_errors)) from None


def load_json(recipe: type[AnyRecipe], path: Path) -> AnyRecipe | None:
    """Read and validate a file written by `Recipe.save_json`; None if it is missing.

    Raises:
        ModelError: not valid JSON; RecipeError: a key or value is refused.
    """
    if not path.exists():
        return None
    return validate(recipe, require_json(path, "Export the model again", ModelError), where=str(path))


def _validation_error(recipe: type[Recipe], content: Mapping[str, Any]) -> ValidationError | None:
    try:
        recipe.model_validate(content)
    except ValidationError as error:
        return error
    return None


def _refuse_lookalike(recipe: type[Recipe], content: Mapping[str, Any], where: str) -> None:
    """Raise if the content is a valid recipe of another kind."""
    for name, message in recipe.lookalikes.items():
        module, _, kind = name.partition(":")
        if _validation_error(getattr(import_module(module), kind), content) is None:
            raise RecipeError(message, where=where) from None


def _override(recipe: type[Recipe], content: dict[str, Any], text: str) -> None:
    """Apply one ``a.b=c`` override to the content, in place."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError("an override must read key=value", where=f"--set {text}", remedy="Write --set optim.lr=1e-4")
    *parents, last = key.strip().split(".")
    node: dict[str, Any] = content
    kinds: list[type[Recipe]] = [recipe]
    for parent in parents:
        where = f"--set {text}: {parent}"
        fields = [kind.model_fields[parent] for kind in kinds if parent in kind.model_fields]
        kinds = [kind for field in fields for kind in _recipes_in(field.annotation)]
        child = node.get(parent)
        if isinstance(child, str):  # a preset with one field overridden
            child = _preset_fields(kinds, child, where)
        node[parent] = child = {} if child is None else child
        if not isinstance(child, dict):
            remedy = f"Set it as a whole: --set {parent}=VALUE"
            raise RecipeError("this key holds a value, not a group", where=where, got=child, remedy=remedy)
        node = child
    fields = [kind.model_fields[last] for kind in kinds if last in kind.model_fields]
    node[last] = _yaml_value(value, any(_is_text(field.annotation) for field in fields))


def _preset_fields(kinds: Sequence[type[Recipe]], name: str, where: str) -> Any:
    """The fields of a group's preset; the name itself if the group has no presets."""
    presets = {known: fields for kind in kinds for known, fields in kind.presets().items()}
    if presets and name not in presets:
        raise _preset_error(name, presets, where)
    return deepcopy(presets.get(name, name))


def describe_yaml_fault(error: Exception) -> str:
    """The fault of a YAML text and its place, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    mark = error.problem_mark
    return f"{error.problem} (line {mark.line + 1})".replace("<stream end>", "the end")


def _yaml_value(text: str, is_text: bool) -> Any:
    """The value of an override; a field for text takes what YAML reads as a number, a date or a truth as text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        what = f"the value is not valid YAML: {describe_yaml_fault(error)}"
        remedy = "Close every bracket and quote, or put the value in quotes inside the quotes of the shell"
        raise RecipeError(what, where=f"--set …={text}", remedy=remedy) from error
    if is_text:
        return value if value is None or isinstance(value, str | list | dict) else text.strip()
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)  # YAML 1.1 reads 1e-4 as text; users mean a number
    return value


def _is_text(annotation: Any) -> bool:
    """Whether a field takes text and no numbers."""
    members = _members(annotation)
    return str in members and not {bool, int, float} & {member for member in members if isinstance(member, type)}


@dataclass(frozen=True)
class _Source:
    """The origin of invalid content: a file, and overrides of its keys."""

    file: str
    override_keys: Sequence[str]
    file_errors: frozenset[tuple[Any, ...]]
    """Locations of the errors that the file has without the overrides."""

    def locate(self, keys: Sequence[str], location: Sequence[Any], known_key: bool) -> str:
        """The override that caused an error, or the key in the file.

        ``keys`` is the path to the error as users write it, ``location`` as pydantic reports it; ``known_key`` is False
        if the last key is not a field.
        """
        # One path of keys is the beginning of the other.
        overrides = [key for key in self.override_keys if all(map(eq, key.split("."), keys))]
        if not overrides or tuple(location) in self.file_errors:
            return ": ".join(part for part in (self.file, ".".join(keys)) if part)
        if known_key and len(keys) < min(key.count(".") + 1 for key in overrides):
            return " ".join(f"--set {key}" for key in overrides)  # values of one group that are invalid together
        return f"--set {'.'.join(keys)}"


def _recipe_error(recipe: type[Recipe], error: ValidationError, source: _Source) -> RecipeError:
    """The first of the validation errors as a one-line RecipeError."""
    errors = [(item, _follow(recipe, item["loc"])) for item in error.errors()]
    first, path = errors[0]
    where = source.locate(path.keys, first["loc"], known_key=first["type"] != "extra_forbidden")
    if first["type"] == "extra_forbidden":
        return RecipeError("unknown key", where=where, remedy=_suggest_key(recipe, path))
    if first["type"] == "union_tag_invalid":
        tag, choice = first["ctx"]["tag"], first["ctx"]["discriminator"].strip("'")
        known = [kind.strip(" '") for kind in first["ctx"]["expected_tags"].split(",")]
        where = source.locate([*path.keys, choice], first["loc"], known_key=True)
        return RecipeError(f"unknown {choice} {tag!r}", where=where, remedy=did_you_mean(tag, known))
    if first["type"] == _NO_PRESET:
        presets = [name for kind in _recipes_in(path.annotation) for name in kind.presets()]
        return _preset_error(first["input"], presets, where)
    # A whole group would be too long for the line, and the message describes the fault anyway.
    has_value = first["type"] != "missing" and not isinstance(first.get("input"), Mapping)
    got = _as_written(first.get("input"))[:80] if has_value else None
    choices = _choices(path.annotation)
    if choices and any(item["type"] == "literal_error" and other.keys == path.keys for item, other in errors):
        expected, remedy = f"one of {', '.join(choices)}", _suggestion(str(first["input"]), choices)
        return RecipeError("no such choice", where=where, got=got, expected=expected, remedy=remedy)
    # Every member of a union complains about the same value: count places, not errors.
    others = len({other.keys for _, other in errors}) - 1
    more = f" (and {others} more)" if others else ""
    if (wanted := describe_expected(first, path.annotation)) is None:
        return RecipeError(first["msg"].removeprefix("Value error, ") + more, where=where, got=got)
    remedy = None
    if path.example is not None:
        text = _as_written(path.example)
        is_override, key = where.startswith("--set "), ".".join(path.keys)
        remedy = f"Write --set '{key}={text}'" if is_override else f"Write {path.keys[-1]}: {text}"
    return RecipeError(f"the value does not fit{more}", where=where, got=got, expected=wanted, remedy=remedy)


_EXPECTED = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "keys with values"),
    **dict.fromkeys(("tuple_type", "list_type", "missing", "too_long", "too_short"), "a list"),
    "finite_number": "a finite number",
    "string_type": "text",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
}
"""Type of a validation error → the value expected, with the limits of its context."""


def describe_expected(error: Any, annotation: Any = None) -> str | None:
    """The value expected by one of pydantic's errors, in plain words; None if its message is one of ours."""
    text = _EXPECTED.get(error["type"])
    if text == "a list":
        kinds = [get_args(member) for member in _members(annotation) if get_origin(member) is tuple]
        if error["type"] == "missing" and not kinds:
            return None
        text = f"a list of {len(kinds[0])} values" if kinds and Ellipsis not in kinds[0] else "a list"
    limits = {name: f"{limit:g}" for name, limit in error.get("ctx", {}).items() if isinstance(limit, int | float)}
    return None if text is None else text.format(**limits)


def _as_written(value: Any) -> str:
    """A value as users write it in YAML, in one line; text in quotes."""
    if value is None or isinstance(value, bool):
        return "nothing" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join('null' if item is None else _as_written(item) for item in value)}]"
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _preset_error(name: str, presets: Iterable[str], where: str) -> RecipeError:
    expected, remedy = f"one of {', '.join(presets)}, or a mapping", _suggestion(name, presets)
    return RecipeError("no such preset", where=where, got=repr(name), expected=expected, remedy=remedy)


def _suggestion(name: str, known: Iterable[str]) -> str | None:
    close = closest_name(name, known)
    return f"Did you mean {close}?" if close else None


def _suggest_key(recipe: type[BaseModel], path: _ErrorPath) -> str:
    """The key that was meant, as it is written: of that name in another group, or of a near name in this one."""
    *groups, last = path.keys
    known = [name for model in path.models for name in model.model_fields]
    written = ".".join(path.keys)  # a key of another kind of the same group
    elsewhere = [key for key in _list_keys(recipe) if key.rpartition(".")[2] == last and key != written]
    close = closest_name(last, known)
    if len(elsewhere) == 1 or (elsewhere and close is None):
        return f"Did you mean {' or '.join(elsewhere)}?"
    return f"Did you mean {'.'.join([*groups, close])}?" if close else did_you_mean(last, known)


def _list_keys(model: type[BaseModel], before: tuple[str, ...] = ()) -> list[str]:
    """Every key of a recipe as users write it, ``engine.steps``."""
    keys = [".".join((*before, name)) for name in model.model_fields]
    for name, field in model.model_fields.items():
        keys += [key for group in _models_in(field.annotation) for key in _list_keys(group, (*before, name))]
    return list(dict.fromkeys(keys))


class _ErrorPath(NamedTuple):
    keys: tuple[str, ...]
    """The path as users write it."""
    models: list[type[BaseModel]]
    """The models that may own the last key."""
    annotation: Any
    """The type at the end of the path; None if it is not known."""
    example: Any = None
    """A valid value of a list, its default; None for other keys."""


def _follow(recipe: type[BaseModel], location: Sequence[Any]) -> _ErrorPath:
    """Follow the location of a validation error through the fields of a recipe.

    Besides keys, a location holds the tag of a discriminated union, which selects one member, and the member name of
    any other union, of which all members are searched.
    """
    keys: list[str] = []
    models: list[type[BaseModel]] = [recipe]
    owners: list[type[BaseModel]] = [recipe]
    tags: dict[str, type[BaseModel]] = {}
    annotation: Any = recipe
    for part in (str(part) for part in location if not str(part).startswith("function-")):
        if part in tags:
            models, tags = [tags[part]], {}
            annotation = models[0]
            continue
        is_key = any(part in model.model_fields for model in models)
        if not is_key and part.isdecimal():
            break  # the place in a list, which is written as a whole
        if not is_key and not tags and len(_members(annotation)) > 1:
            continue  # the name of a union's member, such as "bool" or "literal['auto']"
        keys.append(part)
        if not is_key and get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
            continue
        owners = models
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        tags = {tag: model for field in fields for tag, model in _tagged(field).items()}
        annotation = fields[0].annotation if fields else None
        models = [model for field in fields for model in _models_in(field.annotation)] or models
    defaults = [
        model.model_fields[keys[-1]].get_default() for model in owners if keys and keys[-1] in model.model_fields
    ]
    example = next((value for value in defaults if isinstance(value, tuple) and value), None)
    return _ErrorPath(tuple(keys), owners, annotation, example)


def _members(annotation: Any) -> list[Any]:
    """The types that a value may have, without None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [] if annotation is NoneType else [annotation]


def _choices(annotation: Any) -> list[str]:
    """The allowed values; empty if the type allows numbers or any text."""
    members = _members(annotation)
    if not all(member is bool or get_origin(member) is Literal for member in members):
        return []
    values = [value for member in members for value in ((True, False) if member is bool else get_args(member))]
    return [str(value).lower() if isinstance(value, bool) else str(value) for value in values]


def _tagged(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """The members of a discriminated union by their tags; empty for any other field."""
    name = field.discriminator
    models = _models_in(field.annotation) if isinstance(name, str) else []
    return {str(tag): model for model in models for tag in get_args(model.model_fields[str(name)].annotation)}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _recipes_in(annotation: Any) -> list[type[Recipe]]:
    return [model for model in _models_in(annotation) if issubclass(model, Recipe)]
