"""Reading a scan from any bytes: the rule that must hold, and a coverage-guided fuzzer for it.

The rule: `load_scan` raises `ScanError`, or returns exactly what nibabel reads from the same file by itself; within
`MAX_SECONDS` and `MAX_BYTES`; without a word on the terminal and without another exception.

Run the fuzzer by hand (``pip install atheris``), here for 20,000 executions::

    python tests/data/reading/fuzz_scan.py -runs=20000

What it finds is written as ``crash-…`` into the current folder; give that file as the argument to repeat it.
"""

from __future__ import annotations

import gzip
import io
import logging
import sys
import tempfile
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path

if __name__ == "__main__":
    import atheris

    # Only what decides about bytes is instrumented; with all of numpy the executions would be slow.
    with atheris.instrument_imports(include=["brainfound.data", "nibabel.nifti1", "nibabel.analyze", "zipfile"]):
        import brainfound.data.reading.scan  # noqa: F401

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from brainfound.data.reading.scan import load_scan, read_header
from brainfound.errors import ScanError

MAX_SECONDS = 5.0
"""Of the processor, for a file of a few kB, which takes milliseconds."""

MAX_BYTES = 24 * 2**20
"""Beside the file's own voxels: chunks, and nibabel's tables. A header may claim terabytes."""

SHAPE = (5, 6, 7)
FORMATS = (".nii", ".nii.gz", ".mgh", ".mgz", ".zip")


def plain_files() -> dict[str, bytes]:
    """Small scans without compression, of each layout that is read."""
    voxels = np.arange(210).reshape(SHAPE)
    affine = np.array([[-2, 0.1, 0, 9], [0.1, 2, 0, -8], [0, 0, 2.5, 7], [0, 0, 0, 1]])
    files = {}
    for name, kind, order, dtype in [
        ("little", nib.Nifti1Header, "<", "i2"),
        ("big", nib.Nifti1Header, ">", "f4"),
        ("two", nib.Nifti2Header, "<", "u1"),
        ("two-big", nib.Nifti2Header, ">", "f8"),
    ]:
        header = kind(endianness=order)
        header.set_data_shape(SHAPE)
        header.set_data_dtype(np.dtype(order + dtype))
        header.set_sform(affine, code=1)
        header.set_qform(affine, code=1)
        header.set_slope_inter(*((0.5, 3) if dtype == "i2" else (1, 0)))
        header["vox_offset"] = header.single_vox_offset
        files[f"{name}.nii"] = header.binaryblock + bytes(4) + voxels.astype(order + dtype).tobytes(order="F")
    files["f.mgh"] = nib.MGHImage(voxels.astype(np.float32), affine).to_bytes()
    files["i.mgh"] = nib.MGHImage(voxels.astype(np.int16), affine).to_bytes()
    return files


def zipped(name: str, content: bytes) -> bytes:
    """An archive with one scan and a side file."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr(zipfile.ZipInfo("side.json"), b"{}")
        info = zipfile.ZipInfo(f"anat/{name}")
        info.compress_type = zipfile.ZIP_DEFLATED
        opened.writestr(info, content)
    return stream.getvalue()


def check(path: Path) -> bool:
    """Hold one file (or a member of an archive) against the rule; True if it was read.

    Raises:
        AssertionError: the rule is broken.
    """
    heard = _Heard()
    logging.getLogger("nibabel.global").addHandler(heard)
    # Each start of tracemalloc costs memory that it keeps; the fuzzer starts it once.
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    start = time.process_time()
    scan, message = None, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                scan = load_scan(path)
            except ScanError as error:
                message = str(error)
            if scan is not None:
                header = read_header(path)
                assert scan.notes[: len(header.notes)] == header.notes
                assert len(scan.notes) - len(header.notes) in (0, 1)  # one note on voxels that were corrected
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        if started:
            tracemalloc.stop()
        logging.getLogger("nibabel.global").removeHandler(heard)
    assert time.process_time() - start < MAX_SECONDS
    assert heard.records == []
    if scan is None:
        assert message
        assert "\n" not in message
        assert peak < MAX_BYTES, peak
        return False
    corrected = len(scan.notes) > len(header.notes)
    assert peak < MAX_BYTES + (64 if corrected else 8) * scan.data.size, peak
    try:
        data, affine = _by_nibabel(path)
    except (HeaderDataError, ValueError) as error:
        if "w2 should be positive" not in str(error):  # a quaternion that is a little too long
            raise
        return True
    np.testing.assert_array_equal(scan.native_affine, affine)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(data, affine))
    expected = np.asarray(canonical.dataobj)
    assert np.isfinite(expected).all() != corrected
    np.testing.assert_array_equal(np.where(np.isfinite(expected), scan.data, expected), expected)
    np.testing.assert_allclose(scan.affine, canonical.affine)
    return True


def _by_nibabel(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels ``(I, J, K)`` in float32 and affine, as nibabel reads them from a copy of the bytes."""
    with tempfile.TemporaryDirectory() as folder:
        content = _bytes_of(path)
        copy = Path(folder) / path.name
        copy.write_bytes(content)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable()
            try:
                try:
                    image = nib.load(copy)
                except Exception:
                    # Extensions are skipped here and parsed by nibabel, which may fail there: without them.
                    copy.write_bytes(_without_extensions(content, path.name))
                    image = nib.load(copy)
                data = image.get_fdata(dtype=np.float32)
            finally:
                logging.disable(logging.NOTSET)
        return data.reshape(data.shape[:3]), np.asarray(image.affine, dtype=np.float64)


def _bytes_of(path: Path) -> bytes:
    for parent in path.parents:
        if parent.suffix == ".zip" and parent.is_file():
            with zipfile.ZipFile(parent) as opened:
                return opened.read(path.relative_to(parent).as_posix())
    return path.read_bytes()


def _without_extensions(content: bytes, name: str) -> bytes:
    packed = name.endswith(".gz")
    plain = bytearray(gzip.decompress(content) if packed else content)
    start = 348 if plain[344:347] in (b"n+1", b"ni1") else 540
    plain[start : start + 4] = bytes(4)
    return gzip.compress(plain, 1) if packed else bytes(plain)


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record.getMessage())


def write(layout: int, content: bytes, folder: Path) -> Path:
    """Write bytes as a file ``x.…`` in one of the layouts.

    Args:
        layout: 0 to 4 the bytes are a whole file (`FORMATS`); above, they are packed first: 5 as ``.nii.gz``,
            6 as ``.mgz``, 7 and 8 as a member ``anat/x.nii`` or ``anat/x.nii.gz`` of an archive.
    """
    suffix = FORMATS[layout] if layout < 5 else (".nii.gz", ".mgz", ".zip", ".zip")[layout - 5]
    if layout in (5, 6):
        content = gzip.compress(content, 1, mtime=0)
    elif layout == 7:
        content = zipped("x.nii", content)
    elif layout == 8:
        content = zipped("x.nii.gz", gzip.compress(content, 1, mtime=0))
    path = folder / f"x{suffix}"
    path.write_bytes(content)
    return path


def check_bytes(layout: int, content: bytes, folder: Path) -> bool:
    """Hold a file of these bytes against the rule; True if it was read."""
    path = write(layout, content, folder)
    if path.suffix == ".zip":
        return any([check(path / "anat/x.nii"), check(path / "anat/x.nii.gz")])
    return check(path)


def seeds() -> list[tuple[int, bytes]]:
    """A valid (layout, bytes) of every kind."""
    found = []
    for name, content in plain_files().items():
        if name.endswith(".nii"):
            packed = gzip.compress(content, mtime=0)
            found += [(0, content), (1, packed), (5, content), (7, content), (8, content)]
            found += [(4, zipped("x.nii", content)), (4, zipped("x.nii.gz", packed))]
        else:
            found += [(2, content), (3, gzip.compress(content, mtime=0)), (6, content)]
    return found


def main() -> None:
    """Fuzz with atheris; further arguments are libFuzzer's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus"
        corpus.mkdir()
        for number, (layout, content) in enumerate(seeds()):
            (corpus / f"{number}").write_bytes(bytes([layout]) + content)
        counts = [0, 0]

        def one(data: bytes) -> None:
            read = bool(data) and check_bytes(data[0] % 9, data[1:], folder)
            counts[read] += 1
            # libFuzzer ends the process itself; there is no later moment to say it.
            if sum(counts) % 5000 == 0:
                print(f"{sum(counts)} executions, {counts[1]} of them were read as scans", flush=True)

        arguments = [sys.argv[0], "-max_len=6000", "-len_control=0", "-rss_limit_mb=1500", "-timeout=20", *sys.argv[1:]]
        files = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
        tracemalloc.start()
        atheris.Setup(arguments + ([] if files else [str(corpus)]), one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
