"""One person is one subject, and two people are two, whatever identifiers, visits and protocols names are made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainfound.contrasts import UNKNOWN
from brainfound.data.cohort import Cohort
from brainfound.data.sources.named_file import describe_file
from brainfound.data.sources.named_files import _identify_subjects
from brainfound.errors import CohortError

IDENTIFIERS = (
    *(
        "p{n}",
        "p{n:03d}",
        "P-{n:03d}",
        "S{n:02d}",
        "sub{n:02d}",
        "sub-{n:02d}",
        "{n:03d}",
        "{n}",
        "{n:07d}",
        "NC{n:03d}x",
    ),
    *("HC_{n:02d}", "patient_{n}", "study2_{n:03d}", "site1_{n:02d}", "A_B_{n:04d}", "2021_{n:03d}", "case-{n}-x"),
    *("IXI{n:03d}-HH-1211", "BraTS2021_{n:05d}", "OAS1_{n:04d}", "10000{n:02d}_20252", "TCGA-02-{n:04d}", "{name}"),
    *("hc_{name}", "{name}{n}", "SC_{n:02d}", "F{n:02d}", "s{n}", "3T_{n}", "GE_{n:02d}", "Muster {name}"),
)
NAMES = ("anna", "bob", "carl", "dora")
VISITS = (
    *(("v1", "v2"), ("V1", "V2"), ("ses-1", "ses-2"), ("ses01", "ses02"), ("ses_1", "ses_2"), ("visit1", "visit_2")),
    *(("bl", "m06"), ("sc", "bl"), ("baseline", "followup"), ("tp1", "tp2"), ("m00", "m12"), ("12m", "24m")),
    *(
        ("20190304", "20200506"),
        ("2019-03-04", "2020-05-06"),
        ("2019_03_04", "2020_05_06"),
        ("04.03.2019", "06.05.2020"),
    ),
    *(("190304", "200506"), ("04032019", "06052020"), ("2019", "2020"), ("2019-03", "2020-05"), ("1", "2"), ("a", "b")),
    *(("2_0", "3_0"), ("wk04", "wk08"), ("pre-op", "post-op"), ("screening", "month_6"), ("t0", "t3"), ("xx", "yy")),
    *(
        ("4mar2019", "2020may06"),
        ("20190304101112", "20200506101112"),
        ("first", "second"),
        ("fu", "fu2"),
        ("d1", "d2"),
    ),
)
PROTOCOLS = (
    "",
    "mpr",
    "tse",
    "tirm",
    "space",
    "vibe",
    "3d",
    "mpr_p2_iso",
    "qqq",
    "zzz",
    "dark_fluid",
    "301",
    "501",
    "xq7",
)
NUMBERED_PROTOCOLS = ("mpr_p2_iso", "301", "501", "xq7")
PLANES = ("", "tra", "sag", "cor", "ax")
CONTRASTS = ("t1", "T1w", "t2", "flair", "T2_FLAIR", "pd", "swi", "t1ce", "t1_gd", "t2_in_t1", "flair_to_T1", "t2_hemo")
TEMPLATES = (
    *(
        "{i}/{v}/{c}",
        "{i}_{v}/{c}",
        "{i}/{v}_{c}",
        "{v}/{i}_{c}",
        "{v}/{i}/{c}",
        "{i}/{i}_{v}_{c}",
        "{i}/{c}",
        "{i}_{c}",
    ),
    *(
        "{i}_{v}_{c}",
        "{v}_{i}_{c}",
        "{c}_{i}_{v}",
        "{i}_{c}_{v}",
        "{i}-{v}-{c}",
        "{i}{v}_{c}",
        "x/{i}_{v}_{c}",
        "{i}/x_{c}",
    ),
    *("site2/{i}/{v}_{c}", "site2/{i}_{v}_{c}", "{i}/{i}_{v}/{i}_{c}", "{i}/{i}_{c}", "{i}_{c}/{v}_{c}", "{i} {v} {c}"),
    *(
        "Skyra/{i}/{c}",
        "GE_1.5T/{i}_{c}",
        "preprocessed/{i}/{v}/{c}",
        "{i}/orig/{c}",
        "{i}/{v}/raw/{c}",
        "oslo/{i}/{c}",
    ),
)


WORDS_ONLY = tuple(form for form in IDENTIFIERS if "{name}" in form)


@dataclass(frozen=True)
class Names:
    """The paths of a folder, each with the person that it shows."""

    persons: dict[Path, int]


@st.composite
def names(draw: st.DrawFn, identifiers: tuple[str, ...] = IDENTIFIERS) -> Names:
    """Up to three people of one or two visits with up to three scans, named by one pattern."""
    identifier = draw(st.sampled_from(identifiers))
    template = draw(st.sampled_from(TEMPLATES))
    # Nobody can read "p1" and "190304" without a separator, or tell "anna_1" from "case_1", and "a_07" from "hc_07".
    numbered = "{n:" in identifier or "{n}" in identifier
    words_only = "{i}{v}" in template or not numbered
    known = [pair for pair in VISITS if not words_only or (pair[0][0].isalpha() and pair[0] not in ("a", "xx"))]
    known = [pair for pair in known if not template.startswith("{v}") or pair[0] not in ("a", "xx")]
    if not numbered:  # "annabl" may be a name
        template = template.replace("{i}{v}", "{i}-{v}")
    # "p2" may be the acceleration of a scan, "SC" a screening and "study2" a visit.
    if template.startswith("{c}") and identifier == "p{n}":
        identifier = "q{n}"
    if template.startswith("{v}") and identifier in ("SC_{n:02d}", "study2_{n:03d}"):
        identifier = "HC_{n:02d}"
    visits = draw(st.sampled_from(known))[: draw(st.integers(1, 2))]
    protocols = [word for word in PROTOCOLS if numbered or word not in NUMBERED_PROTOCOLS]
    scan = st.tuples(st.sampled_from(CONTRASTS), st.sampled_from(protocols), st.sampled_from(PLANES))
    scans = draw(st.lists(scan, min_size=1, max_size=3, unique=True))
    protocol_first = draw(st.booleans())
    if template.startswith("{c}") and protocol_first:  # "301" or "qqq" before the contrast may be the subject
        scans = [
            (contrast, "" if word in ("qqq", "zzz", *NUMBERED_PROTOCOLS) else word, p) for contrast, word, p in scans
        ]
    persons = {}
    for number in range(draw(st.integers(1, 3))):
        for visit in visits[: draw(st.integers(1, 2))]:
            for contrast, protocol, plane in scans:
                words = (protocol, contrast, plane) if protocol_first else (contrast, protocol, plane)
                who = identifier.format(n=number + 1, name=NAMES[number])
                name = template.format(i=who, v=visit, c="_".join(word for word in words if word))
                persons[Path("root", f"{name}.nii.gz")] = number
    return Names(persons)


def subjects_by_name(paths: list[Path]) -> dict[Path, str]:
    files = [describe_file(Path("root"), path) for path in paths]
    files = [file for file in files if not file.is_scan or file.name.contrast != UNKNOWN]
    return {file.path: identity.subject for file, identity in _identify_subjects(Path("root"), files) if file.is_scan}


def assert_one_subject_per_person(compositions: st.SearchStrategy[Names], examples: int) -> None:
    """Refusals are allowed, of less than half of the compositions: a reader that refuses everything keeps nobody."""
    was_read = []

    @settings(max_examples=examples, derandomize=True, deadline=None)
    @given(compositions)
    def check(names: Names) -> None:
        try:
            found = subjects_by_name(list(names.persons))
        except CohortError:
            was_read.append(False)
            return
        was_read.append(True)
        pairs = {(names.persons[path], subject) for path, subject in found.items()}
        assert len(pairs) == len({person for person, _ in pairs}) == len({subject for _, subject in pairs}), pairs

    check()
    assert sum(was_read) > len(was_read) / 2


def test_one_person_is_one_subject_or_refused():
    assert_one_subject_per_person(names(), 200)


def test_persons_named_by_words_are_one_subject_each_or_refused():
    assert_one_subject_per_person(names(WORDS_ONLY), 200)


@pytest.mark.slow
def test_many_compositions_of_words_keep_persons_apart():
    assert_one_subject_per_person(names(WORDS_ONLY), 20_000)


@pytest.mark.parametrize(
    "names",
    [
        *("ines1 ines2", "Vogt_1 Vogt_2", "Vogt-1 Vogt-2", "ines1 ines2 otto1", "Vogt_1 Vogt_2 Lang_1 Lang_2"),
        *("Vogt_01 Vogt_02 Lang_01", "ines_vogt_1 ines_vogt_2 otto_lang_1", "INES1 INES2", "ines_T1_qqq ines_T1_zzz"),
        *(
            "ines_mpr2 ines_mpr5",
            "ines_v1_qqq ines_v2_zzz",
            "Zoé_1 Zoé_2",
            "ines1 ines3",
            "Vogt_2018 Vogt_2021",
            "ines2020 ines2021",
        ),
    ],
)
@pytest.mark.parametrize("pattern", ["{}_T1.nii.gz", "{}/T1.nii.gz", "site4/{}_T1.nii.gz"])
def test_names_with_a_last_number_or_word_may_be_visits(layout, names, pattern):
    root = layout(*(f"{pattern.format(name)}" for name in names.split()))
    with pytest.raises(CohortError, match="do not identify the subjects"):
        Cohort.read(root)


@pytest.mark.parametrize(
    "names",
    [
        *("control1 control2 patient1 patient2", "GBM_1 GBM_2", "subject1 subject2", "case_1 case_2"),
        *(
            "Vogt_01 Vogt_02 Vogt_03",
            "AIM_1 AIM_2 AIM_3 AIM_4 AIM_5",
            "oasi7 oasi8 oasi9 oasi12",
            "Vogt_Ines Lang_Otto",
            "ines1 otto2",
            "hc_ines hc_otto",
        ),
    ],
)
def test_numbers_and_groups_of_subjects_are_read(layout, names):
    root = layout(*(f"{name}_T1.nii.gz" for name in names.split()))
    assert set(Cohort.read(root).table["subject"]) == set(names.split())


@pytest.mark.parametrize("names", ["ines_FLAIR otto_T1", "ines_T1 otto_T1", "ines_T1 ines_FLAIR otto_T2 emil_T1"])
@pytest.mark.parametrize(
    "folder",
    [
        *("2017_scans_of", "2017", "export_4", "mydata3", "delivery_2020-03", "archive12", "2018_06", "names2021"),
        *("site4", "batch_7", "center_2", "cohort3", "controls", "batch_7/2017_scans_of", "site4/export_4"),
    ],
)
def test_a_folder_of_several_people_is_no_person(layout, folder, names):
    root = layout(*(f"{folder}/{name}.nii.gz" for name in names.split()))
    people = {name.split("_")[0] for name in names.split()}
    try:
        found = set(Cohort.read(root).table["subject"])
    except CohortError:
        found = people
    assert found == people


@pytest.mark.parametrize("folder", ["site4", "batch_7", "centre2", "patients"])
def test_the_only_file_of_a_group_is_its_subject(layout, folder):
    assert set(Cohort.read(layout(f"{folder}/ines_FLAIR.nii.gz")).table["subject"]) == {"ines"}


def test_one_name_in_folders_of_two_years_is_one_person_or_refused(layout):
    with pytest.raises(CohortError, match="2017_scans/ines and 2019_scans/ines"):
        Cohort.read(layout("2017_scans/ines_T1.nii.gz", "2019_scans/ines_T1.nii.gz"))


@pytest.mark.parametrize("folder", ["q{}", "patient_{}", "AB1{}", "berl00{}", "10{}", "control{}"])
def test_words_in_the_folder_of_a_person_are_a_protocol(layout, folder):
    names = ("xyz_T1", "uvw_FLAIR")
    root = layout(*(f"{folder.format(n)}/{name}.nii.gz" for n in (1, 2) for name in names))
    assert set(Cohort.read(root).table["subject"]) == {folder.format(1), folder.format(2)}


@pytest.mark.slow
def test_many_compositions_of_names_keep_persons_apart():
    numbered = tuple(form for form in IDENTIFIERS if form not in WORDS_ONLY)
    assert_one_subject_per_person(names(numbered), 20_000)
