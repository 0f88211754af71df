"""Phantom cohorts on disk, in BIDS: each subject from seed to files (person, anatomy, lesions, signals, scans, masks).

Axes: X Y Z voxels, C signals, T tissues.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from brainfound.contrasts import parse_contrast
from brainfound.data.worker_processes import map_in_processes
from brainfound.errors import BrainFoundError, UsageError, did_you_mean
from brainfound.phantom.anatomy import Ageing, Anatomy, MassEffect, ParametricHead, draw_ageing, rotation_matrix
from brainfound.phantom.geometry import Grid, apply_matrices, resampling_matrices
from brainfound.phantom.label_maps import LabelledHead, find_label_maps, read_label_map
from brainfound.phantom.pathology import DIAGNOSES, Pathology, Survey, draw_pathology
from brainfound.phantom.physics import (
    B_VALUE_S_PER_MM2,
    SIMULATED_CONTRASTS,
    TISSUE_INDEX,
    Acquisition,
    Site,
    make_site,
    subject_tissues,
    tissue_signal,
)

DEFAULT_DIAGNOSES: dict[str, float] = {"healthy": 0.4, "tumour": 0.2, "infarct": 0.2, "ms": 0.2}


def write_phantom_cohort(
    out: Path,
    num_subjects: int,
    seed: int = 0,
    *,
    spacing_mm: float | None = 1.0,
    contrasts: Sequence[str] = SIMULATED_CONTRASTS,
    diagnoses: Mapping[str, float] | None = None,
    missing_probability: float = 0.1,
    age_range_years: tuple[float, float] = (20.0, 90.0),
    num_sites: int = 3,
    label_maps: Path | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a BIDS cohort of simulated multi-contrast brains; the same seed gives the same bytes.

    Subject number i depends on (seed, i) and on the settings, not on `num_subjects` or `workers`. The cohort is written
    next to `out` under a temporary name and renamed when it is complete.

    Args:
        out: the new folder; may exist if it is empty.
        num_subjects: number of subjects, with one session each.
        spacing_mm: spacing of the simulation, and the unit of the sites' voxels: in-plane widths are 0.9–2 times it,
            by site and contrast, and the 2-D protocols have slices of 2–5 mm (at least the in-plane width). None
            simulates at 1 mm and stores every scan on that grid; all sites then have the same voxels.
        contrasts: any of T1w, T1ce, T2w, FLAIR, DWI, ADC. ADC is in 10⁻⁶ mm²/s.
        diagnoses: probabilities of healthy, tumour, infarct and ms; scaled to sum to 1.
        missing_probability: probability that a scan is missing; every session keeps at least one.
        age_range_years: ages are uniform in this range.
        num_sites: number of sites; the first three scanners are fixed, later ones vary them.
        label_maps: a folder of FreeSurfer-numbered label volumes to use instead of parametric heads.
        workers: number of processes.
        progress: called with (done, total) after each subject.

    Raises:
        UsageError: an argument is invalid, or `out` exists and is not empty.
        CohortError: the label maps are missing or cannot be used.
        BrainFoundError: a worker process died, usually for lack of memory.
    """
    out = Path(out)
    settings = _checked_settings(
        seed, spacing_mm, contrasts, diagnoses, missing_probability, age_range_years, num_sites, label_maps
    )
    for name, count in (("num_subjects", num_subjects), ("workers", workers)):
        if count < 1:
            raise UsageError("must be at least 1", where=name, got=count, remedy=f"Set {name} to 1 or more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        remedy = "Choose another folder or remove this one"
        raise UsageError("exists and is not an empty folder", where=out, remedy=remedy)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.parent / f".{out.name}.unfinished-{uuid4().hex[:8]}"
    unfinished.mkdir()
    try:
        persons = _write_subjects(unfinished, settings, num_subjects, workers, progress)
        _write_tables(unfinished, settings, persons)
        if out.exists():
            out.rmdir()
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def _checked_settings(
    seed: int,
    spacing_mm: float | None,
    contrasts: Sequence[str],
    diagnoses: Mapping[str, float] | None,
    missing_probability: float,
    age_range_years: tuple[float, float],
    num_sites: int,
    label_maps: Path | None,
) -> CohortSettings:
    def require(is_valid: bool, where: str, what: str, got: object, expected: str) -> None:
        if not is_valid:
            raise UsageError(what, where=where, got=got, expected=expected, remedy=f"Change {where}")

    require(seed >= 0, "seed", "must not be negative", seed, "0 or more")
    is_resolvable = spacing_mm is None or 0.5 <= spacing_mm <= 8.0
    require(is_resolvable, "spacing_mm", "out of range", spacing_mm, "0.5 to 8 mm")
    is_probability = 0.0 <= missing_probability <= 1.0
    require(is_probability, "missing_probability", "not a probability", missing_probability, "0 to 1")
    youngest, oldest = age_range_years
    ages, are_adult = f"{youngest}–{oldest}", 18.0 <= youngest <= oldest <= 110.0
    require(are_adult, "age_range_years", "not a range of adult ages", ages, "18 ≤ youngest ≤ oldest ≤ 110")
    require(num_sites >= 1, "num_sites", "must be at least 1", num_sites, "1 or more")
    wanted = tuple(dict.fromkeys(parse_contrast(contrast) for contrast in contrasts))
    simulated = ", ".join(SIMULATED_CONTRASTS)
    for contrast in wanted:
        if contrast not in SIMULATED_CONTRASTS:
            remedy = f"Leave {contrast} out"
            raise UsageError(f"the phantom has no {contrast}", where="contrasts", expected=simulated, remedy=remedy)
    require(bool(wanted), "contrasts", "empty", "nothing", simulated)
    shares = dict(DEFAULT_DIAGNOSES if diagnoses is None else diagnoses)
    for name in shares:
        if name not in DIAGNOSES:
            raise UsageError(f"unknown diagnosis {name!r}", where="diagnoses", remedy=did_you_mean(name, DIAGNOSES))
    total = sum(shares.values())
    are_shares = total > 0 and min(shares.values()) >= 0
    require(are_shares, "diagnoses", "probabilities must be positive", shares, "at least one above 0, none below")
    return CohortSettings(
        seed=int(seed),
        spacing_mm=None if spacing_mm is None else float(spacing_mm),
        contrasts=wanted,
        diagnoses=tuple((name, shares.get(name, 0.0) / total) for name in DIAGNOSES),
        missing_probability=float(missing_probability),
        age_range_years=(float(youngest), float(oldest)),
        num_sites=int(num_sites),
        label_maps=() if label_maps is None else tuple(find_label_maps(label_maps)),
    )


def _write_subjects(
    folder: Path, settings: CohortSettings, num_subjects: int, workers: int, progress: Callable[[int, int], None] | None
) -> list[Participant]:
    if settings.label_maps:
        read_label_map(settings.label_maps[0])  # a folder of unusable volumes fails at once
    persons: dict[int, Participant] = {}
    # A process caches only a few label maps, so subjects of one map follow each other.
    order = sorted(range(num_subjects), key=lambda index: (str(draw_head(settings, index)[1]), index))
    try:
        for index, person in map_in_processes(partial(_write_one, folder, settings), order, workers):
            persons[index] = person
            if progress is not None:
                progress(len(persons), num_subjects)
    except BrokenProcessPool as error:
        got, place = f"{workers} workers", folder.parent
        remedy = "Use fewer workers or a larger spacing; each worker needs about 0.7 GB at 1 mm"
        raise BrainFoundError("a worker process died", where=place, got=got, remedy=remedy) from error
    return [persons[index] for index in range(num_subjects)]


def _write_one(folder: Path, settings: CohortSettings, index: int) -> Participant:
    # With one thread per process, workers do not compete and sums do not depend on the number of threads.
    with threadpool_limits(1):
        return write_subject(folder, settings, index)


def _write_tables(folder: Path, settings: CohortSettings, persons: list[Participant]) -> None:
    """participants.tsv and the descriptions that BIDS asks for."""
    pd.DataFrame([asdict(person) for person in persons]).to_csv(folder / "participants.tsv", sep="\t", index=False)
    columns = {
        "age": {"Description": "age at the scan", "Units": "years"},
        "sex": {"Description": "sex", "Levels": {"F": "female", "M": "male"}},
        "site": {"Description": "simulated site; each has its own scanner and protocols"},
        "diagnosis": {"Description": "simulated diagnosis", "Levels": {name: name for name in DIAGNOSES}},
    }
    write_json(folder / "participants.json", columns)
    generated = [{"Name": "brainfound phantom", "Description": f"seed {settings.seed}"}]

    def describe(part: str, name: str, **kind: str) -> None:
        content = {"Name": name, "BIDSVersion": "1.10.0", **kind, "GeneratedBy": generated}
        write_json(folder / part / "dataset_description.json", content)

    describe(".", "BrainFound phantom cohort", DatasetType="raw", License="CC0")
    for part, title in (("masks", "Lesion masks"), ("tissue", "Tissue segmentation")):
        describe(f"derivatives/{part}", f"{title} of a BrainFound phantom cohort", DatasetType="derivative")
    rows = [{"index": value, "name": name} for value, (name, _) in enumerate(SEGMENTATION)]
    pd.DataFrame(rows).to_csv(folder / "derivatives/tissue/dseg.tsv", sep="\t", index=False)
    (folder / ".bidsignore").write_text("*_ADC.nii.gz\n*_ADC.json\n")
    (folder / "README").write_text(
        "A simulated cohort of multi-contrast brain MRI; no person was scanned.\n"
        f"Made by `brainfound phantom` with seed {settings.seed}.\n"
        "Lesion masks and tissue segmentations are under derivatives/, on the grid of each session's T1w\n"
        "(or its first scan). ADC maps are in 10^-6 mm^2/s.\n"
    )


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
