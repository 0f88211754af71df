"""The subject, the visit and the site that a free-form identifier names; `persons` compares the subjects.

An identifier is what a name of a file or folder says besides the contrast: ``p07_v2_mpr`` is the subject ``p07`` at the
visit ``v2``, scanned with the protocol ``mpr``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from brainfound.data.sources.file_names import is_contrast_name
from brainfound.data.sources.words import AMBIGUOUS_WORDS, PROTOCOL_WORDS

SEPARATOR, _WORD = r"[_\-. ]", re.compile(r"[^_\-. ]+")
YEAR, MONTH, DAY = r"(?:19|20)\d{2}", r"(?:0[1-9]|1[0-2])", r"(?:0[1-9]|[12]\d|3[01])"
_MONTH_NAME = r"(?:jan|feb|mar|mrz|apr|may|mai|jun|jul|aug|sep|oct|okt|nov|dec|dez)"
_DATE = (
    rf"(?:{YEAR}(?:{MONTH}{DAY}|-{MONTH}-{DAY}|\.{MONTH}\.{DAY}|_{MONTH}_{DAY})"
    rf"|{DAY}[-._]{DAY}[-._]{YEAR}"
    rf"|\d{{1,2}}[-._]?{_MONTH_NAME}[-._]?{YEAR}|{YEAR}[-._]?{_MONTH_NAME}[-._]?\d{{1,2}})"
)
_CLOCK = r"(?:[01]\d|2[0-3])[0-5]\d[0-5]\d(?:\.\d+)?"
_NUMBER = rf"{SEPARATOR}?\d{{1,4}}(?:[-.]\d{{1,2}})?[a-z]?"
_UNIT = r"(?:months?|mths?|mo|weeks?|wks?|years?|yrs?|yr|days?|hours?|hrs?)"
_OPERATION = r"(?:op|operative|surgery|surgical|treatment|tx|rt|chemo|therapy)"
SESSION = (
    rf"(?:ses-[a-z0-9]+|(?<={SEPARATOR}){_DATE}_{_CLOCK}|{_DATE}(?:T?{_CLOCK})?"
    rf"|(?:ses|sess|session|visit|vis|wave|tp|time[-_ ]?point|time|study|exam|{_UNIT}|fu|fup|follow[-_ ]?up|baseline|bl"
    rf"|scan|mr|v|m|w|y|d){_NUMBER}|\d{{1,3}}{_UNIT}(?![-_ ]\d)|\d{{1,3}}[mwy]"
    rf"|baseline|base|bl|bsl|screening|screen|scr|sc|initial|init|follow[-_ ]?up|fup?|rescan|retest"
    rf"|(?:pre|post)[-_]?{_OPERATION}"
    r"|(?:first|second|third|1st|2nd|3rd|\dth)[-_ ]?(?:visit|scan|exam|session))"
)
_SESSION_IN_NAME = re.compile(rf"(?:(?<={SEPARATOR})|^){SESSION}(?={SEPARATOR}|$)", re.IGNORECASE)
_SHORT_SESSION = re.compile(rf"(?:v|m|w|y|d|mr|scan){_NUMBER}|\d{{1,3}}[mwy]|{_DATE}(?:[T_]?{_CLOCK})?", re.IGNORECASE)
_FIRST_SESSION = re.compile(
    rf"ses-[a-z0-9]+|(?:ses|sess|session|visit|wave|tp|time[-_ ]?point|month|week|follow[-_ ]?up){_NUMBER}"
    rf"|baseline|screening|follow[-_ ]?up|(?:pre|post)[-_]?op|{_DATE}(?:T?{_CLOCK})?",
    re.IGNORECASE,
)
"""Sessions that are believed before the subject as well; ``SC_01`` and ``study2_01`` may be subjects of a group."""
_OTHER_VISIT = (
    r"(?:(?:besuch|untersuchung|termin|kontrolle|zeitpunkt|zp|u|visite|visita|examen)[-_]?\d{1,2}|i{1,3}|iv"
    r"|erst(?:untersuchung)?|verlauf(?:skontrolle)?|kontrolle|vorher|nachher|vor|nach|prae?[-_]?op|before|after|avant"
    r"|apres|prima|dopo|antes|despues"
    rf"|{_MONTH_NAME}[-_.]?(?:\d\d){{1,2}})"
)
"""Words of visits in other languages, and short dates; a subject may be named like them."""
MAYBE_SESSION = re.compile(
    rf"^\d_\d(?=_)|^(?:fup?\d?|bl|base(?:line)?|scr?|screening|follow-?up)(?={SEPARATOR}\d{{3,}})|"
    rf"(?:(?<=\d)(?!\d)|(?<=\d[a-z])|(?<={SEPARATOR})|^)(?:{SESSION}|t\d{{1,2}}|first|second|third|last)(?={SEPARATOR}|$)"
    rf"|(?<=\d)[a-z](?={SEPARATOR}|$)|(?<={SEPARATOR})[a-z]$"
    rf"|(?:(?<=\d)|(?<={SEPARATOR})){_OTHER_VISIT}(?={SEPARATOR}|$)"
    rf"|(?<=[a-z\d])(?:ses|session|visit|tp|wk|week|month|year|baseline|screening|follow-?up|(?:pre|post)[-_]?op)(?:[-_]?\d+)?(?={SEPARATOR}|$)",
    re.IGNORECASE,
)
"""All that may be a visit, also without a separator: ``p07v2``, ``p07b``, ``annatp1``."""
_GROUP = (
    r"(?:(?:site|cent(?:er|re)|hospital|clinic|ward|trial|scanner|group|batch|cohort|part|fold|set|dataset)(?:[_\-]?(?:\d+|[a-z]))?"
    r"|controls?|patients|cases|healthy)"
)
GROUP_IN_NAME = re.compile(rf"{_GROUP}(?={SEPARATOR}|$)", re.IGNORECASE)
_PROTOCOL_NUMBER = re.compile(r"\d+mm|\d+x\d+(?:x\d+)?|(?:tr|te|ti|fa|fov|mb|etl)\d+")
_PUBLIC_FORMS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?P<subject>BraTS-(?:[A-Z]+-)+\d+)-(?P<session>\d{1,3})",
        r"(?P<subject>BraTS(?:20)?\d\d(?:_[A-Z]+\d*|_2013)+_\d{1,5}(?:_1)?)",  # up to 2020, by institution
        r"(?P<subject>BraTS(?:20)?\d\d_\d{1,5})",
        r"(?P<subject>IXI\d{3})-(?P<site>Guys|HH|IOP)-\d{4}",
        r"(?P<subject>UPENN-GBM-\d{5})_(?P<session>\d{2})",
        r"(?P<subject>UCSF-PDGM-\d{3,5})(?:_(?P<session>FU[A-Z0-9]+))?(?:_nifti)?",
        r"(?:ADNI|PPMI|AIBL)_(?P<subject>[\dS_]+?)_MR_.*_S\d+_I\d+",  # names of the archives of LONI
        r"(?P<subject>(?:OASIS-TRT-20|NKI-RS-22|NKI-TRT-20|MMRR-21|HLN-12|Twins-2|MMRR-3T7T-2|Afterthought)-\d+)",
        r"(?P<subject>OAS[12]_\d{4})_(?P<session>MR\d+)(?:[_-].*)?",
        r"(?P<subject>OAS[34]\d{4})_(?:[A-Z]+_)?(?P<session>d\d{4})",
        r"(?:ADNI_)?(?P<subject>\d{3}_S_\d{4})(?:_(?P<session>.+))?",
        r"(?P<subject>\d{7})_2\d{4}_(?P<session>\d{1,2})_\d{1,2}",  # UK Biobank: EID, field, instance, array
        r"(?P<subject>TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}|\d{3}-\d{2}-\d{4})",
        r"(?P<subject>sub-[A-Z0-9]+)(?:_ses-(?P<session>[A-Z0-9]+))?(?:_.*)?",
    )
)
"""Identifiers of public data sets. Each must match in full."""


@dataclass(frozen=True)
class SubjectIdentity:
    """The subject and the session that an identifier names."""

    subject: str
    """Empty if the identifier names no subject."""
    session: str | None
    site: str | None
    certain: bool
    """Whether the identifier has the form of a public data set."""
    words: tuple[str, ...] = field(default=(), repr=False)
    """Words besides the subject that are not known: those of a protocol, or, rarely, of another person."""


def parse_identifier(identifier: str) -> SubjectIdentity:
    """Subject, session and site of an identifier: without visits and protocol words, all of it is the subject.

    >>> parse_identifier("IXI002-Guys-0828")
    SubjectIdentity(subject='IXI002', session=None, site='Guys', certain=True)
    >>> parse_identifier("patient1_v2_mpr")
    SubjectIdentity(subject='patient1', session='v2', site=None, certain=False)
    """
    subject, sessions = _split_sessions(identifier)
    subject = _without_protocol(subject)
    session = "_".join(sessions) or None
    for text, found in ((_without_protocol(identifier), None), (subject, session)):
        for form in _PUBLIC_FORMS:
            if match := form.fullmatch(text):
                parts = match.groupdict()
                return SubjectIdentity(parts["subject"], parts.get("session") or found, parts.get("site"), certain=True)
    return SubjectIdentity(subject, session, None, certain=False)


def is_session_name(text: str) -> bool:
    """Whether the whole text names a session: ``ses-1``, ``baseline``, ``2019-03-01``."""
    return re.fullmatch(SESSION, text, re.IGNORECASE) is not None


def is_group(text: str) -> bool:
    """Whether the whole text names a group of subjects: ``site1``, ``batch_b``, ``controls``."""
    return re.fullmatch(_GROUP, text, re.IGNORECASE) is not None


def has_number(text: str) -> bool:
    """Whether a name has the number of a subject; that of a group does not count.

    >>> has_number("p1"), has_number("site1"), has_number("site1_p1"), has_number("anna")
    (True, False, True, False)
    """
    return re.search(r"\d", GROUP_IN_NAME.sub("", text, count=1) if GROUP_IN_NAME.match(text) else text) is not None


def could_be_subject(session: str, before: str) -> bool:
    """Whether a short session word or a date may also name a subject: ``HC_m01`` may be a man, ``p1_m01`` is a month.

    >>> could_be_subject("m01", "HC"), could_be_subject("m01", "p1"), could_be_subject("visit1", "HC")
    (True, False, False)
    """
    is_short = _SHORT_SESSION.fullmatch(session) is not None or is_long_number(session)
    return is_short and not has_number(MAYBE_SESSION.sub("", before))


def is_long_number(session: str) -> bool:
    """Whether a session has a number as large as those of subjects: ``study101``."""
    return re.fullmatch(r"(?!ses-)[a-z]+[-_ ]?\d{3,}", session, re.IGNORECASE) is not None


def keep_words(subject: str, number: int) -> str:
    """The first words of a name, with their separators."""
    return subject[: [word.end() for word in _WORD.finditer(subject)][number - 1]] if number else ""


def _split_sessions(identifier: str) -> tuple[str, list[str]]:
    """The identifier without its visits, and the visits without a time of day."""
    found = list(_SESSION_IN_NAME.finditer(identifier))
    rest = _without_protocol(_without(identifier, [match.span() for match in found]))
    taken: list[re.Match[str]] = []
    for match in found:
        before = _without(identifier[: match.start()], [other.span() for other in taken])
        if before:
            is_visit = not could_be_subject(match.group(), before) and not is_group(before)
        else:
            is_visit = _FIRST_SESSION.fullmatch(match.group()) is not None or not rest
            is_date = re.match(_DATE, match.group(), re.IGNORECASE) is not None
            is_visit &= not could_be_subject(match.group(), "") or (is_date and has_number(rest))
            is_visit &= not is_date or not rest.isdecimal()  # 20200101_3 may be the third person of a day
        if is_visit:
            taken.append(match)
    dates = [re.match(_DATE, match.group(), re.IGNORECASE) for match in taken]
    sessions = [date.group() if date else match.group() for date, match in zip(dates, taken, strict=True)]
    return _without(identifier, [match.span() for match in taken]), sessions


def _without(text: str, spans: list[tuple[int, int]]) -> str:
    for start, end in reversed(spans):
        left, right = text[:start].rstrip("_-. "), text[end:].lstrip("_-. ")
        text = left + (text[len(left) : start] if left and right else "") + right
    return text.strip("_-. ")


def _without_protocol(identifier: str) -> str:
    """Without protocol words behind the subject's number; before it (``cor_07``) they may name a group."""
    words = list(_WORD.finditer(identifier))
    protocol = [is_protocol(word.group().lower()) for word in words]
    numbered = any(has_number(word.group()) for word, known in zip(words, protocol, strict=True) if not known)
    spans, seen_number = [], not numbered
    for word, known in zip(words, protocol, strict=True):
        if known and seen_number:
            spans.append(word.span())
        seen_number |= not known and has_number(identifier[: word.end()])
    return _without(identifier, spans)


def is_protocol(word: str) -> bool:
    known = word in PROTOCOL_WORDS or _PROTOCOL_NUMBER.fullmatch(word) is not None
    return known or (is_contrast_name(word) and word not in AMBIGUOUS_WORDS)
