"""One subject from seed to files: person, anatomy, lesions, signals, scans, masks.

Axes: X Y Z voxels, C signals, T tissues.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainfound.phantom.anatomy import Ageing, Anatomy, MassEffect, ParametricHead, draw_ageing, rotation_matrix
from brainfound.phantom.grid import Grid, apply_matrices, resampling_matrices
from brainfound.phantom.label_maps import LabelledHead, read_label_map
from brainfound.phantom.pathology import Pathology, Survey, draw_pathology
from brainfound.phantom.physics import B_VALUE_S_PER_MM2, TISSUE_INDEX, subject_tissues, tissue_signal
from brainfound.phantom.scanner import Acquisition, Site, make_site

# Classes of the stored segmentation, in the order of their values: name and tissues.
SEGMENTATION: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("background", ("air",)),
    ("CSF", ("csf",)),
    ("ventricles", ("ventricle", "choroid_plexus")),
    ("cortex", ("cortex",)),
    ("white matter", ("white_matter", "hyperintensity")),
    ("deep grey matter", ("deep_grey", "pallidum")),
    ("cerebellum", ("cerebellar_cortex", "cerebellar_white")),
    ("brain stem", ("brain_stem",)),
    ("skull", ("bone", "marrow")),
    ("scalp and soft tissue", ("fat", "soft_tissue", "vessel")),
    ("lesion", ("oedema", "enhancing_tumour", "necrosis", "infarct", "plaque", "active_plaque")),
)
_SURVEY_MM = 4.0
_ROWS = 8
# Each aspect of a subject has its own random stream, so that a change in one does not affect the others.
_STREAMS = ("person", "ageing", "anatomy", "pathology", "tissues", "pose", "scans", "missing", "label_map")


@dataclass(frozen=True)
class CohortSettings:
    """The validated arguments of `write_phantom_cohort` that all subjects share."""

    seed: int
    spacing_mm: float | None
    contrasts: tuple[str, ...]
    diagnoses: tuple[tuple[str, float], ...]
    missing_probability: float
    age_range_years: tuple[float, float]
    num_sites: int
    label_maps: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Participant:
    """One row of participants.tsv."""

    participant_id: str
    age: float
    sex: str
    site: str
    diagnosis: str


def draw_participant(settings: CohortSettings, index: int) -> tuple[Participant, Site]:
    """Draw the covariates of subject number `index` (from 0); they do not depend on the number of subjects."""
    rng = _stream(settings, index, "person")
    names = [name for name, _ in settings.diagnoses]
    age = round(float(rng.uniform(*settings.age_range_years)), 1)
    sex = "F" if rng.random() < 0.5 else "M"
    site = make_site(int(rng.integers(settings.num_sites)), settings.seed)
    diagnosis = str(rng.choice(names, p=[probability for _, probability in settings.diagnoses]))
    return Participant(f"sub-{index + 1:04d}", age, sex, site.name, diagnosis), site


def write_subject(folder: Path, settings: CohortSettings, index: int) -> Participant:
    """Simulate one subject and write its scans, sidecars, lesion mask and segmentation below `folder`."""
    person, site = draw_participant(settings, index)
    ageing = draw_ageing(_stream(settings, index, "ageing"), person.age)
    grid = Grid.covering_head(1.0 if settings.spacing_mm is None else settings.spacing_mm)
    anatomy, pathology = _build(settings, index, person, ageing, grid)
    tissues = subject_tissues(_stream(settings, index, "tissues"), ageing.iron)
    written = draw_contrasts(settings, index)
    simulated = [c for c in written if c != "ADC"] + (["b0"] if "ADC" in written else [])
    if "ADC" in written and "DWI" not in simulated:
        simulated.append("DWI")
    sequences = {c: site.get_protocol(c).sequence for c in simulated}
    table = np.array([[tissue_signal(c, t, sequences[c], site.field_tesla) for t in tissues] for c in simulated])
    table = table.astype(np.float32)
    signals, segmentation, lesion = _simulate_signals(anatomy, pathology, grid, table)

    pose = _pose(settings, index, site)
    acquisition = Acquisition(site, _seed(settings, index, "scans"), grid, settings.spacing_mm, pose)
    white = {c: abs(float(row[TISSUE_INDEX["white_matter"]])) for c, row in zip(simulated, table, strict=True)}
    white["b0"] = white.get("DWI", 1.0)  # the ADC needs one receiver gain for both
    magnitude = {c: acquisition.magnitude(c, s, white[c]) for c, s in zip(simulated, signals, strict=True)}
    for contrast in written:
        volume = acquisition.adc(magnitude["b0"], magnitude["DWI"]) if contrast == "ADC" else magnitude[contrast]
        _write_scan(folder, person, acquisition, contrast, volume)
    reference = acquisition.grid("T1w" if "T1w" in written else written[0])
    _write_derivatives(folder, person.participant_id, acquisition, reference, segmentation, lesion)
    return person


def _seed(settings: CohortSettings, index: int, stream: str) -> list[int]:
    return [settings.seed, index, _STREAMS.index(stream)]


def _stream(settings: CohortSettings, index: int, stream: str) -> np.random.Generator:
    return np.random.default_rng(_seed(settings, index, stream))


def _build(
    settings: CohortSettings, index: int, person: Participant, ageing: Ageing, grid: Grid
) -> tuple[Anatomy, Pathology]:
    """The head on the simulation grid with its lesions, placed by a survey on a coarse grid."""
    spread, path = draw_head(settings, index)
    # Men's heads are about 10 % larger in volume.
    size = float((0.985 if person.sex == "M" else 0.953) * np.exp(0.018 * spread))
    seed = _seed(settings, index, "anatomy")
    label_map = None if path is None else read_label_map(path)

    def build(on: Grid, mass_effect: MassEffect | None = None) -> Anatomy:
        if label_map is None:
            return ParametricHead(seed, on, ageing, size, mass_effect)
        return LabelledHead(seed, on, ageing, label_map, size, mass_effect)

    if person.diagnosis == "healthy" and not ageing.has_hyperintensities:
        return build(grid), Pathology(grid)
    survey = Survey.measure(build(Grid.covering_head(max(_SURVEY_MM, grid.spacing_mm[0]))))
    pathology = draw_pathology(_stream(settings, index, "pathology"), person.diagnosis, survey, ageing)
    return build(grid, pathology.mass_effect), pathology


def draw_head(settings: CohortSettings, index: int) -> tuple[float, Path | None]:
    """Draw the deviation of a head's size from the mean, in standard deviations, and its label volume, if any."""
    rng = _stream(settings, index, "label_map")
    spread = float(rng.standard_normal())
    maps = settings.label_maps
    return spread, maps[int(rng.integers(len(maps)))] if maps else None


def _simulate_signals(
    anatomy: Anatomy, pathology: Pathology, grid: Grid, table: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signals (C, X, Y, Z), segmentation (X, Y, Z) and the lesion's share (X, Y, Z), a few planes at a time.

    `table` is (C, T). Signed signals add in proportion to the tissues' fractions.
    """
    signals = np.empty((len(table), *grid.shape), np.float32)
    segmentation = np.zeros(grid.shape, np.uint8)
    lesion = np.zeros(grid.shape, np.float32)
    groups = [[TISSUE_INDEX[name] for name in names] for _, names in SEGMENTATION]
    for start in range(0, grid.shape[0], _ROWS):
        rows = slice(start, min(start + _ROWS, grid.shape[0]))
        fractions = anatomy.fractions(rows)
        lesion[rows] = pathology.apply(fractions, grid, rows)
        signals[:, rows] = np.tensordot(table, fractions, 1)
        best = fractions[groups[0]].sum(axis=0)
        for value, group in enumerate(groups[1:], start=1):
            share = fractions[group].sum(axis=0)
            segmentation[rows][share > best] = value
            np.maximum(best, share, out=best)
    return signals, segmentation, lesion


def draw_contrasts(settings: CohortSettings, index: int) -> list[str]:
    """Draw the contrasts of subject number `index`, at least one."""
    rng = _stream(settings, index, "missing")
    kept = [c for c in settings.contrasts if rng.random() >= settings.missing_probability]
    return kept or [settings.contrasts[int(rng.integers(len(settings.contrasts)))]]


def _pose(settings: CohortSettings, index: int, site: Site) -> np.ndarray:
    """(4, 4) head coordinates → scanner coordinates, the same for all scans of the session."""
    rng = _stream(settings, index, "pose")
    pose = np.eye(4)
    pose[:3, :3] = rotation_matrix(np.radians(site.tilt_degrees) * rng.standard_normal(3))
    pose[:3, 3] = rng.normal(0, 6.0, 3)
    return pose


def scan_path(participant_id: str, contrast: str) -> str:
    """The BIDS path of a scan in the cohort: `sub-0001/anat/sub-0001_ce-gd_T1w.nii.gz`."""
    special = {"T1ce": ("anat", "ce-gd_T1w"), "DWI": ("dwi", "dwi"), "ADC": ("dwi", "ADC")}
    folder, name = special.get(contrast, ("anat", contrast))
    return f"{participant_id}/{folder}/{participant_id}_{name}.nii.gz"


def _write_scan(folder: Path, person: Participant, acquisition: Acquisition, contrast: str, volume: np.ndarray) -> None:
    path = folder / scan_path(person.participant_id, contrast)
    acquisition.store(path, np.clip(volume, 0, np.iinfo(np.int16).max), acquisition.grid(contrast), np.int16)
    site = acquisition.site
    sequence = site.get_protocol(contrast).sequence
    sidecar: dict[str, Any] = {
        "Manufacturer": "Phantom",
        "MagneticFieldStrength": site.field_tesla,
        "RepetitionTime": sequence.repetition_time_s,
        "EchoTime": sequence.echo_time_s,
        "InstitutionName": site.name,
    }
    if sequence.inversion_time_s is not None:
        sidecar["InversionTime"] = sequence.inversion_time_s
    if contrast == "T1ce":
        sidecar["ContrastBolusIngredient"] = "GADOLINIUM"
    stem = str(path).removesuffix(".nii.gz")
    if contrast == "DWI":
        sidecar["Description"] = "trace-weighted image"
        Path(f"{stem}.bval").write_text(f"{B_VALUE_S_PER_MM2:g}\n")
        Path(f"{stem}.bvec").write_text("0\n0\n0\n")
    if contrast == "ADC":
        sidecar["Units"] = "10^-6 mm^2/s"
    write_json(Path(f"{stem}.json"), sidecar)


def _write_derivatives(
    folder: Path, name: str, acquisition: Acquisition, reference: Grid, segmentation: np.ndarray, lesion: np.ndarray
) -> None:
    """The lesion mask and the segmentation on the grid of the session's reference scan."""
    simulation = acquisition.simulation
    share = apply_matrices(lesion, resampling_matrices(simulation, reference, "acquisition"))
    mask = share > 0.5
    if lesion.any() and not mask.any():
        mask = share >= share.max()  # a lesion smaller than half a voxel still has one voxel
    nearest = []
    for axis in range(3):
        index = (reference.axis_mm(axis) - simulation.axis_mm(axis)[0]) / simulation.spacing_mm[axis]
        nearest.append(np.clip(np.rint(index), 0, simulation.shape[axis] - 1).astype(int))
    masks, tissue = (folder / f"derivatives/{kind}/{name}/anat" for kind in ("masks", "tissue"))
    acquisition.store(masks / f"{name}_label-lesion_mask.nii.gz", mask, reference, np.uint8)
    acquisition.store(tissue / f"{name}_dseg.nii.gz", segmentation[np.ix_(*nearest)], reference, np.uint8)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
