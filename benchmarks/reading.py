"""Random slices for training: from a store, and from NIfTI files that are read again for every slice."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from rounds import figure, interleave, ratio
from scans import write_nifti

from brainfound.data.cohort import Cohort
from brainfound.data.store import Store

BATCH = 64
_NIFTI_SLICES = {"nifti, whole volumes": 3, "nifti, only the slice": 32}


def measure_reading(
    store: Store, cohorts: dict[str, Path], folder: Path, rounds: int, num_slices: int = 4096
) -> dict[str, Any]:
    """The section "reading": slices per second of a store and of the two ways to read files again.

    The files' ways are given less work than the store's: they stop at the slice as it was scanned, without scaling,
    cropping and padding to the store's pixels.
    """
    rng = np.random.default_rng(0)
    rows = rng.integers(0, store.num_slices, (max(num_slices // BATCH, 1), BATCH))
    compressed = [list(s.scans.values()) for cohort in cohorts.values() for s in Cohort.read(cohort).sessions()]
    plain = _uncompressed(compressed, folder)

    def from_store() -> None:
        for batch in rows:
            store.read_slices(batch)

    def whole_volumes() -> None:
        # What a data set that keeps files does for an item: every contrast is decompressed whole for one slice.
        for number in rng.integers(0, len(compressed), _NIFTI_SLICES["nifti, whole volumes"]):
            for file in compressed[number]:
                volume = nib.as_closest_canonical(nib.load(file))
                np.asarray(volume.dataobj)[..., rng.integers(volume.shape[2])].astype(np.float32)

    def only_the_slice() -> None:
        # The best that files allow: uncompressed, axial slices contiguous, headers read once, one slice touched.
        for number in rng.integers(0, len(plain), _NIFTI_SLICES["nifti, only the slice"]):
            for image in plain[number]:
                np.asarray(image.dataobj[..., int(rng.integers(image.shape[2]))]).astype(np.float32)

    tools = {"store": from_store, "nifti, whole volumes": whole_volumes, "nifti, only the slice": only_the_slice}
    counts = {"store": rows.size, **_NIFTI_SLICES}
    seconds = interleave(tools, rounds)
    per_slice = {name: [s / counts[name] for s in values] for name, values in seconds.items()}
    return {
        "slice_shape": [len(store.contrasts), *store.preprocessing.size],
        "batch": BATCH,
        "slices_in_store": store.num_slices,
        "slices_per_second": {name: figure(1 / statistics.median(values)) for name, values in per_slice.items()},
        "store_over": {name: ratio(per_slice[name], per_slice["store"]) for name in _NIFTI_SLICES},
    }


def _uncompressed(sessions: list[list[Path]], folder: Path) -> list[list[nib.Nifti1Image]]:
    """The scans as int16 .nii in RAS; opened, not read."""
    folder.mkdir(parents=True)
    opened = []
    for number, files in enumerate(sessions):
        images = []
        for file in files:
            image = nib.as_closest_canonical(nib.load(file))
            out = folder / f"{number}-{file.name.removesuffix('.gz')}"
            write_nifti(out, np.asarray(image.dataobj, dtype=np.int16), image.affine, level=0)
            images.append(nib.load(out))
        opened.append(images)
    return opened
