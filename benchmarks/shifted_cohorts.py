"""Phantom cohorts with a shift of site: pretraining on two scanners, development on another, the test on a third.

No subject is in two parts, and where heads are painted on label maps, no label map either. Age, diagnosis and anatomy
are drawn alike in all parts; what differs is the scanner: field, sequences, voxels, slices, coil, noise.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from worker_processes import in_processes

from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.store import Store
from brainfound.data.store.prepare import prepare
from brainfound.errors import UsageError
from brainfound.phantom.cohort import CohortSettings, draw_participant, scan_path, write_subject
from brainfound.phantom.label_maps import find_label_maps

CONTRASTS = ("T1w", "T2w", "FLAIR")
DIAGNOSES = (("healthy", 0.5), ("tumour", 1 / 6), ("infarct", 1 / 6), ("ms", 1 / 6))
HEALTHY = "healthy"
AGES_YEARS = (20.0, 90.0)
_MAPS_READ = 4  # that the phantom keeps in memory; a fifth would be read again and again


@dataclass(frozen=True)
class Part:
    """Which sites a part of the data comes from, and its share of the label maps."""

    name: str
    sites: tuple[str, ...]
    seed: int
    share: tuple[float, float]

    def maps(self, found: Sequence[Path]) -> tuple[Path, ...]:
        """This part's label maps, which no other part has.

        Raises:
            UsageError: there are too few.
        """
        first, last = (round(end * len(found)) for end in self.share)
        if first == last:
            raise UsageError("too few label maps to give each part its own", got=len(found), expected="5 or more")
        return tuple(found[first : min(last, first + _MAPS_READ)])


PARTS = (
    Part("pretraining", ("site-1", "site-2"), 101, (0.0, 0.4)),
    Part("test", ("site-3",), 102, (0.4, 0.8)),
    # Sites from 4 on are variations of the first three that depend on the seed.
    Part("development", ("site-4", "site-5"), 103, (0.8, 1.0)),
)


def make_store(
    folder: Path,
    part: Part,
    num_sessions: int,
    label_maps: Path | None,
    spacing_mm: float,
    preprocessing: Preprocessing,
    workers: int,
) -> Store:
    """The store of one part, made where it is not there yet; masks are the tissue segmentation."""
    if not (folder / "store").is_dir():
        cohort = folder / "cohort"
        shutil.rmtree(cohort, ignore_errors=True)  # of an earlier run that was cut off
        _write_cohort(cohort, part, num_sessions, label_maps, spacing_mm, workers)
        prepare(cohort, folder / "store", preprocessing, workers)
        shutil.rmtree(cohort)
    return Store.open(folder / "store")


def _write_cohort(
    cohort: Path, part: Part, num_sessions: int, label_maps: Path | None, spacing_mm: float, workers: int
) -> None:
    maps = () if label_maps is None else part.maps(find_label_maps(label_maps))
    num_sites = max(int(site.removeprefix("site-")) for site in part.sites)
    settings = CohortSettings(
        seed=part.seed, spacing_mm=spacing_mm, contrasts=CONTRASTS, diagnoses=DIAGNOSES, missing_probability=0.0,
        age_range_years=AGES_YEARS, num_sites=num_sites, label_maps=maps,
    )  # fmt: skip
    # A person's site is drawn with the person; those of other sites are left out before anything is simulated.
    chosen, index = [], 0
    while len(chosen) < num_sessions:
        if draw_participant(settings, index)[0].site in part.sites:
            chosen.append(index)
        index += 1
    cohort.mkdir(parents=True)
    per_worker = -(-len(chosen) // workers)
    shares = [(cohort, settings, chosen[at : at + per_worker]) for at in range(0, len(chosen), per_worker)]
    rows = [row for rows in in_processes(_write_subjects, shares, workers) for row in rows]
    pd.DataFrame(rows).to_csv(cohort / "manifest.tsv", sep="\t", index=False)


def _write_subjects(cohort: Path, settings: CohortSettings, indices: Sequence[int]) -> list[dict[str, object]]:
    rows = []
    for index in indices:
        person = asdict(write_subject(cohort, settings, index))
        name = str(person.pop("participant_id"))
        person["age_years"] = person.pop("age")
        mask = f"derivatives/tissue/{name}/anat/{name}_dseg.nii.gz"
        for contrast in CONTRASTS:
            rows.append(
                {"subject": name, "contrast": contrast, "path": scan_path(name, contrast), "mask": mask} | person
            )
    return rows


def describe(store: Store) -> dict[str, object]:
    """What a store holds, for the record."""
    table = store.sessions
    return {
        "sessions": len(store),
        "slices": store.num_slices,
        "sites": table["site"].value_counts().to_dict(),
        "diagnoses": table["diagnosis"].value_counts().to_dict(),
        "mean_age_years": round(float(table["age_years"].mean()), 1),
        "content": store.content_hash[:12],
    }


def key_of(settings: dict[str, object]) -> str:
    """A short name that changes with the settings, so that nothing made with others is taken for this."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:10]
