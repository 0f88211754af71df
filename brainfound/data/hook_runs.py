"""Running hooks: a tool in a temporary folder, with files under neutral names, ended when it takes too long."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import nibabel as nib
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

from brainfound.data.archives import is_file, open_binary
from brainfound.data.hooks import Hook
from brainfound.data.scan import load_scan
from brainfound.errors import ScanError

_MESSAGE_LENGTH = 300


def run_session_hooks(
    scans: Mapping[str, Path], hooks: Sequence[Hook], folder: Path
) -> tuple[dict[str, Path], dict[str, ScanError]]:
    """Run hooks on the scans of a session, hook by hook.

    Args:
        scans: a file per contrast; the first is the session's reference scan.
        hooks: in the order in which they are run.
        folder: where files are made; the caller removes it when the scans have been read.

    Returns:
        The file to read for each contrast (the given one if no hook was run on it), and why the others cannot be
        used. If the reference scan fails, the next scan becomes the reference of the hooks that follow.
    """
    files = dict(scans)
    refused: dict[str, ScanError] = {}
    for hook in hooks:
        for contrast in list(files):
            reference = next(iter(files))
            if not hook.applies_to(contrast, contrast == reference):
                continue
            work = folder / f"{contrast}-{hook.name.replace(os.sep, '-')}"
            try:
                files[contrast] = run_hook(files[contrast], hook, work, files[reference])
            except ScanError as error:
                refused[contrast] = error
                del files[contrast]
    return files, refused


def run_hooks(scan_path: str | Path, hooks: Sequence[Hook], reference: Path | None = None, *, folder: Path) -> Path:
    """Run all hooks on one scan, one after the other; registrations only if there is a reference.

    Raises:
        ScanError: as of `run_hook`.
    """
    path = Path(scan_path)
    for number, hook in enumerate(hooks):
        if hook.step != "register" or reference is not None:
            path = run_hook(path, hook, folder / f"{number}", reference)
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
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
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
    """End a tool and whatever it started: it has a process group of its own."""
    with suppress(ProcessLookupError, PermissionError):  # all of it has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(file: Path, folder: Path) -> str:
    """The last line that is not empty, without the temporary folder and without control characters."""
    with file.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(stream.tell() - 8192, 0))
        text = stream.read().decode(errors="replace").replace(f"{folder}{os.sep}", "")
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    return "".join(c for c in lines[-1] if c.isprintable())[:_MESSAGE_LENGTH] if lines else ""
