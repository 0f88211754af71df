"""Running hooks: a tool in a temporary folder, with files under neutral names, ended when it takes too long.

A tool is also ended when the process that runs it dies, however that happens: a guard, a small process of its own,
starts the tool and reads from a pipe that nobody writes to. When the pipe ends, its other end has died, and the guard
ends its process group: the tool, what the tool started, and itself.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import nibabel as nib
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

from brainfound.data.hooks import Hook
from brainfound.data.reading.archives import is_file, open_binary
from brainfound.data.scan import load_scan
from brainfound.errors import ScanError

_MESSAGE_LENGTH = 300
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
"""Of a tool that was ended by a signal the exit code is 128 and the signal's number, as in shells."""


def run_hooks(
    scan_path: str | Path, hooks: Sequence[Hook], *, contrast: str, reference: Path | None = None, folder: str | Path
) -> Path:
    """Run hooks on one scan, one after the other.

    Args:
        scan_path: the scan, also inside a zip.
        hooks: in the order in which they are run; those that are not for this contrast are passed over.
        contrast: what the scan shows.
        reference: the session's reference scan as its hooks left it; None for the reference scan itself, which no
            registration is run on.
        folder: an existing folder for the tools' files; the caller removes it when the result has been read.

    Returns:
        The file to read: the scan itself if no hook was run on it.

    Raises:
        ScanError: a tool failed, see `run_hook`.
    """
    path = Path(scan_path)
    own = Path(tempfile.mkdtemp(dir=folder))
    for number, hook in enumerate(hooks):
        if hook.applies_to(contrast, reference is None):
            path = run_hook(path, hook, own / str(number), reference)
    return path


def run_hook(scan_path: Path, hook: Hook, folder: Path, reference: Path | None = None) -> Path:
    """Run one hook on one scan.

    Args:
        scan_path: the scan, also inside a zip.
        hook: what to run.
        folder: a new folder for the tool's files.
        reference: for a registration, the scan to move it onto.

    Returns:
        What the tool wrote, under the name of the scan.

    Raises:
        ScanError: the tool failed, took too long, wrote nothing, or wrote something that is not a scan.
    """
    scan_path = Path(scan_path)
    folder.mkdir(parents=True)
    files = {"input": neutral_copy(scan_path, folder / "input.nii.gz"), "output": folder / "output.nii.gz"}
    if hook.step == "register":
        assert reference is not None, "a registration needs a reference scan"
        files["reference"] = neutral_copy(reference, folder / "reference.nii.gz")
    _execute(hook, hook.words(**files), folder, scan_path.name)
    output = files["output"]
    if not output.is_file():
        raise ScanError(
            f"the hook {hook.name} wrote no output", where=scan_path.name, remedy="Check its command, and try it alone"
        )
    try:
        load_scan(output)
    except ScanError as error:
        raise ScanError(
            f"what the hook {hook.name} wrote cannot be used: {error.what}",
            where=scan_path.name,
            got=error.got,
            remedy="Try the tool alone on this scan",
        ) from error
    for name in ("input", "reference"):
        if name in files:
            files[name].unlink(missing_ok=True)
    (folder / "result").mkdir()
    return output.rename(folder / "result" / f"{_stem(scan_path)}.nii.gz")


def neutral_copy(source: Path, target: Path) -> Path:
    """A scan as ``.nii.gz`` under a name that says nothing; voxels and affine stay as they are.

    It is a copy, so that a tool cannot change the user's file.

    Raises:
        ScanError: the file is missing or cannot be read.
    """
    if not is_file(source):
        raise ScanError("no such file", where=source.name, remedy="Check the path in the manifest or folder")
    name = source.name.lower()
    if name.endswith(".nii.gz"):
        with open_binary(source) as stream, target.open("wb") as out:
            shutil.copyfileobj(stream, out)
    elif name.endswith(".nii"):
        with open_binary(source) as stream, gzip.open(target, "wb", compresslevel=1) as packed:
            shutil.copyfileobj(stream, packed)
    else:
        scan = load_scan(source)
        back = ornt_transform(io_orientation(scan.affine), io_orientation(scan.native_affine))
        image = nib.Nifti1Image(apply_orientation(scan.data, back), scan.native_affine)
        image.header.set_xyzt_units("mm")
        nib.save(image, target)
    return target


def _stem(path: Path) -> str:
    return re.sub(r"\.(nii|mgz|mgh|img|hdr)(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def _execute(hook: Hook, words: list[str], folder: Path, name: str) -> None:
    log = folder / "stdout.txt"
    errors = folder / "stderr.txt"
    with log.open("wb") as out, errors.open("wb") as err:
        try:
            # Isolated and without site packages: the hook's environment is for the tool, and the guard starts fast.
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _GUARD, *words],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                cwd=folder,
                env={**os.environ, **hook.environment},
                start_new_session=True,
            )
        except OSError as error:
            raise ScanError(
                f"the hook {hook.name} cannot be started: {error.strerror}",
                where=name,
                remedy=f"Check that {Path(hook.executable).name} is installed",
            ) from error
        try:
            code = process.wait(hook.timeout_s)
        except subprocess.TimeoutExpired:
            raise ScanError(
                f"the hook {hook.name} took too long",
                where=name,
                got=f"more than {hook.timeout_s:g} s",
                remedy="Set a longer timeout_s in the hook's file, or leave the scan out",
            ) from None
        finally:
            _end(process)
    if code != 0:
        said = _last_line(errors, folder) or _last_line(log, folder) or "it said nothing"
        raise ScanError(
            f"the hook {hook.name} failed: {said}",
            where=name,
            got=f"exit code {code}",
            remedy="Try the tool alone on this scan",
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a tool, whatever it started, and its guard: they have a process group of their own."""
    with suppress(ProcessLookupError, PermissionError):  # all of it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _last_line(file: Path, folder: Path) -> str:
    """The last line that is not empty, without the temporary folder and without control characters."""
    with file.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(stream.tell() - 8192, 0))
        text = stream.read().decode(errors="replace").replace(f"{folder}{os.sep}", "")
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    return "".join(c for c in lines[-1] if c.isprintable())[:_MESSAGE_LENGTH] if lines else ""
