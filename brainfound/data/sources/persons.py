"""Whether several subjects of a source may be one person, who would leak across splits.

`identifiers` says which subject one name gives; here, all subjects are compared.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import pairwise

from brainfound.data.sources.file_names import natural_sort_key, split_words
from brainfound.data.sources.identifiers import (
    DAY,
    GROUP_IN_NAME,
    MAYBE_SESSION,
    MONTH,
    SEPARATOR,
    SESSION,
    YEAR,
    SubjectIdentity,
    has_number,
    is_group,
    is_protocol,
    keep_words,
    parse_identifier,
)
from brainfound.data.sources.words import PROTOCOL_WORDS

Doubt = tuple[str, str]
"""What is in doubt, and the names."""

_SHORT_MAYBE_DATE = rf"(?:{YEAR}(?:{MONTH})?|\d\d{MONTH}{DAY}|{DAY}{MONTH}\d\d)"
_MAYBE_DATE, _LONG_MAYBE_DATE = (
    re.compile(rf"(?:(?<={SEPARATOR})|^)(?:{pattern})(?={SEPARATOR}|$)")
    for pattern in (_SHORT_MAYBE_DATE, rf"{YEAR}[-._]{MONTH}|{DAY}{DAY}{YEAR}")
)
"""Spellings of dates that may as well be numbers of subjects."""

_GROUP_LIKE_WORDS = {"cor", "sag", "tra", "ax", "obl", "se", "ir", "nd", "fs", "norm", "head", "mag", "3t", "7t"}
_SPM_PREFIX = re.compile(r"^(?:s\d+)?(?:m?w?r?(?:wp|wc|rc|c|p)\d|wm|mw|wr|rw|rm|mr|[rwm])(?=[a-z])")
"""What SPM puts before the name of a scan that it has realigned, warped, corrected or segmented."""
_DATE = re.compile(
    rf"\d{{1,2}}[-._]\d{{1,2}}[-._](?:{YEAR}|\d\d)|\d\d{MONTH}{DAY}|{DAY}{MONTH}\d\d|{YEAR}[-._]?q[1-4]"
    rf"|(?:\d{{1,2}}[-._]?)?[^\W\d_]{{3,9}}[-._]?{YEAR}",
    re.IGNORECASE,
)
"""What is hardly the number of a person."""
_GLUED_VISIT = re.compile(
    r"(?!.*(?:patient|subject|participant|adult)\d)(.*[^\W\d_]{2}?)(?:[dtvmwy]\d{1,2}|bl|sc|fu\d*|pre|post|first|second|third|last)",
    re.IGNORECASE,
)
_MONTHS = re.compile(r"m(?:00|03|06|12|18|24|36|48|60)$", re.IGNORECASE)
_VISIT_IN_LABEL = re.compile(
    rf"(?P<before>(?:pre|post|bl|fu|baseline|follow-?up)(?=\d))?(?P<person>.*?)"
    rf"(?P<visit>(?<=\d)(?:{SESSION}|t\d{{1,2}}|pre|post|first|second|third|last|[a-z])"
    r"|(?<=[a-z]{3})(?:ses|session|visit|tp|baseline|follow-?up|pre|post)\d*)?",
    re.IGNORECASE,
)
"""The visit in a BIDS label: ``p1v2``, ``01b``, ``01post``, ``annaVisit2``, ``pre01``."""
_NUMBERED_NAME = re.compile(r"(.*[^\W\d_]{3})[-_. ]?(0?[1-9])", re.IGNORECASE)
_YEAR_IN_NAME = re.compile(rf"(?<!\d){YEAR}(?:[-_.]?{MONTH}(?:[-_.]?{DAY})?)?(?!\d)")
_SUBJECT_WORDS = {
    *("ad", "adhd", "adult", "ais", "als", "asd", "baby", "case", "child", "con", "control", "ctl", "ctrl", "dementia"),
    *("epi", "epilepsy", "female", "glioma", "hc", "healthy", "infant", "kind", "kontrolle", "male", "mci", "monkey"),
    *("mouse", "ms", "nc", "normal", "old", "paciente", "participant", "pat", "patient", "paziente", "pd", "person"),
    *("phantom", "proband", "rat", "stroke", "sub", "subj", "subject", "sujet", "sujeto", "tia", "tumor", "tumour"),
    *("twin", "volunteer", "young"),
}
_NOT_NAMES = _SUBJECT_WORDS | {
    *("brain", "data", "demo", "example", "head", "image", "pilot", "sample", "scan", "study", "test", "train", "val"),
    *("vol", "volume"),
}
"""Words before the numbers of subjects (``case1``, ``case2``) or before names (``hc_anna``)."""
_MAX_VISITS = 4
"""With more names of one first word, the word names a group and not a person."""
_NEAR_LETTERS = 3
"""Letters of visits are less than this far apart in the alphabet."""


def find_doubt(identities: Sequence[SubjectIdentity]) -> Doubt | None:
    """The first doubt about the subjects of a source; None if each is surely another person."""
    subjects = sorted({identity.subject for identity in identities}, key=natural_sort_key)
    uncertain = sorted({identity.subject for identity in identities if not identity.certain}, key=natural_sort_key)
    return (
        _find_equal(subjects, str.lower, "two subjects differ in capital letters only")
        or _find_equal(subjects, spelling, "two subjects differ in separators or zeros only")
        or _find_equal(uncertain, _sorted_names, "two subjects differ in the order of their words only")
        or _find_equal(uncertain, _without_leading_number, _ONE_OR_TWO)
        or _find_processed(subjects)
        or _find_beginnings(subjects, uncertain)
        or _find_public_endings({identity.subject for identity in identities if identity.certain}, uncertain)
        or _find_equal(subjects, person_words, _ONE_OR_TWO)
        or _find_shared_numbers(subjects, uncertain)
        or _find_dates(uncertain)
        or _find_glued_visits(uncertain)
        or _find_numbered_names(uncertain)
        or _find_names_in_groups(identities)
    )


_ONE_OR_TWO = "they may be two subjects or two visits of one"


def _find_glued_visits(uncertain: Sequence[str]) -> Doubt | None:
    """Names that all end in a visit, some in several: ``annad1``, ``annad2``, ``bobd1``; ``annam00``, ``annam12``."""
    by_stem: dict[str, list[str]] = defaultdict(list)
    for subject in uncertain:
        match = _GLUED_VISIT.fullmatch(subject)
        if not match:
            return None
        by_stem[match.group(1).lower()].append(subject)
    repeated = [named for named in by_stem.values() if len(named) > 1]
    has_first = any(name.lower().endswith("t0") for name in uncertain)
    other_numbers = any(re.search(r"(?<!v)\d+$", _MONTHS.sub("", name.lower())) for name in uncertain)
    are_visits = len(by_stem) > 1 or has_first or not other_numbers
    return (_ONE_OR_TWO, f"{repeated[0][0]} and {repeated[0][1]}") if repeated and are_visits else None


def labels_of_one_person(labels: Iterable[str]) -> list[list[str]]:
    """BIDS labels that may be one person, since they differ in capital letters, leading zeros or a visit only.

    Single letters are visits if they are near each other in the alphabet (``01a``, ``01b``), or if a label has none:
    ``01c`` and ``01p`` may be a control and a patient.
    """
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for label in sorted(set(labels), key=natural_sort_key):
        match = _VISIT_IN_LABEL.fullmatch(label.casefold().removeprefix("sub-"))
        if match is not None:
            person = re.sub(r"(?<!\d)0+(?=\d)", "", match["person"])
            groups[person].append((f"{match['before'] or ''}{match['visit'] or ''}", label))
    found = []
    for group in groups.values():
        letters = sorted({ord(visit) for visit, _ in group if len(visit) == 1})
        are_visits = len(letters) < len({visit for visit, _ in group}) or len(letters) == 1
        if len(group) > 1 and (are_visits or any(b - a < _NEAR_LETTERS for a, b in pairwise(letters))):
            found.append([label for _, label in group])
    return found


def _find_numbered_names(uncertain: Iterable[str]) -> Doubt | None:
    """Names of people with small numbers, which may be visits: ``anna1``, ``anna2``; ``Meier_01``, ``Meier_02``.

    A word without a vowel is the code of a study (``GBM_1``), and so is the only word of many (``ABC_1`` to ``ABC_5``).
    """
    by_name: dict[str, list[str]] = defaultdict(list)
    others: set[str] = set()
    for subject in uncertain:
        name = re.sub(r"[-_. ]?\d+$", "", GROUP_IN_NAME.sub("", subject, count=1)).lower()
        is_name = _is_personal(split_words(name)) and re.search("[aeiouyà-ü]", name)
        if is_name and _NUMBERED_NAME.fullmatch(subject):
            by_name[name].append(subject)
        else:
            others.add(name)
    for name, named in by_name.items():
        is_only = len(by_name) == 1 and (len(named) > _MAX_VISITS or all(re.search(r"0\d$", name) for name in named))
        if len(named) > 1 and name not in others and not is_only:
            return _ONE_OR_TWO, f"{named[0]} and {named[1]}"
    return None


def _is_personal(words: Iterable[str], known: set[str] = _NOT_NAMES) -> bool:
    """Whether no word is one of those before numbers or names of subjects."""
    return known.isdisjoint({text for word in words for text in (word, word.removesuffix("s"))})


def _find_names_in_groups(identities: Iterable[SubjectIdentity]) -> Doubt | None:
    """Words of file names in a folder that may be a year's or a delivery's: ``2019_scans/anna``, ``2019_scans/bob``."""
    named = {
        f"{identity.subject}/{'_'.join(identity.words)}"
        for identity in identities
        if identity.words and not identity.certain and may_hold_several(identity.subject)
    }
    found = " and ".join(sorted(named)[:2])
    return ("the names in a folder may be subjects, or protocols of one", found) if len(named) > 1 else None


def may_hold_several(folder: str) -> bool:
    """Whether a folder with a number may be that of a year, a delivery or a group, and not of one person.

    >>> [may_hold_several(name) for name in ("2019_names", "export_2", "batch3", "p1", "patient_2", "AB12", "berl007")]
    [True, True, True, False, False, False, False]
    """
    rest = _YEAR_IN_NAME.sub("", folder.lower())
    words, numbers = re.findall(r"[^\W\d_]+", rest), re.findall(r"\d+", rest)
    if is_group(folder) or not numbers:
        return True
    is_small = len(numbers) == 1 and re.fullmatch(r"[1-9]\d?", numbers[0]) is not None
    return is_small and any(len(word) > 3 for word in words) and _is_personal(words, _SUBJECT_WORDS)


def find_same_spelling(subjects: Iterable[str]) -> str | None:
    """Two subjects that differ in capital letters, separators or zeros only, or None."""
    doubt = _find_equal(sorted(subjects), spelling, "")
    return doubt and doubt[1]


def _find_equal(subjects: Iterable[str], key: Callable[[str], Hashable], what: str) -> Doubt | None:
    found: dict[Hashable, str] = {}
    for subject in subjects:
        value = key(subject)
        if value is not None and (other := found.setdefault(value, subject)) != subject:
            return what, f"{other} and {subject}"
    return None


def _sorted_names(subject: str) -> tuple[str, ...] | None:
    """The words of a name without a number, in alphabetical order: ``Anna_Meier`` and ``Meier_Anna`` are equal."""
    return None if re.search(r"\d", subject) else tuple(sorted(map(str, spelling(subject))))


def _without_leading_number(subject: str) -> tuple[str, ...] | None:
    """The words behind a number, if one of them has a number too: ``2_p1`` may be the second visit of ``p1``."""
    first, *rest = split_words(subject) or ("",)
    return tuple(rest) if re.fullmatch(r"\d{1,2}", first) and has_number("_".join(rest)) else None


def _find_processed(subjects: Sequence[str]) -> Doubt | None:
    """Subjects of which one name is the other with a mark of SPM; both with a number, or both without one."""
    names = {subject.lower(): subject for subject in subjects}
    originals = {lower: _SPM_PREFIX.sub("", lower) for lower in names}
    by_number = {lower: original for lower, original in originals.items() if re.match(r"[a-z]+[_-]?\d", original)}
    found: dict[str, str] = {}
    for lower, subject in names.items():
        other = found.setdefault(by_number.get(lower, lower), subject)
        if other == subject and len(originals[lower]) > 2 and originals[lower] != lower:
            other = names.get(originals[lower], subject)
        if other != subject:
            return "a prefix of processing (r, w, c1, …) may be one subject's", f"{other} and {subject}"
    return None


def _find_beginnings(subjects: Iterable[str], uncertain: Iterable[str]) -> Doubt | None:
    by_words = {split_words(subject): subject for subject in subjects}
    for subject in uncertain:
        words = split_words(subject)
        if words and words[-1] in ("pre", "post"):
            return "pre and post may mean visits or a contrast agent", subject
        for length in range(1, len(words)):
            if words[:length] in by_words:
                return "one name begins with another", f"{by_words[words[:length]]} and {subject}"
            if words[length:] in by_words and not has_number(subject):
                return "one name ends with another", f"{by_words[words[length:]]} and {subject}"
    return None


def _find_public_endings(certain: set[str], uncertain: Iterable[str]) -> Doubt | None:
    """Names that end with one of a public data set: ``qqq_IXI001-HH-1211`` and ``IXI001``."""
    for subject in uncertain:
        for number in range(1, len(split_words(subject)) if certain else 0):
            rest = parse_identifier(subject[len(keep_words(subject, number)) :].strip("_-. "))
            if rest.certain and rest.subject in certain:
                return "one name ends with another", f"{rest.subject} and {subject}"
    return None


def _find_shared_numbers(subjects: Sequence[str], uncertain: Sequence[str]) -> Doubt | None:
    by_person = {person_words(subject): subject for subject in subjects}
    by_number: dict[tuple[str, ...], str] = {}
    by_last: dict[str, str] = {}
    for subject in uncertain:
        person, words = person_words(subject), split_words(MAYBE_SESSION.sub("", subject))
        shortest = 1 if isinstance(next(iter(person), ""), int) else 2
        for length in range(shortest, len(person)):
            if person[:length] in by_person:
                return "one name begins with another", f"{by_person[person[:length]]} and {subject}"
        # One or two words and another, none with a number: anna_abc, anna_xyz; abc_anna, xyz_anna; hc_anna_abc, ….
        is_phrase = len(words) > 1 and not has_number("_".join(words))
        shared = words[:1] if _is_personal(words[:1]) else words[:2] if len(words) > 2 else ()
        number = shared if is_phrase and shared else subject_number_words(subject)
        if is_phrase and (last := by_last.setdefault(words[-1], subject)) != subject:
            return _ONE_OR_TWO, f"{last} and {subject}"
        other = by_number.setdefault(number, subject) if number else subject
        if other != subject:
            return _ONE_OR_TWO, f"{other} and {subject}"
        if leading_protocol(subject) != leading_protocol(uncertain[0]):
            return "a protocol before a number may be one subject's", f"{uncertain[0]} and {subject}"
    return None


def _find_dates(uncertain: Iterable[str]) -> Doubt | None:
    """A name that goes on with dates or years (``Meier_2019``); among several names also with other short dates."""
    by_name: dict[str, list[str]] = defaultdict(list)
    for subject in uncertain:
        if match := re.match(r"[^\W\d_]{3,}", subject):
            by_name[match.group().lower()].append(subject)
    for name, named in by_name.items():
        rests = [subject[len(name) :].strip("_-. ") for subject in named]
        are_dates = all(map(_DATE.fullmatch, rests))
        are_years = _is_personal([name]) and all(re.fullmatch(YEAR, rest) for rest in rests)
        maybe = are_years or (len(by_name) > 1 and all(map(_MAYBE_DATE.fullmatch, rests)))
        if 1 < len(named) <= _MAX_VISITS and (are_dates or maybe) and not is_group(name):
            return _ONE_OR_TWO, f"{named[0]} and {named[1]}"
    return None


def spelling(subject: str) -> tuple[str | int, ...]:
    """Letters and numbers alone: equal for ``P-01``, ``p_1`` and ``p001``, and for ``Müller`` and ``Mueller``."""
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", subject).casefold())
    text = re.sub("(?<=[aou])e", "", "".join(sign for sign in text if not unicodedata.combining(sign)))
    return tuple(int(part) if part.isdecimal() else part for part in re.findall(r"\d+|[^\W\d_]+", text))


def person_words(subject: str) -> tuple[str | int, ...]:
    """The spelling without all that may be a visit or a protocol: two subjects that agree may be one person.

    >>> person_words("v1_p07") == person_words("p07v2") == person_words("mpr_p07b") == ("p", 7)
    True
    """
    # First, since the letter of 3T could be a visit.
    text = re.sub(r"[^\W_]*\d[^\W_]*", lambda word: "" if is_protocol(word[0].lower()) else word[0], subject)
    text = MAYBE_SESSION.sub("", text.strip("_-. ") or subject)
    text = _LONG_MAYBE_DATE.sub("", text).strip("_-. ") or text
    rest = _MAYBE_DATE.sub("", text)
    return spelling("_".join(word for word in split_words(rest if has_number(rest) else text) if not is_protocol(word)))


def leading_protocol(subject: str) -> frozenset[str]:
    """The protocol words in a subject's name that are never names of groups: those before its number."""
    return frozenset(split_words(subject)) & (PROTOCOL_WORDS - _GROUP_LIKE_WORDS)


def subject_number_words(subject: str) -> tuple[str, ...]:
    """The words up to the first one with a number; a group at the beginning is passed over.

    >>> subject_number_words("HC_07_b"), subject_number_words("site1_07_b"), subject_number_words("anna")
    (('hc', '07'), ('site1', '07'), ())
    """
    words = split_words(subject)
    group = GROUP_IN_NAME.match(subject)
    start = len(split_words(group.group())) if group else 0
    start = 0 if start == len(words) else start
    numbered = [i for i in range(start, len(words)) if re.search(r"\d", words[i])]
    return words[: numbered[0] + 1] if numbered else ()
