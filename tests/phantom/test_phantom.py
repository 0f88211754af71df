"""The phantom: physics, anatomy, ageing, lesions, geometry and files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import typer
from scipy import ndimage
from typer.testing import CliRunner

from brainfound.cli.demo import phantom
from brainfound.data.sources.file_names import read_scan_name
from brainfound.errors import CohortError, UsageError
from brainfound.phantom import write_phantom_cohort
from brainfound.phantom.anatomy import ParametricHead, draw_ageing
from brainfound.phantom.cohort import SEGMENTATION, CohortSettings, draw_contrasts, scan_path
from brainfound.phantom.geometry import Grid, acquisition_matrix
from brainfound.phantom.label_maps import LabelledHead, find_label_maps, read_label_map
from brainfound.phantom.physics import (
    TISSUE_INDEX,
    TISSUES,
    Sequence,
    make_site,
    nulling_inversion_time_s,
    tissue_signal,
)

COARSE_MM = 3.5
LABEL = {name: value for value, (name, _) in enumerate(SEGMENTATION)}
CONTRASTS = ("T1w", "T1ce", "T2w", "FLAIR", "DWI", "ADC")


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory) -> dict[str, Path]:
    """Two subjects of every diagnosis, all six contrasts."""
    folder = tmp_path_factory.mktemp("phantom")
    return {
        diagnosis: write_phantom_cohort(
            folder / diagnosis, 2, seed, spacing_mm=COARSE_MM, diagnoses={diagnosis: 1.0}, missing_probability=0.0
        )
        for seed, diagnosis in enumerate(("healthy", "tumour", "infarct", "ms"))
    }


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nib.load(path)
    return np.asarray(image.dataobj).astype(np.float32), image.affine


class Session:
    """One written session, read back through its affines only."""

    def __init__(self, cohort: Path, number: int) -> None:
        self.cohort, self.name = cohort, f"sub-{number:04d}"
        derivatives = cohort / "derivatives"
        self.labels, self.affine = load(derivatives / f"tissue/{self.name}/anat/{self.name}_dseg.nii.gz")
        mask, mask_affine = load(derivatives / f"masks/{self.name}/anat/{self.name}_label-lesion_mask.nii.gz")
        np.testing.assert_allclose(mask_affine, self.affine)
        self.mask = mask > 0

    def scan(self, contrast: str) -> tuple[np.ndarray, np.ndarray]:
        return load(self.cohort / scan_path(self.name, contrast))

    def at(self, contrast: str, where: np.ndarray, shift_mm=(0.0, 0.0, 0.0)) -> np.ndarray:
        """The contrast's values at the world positions of some voxels of the segmentation."""
        volume, affine = self.scan(contrast)
        world = np.argwhere(where) @ self.affine[:3, :3].T + self.affine[:3, 3] + np.asarray(shift_mm)
        index = (world - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
        return ndimage.map_coordinates(volume, index.T, order=1, mode="nearest")

    def middle(self, contrast: str, tissue: str) -> float:
        """Median signal in the inner part of a tissue."""
        where = (self.labels == LABEL[tissue]) & ~self.mask
        inner = ndimage.binary_erosion(where)
        return float(np.median(self.at(contrast, inner if inner.sum() > 20 else where)))


def sessions(cohorts: dict[str, Path], diagnosis: str) -> list[Session]:
    return [Session(cohorts[diagnosis], number) for number in (1, 2)]


# Physics


def test_inversion_recovery_nulls_the_tissue_it_is_timed_for():
    fluid, white = (TISSUES[TISSUE_INDEX[name]] for name in ("csf", "white_matter"))
    sequence = Sequence(9.0, 0.1, nulling_inversion_time_s(fluid.t1_s[1], 9.0))
    assert tissue_signal("FLAIR", fluid, sequence, 3.0) == pytest.approx(0.0, abs=1e-9)
    assert tissue_signal("FLAIR", white, sequence, 3.0) > 0.1


@pytest.mark.parametrize("index", range(6))
def test_tissues_have_the_contrast_that_each_sequence_is_made_for(index):
    site = make_site(index, seed=11)

    def signal(contrast: str, tissue: str) -> float:
        return abs(
            tissue_signal(contrast, TISSUES[TISSUE_INDEX[tissue]], site.protocols[contrast].sequence, site.field_tesla)
        )

    assert signal("T1w", "white_matter") > signal("T1w", "deep_grey") > signal("T1w", "csf")
    assert signal("T1w", "white_matter") > signal("T1w", "cortex") > signal("T1w", "csf")
    assert signal("T2w", "csf") > signal("T2w", "oedema") > signal("T2w", "cortex") > signal("T2w", "white_matter")
    assert signal("FLAIR", "csf") < 0.35 * signal("FLAIR", "white_matter")
    assert signal("FLAIR", "plaque") > 1.5 * signal("FLAIR", "white_matter")
    assert signal("DWI", "csf") < 0.7 * signal("DWI", "white_matter") < signal("DWI", "infarct")
    assert signal("T1ce", "enhancing_tumour") > 1.5 * signal("T1w", "enhancing_tumour")
    assert signal("T1ce", "white_matter") < 1.15 * signal("T1w", "white_matter")


def test_signal_is_spin_echo_times_diffusion():
    tissue = TISSUES[TISSUE_INDEX["white_matter"]]
    unweighted = tissue_signal("b0", tissue, Sequence(6.0, 0.08), 3.0)
    by_hand = 0.71 * (1 - np.exp(-6.0 / 0.838)) * np.exp(-0.08 / 0.069)
    assert unweighted == pytest.approx(by_hand, rel=1e-9)
    assert tissue_signal("DWI", tissue, Sequence(6.0, 0.08), 3.0) == pytest.approx(by_hand * np.exp(-0.7), rel=1e-9)


def test_thick_slices_average_and_equal_grids_are_untouched():
    fine = Grid((8, 8, 40), (1.0, 1.0, 1.0))
    np.testing.assert_allclose(acquisition_matrix(fine, fine, 2), np.eye(40), atol=1e-3)
    thick = acquisition_matrix(fine, Grid((8, 8, 8), (1.0, 1.0, 5.0)), 2)
    np.testing.assert_allclose(thick.sum(axis=1), 1.0, atol=2e-3)
    # A plane 1 mm thin in the middle of a 5-mm slice keeps a fifth of its signal, as on a scanner.
    assert thick.max() == pytest.approx(0.2, abs=0.06)


# Anatomy and ageing


def test_fractions_are_shares_and_volumes_are_human():
    grid = Grid.covering_head(COARSE_MM)
    head = ParametricHead([1, 0, 2], grid, draw_ageing(np.random.default_rng(0), 30.0))
    fractions = head.fractions(slice(0, grid.shape[0]))
    assert fractions.min() >= -1e-5
    np.testing.assert_allclose(fractions.sum(axis=0), 1.0, atol=1e-4)
    ml = fractions.sum(axis=(1, 2, 3)) * COARSE_MM**3 / 1000
    volume = {tissue.name: float(v) for tissue, v in zip(TISSUES, ml, strict=True)}
    assert 400 < volume["cortex"] < 850
    assert 400 < volume["white_matter"] < 950
    assert 8 < volume["ventricle"] < 35
    assert 80 < volume["cerebellar_cortex"] + volume["cerebellar_white"] < 220
    assert 15 < volume["deep_grey"] < 60


def test_same_person_on_two_grids():
    ageing = draw_ageing(np.random.default_rng(3), 50.0)
    brain = [TISSUE_INDEX[name] for name in ("cortex", "white_matter", "deep_grey")]
    ml = []
    for spacing in (3.0, 4.0):
        grid = Grid.covering_head(spacing)
        fractions = ParametricHead([5, 1, 2], grid, ageing).fractions(slice(0, grid.shape[0]))
        ml.append(fractions[brain].sum() * np.prod(grid.spacing_mm) / 1000)
    assert ml[0] == pytest.approx(ml[1], rel=0.08)


def test_ventricles_grow_and_cortex_shrinks_with_age_but_not_perfectly():
    ages = np.linspace(20, 90, 15)
    grid = Grid.covering_head(5.0)
    ventricles, cortex = [], []
    for subject, age in enumerate(ages):
        ageing = draw_ageing(np.random.default_rng([4, subject]), age)
        fractions = ParametricHead([4, subject], grid, ageing).fractions(slice(0, grid.shape[0]))
        ventricles.append(fractions[TISSUE_INDEX["ventricle"]].sum())
        cortex.append(fractions[TISSUE_INDEX["cortex"]].sum())
    assert 0.75 < np.corrcoef(ages, np.log(ventricles))[0, 1] < 0.999
    assert np.corrcoef(ages, cortex)[0, 1] < -0.5


# Images


@pytest.mark.parametrize("diagnosis", ["healthy", "ms"])
def test_images_show_each_contrast(cohorts, diagnosis):
    for session in sessions(cohorts, diagnosis):
        assert session.middle("T1w", "white matter") > session.middle("T1w", "cortex")
        assert session.middle("T1w", "cortex") > session.middle("T1w", "ventricles")
        assert session.middle("T2w", "ventricles") > 1.5 * session.middle("T2w", "white matter")
        assert session.middle("FLAIR", "ventricles") < 0.6 * session.middle("FLAIR", "white matter")
        assert session.middle("DWI", "ventricles") < 0.8 * session.middle("DWI", "white matter")
        assert 550 < session.middle("ADC", "white matter") < 900  # 10⁻⁶ mm²/s
        assert session.middle("ADC", "ventricles") > 1800


def test_lesions_are_marked_in_patients_only(cohorts):
    for diagnosis in ("healthy", "tumour", "infarct", "ms"):
        for session in sessions(cohorts, diagnosis):
            assert session.mask.any() == (diagnosis != "healthy"), (diagnosis, session.name)


def test_lesions_look_as_they_should(cohorts):
    for session in sessions(cohorts, "infarct"):
        assert np.median(session.at("DWI", session.mask)) > 1.4 * session.middle("DWI", "white matter")
        # A quartile, not the median: in 7-mm voxels much of a small infarct's rim is sulcal fluid.
        assert np.percentile(session.at("ADC", session.mask), 25) < 0.8 * session.middle("ADC", "white matter")
        assert np.median(session.at("FLAIR", session.mask)) > 1.2 * session.middle("FLAIR", "white matter")
    for session in sessions(cohorts, "ms"):
        assert np.median(session.at("FLAIR", session.mask)) > 1.2 * session.middle("FLAIR", "white matter")
    for session in sessions(cohorts, "tumour"):
        before, after = session.at("T1w", session.mask), session.at("T1ce", session.mask)
        assert np.percentile(after, 98) > 1.3 * np.percentile(before, 98)  # the rim takes up contrast agent
        assert np.percentile(session.at("FLAIR", session.mask), 75) > 1.3 * session.middle("FLAIR", "white matter")


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_scans_of_a_session_agree_in_world_space(cohorts, contrast):
    """The segmentation explains every scan best where the affines put it, not 6 mm beside it."""
    session = Session(cohorts["healthy"], 1)
    where = (session.labels > 0) & (session.labels < LABEL["skull"])
    classes = session.labels[where].astype(int)

    def explained(shift_mm) -> float:
        values = session.at(contrast, where, shift_mm)
        sums = np.bincount(classes, values)
        means = sums / np.maximum(np.bincount(classes), 1)
        return 1 - np.var(values - means[classes]) / np.var(values)

    aligned = explained((0, 0, 0))
    assert aligned > 0.2
    for axis in range(3):
        for sign in (-1, 1):
            assert explained(sign * 6.0 * np.eye(3)[axis]) < aligned


def test_sites_differ_in_orientation_voxels_and_field(tmp_path):
    out = write_phantom_cohort(tmp_path / "c", 8, 2, spacing_mm=5.0, contrasts=["T1w", "FLAIR"], missing_probability=0)
    sites = pd.read_csv(out / "participants.tsv", sep="\t").set_index("participant_id")["site"]
    found = {}
    for name, site in sites.items():
        flair = nib.load(out / scan_path(name, "FLAIR"))
        sidecar = json.loads((out / scan_path(name, "FLAIR").replace(".nii.gz", ".json")).read_text())
        found.setdefault(site, set()).add(
            ("".join(nib.aff2axcodes(flair.affine)), tuple(np.round(flair.header.get_zooms(), 2)), sidecar["EchoTime"])
        )
    assert len(found) == 3
    assert all(len(marks) == 1 for marks in found.values())
    assert len({next(iter(marks))[0] for marks in found.values()}) == 3
    assert len({next(iter(marks)) for marks in found.values()}) == 3


# Files


def test_layout_is_bids(cohorts):
    out = cohorts["tumour"]
    table = pd.read_csv(out / "participants.tsv", sep="\t")
    assert list(table.columns) == ["participant_id", "age", "sex", "site", "diagnosis"]
    assert list(table.participant_id) == ["sub-0001", "sub-0002"]
    assert set(table.diagnosis) == {"tumour"}
    assert json.loads((out / "dataset_description.json").read_text())["DatasetType"] == "raw"
    for derivative in ("masks", "tissue"):
        description = json.loads((out / "derivatives" / derivative / "dataset_description.json").read_text())
        assert description["DatasetType"] == "derivative"
    for contrast in CONTRASTS:
        path = out / scan_path("sub-0001", contrast)
        assert read_scan_name(path).contrast == contrast
        sidecar = json.loads(Path(str(path).replace(".nii.gz", ".json")).read_text())
        assert sidecar["Manufacturer"] == "Phantom"
        assert {"RepetitionTime", "EchoTime", "MagneticFieldStrength"} <= set(sidecar)
        assert ("InversionTime" in sidecar) or contrast != "FLAIR"
    names = pd.read_csv(out / "derivatives/tissue/dseg.tsv", sep="\t")
    assert list(names["name"])[:4] == ["background", "CSF", "ventricles", "cortex"]


def test_bytes_do_not_depend_on_workers_or_on_the_number_of_subjects(tmp_path):
    arguments = {"spacing_mm": 6.0, "contrasts": ("T1w", "FLAIR", "ADC")}
    calls = []
    few = write_phantom_cohort(
        tmp_path / "few", 2, 9, progress=lambda done, total: calls.append((done, total)), **arguments
    )
    many = write_phantom_cohort(tmp_path / "many", 3, 9, workers=2, **arguments)
    other = write_phantom_cohort(tmp_path / "other", 2, 10, **arguments)
    files = sorted(p.relative_to(few) for p in few.rglob("*.nii.gz"))
    assert files
    assert calls == [(1, 2), (2, 2)]
    for file in files:
        assert (few / file).read_bytes() == (many / file).read_bytes(), file
    segmentation = Path("derivatives/tissue/sub-0001/anat/sub-0001_dseg.nii.gz")
    assert (few / segmentation).read_bytes() != (other / segmentation).read_bytes()


def settings(**changes) -> CohortSettings:
    given = {
        "seed": 0, "spacing_mm": 4.0, "contrasts": CONTRASTS, "diagnoses": (("healthy", 1.0),),
        "missing_probability": 0.1, "age_range_years": (20.0, 90.0), "num_sites": 3,
    }  # fmt: skip
    return CohortSettings(**{**given, **changes})


def test_scans_are_missing_at_the_stated_rate_and_a_session_never_is():
    kept = [len(draw_contrasts(settings(missing_probability=0.3), index)) for index in range(400)]
    assert 1 - np.mean(kept) / len(CONTRASTS) == pytest.approx(0.3, abs=0.03)
    assert all(len(draw_contrasts(settings(missing_probability=1.0), index)) == 1 for index in range(20))


def test_masks_lie_on_the_first_scan_when_t1w_is_missing(tmp_path):
    out = write_phantom_cohort(
        tmp_path / "c", 1, 3, spacing_mm=5.0, contrasts=["FLAIR"], diagnoses={"ms": 1}, missing_probability=0
    )
    flair = nib.load(out / scan_path("sub-0001", "FLAIR"))
    mask = nib.load(out / "derivatives/masks/sub-0001/anat/sub-0001_label-lesion_mask.nii.gz")
    assert mask.shape == flair.shape
    np.testing.assert_allclose(mask.affine, flair.affine)
    assert np.asarray(mask.dataobj).any()


# Label maps


@pytest.fixture
def label_folder(tmp_path) -> Path:
    """One ball of white matter in cortex in fluid in bone and skin, with ventricles; FreeSurfer's numbers, LIA."""
    folder = tmp_path / "labels"
    folder.mkdir()
    affine = np.array([[-4.0, 0, 0, 100], [0, 0, 4, -110], [0, -4, 0, 110], [0, 0, 0, 1]])
    index = np.stack(np.meshgrid(*[np.arange(54)] * 3, indexing="ij"), axis=-1)
    x, y, z = np.moveaxis(index @ affine[:3, :3].T + affine[:3, 3], -1, 0)
    radius = np.sqrt(x**2 + y**2 + z**2)
    labels = np.zeros(radius.shape, np.int16)
    for outer, left, right in ((92, 511, 511), (82, 515, 515), (74, 24, 24), (68, 3, 42), (60, 2, 41)):
        labels[radius < outer] = np.where(x < 0, left, right)[radius < outer]
    ventricle = (np.abs(np.abs(x) - 14) < 7) & (np.abs(y) < 26) & (np.abs(z) < 10)
    labels[ventricle] = np.where(x < 0, 4, 43)[ventricle]
    nib.save(nib.Nifti1Image(labels, affine), folder / "person.nii.gz")
    return folder


def ventricle_ml(head) -> float:
    fractions = head.fractions(slice(0, head.grid.shape[0]))
    np.testing.assert_allclose(fractions.sum(axis=0), 1.0, atol=1e-4)
    return float(fractions[TISSUE_INDEX["ventricle"]].sum() * np.prod(head.grid.spacing_mm) / 1000)


def test_label_maps_are_painted_in_place_and_age(label_folder, tmp_path):
    out = write_phantom_cohort(
        tmp_path / "c", 2, 1, spacing_mm=4.0, diagnoses={"infarct": 1}, missing_probability=0, label_maps=label_folder
    )
    for number in (1, 2):
        session = Session(out, number)
        assert session.middle("T1w", "white matter") > session.middle("T1w", "cortex") > session.middle("T1w", "CSF")
        assert session.middle("T2w", "ventricles") > session.middle("T2w", "white matter")
        assert session.mask.any()
        world = np.argwhere(session.labels == LABEL["white matter"]) @ session.affine[:3, :3].T + session.affine[:3, 3]
        assert np.abs(world.mean(axis=0)).max() < 60
    label_map = read_label_map(find_label_maps(label_folder)[0])
    grid = Grid.covering_head(4.0)
    young, old = (
        ventricle_ml(LabelledHead([1, 2], grid, draw_ageing(np.random.default_rng(1), age), label_map))
        for age in (25.0, 85.0)
    )
    assert old > 1.3 * young


def test_real_label_maps(real_data):
    paths = find_label_maps(real_data / "label_maps")
    assert len(paths) == 10
    grid = Grid.covering_head(4.0)
    for path in paths[:2]:
        label_map = read_label_map(path)
        for age in (30.0, 75.0):
            ageing = draw_ageing(np.random.default_rng(2), age)
            found = ventricle_ml(LabelledHead([3, 1], grid, ageing, label_map))
            assert found == pytest.approx(ageing.ventricle_volume_ml, rel=0.5)


# Errors


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"not an empty folder.*Choose another"):
        write_phantom_cohort(tmp_path / "c", 1, spacing_mm=6.0)
    assert [p.name for p in tmp_path.rglob("*")] == ["c", "notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contrasts": ["PDw"]}, "the phantom has no PDw"),
        ({"contrasts": ["flare"]}, "(?i)did you mean flair"),
        ({"contrasts": []}, "contrasts: empty"),
        ({"diagnoses": {"tumor": 1.0}}, "Did you mean tumour"),
        ({"diagnoses": {"ms": 0.0}}, "probabilities"),
        ({"missing_probability": 1.5}, "missing_probability"),
        ({"spacing_mm": 0.0}, "spacing_mm"),
        ({"num_sites": 0}, "num_sites"),
        ({"workers": 0}, "workers"),
        ({"age_range_years": (60, 30)}, "age_range_years"),
    ],
)
def test_arguments_that_cannot_work_are_named(tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        write_phantom_cohort(tmp_path / "c", 1, **arguments)
    assert not any(tmp_path.iterdir())


def test_label_maps_of_every_format_are_read(label_folder):
    expected = read_label_map(label_folder / "person.nii.gz")
    image = nib.load(label_folder / "person.nii.gz")
    mgh = nib.MGHImage(np.asarray(image.dataobj).astype(np.int32), image.affine)
    (label_folder / "packed.mgh.gz").write_bytes(gzip.compress(mgh.to_bytes()))
    nib.save(nib.Nifti1Pair(image.dataobj, image.affine), label_folder / "pair.img")
    files = find_label_maps(label_folder)
    assert [file.name for file in files] == ["packed.mgh.gz", "pair.img", "person.nii.gz"]
    for file in files:
        assert np.array_equal(read_label_map(file).tissue, expected.tissue)


def test_label_maps_that_cannot_be_used(tmp_path):
    def attempt(folder: Path) -> None:
        write_phantom_cohort(tmp_path / "c", 1, spacing_mm=6.0, label_maps=folder)

    with pytest.raises(CohortError, match="no such folder of label maps"):
        attempt(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CohortError, match="no label volume"):
        attempt(empty)
    for name, values, message in (
        ("other", [0, 1, 9999], "unknown label codes.*9999"),
        ("tissue", [0, 4], "no usable"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        labels = np.resize(np.array(values, np.int32), (6, 6, 6))
        nib.save(nib.Nifti1Image(labels, np.eye(4)), folder / "seg.nii.gz")
        with pytest.raises(CohortError, match=message):
            attempt(folder)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "seg.nii.gz").write_bytes(b"not a volume")
    with pytest.raises(CohortError, match="cannot be read"):
        attempt(broken)
    assert not [p for p in tmp_path.iterdir() if "unfinished" in p.name or p.name == "c"]


def test_command_writes_a_cohort_and_says_so_in_one_line(tmp_path):
    app = typer.Typer()
    app.command()(phantom)
    out = tmp_path / "cohort"
    result = CliRunner().invoke(
        app, [str(out), "--subjects", "1", "--spacing-mm", "6", "--contrasts", "T1w", "--quiet"]
    )
    assert result.exit_code == 0, result.output
    assert result.output.strip().count("\n") == 0
    assert (out / "participants.tsv").is_file()
