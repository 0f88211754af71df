"""Image files: NIfTI-1 and -2 (``.nii``, ``.nii.gz``, ``.hdr`` + ``.img``) and MGH (``.mgz``, ``.mgh``).

nibabel interprets the header. The bytes are read here, because headers can be wrong: the declared size is compared with
the file's before memory is allocated; voxels become float32 chunk by chunk, without a second copy of the volume; and
the file is read to its end, which verifies the checksum and detects trailing data.

Axis legend: I J K stored voxels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from isal import igzip, isal_zlib
from jaxtyping import Float
from nibabel.analyze import AnalyzeHeader
from nibabel.freesurfer.mghformat import DATA_OFFSET as MGH_OFFSET
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.freesurfer.mghformat import header_dtype as MGH_HEADER
from nibabel.nifti1 import Nifti1Header, Nifti1PairHeader
from nibabel.nifti2 import Nifti2Header, Nifti2PairHeader
from nibabel.spm2analyze import Spm2AnalyzeHeader
from nibabel.volumeutils import apply_read_scaling

from brainfound.data.reading.archives import MAX_DEFLATE_RATIO, open_binary, size_and_mtime, split_volume_path
from brainfound.data.reading.header_geometry import HEADER_ERRORS, AffineSource, header_affine, spatial_header
from brainfound.data.reading.image_names import MGH_SUFFIXES, is_header, is_image, other_half, stem
from brainfound.errors import ScanError

MAX_VOXELS = 1024**3
"""Four times the voxels of an ex-vivo brain at 0.25 mm; 4 GiB as float32."""
MAX_AXIS_VOXELS = 4096
"""Voxels along one axis, more than any scanner makes; a stack gets a slice for each."""
MAX_OFFSET_BYTES = 64 * 2**20
"""Largest header extensions before the voxels. They are skipped, never read into memory."""
MAX_TAIL_BYTES = 4096
"""Bytes allowed after the last voxel: some writers fill up a disk block."""
MAX_MGH_TAIL_BYTES = 2**20
"""MGH files end with tags: scan parameters, the commands that made the file, a colour table."""
CHUNK_VOXELS = 2**17
"""Voxels read, scaled and checked at a time; they fit into the processor's cache."""

_STREAM_ERRORS = (OSError, EOFError, cast("type[Exception]", isal_zlib.error))


@dataclass(frozen=True)
class ImageHeader:
    """A plausible header.

    Attributes:
        data_path: the voxels' file (not ``path`` for an ``.hdr`` + ``.img`` pair).
        shape: stored shape, with trailing axes of length one; ``shape_3d`` is without them.
        offset: byte offset of the first voxel in the decompressed file.
        slope, inter: scaling of the voxels, or None.
        affine: ``(4, 4)``, index in the stored array → millimetres in RAS+.
        max_tail: most bytes allowed after the last voxel.
        spatial: see `brainfound.data.reading.header_geometry.spatial_header`.
    """

    path: Path
    data_path: Path
    shape: tuple[int, ...]
    shape_3d: tuple[int, int, int]
    dtype: np.dtype
    offset: int
    slope: Any
    inter: Any
    affine: Float[np.ndarray, "4 4"]
    affine_source: AffineSource
    max_tail: int
    notes: tuple[str, ...]
    spatial: Nifti1Header | None


def unreadable_error(path: Path, why: object) -> ScanError:
    """The error for a damaged file, or one that is not an image."""
    text = (str(why).strip().splitlines() or [type(why).__name__])[0][:160]
    remedy = "The file is truncated, corrupt or of another format; copy or export it again"
    return ScanError(f"cannot be read as an image: {text}", where=path.name, remedy=remedy)


def read_image_header(path: Path) -> ImageHeader:
    """Read and check the header of an image, without its voxels; ScanError for a file that cannot be a scan."""
    path, volume = split_volume_path(path)
    if not is_image(path):
        raise ScanError(
            "cannot be read as an image: not one of the formats that are read",
            where=path.name,
            expected="NIfTI (.nii, .nii.gz, .hdr with .img) or MGH (.mgz, .mgh)",
            remedy="Convert it, for example with nib-convert or mri_convert",
        )
    data_path = path
    if (other := other_half(path)) is not None:
        path, data_path = _pair(path, other)
    with _opened(path) as stream:
        block = stream.read(Nifti2Header.template_dtype.itemsize)
    messages = _Messages()
    try:
        with np.errstate(all="ignore"):
            header = _parse(path, block, is_pair=data_path != path, messages=messages)
            shape = tuple(int(size) for size in header.get_data_shape())
            shape_3d = _shape_3d(shape if volume is None else _select_volume(shape, volume, path), path)
            dtype = _real_dtype(header.get_data_dtype(), path)
            is_mgh = isinstance(header, MGHHeader)
            offset = MGH_OFFSET if is_mgh else int(header.get_data_offset())
            skipped = 0 if volume is None else math.prod(shape_3d) * dtype.itemsize
            slope, inter = (None, None) if is_mgh else header.get_slope_inter()
            affine, source, notes = header_affine(header, shape_3d, messages.texts)
            spatial = spatial_header(header)
    except HEADER_ERRORS as error:
        raise unreadable_error(path, error) from error
    if not is_mgh and data_path == path and offset < header.single_vox_offset:
        raise unreadable_error(path, f"the voxels would begin inside the header, at byte {offset}")
    max_tail = MAX_MGH_TAIL_BYTES if is_mgh else MAX_TAIL_BYTES
    _check_declared_size(data_path, offset, shape_3d if volume is None else shape, dtype)
    if volume is not None:
        offset, max_tail = offset + volume * skipped, max_tail + (shape[3] - volume - 1) * skipped
    texts = [text for text in messages.texts if source != "sform" or "qfac" not in text]
    return ImageHeader(
        path=path,
        data_path=data_path,
        shape=shape,
        shape_3d=shape_3d,
        dtype=dtype,
        offset=offset,
        slope=slope,
        inter=inter,
        affine=affine,
        affine_source=source,
        max_tail=max_tail,
        notes=tuple(f"header: {text}" for text in texts) + tuple(notes),
        spatial=spatial,
    )


def read_voxels(header: ImageHeader) -> tuple[Float[np.ndarray, "I J K"], float, float]:
    """The voxels in float32, scaled as by nibabel, and their smallest and largest value (NaN if any is NaN).

    ScanError: the file is truncated or corrupt, or holds more data than its header says.
    """
    out = _allocate(header)
    num_chunks = -(-out.size // CHUNK_VOXELS)
    lows, highs = np.empty(num_chunks, np.float32), np.empty(num_chunks, np.float32)
    # Native float32 without scaling needs no conversion: the bytes are read into the result.
    direct = header.dtype == np.float32 and header.dtype.isnative and _unscaled(header)
    staging = bytearray(0 if direct else CHUNK_VOXELS * header.dtype.itemsize)
    with _opened(header.data_path) as stream, np.errstate(all="ignore"):
        _skip(stream, header.offset, header.data_path)
        for number in range(num_chunks):
            part = out[number * CHUNK_VOXELS : (number + 1) * CHUNK_VOXELS]
            if direct:
                _fill(stream, memoryview(cast(Any, part)).cast("B"), header.data_path)
            else:
                raw = memoryview(staging)[: part.size * header.dtype.itemsize]
                _fill(stream, raw, header.data_path)
                part[:] = _scaled(np.frombuffer(raw, header.dtype), header)
            lows[number], highs[number] = part.min(), part.max()
        _check_end(stream, header)
    return out.reshape(header.shape_3d, order="F"), float(lows.min()), float(highs.max())


def copy_without_texts(path: Path, out: BinaryIO) -> None:
    """Copy a NIfTI file (``.nii``) without the texts that may name a person.

    Left out are the texts of the header, its extensions, and bytes after the voxels. ScanError as `read_voxels`.
    """
    header = read_image_header(path)
    start = bytearray(header.offset)
    with _opened(header.data_path) as stream:
        _fill(stream, memoryview(start), path)
        kind: Any = Nifti2Header if Nifti2Header.may_contain_header(bytes(start)) else Nifti1Header
        template = kind.template_dtype
        blank = kind(bytes(start[: template.itemsize]), check=False)
        for name in template.names:
            if template[name].kind == "S" and name not in ("magic", "regular"):
                blank.structarr[name] = b""
        out.write(blank.binaryblock + bytes(header.offset - template.itemsize))
        left = math.prod(header.shape) * header.dtype.itemsize
        while left:
            chunk = stream.read(min(left, CHUNK_VOXELS))
            if not chunk:
                raise unreadable_error(path, "the file ends within its voxels")
            out.write(chunk)
            left -= len(chunk)
        _check_end(stream, header)


def _allocate(header: ImageHeader) -> np.ndarray:
    num_voxels = int(np.prod(header.shape_3d))
    try:
        return np.empty(num_voxels, dtype=np.float32)
    except MemoryError as error:
        got = f"shape {'×'.join(map(str, header.shape))}, which takes {num_voxels / 2**28:.1f} GiB"
        remedy = "Use fewer workers, a larger machine, or a coarser copy of the image"
        what = "not enough memory for the volume"
        raise ScanError(what, where=header.path.name, got=got, remedy=remedy) from error


def _unscaled(header: ImageHeader) -> bool:
    return header.slope in (None, 1) and header.inter in (None, 0)


def _scaled(values: np.ndarray, header: ImageHeader) -> np.ndarray:
    if not _unscaled(header):
        # Arrays keep their own precision, float64 in NIfTI.
        slope: Any = np.asanyarray(1.0 if header.slope is None else header.slope)
        inter: Any = np.asanyarray(0.0 if header.inter is None else header.inter)
        values = apply_read_scaling(values, slope, inter)
    # 64-bit integers become float32 via float64, as in nibabel.
    return values.astype(np.promote_types(values.dtype, np.float32), copy=False)


def _pair(path: Path, other: Path) -> tuple[Path, Path]:
    """The header file and the voxel file of an ``.hdr`` + ``.img`` pair, given in any order."""
    if size_and_mtime(other) is None:
        if other.is_symlink():
            open_binary(other)  # its error says how to fetch the file
        expected = f"the {'.img' if is_header(path) else '.hdr'} file of the same name in its folder"
        remedy = "Copy both files, or convert them to one .nii.gz"
        raise ScanError("half of a pair is missing", where=path.name, expected=expected, remedy=remedy)
    if size_and_mtime(path.with_name(stem(path) + ".mat")) is not None:
        what = "its orientation is in an SPM .mat file, which is not read"
        raise ScanError(what, where=path.name, remedy="Convert the image to .nii.gz with SPM")
    return (path, other) if is_header(path) else (other, path)


def _parse(path: Path, block: bytes, is_pair: bool, messages: _Messages) -> Any:
    """nibabel's header object for the first bytes of a file; extensions are not read."""
    if path.name.lower().endswith(MGH_SUFFIXES):
        if len(block) < MGH_HEADER.itemsize:
            raise ValueError("the file ends within the header")
        header = MGHHeader(block[: MGH_HEADER.itemsize], check=False)
        header.check_fix(logger=messages, error_level=40)
        return header
    kinds: tuple[Any, ...] = (Nifti1Header, Nifti2Header)
    if is_pair:
        kinds = (Nifti1PairHeader, Nifti2PairHeader, Spm2AnalyzeHeader, AnalyzeHeader)
    kind = next((kind for kind in kinds if kind.may_contain_header(block)), None)
    if kind is None:
        raise ValueError("the file holds no NIfTI header" if block else "the file is empty")
    header = kind(block[: kind.template_dtype.itemsize], check=False)
    header.check_fix(logger=messages, error_level=40)
    if kind is Nifti2Header and 3000 <= int(header["intent_code"]) < 3100:
        raise ValueError("it is a CIFTI file, which holds a table and no volume")
    return header


def _shape_3d(shape: tuple[int, ...], path: Path) -> tuple[int, int, int]:
    spatial = shape
    while len(spatial) > 3 and spatial[-1] == 1:
        spatial = spatial[:-1]
    shown = f"shape {'×'.join(map(str, shape))}"
    if len(spatial) != 3:
        remedy = "Extract one volume (for diffusion data the trace or b=1000 image)"
        raise ScanError("not a 3-D volume", where=path.name, got=shown, expected="three dimensions", remedy=remedy)
    if min(spatial) < 2 or max(spatial) > MAX_AXIS_VOXELS or math.prod(spatial) > MAX_VOXELS:
        expected = f"2 to {MAX_AXIS_VOXELS} voxels along each axis and at most {MAX_VOXELS} in all"
        raise ScanError("implausible size", where=path.name, got=shown, expected=expected, remedy="Check the header")
    return (spatial[0], spatial[1], spatial[2])


def _select_volume(shape: tuple[int, ...], volume: int, path: Path) -> tuple[int, ...]:
    """The shape of one volume of a 4-D file."""
    if len(shape) != 4 or volume >= shape[3]:
        got = f"shape {'×'.join(map(str, shape))}"
        remedy = "Check the names of the channels against the file"
        raise ScanError(f"the file has no volume {volume}", where=path.name, got=got, remedy=remedy)
    return shape[:3]


def _real_dtype(dtype: Any, path: Path) -> np.dtype:
    """The stored type, which must be a real number of at most 64 bits."""
    dtype = np.dtype(dtype)
    if dtype.kind in "iu" or (dtype.kind == "f" and dtype.itemsize <= 8):
        return dtype
    if dtype.kind == "c":
        got, remedy = "complex numbers", "Export the magnitude image"
    elif dtype.names:
        got, remedy = "colours", "Export the scan itself instead of a coloured picture of it"
    else:
        got, remedy = f"voxels of {dtype.itemsize * 8} bits", "Convert the image to float32"
    what = "the voxels are no ordinary numbers"
    raise ScanError(what, where=path.name, got=got, expected="integers or floats", remedy=remedy)


def _check_declared_size(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Refuse a header that does not fit the file, before memory is allocated."""
    facts = size_and_mtime(path)
    held = 0 if facts is None else facts[0]
    if offset < 0 or offset > MAX_OFFSET_BYTES:
        raise unreadable_error(path, f"the voxels would begin at byte {offset}")
    claimed = offset + math.prod(shape) * dtype.itemsize
    if claimed > held * (MAX_DEFLATE_RATIO if _is_gzip(path) else 1):
        but = f"which {held} compressed bytes cannot hold" if _is_gzip(path) else f"but the file has {held}"
        raise unreadable_error(path, f"its header claims {claimed} bytes, {but}")


class _Messages(logging.Logger):
    """Collects nibabel's messages about repaired headers, which would otherwise reach the terminal."""

    def __init__(self) -> None:
        super().__init__("brainfound.header", level=logging.DEBUG)
        self.texts: list[str] = []
        self.propagate = False

    def handle(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if text:
            self.texts.append(text[:160])


def _is_gzip(path: Path) -> bool:
    return path.name.lower().endswith((".gz", ".mgz"))


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of a file or of a member of an archive."""
    try:
        with open_binary(path) as stored:
            if not _is_gzip(path):
                yield stored
                return
            with igzip.IGzipFile(fileobj=stored, mode="rb") as stream:
                yield cast(BinaryIO, stream)
    except _STREAM_ERRORS as error:
        raise unreadable_error(path, error) from error


def _skip(stream: BinaryIO, count: int, path: Path) -> None:
    while count:
        step = len(stream.read(min(count, CHUNK_VOXELS)))
        if not step:
            raise unreadable_error(path, "the file ends before its voxels")
        count -= step


def _fill(stream: Any, view: memoryview, path: Path) -> None:
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])
        if not count:
            raise unreadable_error(path, "the file ends within its voxels")
        done += count


def _check_end(stream: BinaryIO, header: ImageHeader) -> None:
    """Read to the end of the file, which verifies the checksum; ScanError if too much follows the voxels."""
    tail = 0
    while step := len(stream.read(CHUNK_VOXELS)):
        tail += step
        if tail > header.max_tail:
            what = "the file holds more data than its header says"
            expected = f"at most {header.max_tail} bytes after shape {'×'.join(map(str, header.shape))}"
            remedy = "Its header is damaged or describes a part of it; export it again"
            raise ScanError(what, where=header.data_path.name, expected=expected, remedy=remedy)
