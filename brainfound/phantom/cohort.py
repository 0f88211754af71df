"""Phantom cohorts on disk, in BIDS: the function behind `brainfound phantom`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from pathlib import Path
from uuid import uuid4

import pandas as pd
from threadpoolctl import threadpool_limits

from brainfound.contrasts import parse_contrast
from brainfound.data.worker_processes import map_in_processes
from brainfound.errors import BrainFoundError, UsageError, did_you_mean
from brainfound.phantom.label_maps import find_label_maps, read_label_map
from brainfound.phantom.pathology import DIAGNOSES
from brainfound.phantom.physics import SIMULATED_CONTRASTS
from brainfound.phantom.subject import SEGMENTATION, CohortSettings, Participant, draw_head, write_json, write_subject

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
