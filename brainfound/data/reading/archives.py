"""Virtual paths, read in place: files inside zip archives, and volumes of 4-D files. Nothing is extracted.

``Path("…/x.nii.gz/volume-2")`` is the third volume of ``x.nii.gz``.
``Path("…/ses-01.zip/anat/x.nii.gz")`` is the member ``anat/x.nii.gz`` of ``ses-01.zip``. Archives are not trusted: the
directory is checked before any member is used, and a member's bytes are counted and checksummed as they are read.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from isal import isal_zlib

from brainfound.data.reading.image_names import is_image
from brainfound.errors import ScanError

MAX_DIRECTORY_BYTES = 32 * 2**20
"""Largest directory of an archive, which is read at once: room for some 200,000 members."""
MAX_MEMBER_BYTES = 16 * 2**30
"""Largest declared size of a member: that of the largest scan (1024³ voxels) with 16 bytes per voxel."""
MAX_DEFLATE_RATIO = 1032
"""No deflate stream expands more (zlib's technical notes); a header that declares more is wrong."""
FREE_BYTES = 256 * 2**20
"""Below this size any ratio is allowed: a nearly empty label map stored as .nii reaches 1000 : 1."""
MAX_RATIO = 250
"""For a member or an archive above `FREE_BYTES`. An image with noise reaches 3 : 1, a stripped one 20 : 1."""
MAX_RATIO_COMPRESSED = 20
"""The same for members that are compressed already (.gz, .mgz): only a bomb can be packed much further."""
CHUNK_BYTES = 2**18
_POINTER_BYTES = 512
_POINTER = "a pointer to a file that was not fetched"
_LOCAL_HEADER = struct.Struct("<4s2B4HL2L2H")
_InflateError = cast("type[Exception]", isal_zlib.error)  # the type stubs declare an instance
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_REMEDY = "Unpack the archive yourself and give the folder, or pack it again"
_ZIP_ERRORS = (zipfile.BadZipFile, struct.error, OSError, EOFError, ValueError, OverflowError, RuntimeError)


def volume_path(path: Path, number: int) -> Path:
    """The virtual path of one volume of a 4-D file, counted from 0."""
    return path / f"volume-{number}"


def split_volume_path(path: Path) -> tuple[Path, int | None]:
    """The file and the volume of a path; None if it is no `volume_path`."""
    match = re.fullmatch(r"volume-(\d{1,4})", path.name)
    return (path.parent, int(match.group(1))) if match and is_image(path.parent) else (path, None)


def split_archive_path(path: str | Path) -> tuple[Path, str] | None:
    """The archive and the member of a path; None if no parent of the path is a zip file."""
    path = Path(path)
    if not any(part.lower().endswith(".zip") for part in path.parts[:-1]):
        return None
    for parent in reversed(path.parents):
        if parent.suffix.lower() == ".zip" and parent.is_file():
            return parent, path.relative_to(parent).as_posix()
    return None


def list_members(archive: str | Path) -> list[str]:
    """The files in a zip archive, sorted, without folders and ``__MACOSX`` shadow files.

    ScanError: not a zip archive, or unsafe: names that leave it, links, encryption, overlapping members, or a bomb.
    """
    return sorted(_directory(Path(archive)))


def open_binary(path: str | Path) -> BinaryIO:
    """Open a file, or a member of a zip archive, for sequential reading.

    A member is not seekable; its length and checksum are verified at its end.
    ScanError: there is no such file or member, or the archive is refused, or it is a pointer of Git LFS or git-annex;
    a read may raise it too, for a corrupt member.
    """
    path = Path(path)
    parts = split_archive_path(path)
    if parts is None:
        try:
            # Opening a pipe would wait for someone to write into it.
            if not path.is_file():
                raise _missing(path)
            stream: io.BufferedReader = path.open("rb")
        except (OSError, ValueError) as error:
            raise ScanError(f"cannot be opened: {_reason(error)}", where=path.name) from error
    else:
        archive, name = parts
        info = _directory(archive).get(name)
        if info is None:
            raise _missing(path)
        stream = io.BufferedReader(_Member(archive, info), CHUNK_BYTES)
    try:
        if remedy := fetch_remedy(path, stream.peek(_POINTER_BYTES)):
            raise ScanError(_POINTER, where=path.name, remedy=remedy)
    except OSError as error:
        stream.close()
        raise ScanError(f"cannot be read: {_reason(error)}", where=path.name) from error
    except ScanError:
        stream.close()
        raise
    return cast(BinaryIO, stream)


def is_file(path: str | Path) -> bool:
    """Whether a file, or a member of a usable zip archive, exists."""
    return size_and_mtime(path) is not None


def size_and_mtime(path: str | Path) -> tuple[int, int] | None:
    """Size in bytes and modification time in ns (of a member: its declared size, the archive's time); None if missing.

    A refused archive counts as missing; `open_binary` gives the reason.
    """
    path, _ = split_volume_path(Path(path))
    parts = split_archive_path(path)
    try:
        status = Path(path if parts is None else parts[0]).stat()
    except (OSError, ValueError):
        return None
    if parts is None:
        return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None
    try:
        info = _directory(parts[0]).get(parts[1])
    except ScanError:
        return None
    return None if info is None else (info.file_size, status.st_mtime_ns)


def fetch_remedy(path: Path, start: bytes = b"") -> str | None:
    """How to fetch the content of a file that git-annex or Git LFS keeps elsewhere; None for any other file.

    Args:
        path: the file, or a link whose target is not there.
        start: its first bytes.
    """
    text = start[:_POINTER_BYTES].decode("ascii", errors="replace").replace("\\", "/").lstrip()
    if text.startswith("version https://git-lfs.github.com/spec/"):
        return "It is kept in Git LFS; fetch it: git lfs pull"
    target = "" if path.exists() else os.path.realpath(path).replace(os.sep, "/")
    is_pointer = re.match(r"(?:[./]*\.git)?/annex/objects/\S", text) is not None
    if is_pointer or "annex/objects/" in target:
        return "It is kept in git-annex; fetch it: datalad get FILE, or git annex get FILE"
    return None


def require_given(path: Path) -> None:
    """Raise a ScanError of usage, with the path as a user wrote it, if there is no such file or member."""
    if path.is_dir():
        remedy = "Give the files of one session, or a single folder of a whole cohort and no file"
        raise ScanError("this is a folder, not a scan", where=path, remedy=remedy, usage=True)
    if not path.exists() and not is_file(path):
        raise _missing(path, path, "Check the path; scans are given as FILE or CONTRAST=FILE", usage=True)


def _missing(
    path: Path, where: object = None, remedy: str = "Check the path in the manifest or folder", usage: bool = False
) -> ScanError:
    where = where or path.name
    if fetch := fetch_remedy(path):
        return ScanError(_POINTER, where=where, remedy=fetch)
    if path.is_symlink():
        return ScanError("a link whose target is not there", where=where, remedy="Copy or download the file itself")
    return ScanError("no such file", where=where, remedy=remedy, usage=usage)


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:160]


def _directory(archive: Path) -> dict[str, zipfile.ZipInfo]:
    try:
        status = archive.stat()
    except (OSError, ValueError):
        raise _missing(archive) from None
    return _checked_directory(archive, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=16)
def _checked_directory(archive: Path, num_bytes: int, _mtime_ns: int) -> dict[str, zipfile.ZipInfo]:
    """Name → entry of each file; cached, since a cohort reads one archive many times."""
    try:
        with archive.open("rb") as raw:
            entries = zipfile.ZipFile(cast(BinaryIO, _LimitedReads(raw, archive, num_bytes))).infolist()
    except _ZIP_ERRORS as error:
        what = f"cannot be read as a zip archive: {_reason(error)}"
        remedy = "The file is truncated, corrupt or of another format; copy or download it again"
        raise ScanError(what, where=archive.name, remedy=remedy) from error
    names: set[str] = set()
    for info in entries:
        problem = _name_problem(info) or _entry_problem(info)
        name = info.orig_filename.rstrip("/")
        if problem is None and name in names:
            problem = "two members have the same name"
        if problem is not None:
            shown = ascii(PurePosixPath(info.orig_filename.replace("\\", "/")).name[:80])
            raise ScanError(f"unsafe archive: {problem}", where=archive.name, got=f"member {shown}", remedy=_REMEDY)
        names.add(name)
    _check_total(archive, entries, num_bytes)
    return {i.orig_filename: i for i in entries if not i.is_dir() and not i.orig_filename.startswith("__MACOSX/")}


def _name_problem(info: zipfile.ZipInfo) -> str | None:
    # `filename` is cut at a zero byte; the original name is complete.
    name = info.orig_filename
    parts = name.removesuffix("/").split("/")
    if name.startswith("/"):
        return "an absolute name"
    if "\\" in name:
        return "a backslash in a name"
    if re.match(r"[A-Za-z]:", name):
        return "a drive letter in a name"
    if ".." in parts:
        return "a name that leaves the archive"
    if "" in parts or "." in parts or any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        return "a name that no file can have"
    return None


def _entry_problem(info: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if stat.S_ISLNK(kind):
        return "a symbolic link"
    if kind and not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        return "a member that is no ordinary file"
    if info.flag_bits & _ENCRYPTED:
        return "an encrypted member"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "a compression other than deflate"
    declared, stored = info.file_size, info.compress_size
    if declared > MAX_MEMBER_BYTES:
        return f"a member of more than {MAX_MEMBER_BYTES // 2**30} GiB"
    if info.compress_type == zipfile.ZIP_STORED and declared != stored:
        return "a stored member with two sizes"
    if declared > MAX_DEFLATE_RATIO * stored + 64:
        return "a member that declares more than its compression can hold"
    compressed_before = info.orig_filename.lower().endswith((".gz", ".mgz"))
    limit = MAX_RATIO_COMPRESSED if compressed_before else MAX_RATIO
    free = FREE_BYTES // 16 if compressed_before else FREE_BYTES
    if declared > free and declared > limit * stored:
        return f"a member packed more than {limit} : 1, as only a bomb is"
    return None


def _check_total(archive: Path, entries: list[zipfile.ZipInfo], num_bytes: int) -> None:
    problem = None
    if (total := sum(info.file_size for info in entries)) > max(FREE_BYTES, MAX_RATIO * num_bytes):
        problem = f"its members declare {total} bytes, more than {MAX_RATIO} times its size"
    end = 0
    for info in sorted(entries, key=lambda info: info.header_offset):
        # A known bomb has thousands of members that share one compressed core.
        if info.header_offset < end:
            problem = "its members overlap"
        end = info.header_offset + _LOCAL_HEADER.size + info.compress_size
    if end > num_bytes:
        problem = "its members lie beyond its end"
    if problem is not None:
        raise ScanError(f"unsafe archive: {problem}", where=archive.name, remedy=_REMEDY)


class _LimitedReads:
    """A file with limited reads, for the directory that `zipfile` reads at once."""

    def __init__(self, raw: BinaryIO, archive: Path, num_bytes: int) -> None:
        self._raw = raw
        # Python allocates the requested size before it knows how much the file holds.
        self._max_read = min(MAX_DIRECTORY_BYTES, num_bytes) + 1
        self._name = archive.name
        self.seek, self.tell, self.seekable = raw.seek, raw.tell, raw.seekable

    def read(self, size: int = -1) -> bytes:
        data = self._raw.read(min(size, self._max_read) if size >= 0 else self._max_read)
        if len(data) > MAX_DIRECTORY_BYTES:
            what = "unsafe archive: its table of contents is too large"
            expected = f"at most {MAX_DIRECTORY_BYTES // 2**20} MiB"
            raise ScanError(what, where=self._name, expected=expected, remedy=_REMEDY)
        return data


class _Member(io.RawIOBase):
    """The bytes of one member, decompressed in chunks, counted and checksummed."""

    def __init__(self, archive: Path, info: zipfile.ZipInfo) -> None:
        self._info = info
        self._name = PurePosixPath(info.orig_filename).name
        self._raw = archive.open("rb")
        self._packed_left = info.compress_size
        self._num_unpacked = self._crc = 0
        self._ended = False
        is_packed = info.compress_type == zipfile.ZIP_DEFLATED
        self._inflate: Any = isal_zlib.decompressobj(wbits=-zlib.MAX_WBITS) if is_packed else None
        try:
            self._skip_local_header()
        except ScanError:
            self._raw.close()
            raise

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = b"" if self._ended or not len(view) else self._next(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._raw.close()
        super().close()

    def _skip_local_header(self) -> None:
        self._raw.seek(self._info.header_offset)
        block = self._raw.read(_LOCAL_HEADER.size)
        if len(block) < _LOCAL_HEADER.size or block[:4] != b"PK\x03\x04":
            raise self._corrupt("its place in the archive holds something else")
        fields = _LOCAL_HEADER.unpack(block)
        if fields[3] & _ENCRYPTED or fields[4] != self._info.compress_type:
            raise self._corrupt("the archive describes it in two ways")
        # Both names have the encoding of the entry.
        encoding = "utf-8" if self._info.flag_bits & 0x800 else "cp437"
        name = self._raw.read(fields[10])
        if name.decode(encoding, errors="replace") != self._info.orig_filename:
            raise self._corrupt("the archive gives it two names")
        self._raw.seek(fields[11], io.SEEK_CUR)

    def _next(self, limit: int) -> bytes:
        if self._inflate is None:
            data = self._packed(min(limit, self._packed_left))
            done = self._packed_left == 0
        else:
            data, done = self._inflated(limit)
        self._num_unpacked += len(data)
        self._crc = isal_zlib.crc32(data, self._crc)
        if self._num_unpacked > self._info.file_size:
            raise self._corrupt("it holds more than the archive declares")
        if done:
            self._ended = True
            if self._num_unpacked != self._info.file_size:
                raise self._corrupt("it holds less than the archive declares")
            if self._packed_left:
                raise self._corrupt("data follows its end")
            if self._crc != self._info.CRC:
                raise self._corrupt("its checksum does not match")
        return data

    def _inflated(self, limit: int) -> tuple[bytes, bool]:
        """At least one byte and at most ``limit``, and whether the stream has ended."""
        inflate = self._inflate
        while True:
            packed = inflate.unconsumed_tail or self._packed(min(CHUNK_BYTES, self._packed_left))
            try:
                data = inflate.decompress(packed, limit)
            except _InflateError as error:
                raise self._corrupt(_reason(error)) from error
            if inflate.eof:
                self._packed_left += len(inflate.unused_data)
                return data, True
            if data:
                return data, False
            if not packed:
                raise self._corrupt("its compressed data end too early")

    def _packed(self, count: int) -> bytes:
        try:
            data = self._raw.read(count)
        except OSError as error:
            raise self._corrupt(_reason(error)) from error
        if len(data) < count:
            raise self._corrupt("the archive ends within it")
        self._packed_left -= len(data)
        return data

    def _corrupt(self, why: str) -> ScanError:
        remedy = "The archive is corrupt or was tampered with; copy or download it again"
        return ScanError(f"cannot be read from its zip archive: {why}", where=self._name, remedy=remedy)
