"""Hooks: tools of others that are run on each scan before it is prepared, such as skull-strippers and registrations.

Nothing is stripped or registered unless a hook is asked for, and the store says which ones were. A hook is a command
with placeholders. It is split into words once and never goes through a shell, so a file name cannot become a command.
Hooks come from the user alone: no store, model or bundle can bring one.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from brainfound.contrasts import parse_contrast
from brainfound.errors import UsageError, did_you_mean
from brainfound.recipes import Recipe, validate

PLACEHOLDERS = ("{input}", "{output}", "{reference}")
_SHELL_WORDS = {"|", "||", "&", "&&", ";", "<", ">", ">>", "2>", "2>&1"}
_VERSION_TIMEOUT_S = 60
_VERSION_LENGTH = 200


class Hook(Recipe):
    """One tool, and the command that runs it on one scan."""

    name: str = Field(min_length=1, max_length=60)
    """What messages and store.json call it."""

    step: Literal["skull_strip", "register", "other"] = "other"
    """What it does. A registration moves each scan onto the session's reference scan, and never runs on that one."""

    command: str
    """The command with {input} and {output}, and for a registration {reference}. All three are `.nii.gz` files in a
    temporary folder in which the command is run. No shell reads it: pipes and variables do not work."""

    contrasts: tuple[str, ...] = ()
    """The contrasts that it is run on; empty: all."""

    timeout_s: float = Field(default=1800, gt=0)
    """A run that takes longer is ended, and its scan refused."""

    needs: str | None = None
    """The executable that must be there before anything starts; None: the first word of the command."""

    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the tool, beside those that are set already."""

    version_command: str | None = None
    """A command that prints the tool's version, for store.json."""

    citation: str = ""
    """What to cite when its result is used."""

    licence: str = ""
    """What to know of the tool's licence."""

    @field_validator("contrasts", mode="before")
    @classmethod
    def _known_contrasts(cls, value: Any) -> Any:
        names = value.split(",") if isinstance(value, str) else value
        try:
            return tuple(parse_contrast(str(name)) for name in names)
        except UsageError as error:
            raise ValueError(str(error)) from None

    @field_validator("command", "version_command")
    @classmethod
    def _splittable(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            words = shlex.split(value)
        except ValueError as error:
            raise ValueError(f"the command cannot be split into words: {error}") from None
        if not words:
            raise ValueError("the command is empty")
        through_shell = sorted(_SHELL_WORDS.intersection(words))
        if through_shell:
            raise ValueError(f"no shell reads the command, so {through_shell[0]!r} does nothing; write a script for it")
        if os.sep in words[0] and not os.path.isabs(words[0]):
            raise ValueError("the command runs in a temporary folder: give the tool's absolute path, or its name alone")
        return value

    @model_validator(mode="after")
    def _fitting_placeholders(self) -> Hook:
        found = re.findall(r"\{[A-Za-z_]*\}", self.command)
        unknown = [name for name in found if name not in PLACEHOLDERS]
        if unknown:
            raise ValueError(f"unknown placeholder {unknown[0]}; known are {', '.join(PLACEHOLDERS)}")
        needed = PLACEHOLDERS if self.step == "register" else PLACEHOLDERS[:2]
        for name in needed:
            if name not in found:
                raise ValueError(f"the command of step {self.step} must hold {name}")
        if self.step != "register" and "{reference}" in found:
            raise ValueError("{reference} is for registrations: set step: register")
        return self

    @property
    def executable(self) -> str:
        """The program that must be installed."""
        return self.needs or shlex.split(self.command)[0]

    def words(self, **files: Path) -> list[str]:
        """The command's words with files in the place of placeholders; a file name is never split."""
        words = shlex.split(self.command)
        for name, file in files.items():
            words = [word.replace("{" + name + "}", str(file)) for word in words]
        return words

    def applies_to(self, contrast: str, is_reference: bool) -> bool:
        """Whether it is run on a scan of this contrast."""
        return (not self.contrasts or contrast in self.contrasts) and not (self.step == "register" and is_reference)


_HD_BET: dict[str, Any] = {
    "step": "skull_strip",
    "needs": "hd-bet",
    "citation": "Isensee et al. 2019, Human Brain Mapping 40:4952",
    "licence": "Apache-2.0",
}

READY: dict[str, Hook] = {
    hook.name: hook
    for hook in (
        Hook(
            name="synthstrip",
            step="skull_strip",
            command="mri_synthstrip -i {input} -o {output}",
            citation="Hoopes et al. 2022, NeuroImage 260:119474",
            licence="FreeSurfer software licence",
        ),
        Hook(name="hd-bet", command="hd-bet -i {input} -o {output}", **_HD_BET),
        Hook(name="hd-bet-cpu", command="hd-bet -i {input} -o {output} -device cpu --disable_tta", **_HD_BET),
        Hook(
            name="flirt-rigid",
            step="register",
            command="flirt -in {input} -ref {reference} -out {output} -dof 6 -cost mutualinfo",
            environment={"FSLOUTPUTTYPE": "NIFTI_GZ"},
            version_command="flirt -version",
            citation="Jenkinson et al. 2002, NeuroImage 17:825",
            licence="FSL licence: not for commercial use",
        ),
    )
}
"""Hooks that can be asked for by name: SynthStrip, HD-BET version 2, and a rigid registration with FSL's FLIRT."""


def load_hooks(names_or_files: Iterable[str | Path | Hook]) -> tuple[Hook, ...]:
    """Hooks by name (see `READY`), from YAML files, or written out as a command with ``{input}`` and ``{output}``.

    Hooks that are loaded already are taken as they are, and checked with the others.

    Raises:
        UsageError: there is no such hook or file, its tool is not installed, or a registration is not the last.
        RecipeError: a file is not a hook.
    """
    hooks = tuple(item if isinstance(item, Hook) else _load_hook(str(item)) for item in names_or_files)
    names = [hook.name for hook in hooks]
    for name in names:
        if names.count(name) > 1:
            raise UsageError("the hook is given twice", where="hook", got=name, remedy="Give it once")
    steps = [hook.step for hook in hooks]
    if "register" in steps and set(steps[steps.index("register") :]) != {"register"}:
        # Scans are moved onto the reference scan as all of its hooks left it, so they must be alike by then.
        raise UsageError(
            "registrations come after the other hooks", where="hook", got=", ".join(names), remedy="Change the order"
        )
    require_tools(hooks)
    return hooks


def _load_hook(item: str) -> Hook:
    if item in READY:
        return READY[item]
    if "{input}" in item:
        step = "register" if "{reference}" in item else "other"
        name = Path(item.split()[0]).name
        return validate(Hook, {"name": name, "command": item, "step": step}, where="hook")
    file = Path(item)
    if file.suffix not in (".yaml", ".yml"):
        raise UsageError(f"no hook named {item!r}", where="hook", remedy=did_you_mean(item, READY))
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError("no such hook file", where=file.name, remedy="Check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"not valid YAML: {error}", where=file.name, remedy="Mend the file") from None
    if not isinstance(content, Mapping):
        raise UsageError("a hook must be a mapping", where=file.name, expected="name:, step:, command:")
    return validate(Hook, {"name": file.stem, **content}, where=file.name)


def require_tools(hooks: Iterable[Hook]) -> None:
    """Refuse to start if a hook's program is not installed.

    Raises:
        UsageError: names the program.
    """
    for hook in hooks:
        if shutil.which(hook.executable) is None:
            raise UsageError(
                f"the tool of the hook {hook.name} is not installed",
                where="hook",
                expected=f"{Path(hook.executable).name} on the PATH",
                remedy="Install it, or load its module, and try again",
            )


def describe(hooks: Iterable[Hook]) -> list[dict[str, Any]]:
    """What was done, for store.json: name, step, command, contrasts, the tool's version, citation, and a hash.

    Folders are left out of the command, since they may name people; the hash is of the hook as it was given.
    """
    return [
        {
            "name": hook.name,
            "step": hook.step,
            "command": " ".join(_without_folder(word) for word in shlex.split(hook.command)),
            "contrasts": list(hook.contrasts),
            "version": _version(hook),
            "citation": hook.citation,
            "sha256": hashlib.sha256(hook.model_dump_json().encode()).hexdigest(),
        }
        for hook in hooks
    ]


def _without_folder(word: str) -> str:
    return re.sub(r"(^|[=:,])/(?:[^/=:,]+/)*", r"\1", word)


def _version(hook: Hook) -> str | None:
    if hook.version_command is None:
        return None
    try:
        done = subprocess.run(
            shlex.split(hook.version_command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_VERSION_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.decode(errors="replace").split("\n")
    return next((line.strip()[:_VERSION_LENGTH] for line in lines if line.strip()), None)
