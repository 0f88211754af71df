"""Hooks: external tools that run on each scan before it is prepared, such as skull-strippers and registrations.

A hook is a command with placeholders, split into words once and never read by a shell. Hooks come from the user only,
never from a store, model or bundle; the store records them. A tool runs in a temporary folder, with files under neutral
names. A guard process starts it, and kills the process group when its standard input closes, which happens when the
process that runs the hook dies.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, cast

import nibabel as nib
import yaml
from isal import igzip
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from pydantic import BeforeValidator, Field, field_validator, model_validator

from brainfound.contrasts import parse_contrasts
from brainfound.data.reading.archives import is_file
from brainfound.data.reading.image_file import copy_without_texts
from brainfound.data.reading.image_names import stem
from brainfound.data.reading.scan import load_scan
from brainfound.errors import ScanError, UsageError, did_you_mean
from brainfound.recipes import Recipe, validate

PLACEHOLDERS = ("{input}", "{output}", "{reference}")
_SHELL_WORDS = {"|", "||", "&", "&&", ";", "<", ">", ">>", "2>", "2>&1"}
_VERSION_TIMEOUT_S, _VERSION_LENGTH, _MESSAGE_LENGTH = 60, 200, 300
_FOLDER = r"(^|[=:,])/(?:[^/=:,]+/)*"
_TRY_ALONE = "Try the tool alone on this scan"
_GUARD = """
import os, signal, subprocess, sys, threading
def end_with_parent():
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)
try:
    tool = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
except OSError as error:
    sys.exit("it cannot be started: " + str(error.strerror))
threading.Thread(target=end_with_parent, daemon=True).start()
code = tool.wait()
os._exit(code if code >= 0 else 128 - code)
"""
"""The program of the guard. After a signal the exit code is 128 plus the signal's number, as in shells."""


class Hook(Recipe):
    """A tool, and the command that runs it on one scan."""

    name: str = Field(min_length=1, max_length=60)
    """Name of the hook in messages and in store.json."""

    step: Literal["skull_strip", "register", "other"] = "other"
    """Kind of processing. A registration moves each scan onto the session's reference scan, and skips that one."""

    command: str
    """The command with {input} and {output}, and for a registration {reference}: `.nii.gz` files in the temporary
    folder in which it runs. No shell reads it: pipes and variables do not work."""

    contrasts: Annotated[tuple[str, ...], BeforeValidator(parse_contrasts)] = ()
    """The contrasts on which the hook runs; empty: all."""

    timeout_s: float = Field(default=1800, gt=0)
    """A tool that takes longer is killed, and its scan is refused."""

    needs: str | None = None
    """The executable that must be installed; None: the first word of the command."""

    environment: dict[str, str] = Field(default_factory=dict)
    """Additional environment variables of the tool."""

    version_command: str | None = None
    """A command that prints the tool's version, for store.json."""

    citation: str = ""
    """The publication to cite."""

    licence: str = ""
    """The tool's licence."""

    @field_validator("command", "version_command")
    @classmethod
    def _check_command(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            words = shlex.split(value)
        except ValueError as error:
            raise ValueError(f"the command cannot be split into words: {error}") from None
        if not words:
            raise ValueError("the command is empty")
        shell_words = sorted(_SHELL_WORDS.intersection(words))
        if shell_words:
            raise ValueError(f"no shell reads the command, so {shell_words[0]!r} does nothing; write a script for it")
        if os.sep in words[0] and not os.path.isabs(words[0]):
            raise ValueError("the command runs in a temporary folder: give the tool's absolute path, or its name alone")
        return value

    @model_validator(mode="after")
    def _check_placeholders(self) -> Hook:
        placeholders = re.findall(r"\{[A-Za-z_]*\}", self.command)
        unknown = [name for name in placeholders if name not in PLACEHOLDERS]
        if unknown:
            raise ValueError(f"unknown placeholder {unknown[0]}; known are {', '.join(PLACEHOLDERS)}")
        needed = PLACEHOLDERS if self.step == "register" else PLACEHOLDERS[:2]
        for name in needed:
            if name not in placeholders:
                raise ValueError(f"the command of step {self.step} must hold {name}")
        if self.step != "register" and "{reference}" in placeholders:
            raise ValueError("{reference} is for registrations: set step: register")
        return self

    @property
    def executable(self) -> str:
        return self.needs or shlex.split(self.command)[0]

    def words(self, **files: Path) -> list[str]:
        """The words of the command with files in place of placeholders; a file name is never split."""
        words = shlex.split(self.command)
        for name, file in files.items():
            words = [word.replace("{" + name + "}", str(file)) for word in words]
        return words

    def applies_to(self, contrast: str, is_reference: bool) -> bool:
        """Whether the hook runs on a scan of this contrast."""
        return (not self.contrasts or contrast in self.contrasts) and not (self.step == "register" and is_reference)


_SYNTHSTRIP: dict[str, Any] = {
    "step": "skull_strip",
    "citation": "Hoopes et al. 2022, NeuroImage 260:119474",
    "licence": "FreeSurfer software licence",
}
_HD_BET: dict[str, Any] = {
    "step": "skull_strip",
    "needs": "hd-bet",
    "citation": "Isensee et al. 2019, Human Brain Mapping 40:4952",
    "licence": "Apache-2.0",
}

BUILTIN_HOOKS: dict[str, Hook] = {
    hook.name: hook
    for hook in (
        Hook(name="synthstrip", command="mri_synthstrip -i {input} -o {output}", **_SYNTHSTRIP),
        Hook(
            name="deepbet",
            step="skull_strip",
            command="deepbet-cli -i {input} -o {output} --no_gpu",
            contrasts=("T1w",),
            citation="Fisch et al. 2024, Computers in Biology and Medicine 179:108845",
            licence="MIT, weights included",
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
"""Hooks by name: SynthStrip, deepbet (the extra `strip`), HD-BET version 2, and a rigid registration with FLIRT."""


def load_hooks(names_or_files: Iterable[str | Path | Hook]) -> tuple[Hook, ...]:
    """Hooks by name (see `BUILTIN_HOOKS`), from YAML files, or given as a command with ``{input}`` and ``{output}``.

    UsageError: there is no such hook, its tool is not installed, or a registration does not come last.
    """
    hooks = tuple(item if isinstance(item, Hook) else _load_hook(str(item)) for item in names_or_files)
    names = [hook.name for hook in hooks]
    for name in names:
        if names.count(name) > 1:
            raise UsageError("the hook is given twice", where="hook", got=name, remedy="Give it once")
    steps = [hook.step for hook in hooks]
    if "register" in steps and set(steps[steps.index("register") :]) != {"register"}:
        # The target of a registration is the reference scan after all of its hooks.
        what, remedy = "registrations come after the other hooks", "Change the order"
        raise UsageError(what, where="hook", got=", ".join(names), remedy=remedy)
    for hook in hooks:
        if shutil.which(hook.executable, path=_environment(hook)["PATH"]) is None:
            what = f"the tool of the hook {hook.name} is not installed"
            expected = f"{Path(hook.executable).name} on the PATH"
            remedy = "Install it, or load its module, and try again"
            if hook == BUILTIN_HOOKS["deepbet"]:
                remedy = 'pip install "brainfound[strip]"'
            raise UsageError(what, where="hook", expected=expected, remedy=remedy)
    return hooks


def _environment(hook: Hook) -> dict[str, str]:
    """The variables of a hook's tool. Behind the PATH are the programs of this Python, which need not be activated."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))
    return {**os.environ, "PATH": path, **hook.environment}


def _load_hook(item: str) -> Hook:
    if item in BUILTIN_HOOKS:
        return BUILTIN_HOOKS[item]
    if "{input}" in item:
        step = "register" if "{reference}" in item else "other"
        name = Path(item.split()[0]).name
        return validate(Hook, {"name": name, "command": item, "step": step}, where="hook")
    file = Path(item)
    if file.suffix not in (".yaml", ".yml"):
        raise UsageError(f"no hook named {item!r}", where="hook", remedy=did_you_mean(item, BUILTIN_HOOKS))
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError("no such hook file", where=file.name, remedy="Check the path") from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=file.name, remedy="Give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"not valid YAML: {error}", where=file.name, remedy="Mend the file") from None
    if not isinstance(content, Mapping):
        raise UsageError("a hook must be a mapping", where=file.name, expected="name:, step:, command:")
    return validate(Hook, {"name": file.stem, **content}, where=file.name)


def describe_hooks(hooks: Iterable[Hook]) -> list[dict[str, Any]]:
    """The record of hooks in store.json: name, step, command, contrasts, the tool's version, citation, and a hash.

    The command is written without folders, which may name people; the hash is that of the full hook.
    """
    return [
        {
            "name": hook.name,
            "step": hook.step,
            "command": " ".join(re.sub(_FOLDER, r"\1", word) for word in shlex.split(hook.command)),
            "contrasts": list(hook.contrasts),
            "version": _version(hook),
            "citation": hook.citation,
            "sha256": hashlib.sha256(hook.model_dump_json().encode()).hexdigest(),
        }
        for hook in hooks
    ]


def _version(hook: Hook) -> str | None:
    if hook.version_command is None:
        return None
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    options |= {"env": _environment(hook), "timeout": _VERSION_TIMEOUT_S, "check": False}
    try:
        done = subprocess.run(shlex.split(hook.version_command), **options)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.decode(errors="replace").split("\n")
    return next((line.strip()[:_VERSION_LENGTH] for line in lines if line.strip()), None)


def run_hooks(
    scan_path: str | Path, hooks: Sequence[Hook], *, contrast: str, reference: Path | None = None, folder: str | Path
) -> Path:
    """Run hooks on one scan (also inside a zip), in order; returns the file to read, the scan itself if no hook ran.

    Args:
        hooks: hooks for other contrasts are skipped.
        reference: the session's reference scan after its hooks; None for the reference scan itself.
        folder: an existing folder for the tools' files; the caller removes it when the result has been read.

    Raises:
        ScanError: a tool failed, see `run_hook`.
    """
    path = Path(scan_path)
    for hook in hooks:
        if hook.applies_to(contrast, reference is None):
            path = run_hook(path, hook, Path(tempfile.mkdtemp(dir=folder)), reference)
    return path


def run_hook(scan_path: Path, hook: Hook, folder: Path, reference: Path | None = None) -> Path:
    """Run one hook on one scan, in an empty or new folder; returns the tool's output, under the name of the scan.

    ScanError: the tool failed, took too long, wrote nothing, or wrote something that is not a scan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {"input": anonymised_copy(scan_path, folder / "input.nii.gz"), "output": folder / "output.nii.gz"}
    if hook.step == "register":
        assert reference is not None, "a registration needs a reference scan"
        files["reference"] = anonymised_copy(reference, folder / "reference.nii.gz")
    _execute(hook, hook.words(**files), folder, scan_path.name)
    output = files["output"]
    if not output.is_file():
        what, remedy = f"the hook {hook.name} wrote no output", "Check its command, and try it alone"
        raise ScanError(what, where=scan_path.name, remedy=remedy)
    try:
        load_scan(output)
    except ScanError as error:
        what = f"what the hook {hook.name} wrote cannot be used: {error.what}"
        raise ScanError(what, where=scan_path.name, got=error.got, remedy=_TRY_ALONE) from error
    for name in ("input", "reference"):
        if name in files:
            files[name].unlink(missing_ok=True)
    (folder / "result").mkdir()
    return output.rename(folder / "result" / f"{stem(scan_path)}.nii.gz")


def anonymised_copy(source: Path, target: Path) -> Path:
    """Copy a scan to a ``.nii.gz`` with a neutral name, without texts; voxels and affine do not change."""
    if not is_file(source):
        raise ScanError("no such file", where=source.name, remedy="Check the path in the manifest or folder")
    if source.name.lower().endswith((".nii", ".nii.gz")):
        with igzip.open(target, "wb", compresslevel=1) as packed:
            copy_without_texts(source, cast(BinaryIO, packed))
    else:
        scan = load_scan(source)
        back = ornt_transform(io_orientation(scan.affine), io_orientation(scan.native_affine))
        image = nib.Nifti1Image(apply_orientation(scan.data, back), scan.native_affine)
        image.header.set_xyzt_units("mm")
        nib.save(image, target)
    return target


def _execute(hook: Hook, words: list[str], folder: Path, name: str) -> None:
    log, errors = folder / "stdout.txt", folder / "stderr.txt"
    # Isolated and without site packages: the guard starts fast, and ignores the tool's environment.
    command = [sys.executable, "-I", "-S", "-c", _GUARD, *words]
    environment = _environment(hook)
    with log.open("wb") as out, errors.open("wb") as err:
        streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": out, "stderr": err}
        try:
            process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams)
        except OSError as error:
            what = f"the hook {hook.name} cannot be started: {error.strerror}"
            remedy = f"Check that {Path(hook.executable).name} is installed"
            raise ScanError(what, where=name, remedy=remedy) from error
        try:
            code = process.wait(hook.timeout_s)
        except subprocess.TimeoutExpired:
            what, got = f"the hook {hook.name} took too long", f"more than {hook.timeout_s:g} s"
            remedy = "Set a longer timeout_s in the hook's file, or leave the scan out"
            raise ScanError(what, where=name, got=got, remedy=remedy) from None
        finally:
            _kill_group(process)
    if code != 0:
        last = _last_line(errors, folder) or _last_line(log, folder) or "no message"
        what = f"the hook {hook.name} failed: {last}"
        raise ScanError(what, where=name, got=f"exit code {code}", remedy=_TRY_ALONE)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group of a guard: the tool, its children, and the guard."""
    with suppress(ProcessLookupError, PermissionError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _last_line(file: Path, folder: Path) -> str:
    """The last non-empty line of a log, without the temporary folder and control characters."""
    with file.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(stream.tell() - 8192, 0))
        text = stream.read().decode(errors="replace").replace(f"{folder}{os.sep}", "")
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    return "".join(c for c in lines[-1] if c.isprintable())[:_MESSAGE_LENGTH] if lines else ""
