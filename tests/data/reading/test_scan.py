"""Reading one scan, and every way in which it can be unusable."""

from __future__ import annotations

import contextlib
import gzip
import re
import subprocess
import sys
import tracemalloc
import zipfile

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from brainfound.data.reading.header_geometry import axis_codes
from brainfound.data.reading.scan import labels_in, load_scan, read_header
from brainfound.errors import ScanError
from tests.damage import truncate


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR", "LIA", "SAR", "ILP"])
def test_any_axis_order_gives_the_same_ras_volume(write_scan, axes, tmp_path):
    path = write_scan("a.nii.gz")
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    nib.save(nib.load(path).as_reoriented(turn), tmp_path / "turned.nii.gz")
    scan, turned = load_scan(path), load_scan(tmp_path / "turned.nii.gz")
    np.testing.assert_array_equal(turned.data, scan.data)
    np.testing.assert_allclose(turned.affine, scan.affine, atol=1e-5)
    assert "".join(nib.aff2axcodes(turned.native_affine)) == axes


def test_scaled_integers_are_scaled(tmp_path):
    image = nib.Nifti1Image(np.arange(60).reshape(3, 4, 5).astype(np.int16), np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    nib.save(image, tmp_path / "a.nii")
    expected = np.asarray(nib.load(tmp_path / "a.nii").dataobj).max()
    assert load_scan(tmp_path / "a.nii").data.max() == pytest.approx(expected)


def test_trailing_axis_of_one_is_dropped(write_scan):
    assert load_scan(write_scan("a.nii.gz", np.random.rand(5, 6, 7, 1))).data.shape == (5, 6, 7)


def _not_an_image(path):
    path.write_bytes(gzip.compress(b"hello" * 100))


@pytest.mark.parametrize("break_file", [truncate, _not_an_image])
def test_broken_files_are_refused_in_one_line(write_scan, break_file):
    path = write_scan("a.nii.gz", np.random.rand(20, 20, 20))
    break_file(path)
    with pytest.raises(ScanError, match=r"a\.nii\.gz: cannot be read") as caught:
        load_scan(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (np.random.default_rng(0).random((5, 6, 7, 3)), "not a 3-D volume"),
        (np.zeros((5, 6, 7)), "all voxels are zero"),
        (np.full((5, 6, 7), 3.0), "all voxels have the value 3"),
        (np.where(np.arange(210).reshape(5, 6, 7) == 9, np.nan, 1.0), "NaN or infinite"),
        (np.where(np.arange(210).reshape(5, 6, 7) == 9, np.inf, 1.0), "NaN or infinite"),
        (np.random.default_rng(0).random((1, 6, 7)), "implausible size"),
        (np.where(np.arange(210).reshape(5, 6, 7) == 9, -1e31, 1.0), "implausible values"),
        (np.float32(1e-38) * np.arange(210, dtype=np.float32).reshape(5, 6, 7), "implausible values"),
    ],
)
def test_unusable_content_is_refused(write_scan, data, reason):
    with pytest.raises(ScanError, match=reason):
        load_scan(write_scan("a.nii.gz", data))


def test_missing_file_and_singular_affine(write_scan, tmp_path):
    with pytest.raises(ScanError, match="no such file"):
        load_scan(tmp_path / "none.nii.gz")
    affine = np.eye(4)
    image = nib.Nifti1Image(np.random.rand(5, 6, 7), affine)
    image.header["srow_x"] = image.header["srow_y"]
    image.header["sform_code"] = 1
    image.header["qform_code"] = 0
    image.to_filename(tmp_path / "b.nii")
    raw = bytearray((tmp_path / "b.nii").read_bytes())
    raw[280:296] = raw[296:312]  # srow_x := srow_y
    (tmp_path / "b.nii").write_bytes(raw)
    with pytest.raises(ScanError, match="affine"):
        load_scan(tmp_path / "b.nii")


def test_label_maps_may_be_empty_but_must_be_whole_numbers(write_scan):
    assert load_scan(write_scan("m.nii.gz", np.zeros((4, 4, 4), np.uint8)), labels=True).data.max() == 0
    with pytest.raises(ScanError, match="not a label map"):
        load_scan(write_scan("p.nii.gz", np.random.rand(4, 4, 4)), labels=True)
    data = np.zeros((4, 4, 4))
    data[3, 3, 3] = 0.5
    with pytest.raises(ScanError, match="not a label map"):
        load_scan(write_scan("q.nii.gz", data), labels=True)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16"])
def test_codes_that_a_header_scales_are_whole_numbers_again(write_scan, tmp_path, dtype):
    codes = np.random.default_rng(0).choice([0, 1, 3, 7, 90], (6, 7, 8)).astype(float)
    image = nib.Nifti1Image(codes, np.eye(4))
    image.header.set_data_dtype(dtype)
    nib.save(image, tmp_path / "m.nii.gz")
    assert not np.array_equal(nib.load(tmp_path / "m.nii.gz").get_fdata(), codes)
    scan = load_scan(tmp_path / "m.nii.gz", labels=True)
    np.testing.assert_array_equal(scan.data, codes)
    assert any("label codes were rounded to whole numbers, by up to " in note for note in scan.notes)
    nearly = load_scan(write_scan("n.nii.gz", codes + 0.004), labels=True)
    np.testing.assert_array_equal(nearly.data, codes)


def test_a_soft_map_is_no_label_map_however_it_is_scaled(tmp_path):
    soft = np.linspace(0, 1, 4**3).reshape(4, 4, 4)
    halves = np.tile([0, 0.5, 1.0, 1.5], 16).reshape(4, 4, 4)
    many = np.random.default_rng(0).choice(np.arange(0, 900, 7), (4, 4, 4)).astype(float)  # too many codes for uint8
    for data in (soft, halves, many):
        image = nib.Nifti1Image(data, np.eye(4))
        image.header.set_data_dtype(np.uint8)
        nib.save(image, tmp_path / "m.nii")
        with pytest.raises(ScanError, match=r"not a label map \(got the value \S+, in \d+ voxels"):
            load_scan(tmp_path / "m.nii", labels=True)


@pytest.mark.parametrize("noise", [0.0, 5.0])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_voxel_that_is_not_finite_becomes_background_outside_of_the_head(write_scan, head, centred, noise, value):
    affine = centred((40, 48, 36), np.eye(3) * 3)
    image = head.image((40, 48, 36), affine, noise=noise)
    image[2, 3, 30] = value
    scan = load_scan(write_scan("a.nii.gz", image, affine=affine))
    assert scan.notes == ("1 voxel outside of the head was NaN or infinite, and became background",)
    assert scan.data[2, 3, 30] == (0 if noise == 0 else pytest.approx(6, abs=3))
    for place in ((20, 24, 18), (4, 24, 18)):  # in the middle, and at the border
        inside = image.copy()
        inside[place] = value
        with pytest.raises(ScanError, match=r"NaN or infinite values \(got 2 of 69120 voxels, 1 of them in the head"):
            load_scan(write_scan("b.nii.gz", inside, affine=affine))
    image[:, :, :2] = value
    with pytest.raises(ScanError, match=r"NaN or infinite values \(got 3841 of 69120 voxels"):
        load_scan(write_scan("c.nii.gz", image, affine=affine))


def _with_quaternion(path, quaternion, sform_code=0):
    image = nib.Nifti1Image(np.random.rand(5, 6, 7), np.diag([2.0, 2, 3, 1]))
    image.set_qform(np.diag([-2.0, -2, 3, 1]), 1)
    image.set_sform(np.diag([-2.0, -2, 3, 1]), sform_code)
    nib.save(image, path)
    raw = bytearray(path.read_bytes())
    raw[256:268] = np.array(quaternion, "<f4").tobytes()
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    "quaternion", [(0, 0, 1.0000004), (0.70711, 0.70712, 0), (0.57736, 0.57736, 0.57736), (0, 1.0004, 0)]
)
def test_a_quaternion_that_rounding_made_too_long_is_a_turn(tmp_path, quaternion):
    _with_quaternion(tmp_path / "a.nii", quaternion)
    scan = load_scan(tmp_path / "a.nii")
    turn = nib.quaternions.quat2mat([0, *quaternion])  # of any length
    np.testing.assert_allclose(scan.native_affine[:3, :3], turn * [2, 2, 3], atol=1e-5)
    assert len(scan.notes) == (np.square(quaternion).sum() > 1.00001)
    _with_quaternion(tmp_path / "b.nii", quaternion, sform_code=1)
    assert not any("not valid" in note for note in load_scan(tmp_path / "b.nii").notes)


def test_a_quaternion_that_is_no_turn_is_refused(tmp_path):
    _with_quaternion(tmp_path / "a.nii", (0, 0.5, 1.0))
    with pytest.raises(ScanError, match="cannot be read as an image"):
        load_scan(tmp_path / "a.nii")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
ANNEX = "/annex/objects/MD5E-s12345--0cc175b9.nii.gz\n"


@pytest.mark.parametrize(
    ("content", "command"), [(LFS, "git lfs pull"), (ANNEX, "datalad get"), (f"../../.git{ANNEX}", "git annex get")]
)
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.mgz", "a.hdr"])
def test_a_pointer_of_git_is_fetched_first(tmp_path, content, command, name):
    (tmp_path / name).write_text(content)
    if name == "a.hdr":
        (tmp_path / "a.img").write_text(content)
    with pytest.raises(ScanError, match=f"a pointer to a file that was not fetched.*{command}"):
        load_scan(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "ses.zip", "w") as archive:
        archive.writestr("anat/x.nii.gz", content)
    with pytest.raises(ScanError, match=command):
        load_scan(tmp_path / "ses.zip" / "anat" / "x.nii.gz")


def test_a_link_of_git_annex_is_fetched_first(tmp_path, write_scan):
    (tmp_path / "a.nii.gz").symlink_to("../.git/annex/objects/Xk/4p/MD5E-s1--ab.nii.gz/MD5E-s1--ab.nii.gz")
    with pytest.raises(ScanError, match="a pointer to a file that was not fetched.*datalad get"):
        load_scan(tmp_path / "a.nii.gz")
    (tmp_path / "b.nii.gz").symlink_to("gone.nii.gz")
    with pytest.raises(ScanError, match="a link whose target is not there"):
        load_scan(tmp_path / "b.nii.gz")
    objects = tmp_path / ".git" / "annex" / "objects"
    objects.mkdir(parents=True)
    write_scan("whole.nii.gz").rename(objects / "k.nii.gz")
    (tmp_path / "c.nii.gz").symlink_to(objects / "k.nii.gz")
    assert load_scan(tmp_path / "c.nii.gz").data.any(), "fetched"


# Every stored type, byte order, scaling and format, against nibabel.

# NIfTI and MGH have no 16-bit floats.
NIFTI_TYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]


def _values(dtype: np.dtype) -> np.ndarray:
    rng = np.random.default_rng(0)
    if dtype.kind == "f":
        return (rng.normal(0, 100, (9, 10, 11))).astype(dtype)
    limits = np.iinfo(dtype)
    values = rng.integers(limits.min, limits.max, (9, 10, 11), dtype=dtype.newbyteorder("="), endpoint=True)
    values[0, 0, :2] = limits.min, limits.max
    return values


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".img"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", NIFTI_TYPES)
def test_voxels_are_those_that_nibabel_reads(tmp_path, name, order, version, suffix):
    dtype = np.dtype(order + name)
    pair = suffix == ".img"
    kind = {
        (1, False): nib.Nifti1Image,
        (2, False): nib.Nifti2Image,
        (1, True): nib.Nifti1Pair,
        (2, True): nib.Nifti2Pair,
    }[version, pair]
    header = kind.header_class(endianness=order)
    header.set_data_shape((9, 10, 11))
    header.set_data_dtype(dtype)
    header.set_sform(np.diag([2.0, 2.0, 3.0, 1.0]), code=1)
    header["vox_offset"] = 0 if pair else header.single_vox_offset
    voxels = _values(dtype).astype(dtype).tobytes(order="F")
    path = tmp_path / f"a{suffix}"
    for scaling in [(1.0, 0.0), (0.25, -3.0), (1.0, 7.0), (-2.5, 0.0), (np.nan, 3.0), (0.0, 3.0)]:
        header["scl_slope"], header["scl_inter"] = scaling
        if pair:
            path.with_suffix(".hdr").write_bytes(header.binaryblock)
            path.write_bytes(voxels)
        else:
            content = header.binaryblock + bytes(4) + voxels
            path.write_bytes(gzip.compress(content, 1) if suffix.endswith("gz") else content)
        scan, image = load_scan(path), nib.load(path)
        np.testing.assert_array_equal(scan.data, image.get_fdata(dtype=np.float32))
        np.testing.assert_array_equal(scan.native_affine, image.affine)
        assert scan.data.dtype == np.float32
        assert scan.data.dtype.isnative
        assert scan.header.dtype == dtype.name


@pytest.mark.parametrize("suffix", [".mgh", ".mgz"])
@pytest.mark.parametrize("name", ["u1", "i2", "i4", "f4", "u2"])
def test_mgh_volumes_are_those_that_nibabel_reads(tmp_path, name, suffix):
    affine = np.array([[-1.0, 0, 0, 30], [0, 0, 1.5, -20], [0, -1, 0, 40], [0, 0, 0, 1]])
    image = nib.MGHImage(_values(np.dtype(">" + name)).astype(">" + name), affine)
    nib.save(image, tmp_path / f"a{suffix}")
    scan, stored = load_scan(tmp_path / f"a{suffix}"), nib.load(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(scan.native_affine, stored.affine)
    expected = nib.as_closest_canonical(nib.Nifti1Image(stored.get_fdata(dtype=np.float32), stored.affine))
    np.testing.assert_array_equal(scan.data, expected.get_fdata(dtype=np.float32))
    assert scan.header.affine_source == "mgh"
    assert axis_codes(scan.header.affine) == "LIA"


def test_a_scan_in_an_archive_is_the_scan_in_a_folder(write_scan, tmp_path):
    files = [write_scan("a.nii.gz"), write_scan("b.nii")]
    with zipfile.ZipFile(tmp_path / "ses.zip", "w", zipfile.ZIP_DEFLATED) as opened:
        for file in files:
            opened.write(file, f"anat/{file.name}")
    for file in files:
        inside, outside = load_scan(tmp_path / "ses.zip" / "anat" / file.name), load_scan(file)
        np.testing.assert_array_equal(inside.data, outside.data)
        assert repr(inside) == repr(outside)


def test_the_header_alone_says_what_the_scan_will_be(write_scan):
    affine = np.array([[-2.0, 0, 0, 10], [0, -2, 0, 20], [0, 0, 3, -30], [0, 0, 0, 1]])
    path = write_scan("a.nii.gz", np.arange(210).reshape(5, 6, 7, 1).astype(np.int16), affine=affine)
    header = read_header(path)
    assert (header.shape, header.dtype, axis_codes(header.affine)) == ((5, 6, 7), "int16", "LPS")
    assert header.spacing_mm == (2, 2, 3)
    # nibabel stores a new image's affine as the sform with code 2.
    assert (header.affine_source, header.notes) == ("sform", ())
    np.testing.assert_array_equal(header.affine, affine)
    scan = load_scan(path)
    np.testing.assert_array_equal(scan.header.affine, header.affine)


# Headers that claim what the file cannot hold.


def _nifti(shape=(5, 6, 7), **fields) -> bytes:
    """A NIfTI-1 file with fields of its header replaced after it was made."""
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.int16)
    header.set_sform(np.diag([2.0, 2.0, 2.0, 1.0]), code=1)
    header["vox_offset"] = 352
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + bytes(4) + np.arange(210, dtype=np.int16).tobytes()


TERABYTE = {"dim": [3, 1024, 1024, 1024, 1, 1, 1, 1], "datatype": 64, "bitpix": 64}


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (TERABYTE, "cannot be read as an image: its header claims 8589934944 bytes"),
        ({"dim": [3, 32767, 32767, 1000, 1, 1, 1, 1]}, "implausible size"),
        ({"dim": [3, 4097, 6, 7, 1, 1, 1, 1]}, "implausible size"),
        ({"dim": [3, -5, 6, 7, 1, 1, 1, 1]}, "implausible size"),
        ({"dim": [3, -1, 1, 1, 1, 1, 1, 1], "glmin": 2**31 - 1}, "implausible size"),
        ({"dim": [0, 5, 6, 7, 1, 1, 1, 1]}, "not a 3-D volume"),
        ({"vox_offset": 1e9}, "would begin at byte 1000000000"),
        ({"vox_offset": np.inf}, "cannot be read as an image"),
        ({"vox_offset": np.nan}, "cannot be read as an image"),
        ({"vox_offset": 0}, "inside the header"),
        ({"vox_offset": 100}, "cannot be read as an image: vox offset 100 too low"),
        ({"datatype": 32, "bitpix": 64}, "complex numbers.*magnitude"),
        ({"datatype": 1792, "bitpix": 128}, "complex numbers"),
        ({"datatype": 128, "bitpix": 24}, "got colours"),
        ({"datatype": 2304, "bitpix": 32}, "got colours"),
        ({"datatype": 1536, "bitpix": 128}, "no ordinary numbers|data code 1536"),
        ({"datatype": 999}, "data code 999 not recognized"),
        ({"datatype": 1, "bitpix": 1}, "no ordinary numbers|not supported"),
        ({"datatype": 0}, "no ordinary numbers|not supported"),
        ({"scl_slope": 2, "scl_inter": np.inf}, "invalid intercept"),
        ({"magic": b"nope"}, "no NIfTI header"),
    ],
)
def test_impossible_headers_are_refused(tmp_path, fields, reason, name):
    content = _nifti(**fields)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    tracemalloc.start()
    try:
        for read in (load_scan, read_header):
            with pytest.raises(ScanError, match=reason) as caught:
                read(tmp_path / name)
            assert "\n" not in str(caught.value)
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="limits on memory are set as Linux does")
def test_a_terabyte_is_refused_within_a_limit_on_memory(tmp_path):
    # 100 MB of zeros compress to 100 kB: as much as that may claim, and the header claims 1 TB or 8 GB.
    header = nib.Nifti2Header()
    for number, size in enumerate((16384, 1024)):
        header.set_data_shape((size, size, size if size == 1024 else 4096))
        header.set_data_dtype(np.float64 if size == 1024 else np.uint8)
        header["vox_offset"] = 544
        with gzip.open(tmp_path / f"{number}.nii.gz", "wb") as file:
            file.write(header.binaryblock + bytes(10**8))
    code = (
        "import resource, sys\n"
        "from brainfound.data.reading.scan import load_scan\n"
        "from brainfound.errors import ScanError\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**26,) * 2)\n"
        "for path in sys.argv[1:]:\n"
        "    try: load_scan(path)\n"
        "    except ScanError as error: print(error)\n"
    )
    files = [str(tmp_path / f"{number}.nii.gz") for number in range(2)]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, timeout=120)
    first, second = done.stdout.splitlines()
    assert "implausible size" in first
    assert "compressed bytes cannot hold" in second
    assert done.stderr == ""


def test_memory_is_one_float32_volume(tmp_path):
    data = np.random.default_rng(0).integers(0, 1000, (100, 100, 100)).astype(np.int16)
    image = nib.Nifti1Image(data, np.eye(4))
    image.header.set_slope_inter(0.5, 1)
    nib.save(image, tmp_path / "a.nii.gz")
    load_scan(tmp_path / "a.nii.gz")
    tracemalloc.start()
    for labels in (False, True):
        with contextlib.suppress(ScanError):
            load_scan(tmp_path / "a.nii.gz", labels=labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 4e6 < peak < 4e6 + 4e6


def test_too_little_memory_is_reported_in_one_line(write_scan, monkeypatch):
    path = write_scan("a.nii.gz")

    def refuse(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(np, "empty", refuse)
    with pytest.raises(ScanError, match="not enough memory.*40×48×36"):
        load_scan(path)


def test_an_extension_is_skipped_whatever_it_claims(tmp_path):
    extension = np.array([1, 2**31 - 16, 6], dtype="<i4").tobytes() + bytes(24)
    content = _nifti(vox_offset=384)
    (tmp_path / "a.nii").write_bytes(content[:348] + extension + content[352:])
    # 348 + 4 flag bytes + 32: the voxels follow at 384.
    assert load_scan(tmp_path / "a.nii").data.max() == 209


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgz"])
def test_more_data_than_the_header_says_are_refused(tmp_path, name):
    if name.endswith("mgz"):
        nib.save(nib.MGHImage(np.arange(210, dtype=np.int16).reshape(5, 6, 7), np.eye(4)), tmp_path / name)
        content, limit = gzip.decompress((tmp_path / name).read_bytes()), 2**20
    else:
        content, limit = _nifti(), 4096
    pack = gzip.compress if name.endswith("z") else bytes
    (tmp_path / name).write_bytes(pack(content + bytes(limit - 100)))
    assert load_scan(tmp_path / name).data.max() == 209
    (tmp_path / name).write_bytes(pack(content + bytes(limit + 1)))
    with pytest.raises(ScanError, match="more data than its header says"):
        load_scan(tmp_path / name)


@pytest.mark.parametrize("place", [-8, -6, -1, -4])
def test_a_wrong_checksum_or_length_of_gzip_is_noticed(tmp_path, place):
    content = bytearray(gzip.compress(_nifti()))
    content[place] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(content)
    with pytest.raises(ScanError, match="cannot be read as an image"):
        load_scan(tmp_path / "a.nii.gz")


def test_other_formats_are_named(tmp_path):
    (tmp_path / "a.mnc").write_bytes(b"CDF")
    with pytest.raises(ScanError, match="not one of the formats"):
        load_scan(tmp_path / "a.mnc")
    (tmp_path / "a.hdr").write_bytes(_nifti())
    with pytest.raises(ScanError, match=r"half of a pair is missing.*expected the \.img file of the same name"):
        load_scan(tmp_path / "a.hdr")


def test_an_analyze_pair_is_read_with_a_warning_and_never_without_its_orientation(tmp_path):
    data = np.arange(210, dtype=np.int16).reshape(5, 6, 7)
    nib.save(nib.AnalyzeImage(data, None), tmp_path / "a.img")
    scan, image = load_scan(tmp_path / "a.img"), nib.load(tmp_path / "a.img")
    np.testing.assert_array_equal(scan.native_affine, image.affine)
    np.testing.assert_array_equal(scan.data, nib.as_closest_canonical(image).get_fdata(dtype=np.float32))
    assert "left-right may be wrong" in "; ".join(scan.notes)
    assert repr(load_scan(tmp_path / "a.hdr")) == repr(scan)
    (tmp_path / "a.mat").write_bytes(b"an affine of SPM")
    with pytest.raises(ScanError, match=r"SPM \.mat file, which is not read"):
        load_scan(tmp_path / "a.img")


# What a header says of orientation.


def _notes(tmp_path, **fields) -> tuple[str, tuple[str, ...]]:
    (tmp_path / "a.nii").write_bytes(_nifti(**fields))
    header = read_header(tmp_path / "a.nii")
    assert load_scan(tmp_path / "a.nii").notes == header.notes
    return header.affine_source, header.notes


SIZES = [1, 2, 2, 2, 1, 1, 1, 1]


def test_an_ordinary_header_has_no_notes(tmp_path):
    assert _notes(tmp_path, pixdim=SIZES) == ("sform", ())
    # A qform that says the same.
    assert _notes(tmp_path, pixdim=SIZES, qform_code=1) == ("sform", ())
    assert _notes(tmp_path, pixdim=SIZES, qform_code=1, sform_code=0) == ("qform", ())


@pytest.mark.parametrize(
    ("fields", "source", "note"),
    [
        ({"qform_code": 1, "qoffset_y": 7}, "sform", "disagree by up to 7.0 mm at a corner of the volume; the sform"),
        ({"qform_code": 1, "quatern_b": 5}, "sform", "qform is not valid; the sform was used"),
        ({"sform_code": 0}, "header size only", "no orientation in the header.*left-right may be wrong"),
        ({"pixdim": [1, 3, 3, 3, 1, 1, 1, 1]}, "sform", r"3 × 3 × 3 mm differs from the affine's, 2 × 2 × 2 mm"),
        ({"srow_x": [2, 0.4, 0, 0]}, "sform", r"sheared by 11\.3 degrees"),
        ({"xyzt_units": 3}, "sform", "in micrometres; they were read as millimetres"),
        ({"sform_code": 77, "qform_code": 1}, "qform", "sform_code 77 not valid; setting to 0"),
        ({"bitpix": 5}, "sform", "bitpix"),
    ],
)
def test_odd_headers_are_noted(tmp_path, capfd, fields, source, note):
    found, notes = _notes(tmp_path, **({"pixdim": SIZES} | fields))
    assert found == source
    assert re.search(note, "; ".join(notes))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"srow_x": [np.nan, 0, 0, 0]}, "not finite"),
        ({"srow_x": [0, 0, 0, 0]}, "singular"),
        ({"srow_x": [2, 2, 0, 0], "srow_y": [2, 2.01, 0, 0]}, "singular"),
        ({"srow_x": [2, 2, 0, 0], "srow_y": [0, 0.1, 0, 0]}, "axes nearly fall together"),
        ({"srow_x": [0.002, 0, 0, 0], "srow_y": [0, 0.002, 0, 0]}, "implausible voxel size"),
        ({"srow_z": [0, 0, 60, 0]}, "implausible voxel size"),
        ({"srow_z": [0, 0, 2, 1e6]}, "implausible origin"),
        ({"dim": [3, 2, 2, 51, 1, 1, 1, 1], "srow_z": [0, 0, 45, 0]}, "implausible length"),
        ({"sform_code": 0, "qform_code": 1, "quatern_b": 5, "pixdim": SIZES}, "cannot be read as an image"),
        ({"sform_code": 0, "qform_code": 1, "pixdim": [1, 0, 2, 2, 1, 1, 1, 1]}, "voxel size of 0 mm"),
    ],
)
def test_affines_that_cannot_be_a_scans_are_refused(tmp_path, fields, reason):
    (tmp_path / "a.nii").write_bytes(_nifti(**fields))
    for read in (read_header, load_scan):
        with pytest.raises(ScanError, match=reason):
            read(tmp_path / "a.nii")


def test_a_left_handed_grid_needs_no_note(tmp_path):
    assert _notes(tmp_path, pixdim=SIZES, srow_x=[-2, 0, 0, 0]) == ("sform", ())


def _smooth_head(seed: int) -> np.ndarray:
    """An ellipsoid of smooth grey values from 0 to 1 with some noise, on 0."""
    random = np.random.default_rng(seed)
    x = np.stack(np.meshgrid(*[np.linspace(-1, 1, 48)] * 3, indexing="ij"))
    values = ndimage.gaussian_filter(random.normal(size=(48, 48, 48)), 3)
    values = (values - values.min()) / np.ptp(values) + random.normal(0, 0.01, values.shape)
    return np.where((x**2).sum(axis=0) < 0.8, np.clip(values, 0, 1), 0)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("num_levels", [5, 8, 12, 16, 32, 64, 256, 4096])
@pytest.mark.parametrize("factor", [1, 9])
def test_a_quantised_scan_is_no_label_map(write_scan, num_levels, factor, seed):
    values = np.rint(_smooth_head(seed) * (num_levels - 1)) * factor
    found = labels_in(load_scan(write_scan("a.nii.gz", values.astype(np.int16))))
    assert found == "perhaps" if num_levels <= 12 else found != "surely"
    assert found == "no" or num_levels < 20


@pytest.mark.parametrize(
    ("num_regions", "codes"), [(1, (1,)), (8, (2, 41, 77)), (60, (2, 4, 10, 17, 41, 49, 53, 1035))]
)
def test_regions_of_codes_are_a_label_map(write_scan, num_regions, codes):
    random = np.random.default_rng(num_regions)
    centres = random.uniform(4, 44, (num_regions, 3))
    points = np.stack(np.meshgrid(*[np.arange(48)] * 3, indexing="ij"), axis=-1)
    nearest = np.argmin([((points - centre) ** 2).sum(axis=-1) for centre in centres], axis=0)
    values = np.where(_smooth_head(3) > 0, random.choice(codes, num_regions)[nearest], 0)
    assert labels_in(load_scan(write_scan("a.nii.gz", values.astype(np.int16)))) == "surely"
