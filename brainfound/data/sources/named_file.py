"""What the names of one file and of its folders say: contrast or label map, subject, session and protocol."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from brainfound.contrasts import UNKNOWN
from brainfound.data.sources.file_names import (
    FileName,
    is_contrast_name,
    natural_sort_key,
    parse_filename,
    split_words,
    stem,
)
from brainfound.data.sources.folders import SPM_MARK, Folders, read_folders
from brainfound.data.sources.identifiers import (
    MAYBE_SESSION,
    SubjectIdentity,
    has_number,
    is_session_name,
    keep_words,
    parse_identifier,
)
from brainfound.data.sources.word_table import IMAGE_WORDS
from brainfound.data.sources.words import IN_DOUBT, find_targets, find_words, is_contrast_word, read_file_name

_PROTOCOL_OPTION = re.compile(r"[pe]\d")
"""Acceleration and echo: ``p2`` after a contrast, where it is no subject."""


@dataclass(frozen=True)
class NamedFile:
    """An image of a source, as its names describe it."""

    path: Path
    place: Folders
    name: FileName
    identity: SubjectIdentity
    """The subject that the file's name gives."""

    @property
    def is_scan(self) -> bool:
        return self.name.label_column is None

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders that may name the subject and the session."""
        return self.place.named

    @property
    def order(self) -> tuple:
        """Sort key: of several scans of one contrast, or label maps of one kind, the first is used."""
        return self.name.order[0], self.place.rank, self.name.order, natural_sort_key(self.path)


def describe_file(root: Path, image: Path, known: Collection[str] = (), alone: bool = False) -> NamedFile:
    """What names say of an image; `known` are all folders of the source, `alone` says that its own has no other."""
    place = read_folders(image.relative_to(root).parts[:-1], known)
    name, folders = parse_filename(image), place.named
    if place.label_column and (name.label_column is None or (name.label_column == "mask" and name.order[0])):
        name = replace(name, contrast=UNKNOWN, label_column=place.label_column)
    elif name.label_column is None and place.contrast != UNKNOWN and name.contrast != place.contrast:
        name = _with_contrast_of_folder(name, place, image, alone)
    elif name.label_column is None and name.is_silent and place.reason:
        name = replace(name, reason=place.reason)
    if all(word in IMAGE_WORDS for word in split_words(name.identifier)):
        name = replace(name, identifier="")
    in_subject = bool(folders) and parse_identifier(folders[-1]).subject != "" and not is_session_name(folders[-1])
    is_last = stem(image).endswith(name.identifier)
    # A repeat number (p1/T1_2.nii.gz) or that of a series (p1/2_T1.nii.gz), but berlin/2_T1.nii.gz may be a person.
    if (
        in_subject
        and re.fullmatch(r"\d{1,2}", name.identifier)
        and (is_last or (has_number(folders[-1]) and not folders[-1].isdecimal()))
    ):
        name = replace(name, identifier="")
    identity = parse_identifier(name.identifier)
    if not identity.certain:
        identity = _without_words_after_contrast(identity, image)
    bare = identity.subject.removeprefix("sub-")
    if any(bare == parse_identifier(folder).subject for folder in folders):
        identity = replace(identity, subject=bare)
    return NamedFile(image, place, name, identity)


def _with_contrast_of_folder(name: FileName, place: Folders, image: Path, alone: bool) -> FileName:
    """The contrast that the folder says, if no word of the name leaves doubt: ``T1/p1.nii``, not ``T1/p1_bias.nii``."""
    words = [word for word, _, _ in find_words(stem(image).removeprefix("sub-"))]
    reading = read_file_name([place.contrast.lower(), *words])
    reason, targets = place.reason or reading.reason, find_targets(words)
    if any(map(is_contrast_word, words)):
        if not targets:
            return name
        if reading.contrast != place.contrast or targets - {"to", "onto", "in", "on", "space"}:
            reason = reason or name.reason or f"{IN_DOUBT}: {place.contrast} or {name.contrast}"
        return replace(name, contrast=UNKNOWN if reason else reading.contrast, reason=reason)
    lower = split_words(stem(image))
    others = set(split_words(parse_identifier(name.identifier).subject)) - IMAGE_WORDS
    others -= {word for folder in place.named for word in split_words(folder)}
    unknown = [word for word in others if word.isalpha() and not alone and any(map(has_number, place.named))]
    if "bias" in lower and not {"corrected", "correction"} & set(lower):
        unknown.append("bias")
    if SPM_MARK.match(stem(image)):
        reason = f"{IN_DOUBT}: {stem(image)!r} may begin with a mark of SPM's maps"
    elif unknown:
        reason = reason or f"{IN_DOUBT}: {min(unknown)!r} may say what an image of {place.contrast} shows"
    return replace(name, contrast=UNKNOWN if reason else reading.contrast, reason=reason, is_silent=False)


def _without_words_after_contrast(identity: SubjectIdentity, image: Path) -> SubjectIdentity:
    """After a subject's number and a contrast, words belong to the protocol: ``p1_t1_xyz`` is ``p1``."""
    words, remaining = split_words(stem(image)), list(split_words(identity.subject))
    contrasts = [i for i in range(1, len(words)) if is_contrast_name(words[i]) and _has_own_number(words[:i])]
    after = words[contrasts[0] + 1 :] if contrasts else ()
    dropped = set()
    for word in reversed(after):
        if len(remaining) > 1 and word == remaining[-1]:
            dropped.add(remaining.pop())
    if not _has_own_number(remaining):
        return identity
    # The number of "hc_01" in "7_t1_hc_01", which looks like the number of a repeat, may be a person's.
    numbers = tuple(b for a, b in pairwise(after) if a in dropped and b.isdecimal() and b not in dropped)
    identity = without_words(identity, len(remaining))
    return replace(identity, words=(*identity.words, *numbers))


def _has_own_number(words: Sequence[str]) -> bool:
    """Whether words have a number that cannot be a visit's: ``anna_m06`` has none."""
    return has_number(MAYBE_SESSION.sub("", "_".join(words)))


def without_words(identity: SubjectIdentity, number: int) -> SubjectIdentity:
    """The subject's first words only. Other words become `SubjectIdentity.words`; other numbers may be people."""
    others = split_words(identity.subject)[number:]
    if any(re.search(r"\d", word) and not _PROTOCOL_OPTION.fullmatch(word) for word in others):
        return identity
    return replace(identity, subject=keep_words(identity.subject, number), words=(*identity.words, *others))
