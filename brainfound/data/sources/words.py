"""What the words of a name or a series description say of an image; `word_table` and `contrasts` have the words.

A reading is a contrast, or ``unknown`` with the reason. Words of two contrasts leave doubt, except where one is a
property of the other (T2 and FLAIR), or where a word between them makes the second the target of a registration
(``FLAIR_to_T1``). Doubt is never resolved by a guess: the user writes the contrast.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from brainfound.contrasts import CONTRASTS, UNKNOWN, parse_contrast
from brainfound.data.sources.word_table import (
    AMBIGUOUS_WORDS,
    CONTRAST_WORDS,
    DIFFUSION_MAPS,
    LESION_WORDS,
    NO_AGENT_ENTITIES,
    PUBLIC_TEMPLATES,
    STRUCTURES,
    WORDS,
)
from brainfound.errors import UsageError

NO_CONTRAST, IN_DOUBT = "no known contrast in the name", "in doubt"
_BIDS_SUFFIXES = {suffix: contrast.name for contrast in CONTRASTS.values() for suffix in contrast.bids_suffixes}
_REFUSED = tuple(WORDS)[list(WORDS).index("a map") :]
_BIDS_REFUSED = {kind for kind in _REFUSED if kind not in ("a map", "a localizer", "a functional or perfusion series")}
_BIDS_REFUSED_MAPS = {"t1map", "t2map", "synthetic", "synth", "thickness", "zscore", "prediction", "predicted"}
"""Maps that an entity may name; others have suffixes of their own in BIDS, and ``fa8`` is a flip angle."""
_REFUSED_BEFORE_SUBJECT = {"template", "template0", "phantom", "acr", "biasfield", "5tt", "5ttvis", "ples", "qsm"}
"""What refuses an image wherever it stands."""
_TISSUE_MARK = re.compile(
    r"(?!mp2rage)(?:s\d*)?(?:[mwru][mwru0]*[cp]\d(?=[a-zA-Z])|[cp][0-6](?=[a-zA-Z]{2}|[a-zA-Z]\d\d))"
    r"(?!(?i:v|ses|visit|tp|bl|fu|follow|base|pre|post|month|mo|week|wk|scan|year)[a-z]*\d*$)"
)
_WARP_MARKS = {"y", "iy", "wj"}
"""What SPM and CAT12 put before the name of a scan, for its maps of tissues and its deformation fields."""
_AFTER_CONTRAST_ONLY = {"r1", "r2", "s0", "b1", "c", "iv", "with"}
"""Before the contrast, these may name a subject or a repeat."""
_AGENT_ALONE = {"gado", "gadolinium"}
"""Agents that alone mean T1 with an agent."""
_MAP_WORDS = ("map", "maps", "karte", "carte", "cartes", "mapa")
_VISITS = {"v1", "v2", "v3"}
_NAMES_A_GROUP = {"healthy", "normal", "white", "matter", "grey", "gray"}
_MAYBE_LABEL_MAP = (STRUCTURES.keys() | {"manual", "expert", "rater"}) - _NAMES_A_GROUP
"""What an image may show instead of being the scan: ``T1_hippocampus``."""


def _build() -> tuple[dict[tuple[str, ...], tuple[str, str]], tuple[str, ...]]:
    """Divided words → (meaning, contrast), and the words that may begin a glued name such as ``flair2t1``."""
    entries: list[tuple[str, str, str]] = [(word, kind, "") for kind, words in WORDS.items() for word in words.split()]
    for contrast in CONTRASTS.values():
        if contrast.name != UNKNOWN:
            words = [contrast.name.lower(), *contrast.aliases, *CONTRAST_WORDS[contrast.name].split()]
            entries += [(word, "contrast", contrast.name) for word in words if word != "gre"]
    table: dict[tuple[str, ...], tuple[str, str]] = {}
    for word, kind, contrast_name in entries:
        table[(word.replace("-", ""),)] = table[tuple(word.split("-"))] = (kind, contrast_name)
    strong = (key[0] for key, (kind, _) in table.items() if kind == "contrast" and len(key) == 1)
    return table, tuple(sorted(set(strong) - AMBIGUOUS_WORDS - {"trace", "resolve"}, key=len, reverse=True))


_TABLE, _STRONG = _build()
_STAR = ("gre", "hemo", "haem")
"""Words of a gradient echo that alone mean T2*."""
_WIDEST = max(map(len, _TABLE))
_GLUED = sorted((key[0] for key in _TABLE if len(key) == 1 and len(key[0]) > 1), key=len, reverse=True)


_PROTOCOL_KINDS = ("protocol", "inversion", "gradient echo", "magnitude")
PROTOCOL_WORDS = {key[0] for key, (kind, _) in _TABLE.items() if len(key) == 1 and kind in _PROTOCOL_KINDS}
PROTOCOL_WORDS |= {"space", "tfl", "bravo", "dixon", "stir", "dark", "fluid", "darkfluid", "head"}
PROTOCOL_WORDS -= {"w", "p2", "p3", "p4"}
"""Words of a protocol, which never name a subject behind its number."""


@dataclass(frozen=True)
class Reading:
    """What the words of a name say."""

    contrast: str
    """A canonical name, or ``unknown``."""
    reason: str = ""
    """Why the contrast is unknown."""
    candidates: tuple[str, ...] = ()
    """The contrasts between which a name leaves doubt."""
    used: frozenset[int] = frozenset()
    """The words that describe the scan; the others may name the subject."""
    denies_agent: bool = False
    """Whether a word says that there was no contrast agent."""


@dataclass(frozen=True)
class _Item:
    kind: str
    contrast: str
    text: str
    words: frozenset[int]
    """The words of the name that it lies in."""


def find_words(text: str) -> list[tuple[str, int, int]]:
    """The words of a file name between ``_ - .`` and blanks, with their places; ``1.25`` is one."""
    found = re.finditer(r"(?<![^_ ])\d\.\d{1,2}(?:mm)?(?![^_ ])|[^_\-. ]+", text)
    return [(match.group(), match.start(), match.end()) for match in found]


def is_contrast_word(word: str) -> bool:
    """Whether a word alone names a contrast."""
    return any(item.kind == "contrast" or item.text == "gre" for item in _find_items([word], frozenset()))


def find_targets(words: Sequence[str]) -> set[str]:
    """The words that make a contrast the target of a registration, also where they are glued to it (``T1space``)."""
    return {item.text for item in _find_items([word.lower() for word in words], frozenset()) if item.kind == "target"}


def read_file_name(words: Sequence[str]) -> Reading:
    """The reading of the words of a file name; words before the contrast may name a subject, unless they adjoin it.

    >>> read_file_name(["p1", "FLAIR", "to", "T1"]).contrast, read_file_name(["p1", "T1", "phase"]).reason
    ('FLAIR', 'a phase image')
    """
    lower = [word.lower() for word in words]
    items = _find_items(words, _ambiguous_words(lower))
    first = next((k for k, item in enumerate(items) if item.kind == "contrast" or item.text in _STAR), None)
    if first is None:
        refused = next((item for item in items if item.kind in _REFUSED and "map" in item.text), None)
        agent = next((item for item in items if item.text in _AGENT_ALONE), None)
        if agent and not {item.kind for item in items} & {*_REFUSED, "no agent"}:
            return Reading("T1ce", "", (), agent.words)
        return Reading(UNKNOWN, refused.kind if refused else NO_CONTRAST)
    start = first
    while start and min(items[start].words) - max(items[start - 1].words) <= 1 and items[start - 1].kind != "visit":
        start -= 1
    adjoining = [
        item for item in items[start:first] if item.kind != "protocol" and item.text not in _AFTER_CONTRAST_ONLY
    ]
    reading = _read([*adjoining, *items[first:]], series=False)
    if first and items[first - 1] in adjoining and items[first - 1].text in ("to", "onto", "in", "on"):
        return Reading(UNKNOWN, f"{IN_DOUBT}: the name says a target of registration, and no scan", (), reading.used)
    if visits := [item.text for item in adjoining if item.text in ("pre", "post")]:
        return Reading(UNKNOWN, f"{IN_DOUBT}: {visits[0]!r} may denote visits or a contrast agent", (), reading.used)
    begin, end = min(items[first].words), max(items[first].words) + 1
    if _TISSUE_MARK.match(words[0]) or (words[0] in _WARP_MARKS and not words[1].isdecimal()):
        return Reading(UNKNOWN, f"{IN_DOUBT}: {words[0]!r} may begin with a mark of SPM's maps", (), reading.used)
    if any(item.text in _REFUSED_BEFORE_SUBJECT for item in items) or PUBLIC_TEMPLATES & set(lower[: min(2, begin)]):
        return Reading(UNKNOWN, "a template, a phantom or a map", (), reading.used)
    shown = [word for word in (*lower[max(begin - 1, 0) : begin], *lower[end:]) if word in _MAYBE_LABEL_MAP]
    if reading.contrast in ("DWI", "ADC"):
        maps = DIFFUSION_MAPS - (_VISITS if reading.contrast == "ADC" else set())
        shown += [word for word in lower[end:] if word in maps]
    if reading.contrast != UNKNOWN and shown:
        return Reading(UNKNOWN, f"{IN_DOUBT}: {shown[0]!r} may denote what a map shows", (), reading.used)
    return reading


def read_series_text(text: str) -> Reading | None:
    """The reading of a series description or protocol name; None if it has no word of the table but of protocols."""
    items = _find_items(text.lower().replace("w/o", "without").replace("/", " ").split(), frozenset())
    kinds = {item.kind for item in items}
    if not kinds & {"contrast", "gradient echo", *_REFUSED}:
        return None
    reading = _read(items, series=True)
    return None if reading.reason == NO_CONTRAST else reading


def read_bids_name(entities: Mapping[str, str], suffix: str) -> Reading:
    """The reading of a BIDS name: by its suffix, unless ``acq-`` or ``rec-`` contradict it. Lower-case suffixes count.

    >>> read_bids_name({"sub": "1", "acq": "mpragePostGad"}, "T1w").contrast
    'T1ce'
    >>> read_bids_name({"sub": "1", "acq": "darkFluid"}, "T2w").reason
    'in doubt: T2w or FLAIR'
    """
    if entities.get("part", "mag") != "mag":
        return Reading(UNKNOWN, f"not a magnitude image (part-{entities['part']})")
    for key in ("label", "stat"):
        if key in entities:
            return Reading(UNKNOWN, f"a map ({key}-{entities[key]})")
    if "inv" in entities:
        return Reading(UNKNOWN, "one inversion of an MP2RAGE")
    contrast = _BIDS_SUFFIXES.get(suffix, UNKNOWN)
    if contrast == UNKNOWN and re.fullmatch(r"[A-Za-z][A-Za-z0-9]*", suffix):
        with suppress(UsageError):
            contrast = parse_contrast(suffix)
    if contrast == UNKNOWN:
        return Reading(UNKNOWN, f"no known contrast ({suffix})" if entities else NO_CONTRAST)
    if entities.get("desc", "").lower() in LESION_WORDS | STRUCTURES.keys():
        return Reading(UNKNOWN, f"{IN_DOUBT}: desc-{entities['desc']} may be a map")
    reading = _read_entities(contrast, [entities.get(key, "") for key in ("acq", "rec", "desc")])
    if reading.contrast == "T1w" and entities.get("ce", "none").lower() not in NO_AGENT_ENTITIES:
        return replace(reading, contrast="T1ce")
    return reading


def _read_entities(contrast: str, texts: Sequence[str]) -> Reading:
    words = [
        word for text in texts for word in re.findall(r"[A-Z]?[a-z]+\d?(?![a-z])|[A-Z]+\d?(?![a-z])|[a-z]+|\d+", text)
    ]
    items = _find_items([word.lower() for word in words], frozenset())
    # In a diffusion scan, "dir" means directions.
    refused = _BIDS_REFUSED - ({"no structural contrast"} if contrast == "DWI" else set())
    for text in map(str.lower, texts):
        kind = "a map" if text in _BIDS_REFUSED_MAPS else _TABLE.get((text,), ("",))[0]
        if kind in refused or text in _BIDS_REFUSED_MAPS:
            return Reading(UNKNOWN, kind)
    for item in items:
        is_diffusion_map = contrast == "DWI" and item.text in ("fa", "b0")
        if item.kind in refused or item.text in _BIDS_REFUSED_MAPS or is_diffusion_map:
            return Reading(UNKNOWN, item.kind)
    kept = ("contrast", "agent", "no agent", "inversion")
    reading = _read(
        [_Item("contrast", contrast, contrast, frozenset()), *(i for i in items if i.kind in kept)], series=True
    )
    if {reading.contrast, contrast} == {"ADC", "DWI"}:
        return Reading("ADC")
    if reading.contrast in (contrast, "T1ce") or {reading.contrast, contrast} == {"SWI", "T2starw"}:
        return Reading(contrast if reading.contrast == "SWI" else reading.contrast)
    others = reading.candidates or (reading.contrast,)
    names = tuple(dict.fromkeys(name for name in (contrast, *others) if name != UNKNOWN))
    return Reading(UNKNOWN, reading.reason or _doubt(names), names)


_RESOLVED = {
    frozenset(pair): contrast
    for contrast, pair in (
        *(("FLAIR", ("FLAIR", "T2w")), ("T1ce", ("T1ce", "T1w")), ("ADC", ("ADC", "DWI"))),
        *(("SWI", ("SWI", "T2w")), ("SWI", ("SWI", "T2starw")), ("T2starw", ("T2starw", "T2w"))),
        *(("SWI", ("SWI", "T2starw", "T2w")),),
    )
}
"""Contrasts of which one is a property of the other, or its derivative."""


def _read(items: Sequence[_Item], series: bool) -> Reading:
    used = frozenset[int]().union(*(item.words for item in items))
    kinds = {item.kind for item in items}
    named, sure = _named_contrasts(items, series)
    star = any(item.text in _STAR for item in items)
    if ("gradient echo" in kinds and named == ["T2w"]) or (star and not named):
        named = ["T2starw"]
    for item in items:
        if item.kind in _REFUSED and not (item.kind == "a map" and "ADC" in named and item.text in _MAP_WORDS):
            return Reading(UNKNOWN, item.kind, (), used)
    if not named:
        return Reading(UNKNOWN, NO_CONTRAST, (), used)
    if reason := _hidden_doubt(items, kinds, named, series):
        return Reading(UNKNOWN, reason, tuple(named), used)
    contrast = named[0] if len(named) == 1 else _RESOLVED.get(frozenset(named), UNKNOWN) if sure else UNKNOWN
    if series and set(named) == {"FLAIR", "T1w"}:  # General Electric's T1 FLAIR; in a file name T1 may be a time point
        contrast = "T1w"
    if contrast == UNKNOWN:
        return Reading(UNKNOWN, _doubt(named), tuple(named), used)
    if contrast == "T2w" and "inversion" in kinds:
        return Reading(UNKNOWN, f"{IN_DOUBT}: an inversion recovery with T2 may be FLAIR or STIR", ("FLAIR",), used)
    if contrast == "T1w":
        agent = _has_agent(items)
        if agent is None:
            return Reading(UNKNOWN, f"{IN_DOUBT}: words for and against a contrast agent", ("T1w", "T1ce"), used)
        contrast = "T1ce" if agent else contrast
    return Reading(contrast, "", (), used, "no agent" in kinds)


def _hidden_doubt(items: Sequence[_Item], kinds: set[str], named: Sequence[str], series: bool) -> str | None:
    """Why words that agree on a contrast still leave doubt."""
    texts = [item.text for item in items if item.kind == "contrast"]
    if "mp2rage" in texts and "t1" in texts[texts.index("mp2rage") :]:
        return f"{IN_DOUBT}: the T1 of an MP2RAGE may be its map"
    if not series and "T1ce" in named and {"t1", "t1w"} & set(texts):
        return f"{IN_DOUBT}: T1w or T1ce, or their difference"
    if named == ["MRA"] and "a rendering of vessels" in kinds:
        return f"{IN_DOUBT}: a scan or a rendering of vessels"
    if named == ["SWI"] and "magnitude" in kinds:
        return f"{IN_DOUBT}: the magnitude of an SWI is T2*-weighted"
    if named == ["T1w"] and "perhaps an agent" in kinds and not kinds & {"agent", "no agent"}:
        word = next(item.text for item in items if item.kind == "perhaps an agent")
        return f"{IN_DOUBT}: T1w or T1ce ({word!r} may denote a contrast agent)"
    return None


def _named_contrasts(items: Sequence[_Item], series: bool) -> tuple[list[str], bool]:
    """The contrasts of the scan, in order, without the target of a registration; and whether that is sure."""
    named: list[str] = []
    between: set[str] = set()
    for item in items:
        if item.kind == "target":
            between.add(item.text)
        if item.kind != "contrast":
            continue
        if named and between and item.contrast not in named:
            if between != {"space"} or item.contrast != "FLAIR" or named != ["T2w"]:
                break
            named.append(item.contrast)  # the sequence SPACE, or the space of the FLAIR
            return named, series or item.text != "flair"
        named += [item.contrast] if item.contrast not in named else []
        between = set()
    return named, True


def _has_agent(items: Sequence[_Item]) -> bool | None:
    """Whether words name a contrast agent that no word denies; None if they do both."""
    said = [item for item in items if item.kind in ("agent", "no agent")]
    denied = {
        id(after)
        for before, after in pairwise(said)
        if before.kind == "no agent" and after.kind == "agent" and after.text != "post"
    }
    agents = [item for item in said if item.kind == "agent" and id(item) not in denied]
    if agents and len(agents) < len(said):
        return None
    return bool(agents)


def _doubt(names: Iterable[str]) -> str:
    return f"{IN_DOUBT}: {' or '.join(names)}"


def _find_items(words: Sequence[str], plain: frozenset[int]) -> list[_Item]:
    """The entries of the table among words, except those at the places `plain`."""
    atoms = [(atom, index) for index, word in enumerate(words) for atom in _atoms(word)]
    items: list[_Item] = []
    place = 0
    while place < len(atoms):
        for width in range(min(_WIDEST, len(atoms) - place), 0, -1):
            part = atoms[place : place + width]
            entry = _TABLE.get(tuple(atom for atom, _ in part))
            if entry and not (width == 1 and part[0][1] in plain):
                items.append(_Item(*entry, "".join(atom for atom, _ in part), frozenset(index for _, index in part)))
                place += width
                break
        else:
            place += 1
    return items


@lru_cache(maxsize=4096)
def _atoms(word: str) -> tuple[str, ...]:
    """The parts of a word: at signs, and where a glued word consists of words of the table (``flair2t1``).

    >>> _atoms("t1+c"), _atoms("flair2t1"), _atoms("t2*"), _atoms("p001")
    (('t1', 'plusc'), ('flair', 'to', 't1'), ('t2star',), ('p001',))
    """
    if (word.lower(),) not in _TABLE:
        word = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z]{2})", " ", word)
    word = word.lower()
    word = re.sub(r"\+(?:c|gd|gad|km)?(?![a-z0-9])|(?<![a-z0-9])(?:c|gd)\+", " plusc ", word)
    word = word.replace("t2*", "t2star").replace("flair*", "flairstar")
    word = re.sub(r"(?<![a-z0-9])-(?:c|gd|gad|km)(?![a-z0-9])|(?<![a-z0-9])c-(?![a-z0-9])", " without ", word)
    atoms: list[str] = []
    for part in re.findall(r"[^\W_]+", word):
        numbered = re.fullmatch(r"([a-z]{5,})\d", part)  # posteriors1
        part = numbered.group(1) if numbered and (numbered.group(1),) in _TABLE else part
        processed = re.fullmatch(r"(?:s\d*)?(?:m?w?r?|w?m)(t[12]w?|flair|mprage)", part)  # SPM's names: wmT1
        pieces = [processed.group(1)] if processed else None if (part,) in _TABLE else _unglue(part)
        atoms += pieces or [part]
    return tuple(atoms)


def _unglue(text: str) -> list[str] | None:
    """The words of the table that make up a text with a contrast in it; None if there are none."""
    for begin in range(len(text)):
        for word in _STRONG:
            if not text.startswith(word, begin):
                continue
            before, after = _cover(text[:begin]), _cover(text[begin + len(word) :])
            if before is not None and after is not None:
                return [*before, word, *after]
    return None


def _cover(text: str) -> list[str] | None:
    """The words of the table that make up a text; "2" means "to". None if they do not."""
    if not text:
        return []
    for word in ("2", *_GLUED):
        if text.startswith(word) and word != text + "2":
            rest = _cover(text[len(word) :])
            if rest is not None and (word != "2" or rest):
                return ["to" if word == "2" else word, *rest]
    return None


def _ambiguous_words(lower: Sequence[str]) -> frozenset[int]:
    """Places of words that are no contrast before a subject's number: in ``PD_001``, not in ``001_PD``."""

    def numbered(words: Sequence[str]) -> bool:
        return any(re.search(r"\d", word) and not _find_items([word], frozenset()) for word in words)

    return frozenset(
        i
        for i, word in enumerate(lower)
        if word in AMBIGUOUS_WORDS and not numbered(lower[:i]) and (numbered(lower[i + 1 :]))
    )
