"""Words of file names, BIDS entities and series descriptions, and what they say of a scan: one table for all readers.

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
from brainfound.errors import UsageError

_CONTRAST_WORDS = {
    "T1w": "mprage mp-rage memprage spgr fspgr bravo tfl mp2rage t1-weighted uni-images",
    "T1ce": "t1-c t1gad t1gado",
    "T2w": "t2-weighted",
    "FLAIR": "dark-fluid darkfl da-fl",
    "PDw": "proton-density",
    "T2starw": "t2-star t2-star-weighted",
    "SWI": "susceptibility ven-bold",
    "DWI": "tracew ep2d-diff diffusion resolve b-1000",
    "ADC": "apparent-diffusion",
    "MRA": "angiography",
}
"""Words of a contrast, besides its aliases (`brainfound.contrasts`). A hyphen stands where a name may be divided."""
NO_CONTRAST, IN_DOUBT = "no known contrast in the name", "in doubt"
_NO_AGENT_ENTITIES = {"none", "no", "pre", "without", "nativ", "native", "false", "0"}
AMBIGUOUS_WORDS = {"pd", "md", "fl"}
"""In a file name, a contrast only after a subject's number: ``PD_001`` is from a study of Parkinson's disease."""
_PLANES = "ax axial tra trans transverse transversal sag sagittal cor coronal obl oblique"
_SEQUENCES = (
    "se tse fse tir spc cube vista brainview blade propeller tfe vibe mpr haste ssfp fiesta ciss epi grase spair"
    " caipi sense grappa fs nofs fatsat fat-sat iso isotropic hires highres lowres thin thick"
)
_WORDS = {
    "agent": "post gd gad gado gadolinium gadovist gadavist dotarem magnevist omniscan prohance multihance"
    " clariscan ce km kontrast kontrastmittel contrast contraste enhanced enh nach-km mit-km injecte civ mdc"
    " post-contrast post-gad post-gado post-gd post-ce post-km post-gadolinium with-contrast with-gd wc plusc"
    " plusgd plusgad pluskm",
    "no agent": "pre non no without wo ohne vor kein keine sans avant sin zonder utan nativ native pre-contrast"
    " pre-gad pre-gado pre-gd pre-ce pre-km no-gd no-gad no-contrast non-contrast non-enhanced unenhanced"
    " without-contrast wo-contrast non-ce no-ce",
    "visit": "post-op pre-op post-surgery pre-surgery post-surgical pre-surgical post-treatment pre-treatment",
    "target": "to onto in on reg coreg registered coregistered rigid aligned space",
    "inversion": "ir irprep ir-prep tirm",
    "gradient echo": "gre ffe fl2d fl3d flash hemo haem",
    "protocol": f"{_PLANES} {_SEQUENCES} p2 p3 p4 3d 2d 3t 7t seq sequence series acq wip w weighted norm nd dis2d"
    " dis3d filt uni den uni-den magnitude mag",
    "a map": "map maps karte mapa thickness molli symri magic synthetic synthsr predicted aniso anisotropy odi"
    " colfa exponential sbref nodif b0 s0 meanb0 mapping mapit t1map t2map t1-images r1 r2 r2s r2star qt1 qt2 qsm"
    " mtr mtsat mwf relaxometry fieldmap b0map b1map fa eadc cbf cbv mtt ttp tmax rcbv rcbf",
    "a phase image": "phase phas pha ph imag imaginary real unwrapped",
    "a map of probabilities or tissues": "pve prob probs probability probabilities probmap probseg posterior"
    " posteriors",
    "another modality": "ct cta pet fdg amyloid suv suvr dsa oct mrv",
    "a deformation field": "field coeff coef biasfield warp warpfield jac jacobian deformation displacement",
    "a projection": "mip minip mnip projection projections",
    "a subtraction": "sub subtraction subtraktion subtracted substraction minus",
    "one inversion of an MP2RAGE": "inv inv1 inv2 ti1 ti2 first-inversion second-inversion",
    "a localizer": "loc localizer localiser scout survey aahead aascout asset shim calib calibration",
    "a functional or perfusion series": "bold fmri rest resting asl pasl pcasl perf perfusion dsc dce pwi",
    "no structural contrast": "spectro spectroscopy svs csi mrs screensave screen-save report phoenix cine dixon"
    " mt dir stir psir fgatir dti tensor",
    "another part of the body": "hws bws lws rachis lombaire columna orbita knie leber lunge mrcp myelo spine"
    " cspine tspine lspine spinal cervical thoracic lumbar sacral neck knee shoulder wrist ankle elbow foot"
    " abdomen abdominal liver kidney prostate pelvis breast heart cardiac chest thorax lung carotid carotids",
}
"""Words by what they mean; from "a map" on, they say that an image is no scan of the cohort."""
_BIDS_SUFFIXES = {suffix: contrast.name for contrast in CONTRASTS.values() for suffix in contrast.bids_suffixes}
_REFUSED = tuple(_WORDS)[list(_WORDS).index("a map") :]
_BIDS_REFUSED = ("a phase image", "a projection", "a subtraction")
"""What an ``acq-`` may refuse: other words have suffixes of their own in BIDS, and ``fa8`` is a flip angle."""


def _build() -> tuple[dict[tuple[str, ...], tuple[str, str]], tuple[str, ...]]:
    """Divided words → (meaning, contrast), and the words that may begin a glued name such as ``flair2t1``."""
    entries: list[tuple[str, str, str]] = [(word, kind, "") for kind, words in _WORDS.items() for word in words.split()]
    for contrast in CONTRASTS.values():
        if contrast.name != UNKNOWN:
            words = [contrast.name.lower(), *contrast.aliases, *_CONTRAST_WORDS[contrast.name].split()]
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


_PROTOCOL_KINDS = ("protocol", "inversion", "gradient echo")
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
    """The words of a file name between ``_ - .`` and blanks, with their places."""
    return [(match.group(), match.start(), match.end()) for match in re.finditer(r"[^_\-. ]+", text)]


def is_contrast_word(word: str) -> bool:
    """Whether a word alone names a contrast."""
    return any(item.kind == "contrast" or item.text == "gre" for item in _find_items([word], frozenset()))


def read_file_name(words: Sequence[str]) -> Reading:
    """The reading of the words of a file name; words before the contrast may name a subject, unless they adjoin it.

    >>> read_file_name(["p1", "FLAIR", "to", "T1"]).contrast, read_file_name(["p1", "T1", "phase"]).reason
    ('FLAIR', 'a phase image')
    """
    lower = [word.lower() for word in words]
    items = _find_items(lower, _ambiguous_words(lower))
    first = next((k for k, item in enumerate(items) if item.kind == "contrast" or item.text in _STAR), None)
    if first is None:
        refused = next((item for item in items if item.kind in _REFUSED and "map" in item.text), None)
        return Reading(UNKNOWN, refused.kind if refused else NO_CONTRAST)
    start = first
    while start and min(items[start].words) - max(items[start - 1].words) <= 1 and items[start - 1].kind != "visit":
        start -= 1
    adjoining = [item for item in items[start:first] if item.kind != "protocol"]
    reading = _read([*adjoining, *items[first:]], series=False)
    if visits := [item.text for item in adjoining if item.text in ("pre", "post")]:
        return Reading(UNKNOWN, f"{IN_DOUBT}: {visits[0]!r} may say visits or a contrast agent", (), reading.used)
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
    if "inv" in entities:
        return Reading(UNKNOWN, "one inversion of an MP2RAGE")
    contrast = _BIDS_SUFFIXES.get(suffix, UNKNOWN)
    if contrast == UNKNOWN and re.fullmatch(r"[A-Za-z][A-Za-z0-9]*", suffix):
        with suppress(UsageError):
            contrast = parse_contrast(suffix)
    if contrast == UNKNOWN:
        return Reading(UNKNOWN, f"no known contrast ({suffix})" if entities else NO_CONTRAST)
    reading = _read_entities(contrast, [entities.get(key, "") for key in ("acq", "rec")])
    if reading.contrast == "T1w" and entities.get("ce", "none").lower() not in _NO_AGENT_ENTITIES:
        return replace(reading, contrast="T1ce")
    return reading


def _read_entities(contrast: str, texts: Iterable[str]) -> Reading:
    words = [
        word for text in texts for word in re.findall(r"[A-Z]?[a-z]+\d?(?![a-z])|[A-Z]+\d?(?![a-z])|[a-z]+|\d+", text)
    ]
    items = _find_items([word.lower() for word in words], frozenset())
    refused = next((item.kind for item in items if item.kind in _BIDS_REFUSED), None)
    if refused:
        return Reading(UNKNOWN, refused)
    kept = ("contrast", "agent", "no agent", "inversion")
    reading = _read(
        [_Item("contrast", contrast, contrast, frozenset()), *(i for i in items if i.kind in kept)], series=True
    )
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
        if item.kind in _REFUSED and not (item.kind == "a map" and "ADC" in named and item.text in ("map", "maps")):
            return Reading(UNKNOWN, item.kind, (), used)
    if not named:
        return Reading(UNKNOWN, NO_CONTRAST, (), used)
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
    """The entries of the table among lower-case words, except those at the places `plain`."""
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
    word = re.sub(r"\+(?:c|gd|gad|km)(?![a-z0-9])|(?<![a-z0-9])(?:c|gd)\+", " plusc ", word).replace("t2*", "t2star")
    word = re.sub(r"(?<![a-z0-9])-(?:c|gd|gad|km)(?![a-z0-9])|(?<![a-z0-9])c-(?![a-z0-9])", " without ", word)
    atoms: list[str] = []
    for part in re.findall(r"[^\W_]+", word):
        pieces = None if (part,) in _TABLE else _unglue(part)
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
