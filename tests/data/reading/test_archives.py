"""Zip members as paths, and every archive that must not be trusted."""

from __future__ import annotations

import io
import os
import random
import stat
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from brainfound.data.reading import archives
from brainfound.data.reading.archives import is_file, list_members, open_binary, size_and_mtime, split_archive_path
from brainfound.errors import ScanError

TEXT = b"some bytes of a scan " * 500


def write_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as opened:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            opened.writestr(info, content)
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_zip(tmp_path / "ses-01.zip", {"anat/x.nii.gz": TEXT, "anat/y.json": b"{}", "empty/": b"", "z": b""})


def test_a_path_is_split_at_an_archive_that_exists(archive, tmp_path):
    assert split_archive_path(archive / "anat/x.nii.gz") == (archive, "anat/x.nii.gz")
    assert split_archive_path(archive) is None
    assert split_archive_path(tmp_path / "other.zip" / "x.nii.gz") is None
    folder = tmp_path / "folder.zip"
    folder.mkdir()
    (folder / "a.nii").write_bytes(TEXT)
    assert split_archive_path(folder / "a.nii") is None
    assert is_file(folder / "a.nii")


def test_members_are_listed_and_read_where_they_are(archive):
    assert list_members(archive) == ["anat/x.nii.gz", "anat/y.json", "z"]
    with open_binary(archive / "anat/x.nii.gz") as stream:
        assert stream.read(10) == TEXT[:10]
        assert stream.read() == TEXT[10:]
    with open_binary(archive / "z") as stream:
        assert stream.read() == b""
    assert size_and_mtime(archive / "anat/x.nii.gz") == (len(TEXT), archive.stat().st_mtime_ns)
    assert [path.name for path in archive.parent.iterdir()] == ["ses-01.zip"]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("size", [0, 1, 5, archives.CHUNK_BYTES, 3 * archives.CHUNK_BYTES + 7])
def test_any_size_is_read_whole(tmp_path, compression, size):
    content = np.random.default_rng(0).integers(0, 99, size).astype(np.uint8).tobytes()
    path = write_zip(tmp_path / "a.zip", {"x": content}, compression)
    with open_binary(path / "x") as stream:
        assert stream.read() == content


def test_what_is_missing_is_missing(archive, tmp_path):
    for path in (archive / "anat/none.nii.gz", archive / "anat", tmp_path / "none.nii", archive / "../ses-01.zip/q"):
        assert not is_file(path)
        assert size_and_mtime(path) is None
        with pytest.raises(ScanError, match="no such file"):
            open_binary(path)
    assert size_and_mtime(tmp_path) is None
    os.mkfifo(tmp_path / "pipe.nii")
    with pytest.raises(ScanError, match="no such file"):
        open_binary(tmp_path / "pipe.nii")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../evil.nii.gz", "leaves the archive"),
        ("anat/../../evil.nii.gz", "leaves the archive"),
        ("../", "leaves the archive"),
        ("/etc/evil.nii", "absolute name"),
        ("C:/evil.nii", "drive letter"),
        ("c:evil.nii", "drive letter"),
        ("anat\\evil.nii", "backslash"),
        ("anat//evil.nii", "no file can have"),
        ("./evil.nii", "no file can have"),
        ("evil.nii\x00.png", "no file can have"),
        ("evil\n.nii", "no file can have"),
    ],
)
def test_names_that_reach_elsewhere_are_refused(tmp_path, name, reason):
    # A stand-in of equal length is replaced in the bytes: the writer would tidy the name itself.
    stand_in = "x" * (len(name) - name.endswith("/")) + "/" * name.endswith("/")
    path = write_zip(tmp_path / "a.zip", {"good.nii": TEXT, stand_in: b"" if name.endswith("/") else TEXT})
    path.write_bytes(path.read_bytes().replace(stand_in.encode(), name.encode()))
    for use in (list_members, lambda archive: open_binary(archive / "good.nii")):
        with pytest.raises(ScanError, match=reason) as caught:
            use(path)
        assert "\n" not in str(caught.value)
        assert caught.value.remedy
    assert not is_file(path / "good.nii")


def _entry(path: Path, member: str) -> tuple[bytearray, int, int]:
    """An archive's bytes, and where its entry of a member lies in the directory and in the file."""
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as opened:
        info = opened.getinfo(member)
        central = opened.start_dir
    while raw[central + 46 : central + 46 + len(member)] != member.encode():
        central += 46 + sum(struct.unpack_from("<3H", raw, central + 28))
    return raw, central, info.header_offset


def _patch(path: Path, member: str, offset: int, code: str, value: int) -> None:
    """Change one field of a member's entry in the directory."""
    raw, central, _ = _entry(path, member)
    struct.pack_into(code, raw, central + offset, value)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("offset", "code", "value", "reason"),
    [
        (38, "<L", (stat.S_IFLNK | 0o777) << 16, "symbolic link"),
        (38, "<L", (stat.S_IFIFO | 0o777) << 16, "no ordinary file"),
        (8, "<H", 1, "encrypted"),
        (10, "<H", zipfile.ZIP_LZMA, "compression other than deflate"),
        (24, "<L", 2**31, "more than its compression can hold"),
        (42, "<L", 10, "overlap"),
    ],
)
def test_entries_that_are_no_plain_files_are_refused(tmp_path, offset, code, value, reason):
    path = write_zip(tmp_path / "a.zip", {"a.nii": TEXT, "b.nii": TEXT})
    _patch(path, "b.nii", offset, code, value)
    with pytest.raises(ScanError, match=reason):
        list_members(path)


def test_two_members_of_one_name_are_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.nii": TEXT, "b.nii": TEXT})
    path.write_bytes(path.read_bytes().replace(b"b.nii", b"a.nii"))
    with pytest.raises(ScanError, match="same name"):
        list_members(path)


def test_bombs_are_refused_by_what_they_declare(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "FREE_BYTES", 2**20)
    bomb = write_zip(tmp_path / "a.zip", {"zeros.nii": bytes(2**21)})
    with pytest.raises(ScanError, match="packed more than 250 : 1"):
        list_members(bomb)
    many = write_zip(tmp_path / "b.zip", {f"{n}.nii": bytes(2**19) for n in range(8)})
    with pytest.raises(ScanError, match="250 times its size"):
        list_members(many)
    twice = write_zip(tmp_path / "c.zip", {"zeros.nii.gz": bytes(2**17)})
    with pytest.raises(ScanError, match="packed more than 20 : 1"):
        list_members(twice)
    huge = write_zip(tmp_path / "d.zip", {"a.nii": TEXT})
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 1000)
    with pytest.raises(ScanError, match="a member of more than"):
        list_members(huge)


def test_a_nearly_empty_label_map_is_no_bomb(tmp_path):
    content = bytes(2**20) + b"\1" * 100 + bytes(2**24)
    path = write_zip(tmp_path / "a.zip", {"mask.nii": content})
    assert path.stat().st_size < len(content) / archives.MAX_RATIO
    with open_binary(path / "mask.nii") as stream:
        assert stream.read() == content


def test_a_table_of_contents_too_large_to_read_is_refused(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip", {f"{n}.nii": b"" for n in range(200)})
    monkeypatch.setattr(archives, "MAX_DIRECTORY_BYTES", 5000)
    with pytest.raises(ScanError, match="table of contents"):
        list_members(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(("change", "word"), [(-1, "more"), (1, "less")])
def test_a_member_gives_exactly_what_was_declared(tmp_path, compression, change, word):
    path = write_zip(tmp_path / "a.zip", {"a.nii": TEXT, "b.nii": TEXT}, compression)
    _patch(path, "a.nii", 24, "<L", len(TEXT) + change)
    # A stored member has one size only, so there the directory shows the lie.
    expected = "two sizes" if compression == zipfile.ZIP_STORED else f"holds {word} than"
    with pytest.raises(ScanError, match=expected):
        open_binary(path / "a.nii").read()


def test_a_wrong_checksum_and_a_wrong_place_are_noticed(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.nii": TEXT})
    good = path.read_bytes()
    _patch(path, "a.nii", 16, "<L", 1234)
    with pytest.raises(ScanError, match="checksum"):
        open_binary(path / "a.nii").read()
    path.write_bytes(good.replace(b"a.nii", b"b.nii", 1))
    with pytest.raises(ScanError, match="two names"):
        open_binary(path / "a.nii")
    path.write_bytes(b"XX" + good[2:])
    with pytest.raises(ScanError, match="something else"):
        open_binary(path / "a.nii")


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1, -30])
def test_truncated_archives_are_refused(archive, keep):
    raw = archive.read_bytes()
    archive.write_bytes(raw[: int(keep * len(raw))] if isinstance(keep, float) else raw[:keep])
    with pytest.raises(ScanError, match="cannot be read as a zip archive"):
        list_members(archive)
    assert size_and_mtime(archive / "anat/x.nii.gz") is None


def test_any_damage_ends_in_the_same_bytes_or_in_a_refusal(tmp_path):
    path = tmp_path / "a.zip"
    good = write_zip(path, {"a.nii": TEXT, "b/c.json": b'{"a": 1}'}).read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(1500):
        raw = bytearray(good)
        for _ in range(rng.choice([1, 1, 3])):
            place = rng.randrange(len(raw))
            kind = rng.randrange(3)
            if kind == 0:
                raw[place] = rng.randrange(256)
            elif kind == 1:
                del raw[place : place + rng.randrange(1, 9)]
            else:
                raw[place:place] = rng.randbytes(rng.randrange(1, 9))
        path.write_bytes(raw)
        archives._checked_directory.cache_clear()
        try:
            for name in list_members(path):
                with open_binary(path / name) as stream:
                    content = stream.read()
                if name == "a.nii":
                    assert content == TEXT
        except ScanError:
            refused += 1
    assert refused > 1000


def test_a_stream_of_a_member_is_an_ordinary_binary_stream(archive):
    stream = open_binary(archive / "anat/x.nii.gz")
    assert stream.readable()
    assert not stream.seekable()
    assert isinstance(stream, io.BufferedReader)
    stream.close()
    assert stream.closed


def test_names_beyond_ascii_are_read(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"sub-01/Kopf-Übersicht.nii": TEXT})
    with open_binary(path / "sub-01/Kopf-Übersicht.nii") as stream:
        assert stream.read() == TEXT
