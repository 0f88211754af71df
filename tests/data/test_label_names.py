"""Names of label codes: tables as programs write them, and names as people write them."""

from __future__ import annotations

import json

import pytest

from brainfound.data.label_names import file_label, find_codes, has_sides, read_lookup_table, unique_names
from brainfound.errors import UsageError

FREESURFER = """#$Id: FreeSurferColorLUT.txt

#No. Label Name:                            R   G   B   A

0   Unknown                                 0   0   0   0
4   Left-Lateral-Ventricle                  120 18  134 0
14  3rd-Ventricle                           204 182 142 0
17  Left-Hippocampus                        220 216 20  0
53  Right-Hippocampus                       220 216 20  0
1001    ctx-lh-bankssts                     25  100 40  0
"""
SYNTHSEG = """List of structures

labels    structures
0         background
17        left hippocampus
14    3rd ventricle
"""
SNAP = """# ITK-SnAP Label Description File
    0     0    0    0        0  0  0    "Clear Label"
    2   255    0    0        1  1  1    "edema"
"""


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("lut.txt", FREESURFER, {4: "Left-Lateral-Ventricle", 14: "3rd-Ventricle", 1001: "ctx-lh-bankssts"}),
        ("labels.txt", SYNTHSEG, {17: "left hippocampus", 14: "3rd ventricle"}),
        ("snap.label", SNAP, {2: "edema"}),
        ("muse.csv", "Index,Code,Name\n47,MUSE_47,Hippocampus_R\n48,MUSE_48,Hippocampus_L\n", {48: "Hippocampus_L"}),
        ("table.tsv", "\ufeffname\tindex\nedema\t2\ncore\t3\n", {2: "edema", 3: "core"}),
        ("plain.csv", "4,vl\n43,vr\n", {4: "vl", 43: "vr"}),
        ("dataset.json", json.dumps({"labels": {"background": 0, "edema": 2, "core": [1, 3]}}), {2: "edema"}),
        ("dataset.json", json.dumps({"labels": {"0": "background", "2": "edema"}}), {2: "edema"}),
    ],
)
def test_tables_of_programs_are_read(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert expected.items() <= read_lookup_table(tmp_path / name).items()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("nothing here\n", "no label codes"),
        ("1 a\n1 b\n", "two names for the code 1.*a and b"),
        (b"\xff\xfe\x00", "text"),
    ],
)
def test_other_files_are_refused(tmp_path, text, fault):
    file = tmp_path / "lut.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=fault):
        read_lookup_table(file)
    with pytest.raises(UsageError, match="no such file"):
        read_lookup_table(tmp_path / "none.txt")


def test_names_are_found_as_people_write_them():
    table = {4: "Left-Lateral-Ventricle", 17: "Left-Hippocampus", 53: "Right-Hippocampus", 48: "Amygdala_L", 9: "core"}
    for name, code in {
        "ventricle_lateral_left": 4, "hippocampus_l": 17, "HippocampusRight": 53, "left amygdala": 48, "core": 9,
    }.items():  # fmt: skip
        assert find_codes(name, table, "") == [code]
    with pytest.raises(UsageError, match=r"no such name.*Left-Hipocampus.*Did you mean Left-Hippocampus\?"):
        find_codes("Left-Hipocampus", table, "task.regions.x")
    with pytest.raises(UsageError, match="several codes.*1, 2"):
        find_codes("core left", {1: "core_l", 2: "Left core"}, "")


def test_names_of_codes_are_unique():
    assert unique_names([2, 5, 7, 9], {2: "core", 5: "core", 7: "edema"}) == ["core 2", "core 5", "edema", "label 9"]


def test_names_in_files_have_letters_and_digits():
    assert [file_label(name) for name in ("ventricle_left", "3rd-Ventricle", "label 4")] == [
        "ventricleLeft", "3rdVentricle", "label4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "sided"),
    [
        (("edema", "core"), False),
        (("Left-Hippocampus", "Right-Hippocampus"), True),
        (("hippocampus_l", "core"), True),
        (("lesionleft",), True),
        (("bright",), False),
    ],
)
def test_sides_are_noticed_with_and_without_a_partner(names, sided):
    assert has_sides(names) is sided
