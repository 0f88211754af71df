"""Checking sessions against the input contract of a model.

Scans go through the hooks and are brought onto the model's grid, as in `prepare` and `predict`; nothing is written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from brainfound.contrasts import CONTRASTS, parse_contrast
from brainfound.data.checking.contract import InputContract
from brainfound.data.checking.image_rules import cut_finding, picture_findings, position_findings
from brainfound.data.checking.rules import (
    Finding,
    Level,
    age_finding,
    contrast_finding,
    field_of_view_findings,
    intensity_findings,
    missing_contrast_findings,
    orientation_findings,
    overlap_finding,
    skull_finding,
    slices_finding,
    spacing_finding,
    worst_level,
)
from brainfound.data.cohort import Session
from brainfound.data.hooks import Hook, run_hooks
from brainfound.data.preprocessing.session import next_scan_note
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.preprocessing.stack import ScanQuality, Stack
from brainfound.data.preprocessing.stack_builder import StackBuilder
from brainfound.data.reading.scan import Scan, load_scan, read_header
from brainfound.data.store import Store
from brainfound.errors import ScanError, UsageError


@dataclass(frozen=True)
class CheckedScan:
    """One file with its findings; ``quality`` is None if it cannot be used.

    ``is_used`` is False for a contrast that the model does not read, and for a scan in whose place another one of its
    contrast is used.
    """

    contrast: str
    file: Path
    findings: tuple[Finding, ...]
    quality: ScanQuality | None = None
    is_used: bool = True

    @property
    def level(self) -> Level:
        return worst_level(self.findings)

    def check_level(self, check: str) -> Level | None:
        """The gravest level of one check; None if it was not applied."""
        matching = [finding for finding in self.findings if finding.check == check]
        return worst_level(matching) if matching else None


@dataclass(frozen=True)
class CheckedSession:
    """One session: its scans, and the findings about all of them."""

    subject: str
    session: str
    scans: tuple[CheckedScan, ...]
    findings: tuple[Finding, ...] = ()
    stack: Stack | None = field(default=None, repr=False)

    @property
    def level(self) -> Level:
        return worst_level([*self.findings, *(finding for scan in self.scans for finding in scan.findings)])


def check_session(
    session: Session, preprocessing: Preprocessing, contract: InputContract, hooks: Sequence[Hook] = ()
) -> CheckedSession:
    """Check the scans of one session, as a model with this preprocessing and contract would read them."""
    with tempfile.TemporaryDirectory() if hooks else nullcontext("") as folder:
        return _SessionCheck(session, preprocessing, contract, hooks, Path(folder)).run()


@dataclass
class _SessionCheck:
    session: Session
    preprocessing: Preprocessing
    contract: InputContract
    hooks: Sequence[Hook]
    folder: Path
    reference: Path | None = None
    """The reference scan after its hooks."""
    builder: StackBuilder | None = None
    scans: list[CheckedScan] = field(default_factory=list)

    def run(self) -> CheckedSession:
        session = self.session
        wanted, repeated = session.candidates(self.preprocessing.contrasts)
        for contrast, files in wanted.items():  # each check uses the results of those before it
            self._check_candidates(contrast, files)
        for contrast, file, other in repeated:
            finding = Finding("contrast", "fail", f"the same file is listed as {other}", "Name each file once")
            self.scans.append(CheckedScan(contrast, file, (finding,), is_used=contrast not in wanted))
        for contrast, file in [*session.scans.items(), *session.extra_scans]:
            if contrast not in self.preprocessing.contrasts:
                self.scans.append(self._check_unread(contrast, file, bool(wanted)))
        findings: list[Finding | None] = [
            *missing_contrast_findings(session.scans, self.contract),
            age_finding(session.covariates.get("age_years"), self.contract),
        ]
        stack = None
        if self.builder is not None:
            stack = self.builder.build(subject=session.subject, session=session.session)
            findings.insert(0, slices_finding(len(stack.pixels), self.contract))
        return CheckedSession(session.subject, session.session, tuple(self.scans), _present(findings), stack)

    def _check_candidates(self, contrast: str, files: list[Path]) -> None:
        """Check the scans of one contrast until one can be used."""
        refused: list[CheckedScan] = []
        for place, file in enumerate(files, start=1):
            scan = self._check(contrast, file)
            if scan.quality is None:
                refused.append(scan)
                continue
            if refused:
                note = next_scan_note(place, len(files), refused[0].findings[-1].message)
                scan = replace(scan, findings=(*scan.findings, Finding("contrast", "warn", note)))
                refused = [replace(other, is_used=False) for other in refused]
            message = "another scan of this contrast is used"
            note_only = (Finding("contrast", "note", message),)
            further = [CheckedScan(contrast, other, note_only, is_used=False) for other in files[place:]]
            self.scans += [*refused, scan, *further]
            return
        self.scans += refused

    def _check(self, contrast: str, file: Path) -> CheckedScan:
        findings: list[Finding] = [contrast_finding(contrast, self.contract)]
        try:
            read_header(file)
            processed = run_hooks(file, self.hooks, contrast=contrast, reference=self.reference, folder=self.folder)
            scan = load_scan(processed)
        except ScanError as error:
            return CheckedScan(contrast, file, (*findings, _failed("file", error)))
        findings += [Finding("file", "ok"), *orientation_findings(scan)]
        try:
            if self.builder is None:
                self.builder = StackBuilder(self.preprocessing, contrast, scan, file.name)
            else:
                self.builder.add(contrast, scan, file.name)
        except ScanError as error:
            return CheckedScan(contrast, file, (*findings, _failed("field", error)))
        self.reference = self.reference or processed
        findings += image_findings(scan, self.builder, self.contract)
        return CheckedScan(contrast, file, tuple(findings), self.builder.quality[-1])

    def _check_unread(self, contrast: str, file: Path, has_others: bool) -> CheckedScan:
        if contrast not in CONTRASTS:
            finding = Finding("contrast", "fail", f"unknown contrast {contrast!r}", _name_remedy(contrast))
        elif has_others:
            finding = Finding("contrast", "note", f"the model does not read {contrast}")
        else:
            message = f"the session has none of the model's contrasts ({', '.join(self.preprocessing.contrasts)})"
            finding = Finding("contrast", "fail", message, "Give one of them, or use a model that reads what there is")
        return CheckedScan(contrast, file, (finding,), is_used=False)


def image_findings(scan: Scan, builder: StackBuilder, contract: InputContract) -> list[Finding]:
    """The findings on the image of a scan that a stack was just built from or extended by."""
    quality = builder.quality[-1]
    is_reference = len(builder.quality) == 1
    pixels, spacing_mm = builder.channel(quality.contrast), np.linalg.norm(builder.affine[:3, :3], axis=0)
    findings: list[Finding | None] = [
        spacing_finding(quality, contract),
        *intensity_findings(scan, quality, contract, builder.preprocessing),
        *picture_findings(scan, quality),
        skull_finding(quality, contract),
        *field_of_view_findings(quality, contract),
        cut_finding(pixels, spacing_mm, quality, contract) if is_reference else None,
        *position_findings(pixels, spacing_mm, quality, contract),
        None if is_reference else overlap_finding(quality),  # others are compared with the first
    ]
    return list(_present(findings))


def _present(findings: Iterable[Finding | None]) -> tuple[Finding, ...]:
    return tuple(finding for finding in findings if finding is not None)


def _failed(check: str, error: ScanError) -> Finding:
    return Finding(check, "fail", error.fault, error.remedy or "")


def _name_remedy(contrast: str) -> str:
    try:
        parse_contrast(contrast)
    except UsageError as error:
        return error.remedy or ""
    return ""


def load_model_contract(folder: str | Path) -> tuple[Preprocessing, InputContract]:
    """The preprocessing and the contract of a run, an export, a bundle, or a store (measured now)."""
    folder = Path(folder)
    if (folder / "store.json").is_file():
        store = Store.open(folder)
        return store.preprocessing, InputContract.of(store)
    if (folder / "export").is_dir():
        folder = folder / "export"
    preprocessing = Preprocessing.load(folder)
    contract = InputContract.load_or_none(folder)
    return preprocessing, contract or InputContract.from_preprocessing(preprocessing)


def scan_to_dict(scan: CheckedScan, keep_ids: bool) -> dict[str, Any]:
    """A scan as plain values for JSON; the file name is included only if identifiers are kept."""
    row: dict[str, Any] = {"contrast": scan.contrast, "level": scan.level, "is_used": scan.is_used}
    if keep_ids:
        row["file"] = scan.file.name
    row["checks"] = {check: scan.check_level(check) for check in dict.fromkeys(f.check for f in scan.findings)}
    row["findings"] = [asdict(finding) for finding in scan.findings if finding.message]
    if scan.quality is not None:
        row |= {name: value for name, value in scan.quality.to_row().items() if name not in ("file", "notes")}
    return row
