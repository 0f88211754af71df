"""DICOM folders, converted series by series with dcm2niix (Li et al. 2016, J Neurosci Methods 264:47).

Converted scans stay in a work folder as ``<subject>/<session>/<series>/scan.nii.gz``, with a sidecar free of personal
data. A series is written under a temporary name and renamed when complete, so an interrupted conversion resumes.
``conversion.json`` is written last; a complete conversion is not repeated.

The contrast of a series is derived from its sidecar by these rules, in this order. If none applies it stays
``unknown``, since a wrong contrast is worse than none.

1. ``ImageType``: ADC is an ADC map and a trace is a DWI; phase, projections and other derived maps are unknown.
2. Words of ``SeriesDescription``, then of ``ProtocolName``, read by `brainfound.data.sources.words` as those of file
   names are: localizers, functional and perfusion series, maps, other parts of the body and doubtful texts are unknown.
3. Sequence times, in seconds, outrank the words T1, T2, FLAIR and PD: an inversion-prepared gradient echo with TI
   0.6–1.3 and TE < 0.01 is T1w; a spin echo with TE ≥ 0.07 and TR ≥ 2 is T2w without an inversion, and FLAIR with TI
   1.5–3 and TR ≥ 4.
4. A T1w with a contrast agent in the header, or with a word for one (post, gd), is T1ce.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from brainfound.contrasts import UNKNOWN
from brainfound.data.sources.bids_files import SCANNER_COLUMNS
from brainfound.data.sources.covariates import clean_covariates
from brainfound.data.sources.dicom_series import (
    MAX_FOLDERS_PER_PATIENT,
    Series,
    decode_filename,
    find_series,
    is_dicom,
    max_folders_per_patient,
)
from brainfound.data.sources.file_names import BROKEN_LINK, UnusedFiles, iter_files, natural_sort_key
from brainfound.data.sources.tables import SourceLayout, SourceTable, read_json
from brainfound.data.sources.words import read_series_text
from brainfound.errors import CohortError, UsageError

_MARKER = "conversion.json"
_SCHEMA = 3
_MAX_FILES_SEARCHED = 500
_TIMEOUT_S = 3600
_KEPT_KEYS = {
    *SCANNER_COLUMNS,
    *("ImageType", "SeriesDescription", "ProtocolName", "ScanningSequence"),
    *("EchoTime", "RepetitionTime", "InversionTime", "FlipAngle", "SliceThickness", "SpacingBetweenSlices"),
    *("ConversionSoftware", "ConversionSoftwareVersion"),
}
"""Sidecar keys to keep: those needed by the contrast rules and the cohort's columns."""

_DERIVED_WORDS = ("PROJECTION", "SUBTRACT", "SCREEN", "PHASE MAP", "STAR_MAP", "EXPONENTIAL", "MAX_IP", "MIN_IP", "VRT")
_WEIGHTED = {"T1w", "T1ce", "T2w", "FLAIR", "PDw"}
"""Contrasts that the times of a sequence decide."""
_DERIVED_TYPES = {
    *("FA", "EADC", "EXP", "TENSOR", "COLFA", "PHASE", "P", "IMAGINARY", "REAL", "MIP", "MNIP", "MINIP", "MPR"),
    *("PROJECTION IMAGE", "CBF", "CBV", "MTT", "TTP", "TMAX", "RCBV", "RCBF", "T1 MAP", "T2 MAP", "LOCALIZER"),
}


def can_read(path: Path) -> bool:
    """Whether a folder has a DICOM file among its first 500 files."""
    return path.is_dir() and any(is_dicom(file) for file in islice(iter_files(path, []), _MAX_FILES_SEARCHED))


def read(path: Path, work: Path | None = None) -> SourceTable:
    """Read the MR series of a folder, after converting into ``work`` those that are not there yet.

    Subjects are named after the top-level folders if each holds one patient and its name does not contain the
    patient's; otherwise by a short hash of PatientID, or of StudyInstanceUID if that is missing. Names, birth dates,
    study dates and institutions are not kept. UsageError if the packages of the extra ``dicom`` are not installed.
    """
    if work is None:
        remedy = 'Prepare it (brainfound prepare), or give a folder for it: Cohort.read(path, work="converted")'
        raise CohortError("DICOM must be converted first", where=path.name, remedy=remedy)
    conversion = _convert(path, work, _find_dcm2niix())
    rows, unused = conversion["rows"], [(Path(file), reason) for file, reason in conversion["unused"]]
    if not rows:
        got = f"{unused[0][0].name}: {unused[0][1]}" if unused else "no MR series"
        raise CohortError("no series could be converted", where=path.name, got=got, remedy="Check the DICOM files")
    table = pd.DataFrame(rows)
    table["path"] = [str(work / file) for file in table["path"]]
    notes = [f"{conversion['num_series']} series converted by dcm2niix; nothing was registered or skull-stripped"]
    if conversion["most_folders"] > MAX_FOLDERS_PER_PATIENT:
        notes.append(f"up to {conversion['most_folders']} folders have one PatientID, and are one subject")
    num_unknown = int((table["contrast"] == UNKNOWN).sum())
    if num_unknown:
        notes.append(f"{num_unknown} scans are of unknown contrast; name them in a manifest if you need them")
    table = clean_covariates(table, "DICOM", notes)
    return SourceTable(table, work, LAYOUT.name, notes=notes, unused=unused)


LAYOUT = SourceLayout("DICOM", "DICOM files", can_read, read)


def _find_dcm2niix() -> str:
    try:
        import dcm2niix
        import pydicom  # noqa: F401  (reads the headers)
    except ImportError as error:
        remedy = 'Install it: pip install "brainfound[dicom]"'
        raise UsageError(f"DICOM needs the package {error.name!r}", remedy=remedy) from error
    return str(dcm2niix.bin)


def _convert(path: Path, work: Path, program: str) -> dict[str, Any]:
    unused: UnusedFiles = []
    resolved_work = work.resolve()
    candidates = [file for file in iter_files(path, unused) if resolved_work not in file.resolve().parents]
    files = [file for file in candidates if file.is_file()]
    existing = set(files)
    unused += [(file, BROKEN_LINK) for file in candidates if file not in existing]
    fingerprint = _fingerprint(path, files)
    marker = work / _MARKER
    previous = read_json(marker)
    unchanged = previous.get("fingerprint") == fingerprint and previous.get("schema") == _SCHEMA
    if unchanged and all((work / row["path"]).is_file() for row in previous["rows"]):
        return previous
    if work.exists() and not previous and not _can_resume(work):
        raise CohortError("the work folder is not empty", where=work, remedy="Give another folder")
    all_series = find_series(path, files, unused)
    rows: list[dict[str, Any]] = []
    for series in all_series:
        folder = work / series.subject / series.session / series.key
        if not (folder / "series.json").is_file():
            _convert_series(series, folder, work, program)
        outcome = read_json(folder / "series.json")
        rows += [_row(series, work, folder / name) for name in outcome["scans"]]
        unused += [(series.files[0], f"dcm2niix: {line}") for line in outcome["problems"]]
        unused += [(folder / name, reason) for name, reason in outcome["left_out"]]
    conversion = {
        "schema": _SCHEMA,
        "fingerprint": fingerprint,
        "num_series": len(all_series),
        "most_folders": max_folders_per_patient(all_series),
        "rows": rows,
        "unused": [(decode_filename(str(file)), reason) for file, reason in unused],
    }
    work.mkdir(parents=True, exist_ok=True)
    partial = work / f"{_MARKER}.{os.getpid()}"
    partial.write_text(json.dumps(conversion, indent=1), encoding="utf-8")
    partial.replace(marker)
    return conversion


def _can_resume(work: Path) -> bool:
    """Whether a folder is empty or holds only files of an interrupted conversion."""
    files = [file for file in work.rglob("*") if file.is_file()]
    return all(file.name.startswith(("scan", "series.json", _MARKER)) or ".converting" in str(file) for file in files)


def _fingerprint(path: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(os.fsencode(f"{file.relative_to(path)} {status.st_size} {status.st_mtime_ns}\n"))
    return digest.hexdigest()


def _convert_series(series: Series, folder: Path, work: Path, program: str) -> None:
    """Convert one series by itself, so that its faults affect no other; the folder is renamed when complete."""
    work.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=work))
    try:
        with tempfile.TemporaryDirectory() as links:
            for number, file in enumerate(series.files):
                (Path(links) / f"{number:06d}.dcm").symlink_to(file.resolve())
            messages = _run_dcm2niix(program, Path(links), temporary)
        # Drop the keys that are not needed: dcm2niix leaves the institution and the time of day in sidecars.
        for file in temporary.glob("*.json"):
            file.write_text(json.dumps({k: v for k, v in read_json(file).items() if k in _KEPT_KEYS}, indent=1))
        images = sorted((file.name for file in temporary.glob("*.nii.gz")), key=natural_sort_key)
        phase = [name for name in images if _is_phase(temporary / name)]
        errors = [line for line in messages if line.lower().startswith("error")]
        outcome = {
            "scans": [name for name in images if name not in phase],
            "left_out": [(name, "phase or part of a complex image, not magnitude") for name in phase],
            "problems": errors if images else [" · ".join(messages)],
        }
        (temporary / "series.json").write_text(json.dumps(outcome), encoding="utf-8")
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "series.json").is_file():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _run_dcm2niix(program: str, source: Path, out: Path) -> list[str]:
    """Run dcm2niix; return its messages on faults, or else its last line, without paths."""
    # Anonymised sidecars (-ba), no comment in the header (-c), internal gzip (-z i), no user defaults (-g i).
    command = [program, "-b", "y", "-ba", "y", "-c", "", "-z", "i", "-g", "i", "-f", "scan", "-d", "0", "-w", "2"]
    try:
        command += ["-o", str(out), str(source)]
        completed = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return [f"error: not done after {_TIMEOUT_S} s"]
    except OSError as error:
        raise CohortError(f"dcm2niix cannot be started ({error.strerror})", remedy="Install it again") from error
    lines = [line.strip() for line in (completed.stdout + "\n" + completed.stderr).splitlines() if line.strip()]
    faults = [line for line in lines if re.match(r"(?:error|unable|unsupported|warning)", line, re.IGNORECASE)]
    if completed.returncode and not any(line.lower().startswith("error") for line in faults):
        faults = [f"error: exit code {completed.returncode}", *(faults or lines[-1:])]
    return [re.sub(r"\S*/\S*", "(file)", line)[:200] for line in faults or lines[-1:]]


def _is_phase(image: Path) -> bool:
    types = _image_types(_read_sidecar(image))
    suffix = re.search(r"_(?:ph|real|imaginary)(?:\d|_|\.)", image.name)
    return suffix is not None or bool(types & {"PHASE", "IMAGINARY", "REAL"})


def _read_sidecar(image: Path) -> dict[str, Any]:
    return read_json(image.with_name(image.name.removesuffix(".nii.gz") + ".json"))


def _row(series: Series, work: Path, image: Path) -> dict[str, Any]:
    sidecar = _read_sidecar(image)
    scanner = {column: sidecar[key] for key, column in SCANNER_COLUMNS.items() if sidecar.get(key)}
    contrast = contrast_from_sidecar(sidecar, series.has_agent)
    row = {"subject": series.subject, "session": series.session, "contrast": contrast}
    return {**row, "path": str(image.relative_to(work)), "age_years": series.age_years, "sex": series.sex, **scanner}


def contrast_from_sidecar(sidecar: dict[str, Any], has_agent: bool = False) -> str:
    """The contrast of a dcm2niix sidecar by this module's rules; ``"unknown"`` if none applies.

    ``has_agent`` comes from the DICOM header: dcm2niix writes nothing about contrast agents.
    """
    types = _image_types(sidecar)
    if types & {"ADC", "ADC_UNSPECIFIED"}:
        return "ADC"
    if types & {"TRACE", "TRACEW"}:
        return "DWI"
    if types & _DERIVED_TYPES or any(word in name for name in types for word in _DERIVED_WORDS):
        return UNKNOWN
    from_times = _contrast_from_times(sidecar)
    for key in ("SeriesDescription", "ProtocolName"):
        reading = read_series_text(str(sidecar.get(key) or ""))
        if reading is None:
            continue
        weighted = {*reading.candidates, reading.contrast} <= _WEIGHTED | {UNKNOWN}
        if from_times != UNKNOWN and weighted and (reading.contrast != UNKNOWN or reading.candidates):
            # Many headers of a FLAIR lack its inversion time; without it the times are those of a T2w.
            same = (from_times, reading.contrast) in (("T1w", "T1ce"), ("T2w", "FLAIR"))
            contrast = reading.contrast if same else from_times
        else:
            contrast = reading.contrast
        return "T1ce" if contrast == "T1w" and has_agent and not reading.denies_agent else contrast
    return "T1ce" if from_times == "T1w" and has_agent else from_times


def _contrast_from_times(sidecar: dict[str, Any]) -> str:
    sequence = set(re.split(r"\W+", " ".join(map(str, _as_list(sidecar.get("ScanningSequence")))).upper()))
    keys = ("EchoTime", "RepetitionTime", "InversionTime")
    echo, repetition, inversion = (_seconds(sidecar.get(key)) for key in keys)
    if "EP" in sequence or echo is None:
        return UNKNOWN
    if "GR" in sequence and inversion is not None and 0.6 <= inversion <= 1.3 and echo < 0.01:
        return "T1w"
    if "SE" in sequence and "GR" not in sequence and echo >= 0.07 and repetition is not None and repetition >= 2:
        if inversion is None and "IR" not in sequence:
            return "T2w"
        if inversion is not None and 1.5 <= inversion <= 3 and repetition >= 4:
            return "FLAIR"
    return UNKNOWN


def _image_types(sidecar: dict[str, Any]) -> set[str]:
    return {str(name).upper() for name in _as_list(sidecar.get("ImageType"))}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _seconds(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None
