"""``brainfound check``: compare scans with the input contract of a model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brainfound.cli.predict import is_cohort
from brainfound.cli.terminal import (
    AsJson,
    Hooks,
    KeepIds,
    Quiet,
    note_absent_contrasts,
    print_note,
    print_table,
    progress_bar,
    require_picture,
)
from brainfound.errors import EXIT_SOME_REJECTED, UsageError

if TYPE_CHECKING:
    from brainfound.data.checking.check import CheckedSession
    from brainfound.data.checking.contract import InputContract
    from brainfound.data.checking.rules import Finding
    from brainfound.data.cohort import Session
    from brainfound.data.hooks import Hook
    from brainfound.data.preprocessing.settings import Preprocessing
    from brainfound.data.store.contact_sheet import SessionCard

COLUMN_LABELS = {
    "contrast": "name",
    "file": "read",
    "orientation": "orient",
    "intensity": "values",
    "position": "place",
}
"""Short column titles of checks."""
MAX_CARDS = 60
"""Maximum number of sessions in the picture."""


def check(
    source: Annotated[
        list[str],
        typer.Argument(help="A cohort (folder or manifest), or the scans of one session (FILE or CONTRAST=FILE)."),
    ],
    model: Annotated[
        str | None, typer.Option(help="A run, export, bundle or Hub id to check against; also a store.")
    ] = None,
    contrasts: Annotated[str | None, typer.Option(help="Without --model: comma-separated, such as T1w,FLAIR.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture of slices as the model sees them.")] = None,
    hook: Hooks = None,
    keep_ids: KeepIds = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check scans against the input contract of a model: ✓ matches, ! needs a look, ✗ unfit for the model.

    Exit code 3 if any scan has a ✗.
    """
    from brainfound.data.hooks import load_hooks

    if png is not None:
        require_picture(png)
    hooks = load_hooks(hook or ())
    preprocessing, contract = _load_contract(model, contrasts)
    sessions, are_files = _sessions(source, preprocessing)
    if contrasts is not None:
        there = Counter(contrast for session in sessions for contrast in session.scans)
        note_absent_contrasts(preprocessing.contrasts, there)
    report = _Report(keep_ids or are_files, are_files, with_cards=png is not None)
    with progress_bar("checking sessions", quiet or as_json) as progress:
        report.add_all(sessions, preprocessing, contract, hooks, progress)
    if png is not None:
        report.write_picture(png, preprocessing)
    if as_json:
        print(json.dumps(report.facts(contract), indent=1))
    else:
        report.show()
    if model is not None and not contract.is_measured:
        print_note("the model carries no input contract: only its preprocessing was checked, the position not compared")
    if contract.hooks and not hooks:
        print_note(f"the model's scans went through {', '.join(contract.hooks)} first; these were checked as they are")
    if report.has_failed:
        raise typer.Exit(EXIT_SOME_REJECTED)


def _load_contract(model: str | None, contrasts: str | None) -> tuple[Preprocessing, InputContract]:
    from brainfound.data.checking.check import load_model_contract
    from brainfound.data.checking.contract import InputContract
    from brainfound.data.preprocessing.settings import Preprocessing
    from brainfound.recipes import validate

    if model is None:
        content = {} if contrasts is None else {"contrasts": contrasts}
        preprocessing = validate(Preprocessing, content, where="--contrasts")
        return preprocessing, InputContract.from_preprocessing(preprocessing)
    if contrasts is not None:
        raise UsageError("a model has contrasts of its own", where="--contrasts", remedy="Leave --contrasts out")
    if not Path(model).exists() and model.count("/") == 1:
        from brainfound.inference.loading import local_folder

        return load_model_contract(local_folder(model))
    return load_model_contract(model)


def _sessions(source: list[str], preprocessing: Preprocessing) -> tuple[list[Session], bool]:
    """The sessions, and whether they were given as individual files."""
    from brainfound.data.cohort import Cohort
    from brainfound.data.given_scans import parse_inputs, session_from_scans

    paths, contrast_paths = parse_inputs(source)
    if is_cohort(paths, contrast_paths):
        return list(Cohort.read(paths[0]).sessions()), False
    session, notes = session_from_scans(paths, contrast_paths, preprocessing.contrasts, allow_others=True)
    for note in notes:
        print_note(note)
    return [session], True


@dataclass
class _Report:
    """The findings, as text, JSON and picture."""

    with_names: bool
    are_files: bool
    with_cards: bool
    sessions: list[CheckedSession] = field(default_factory=list)
    cards: dict[int, SessionCard] = field(default_factory=dict)

    def add_all(
        self,
        sessions: list[Session],
        preprocessing: Preprocessing,
        contract: InputContract,
        hooks: tuple[Hook, ...],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        from dataclasses import replace

        from brainfound.data.checking.check import check_session
        from brainfound.data.store.contact_sheet import choose_sessions

        evenly_spaced = set(choose_sessions(len(sessions), (), MAX_CARDS))
        num_flagged = 0
        for row, session in enumerate(sessions):
            checked = check_session(session, preprocessing, contract, hooks)
            # Keep only as many flagged sessions as fit in the picture: there may be thousands.
            flagged = checked.level in ("warn", "fail") and num_flagged < MAX_CARDS
            if self.with_cards and checked.stack is not None and (row in evenly_spaced or flagged):
                self.cards[row] = self._card(row, checked)
                num_flagged += flagged
            self.sessions.append(replace(checked, stack=None))
            if progress:
                progress(row + 1, len(sessions))

    @property
    def has_failed(self) -> bool:
        return any(session.level == "fail" for session in self.sessions)

    def _label(self, row: int, session: CheckedSession) -> str:
        return f"{row} {session.subject} {session.session}" if self.with_names and not self.are_files else str(row)

    def _card(self, row: int, checked: CheckedSession) -> SessionCard:
        from brainfound.data.store.contact_sheet import card_from_stack

        assert checked.stack is not None
        notes = {scan.contrast: _warning_messages(scan.findings) for scan in checked.scans if scan.is_used}
        notes[""] = _warning_messages(checked.findings)
        refused = frozenset(scan.contrast for scan in checked.scans if scan.is_used and scan.quality is None)
        return card_from_stack(checked.stack, self._label(row, checked), notes, refused)

    def show(self) -> None:
        from brainfound.data.checking.rules import LEVEL_SYMBOLS, SCAN_CHECKS, SESSION_CHECKS

        names = ("file",) if self.with_names else ()
        rows = []
        for number, session in enumerate(self.sessions):
            for place, scan in enumerate(session.scans):
                signs = [LEVEL_SYMBOLS[scan.check_level(check)] for check in SCAN_CHECKS]
                common = [_sign(session.findings, check) if place == 0 else "" for check in SESSION_CHECKS]
                file = (scan.file.name,) if self.with_names else ()
                label = "" if place else self._label(number, session)
                rows.append(
                    (label, scan.contrast, *file, LEVEL_SYMBOLS[scan.level] if scan.is_used else "·", *signs, *common)
                )
        titles = [COLUMN_LABELS.get(check, check) for check in (*SCAN_CHECKS, *SESSION_CHECKS)]
        print_table(("session", "contrast", *names, "all", *titles), rows)
        for line in self._problems():
            print(line)
        print(self._summary())

    def _problems(self) -> list[str]:
        """One line per distinct problem, worst first: count, example and remedy."""
        from brainfound.data.checking.rules import LEVEL_SYMBOLS, LEVELS

        groups: dict[tuple[str, str, str], list[str]] = {}
        for session in self.sessions:
            findings = [finding for scan in session.scans for finding in scan.findings] + list(session.findings)
            for finding in findings:
                if finding.message:
                    key = (finding.level, finding.check, finding.remedy or finding.message)
                    groups.setdefault(key, []).append(finding.message)
        lines = []
        ordered = sorted(groups.items(), key=lambda item: (-LEVELS.index(item[0][0]), item[0][1]))  # type: ignore[arg-type]
        for (level, name, remedy), messages in ordered:
            times = f" ({len(messages)} times, the first)" if len(messages) > 1 else ""
            advice = "" if remedy == messages[0] else f". {remedy}"
            lines.append(f"{LEVEL_SYMBOLS[level]} {COLUMN_LABELS.get(name, name)}{times}: {messages[0]}{advice}")  # type: ignore[index]
        return lines

    def _summary(self) -> str:
        from brainfound.data.sources.tables import count_noun

        used = [scan for session in self.sessions for scan in session.scans if scan.is_used or scan.level == "fail"]
        counts = {level: sum(scan.level == level for scan in used) for level in ("ok", "note", "warn", "fail")}
        fine = counts["ok"] + counts["note"]
        return (
            f"{count_noun(len(used), 'scan')} of {count_noun(len(self.sessions), 'session')}: "
            f"{fine} ✓, {counts['warn']} !, {counts['fail']} ✗"
        )

    def facts(self, contract: InputContract) -> dict[str, Any]:
        from brainfound.data.checking.check import scan_to_dict
        from brainfound.data.checking.rules import LEVELS

        listed = []
        for row, session in enumerate(self.sessions):
            names = {"subject": session.subject, "session": session.session}
            listed.append(
                {
                    "row": row,
                    **(names if self.with_names and not self.are_files else {}),
                    "level": session.level,
                    "findings": [asdict(finding) for finding in session.findings if finding.message],
                    "scans": [scan_to_dict(scan, self.with_names) for scan in session.scans],
                }
            )
        return {
            "level": max((s.level for s in self.sessions), key=LEVELS.index, default="ok"),
            "has_contract": contract.is_measured,
            "contract": contract.model_dump(mode="json", exclude={"mean_stack"}),
            "sessions": listed,
        }

    def write_picture(self, path: Path, preprocessing: Preprocessing) -> None:
        from brainfound.data.sources.tables import count_noun
        from brainfound.data.store.contact_sheet import choose_sessions, draw_contact_sheet

        rows = list(self.cards)
        flagged = [place for place, row in enumerate(rows) if self.cards[row].is_flagged]
        cards = [self.cards[rows[place]] for place in choose_sessions(len(rows), flagged, MAX_CARDS)]
        foot = f"{len(cards)} of {count_noun(len(self.sessions), 'session')} as the model sees them."
        draw_contact_sheet(cards, preprocessing.contrasts, path, foot)


def _warning_messages(findings: Iterable[Finding]) -> tuple[str, ...]:
    return tuple(finding.message for finding in findings if finding.level in ("warn", "fail") and finding.message)


def _sign(findings: tuple[Finding, ...], name: str) -> str:
    from brainfound.data.checking.rules import LEVEL_SYMBOLS, worst_level

    matching = [finding for finding in findings if finding.check == name]
    return LEVEL_SYMBOLS[worst_level(matching)] if matching else ""
