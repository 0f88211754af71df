"""Preparing one session: from files to a stack, with a reason for every file that is not used."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from brainfound.contrasts import CONTRASTS, parse_contrast
from brainfound.data.cohort import Session
from brainfound.data.hooks import Hook, run_hooks
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.preprocessing.stack import ScanQuality, Stack
from brainfound.data.preprocessing.stack_builder import StackBuilder
from brainfound.data.reading.scan import MAX_MASK_VALUES, Scan, labels_in, load_scan
from brainfound.errors import ScanError, UsageError

FURTHER_SCAN_REASON = "another scan of this contrast"
"""Prefix of the reason for a further scan of a contrast, which is not faulty."""
NOT_IN_COHORT_REASON = "no part of the cohort"
"""Prefix of the reason for a file of the source that is not a scan of the cohort, and not faulty."""


@dataclass(frozen=True)
class UnusedFile:
    """A file that is not in the stack, its listed contrast (or ``mask``), and the reason."""

    file: Path
    contrast: str
    reason: str

    @property
    def is_further_scan(self) -> bool:
        """Not faulty: the session has another scan of the contrast."""
        return self.reason.startswith(FURTHER_SCAN_REASON)


@dataclass(frozen=True)
class PreparedSession:
    """A session's stack (None if no scan can be used), the files left out of it, and the quality of each scan in it."""

    stack: Stack | None
    not_used: list[UnusedFile] = field(default_factory=list)
    quality: list[ScanQuality] = field(default_factory=list)

    @property
    def refused(self) -> list[UnusedFile]:
        return [file for file in self.not_used if not file.is_further_scan]

    @property
    def further_scans(self) -> list[UnusedFile]:
        return [file for file in self.not_used if file.is_further_scan]


def next_scan_note(place: int, num_scans: int, reason: str) -> str:
    """The note on a scan that is used since those before it cannot be; ``reason`` is that of the first.

    Its details are left out, since they may name a file.
    """
    why = re.split(r": | \(", reason)[0]
    return f"scan {place} of {num_scans} of this contrast is used, since the first cannot be ({why})"


def prepare_session(
    session: Session,
    preprocessing: Preprocessing,
    mask: str = "mask",
    hooks: Sequence[Hook] = (),
    inspect: Callable[[Scan, StackBuilder], None] | None = None,
    refuse_label_maps: bool = False,
) -> PreparedSession:
    """Read and prepare one session; one scan at a time is in memory. ``mask`` is the column of the stack's mask.

    ``inspect`` is called with each scan that was accepted, after the builder has added it. ``refuse_label_maps``: a
    scan that is a label map is not used; one that may be gets a note.
    """
    with tempfile.TemporaryDirectory() if hooks else nullcontext("") as folder:
        return _Preparation(session, preprocessing, mask, hooks, Path(folder), inspect, refuse_label_maps).run()


@dataclass
class _Preparation:
    session: Session
    preprocessing: Preprocessing
    mask: str
    hooks: Sequence[Hook]
    folder: Path
    inspect: Callable[[Scan, StackBuilder], None] | None = None
    refuse_label_maps: bool = False
    not_used: list[UnusedFile] = field(default_factory=list)

    def run(self) -> PreparedSession:
        builder: StackBuilder | None = None
        reference: Path | None = None
        for contrast, files in self._select_scans().items():
            first_reason = ""
            for place, source in enumerate(files, start=1):
                try:
                    # Other scans are registered to the reference scan after its hooks.
                    file = run_hooks(source, self.hooks, contrast=contrast, reference=reference, folder=self.folder)
                    scan = load_scan(file)
                    labels = labels_in(scan) if self.refuse_label_maps else "no"
                    if labels == "surely":
                        expected, remedy = "an image", "Give the image from which it was drawn, and this one as a mask"
                        raise ScanError("a mask or label map", where=source.name, expected=expected, remedy=remedy)
                    if builder is None:
                        # If this fails, the contrast's next scan is the reference, or that of the next contrast.
                        builder = StackBuilder(self.preprocessing, contrast, scan, source.name)
                        reference = file
                    else:
                        builder.add(contrast, scan, source.name)
                    if labels == "perhaps":
                        builder.note(f"at most {MAX_MASK_VALUES} different values, as in a mask or label map")
                    if self.inspect is not None:
                        self.inspect(scan, builder)
                    del scan
                except ScanError as error:
                    self._refuse(source, contrast, error.reason)
                    first_reason = first_reason or error.what
                    continue
                if place > 1:
                    builder.note(next_scan_note(place, len(files), first_reason))
                for further in files[place:]:
                    self._refuse(further, contrast, f"{FURTHER_SCAN_REASON} is used: {source.name}")
                break
        if builder is None:
            return PreparedSession(None, self.not_used)
        self._add_mask(builder)
        session = self.session
        stack = builder.build(session.covariates, session.subject, session.session)
        return PreparedSession(stack, self.not_used, builder.quality)

    def _select_scans(self) -> dict[str, list[Path]]:
        """Contrast → its scans in the order in which they are tried; other files are refused with a reason."""
        session = self.session
        listed = [*session.scans.items(), *session.extra_scans]
        for contrast, file in listed:
            if contrast not in CONTRASTS:
                try:
                    parse_contrast(contrast)
                except UsageError as error:
                    self._refuse(file, contrast, error.reason)
        wanted, repeated = session.candidates(self.preprocessing.contrasts)
        for contrast, file, other in repeated:
            self._refuse(file, contrast, f"the same file is listed as {other}")
        if not wanted and not repeated:
            names = ", ".join(self.preprocessing.contrasts)
            for contrast, file in session.scans.items():
                if contrast in CONTRASTS:
                    self._refuse(file, contrast, f"the session has none of the wanted contrasts ({names})")
        return wanted

    def _add_mask(self, builder: StackBuilder) -> None:
        file = self.session.masks.get(self.mask)
        if file is None:
            return
        try:
            builder.add_mask(load_scan(file, labels=True))
        except ScanError as error:
            self._refuse(file, "mask", error.reason)

    def _refuse(self, file: Path, contrast: str, reason: str) -> None:
        self.not_used.append(UnusedFile(file, contrast, reason))
