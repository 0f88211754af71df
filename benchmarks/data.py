"""Reading slices: from a store, and by reading NIfTI files again for every slice. Side by side, in one run.

    python benchmarks/data.py [--subjects 6] [--repeats 5]

Prints medians and their ratio as JSON. Absolute numbers mean little; the ratio is what to compare.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from brainfound.data.cohort import Cohort
from brainfound.data.phantom import write_phantom_cohort
from brainfound.data.prepare import prepare
from brainfound.data.preprocessing import Preprocessing

CONTRASTS = ("T1w", "T2w", "FLAIR")


def median_rate(read: Callable[[], int], repeats: int) -> float:
    """Slices per second: the median of several runs, after one to warm up."""
    read()
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        count = read()
        rates.append(count / (time.perf_counter() - started))
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_phantom_cohort(folder / "cohort", options.subjects, spacing_mm=1.0, contrasts=CONTRASTS)
        started = time.perf_counter()
        store = prepare(folder / "cohort", folder / "store", Preprocessing(contrasts=CONTRASTS))
        seconds_to_prepare = time.perf_counter() - started
        rng = np.random.default_rng(0)
        rows = rng.integers(0, store.num_slices, 2000)
        files = [list(session.scans.values()) for session in Cohort.read(folder / "cohort").sessions()]

        def from_store() -> int:
            for batch in rows.reshape(-1, 50):
                store.read_slices(batch)
            return len(rows)

        def from_nifti() -> int:
            # What a data set that keeps files does for each item: three volumes are decompressed for one slice.
            for number in rng.integers(0, len(files), 3):
                for file in files[number]:
                    volume = np.asarray(nib.load(file).dataobj)
                    volume[..., volume.shape[2] // 2].astype(np.float32)
            return 3

        store_rate = median_rate(from_store, options.repeats)
        nifti_rate = median_rate(from_nifti, options.repeats)
        result = {
            "machine": platform.processor() or platform.machine(),
            "slice_shape": [len(CONTRASTS), *store.preprocessing.size],
            "store_slices_per_second": round(store_rate),
            "nifti_slices_per_second": round(nifti_rate, 2),
            "ratio": round(store_rate / nifti_rate),
            "seconds_to_prepare_one_session": round(seconds_to_prepare / len(store), 2),
        }
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
