"""Preparing sessions: BrainFound, TorchIO and MONAI on the same files, and a lower bound on the time."""

from __future__ import annotations

import gzip
import shutil
import statistics
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from breakdown import seconds_by_kind
from peers import agreement, find_head, find_head_with_itk, monai_preparation, torchio_preparation
from rounds import figure, interleave, ratio
from scipy import ndimage

from brainfound.data.cohort import Cohort, Session
from brainfound.data.preprocessing.grids import resample
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.store import Store
from brainfound.data.store.prepare import prepare

LEAST_CORRELATION = 0.97
"""Below this the tools would not have done the same work, and the comparison is refused."""

_PEERS = {
    "torchio": (torchio_preparation, find_head),
    "monai": (monai_preparation, find_head),
    "torchio, head mask by ITK": (torchio_preparation, find_head_with_itk),
    "monai, head mask by ITK": (monai_preparation, find_head_with_itk),
}


def measure_preparing(
    cohorts: dict[str, Path], folder: Path, preprocessing: Preprocessing, rounds: int
) -> dict[str, Any]:
    """The section "prepare": seconds per session of every tool, ratios, agreement and where our time goes."""
    import SimpleITK as sitk
    import torch

    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    kinds = {kind: _measure_kind(cohort, folder / kind, preprocessing, rounds) for kind, cohort in cohorts.items()}
    together: dict[str, list[float]] = {}
    for kind in kinds.values():
        for tool, seconds in kind.pop("all_seconds").items():
            whole = together.setdefault(tool, [0.0] * rounds)
            together[tool] = [a + b for a, b in zip(whole, seconds, strict=True)]
    num_sessions = sum(kind["sessions"] for kind in kinds.values())
    breakdown: dict[str, float] = {}
    for kind in kinds.values():
        for work, seconds in kind["brainfound_seconds_by_work"].items():
            breakdown[work] = breakdown.get(work, 0.0) + seconds
    whole = sum(breakdown.values())
    return {
        "sessions": num_sessions,
        "all_kinds": _compare(together, num_sessions),
        "share_of_brainfound_time": {
            work: round(seconds / whole, 3) for work, seconds in sorted(breakdown.items(), key=lambda item: -item[1])
        },
        "by_kind": kinds,
    }


def _measure_kind(cohort: Path, folder: Path, preprocessing: Preprocessing, rounds: int) -> dict[str, Any]:
    sessions = list(Cohort.read(cohort).sessions())
    folder.mkdir(parents=True)
    numbers = iter(range(10**9))

    def brainfound() -> None:
        # A fresh folder each time: a finished store would be a no-op. Removed later, outside of the clock.
        prepare(cohort, folder / f"store-{next(numbers)}", preprocessing, workers=1)

    brainfound()
    store = Store.open(folder / "store-0")
    tools: dict[str, Callable[[], Any]] = {"brainfound": brainfound}
    agreements = {}
    for name, (make, head) in _PEERS.items():
        tools[name] = _for_all(make(preprocessing, head), sessions, folder, name)
        tools[name]()
        agreements[name] = _agreements(store, sessions, folder, name)
    parts = _Floor(store, sessions, preprocessing)
    tools |= {
        "gunzip (gzip)": parts.gunzip_with_gzip,
        "gunzip (zlib)": parts.gunzip_with_zlib,
        "resampling (scipy)": parts.resample_with_scipy,
        "resampling (brainfound)": parts.resample_with_brainfound,
    }
    if parts.isal is not None:
        tools["gunzip (isal)"] = parts.gunzip_with_isal
    seconds = interleave(tools, rounds)
    result = {
        "sessions": len(sessions),
        **_compare(seconds, len(sessions)),
        "agreement": agreements,
        "brainfound_seconds_by_work": {work: figure(s) for work, s in seconds_by_kind(brainfound).items()},
        "all_seconds": seconds,
    }
    shutil.rmtree(folder)
    return result


def _for_all(run: Callable, sessions: list[Session], folder: Path, name: str) -> Callable[[], None]:
    def all_sessions() -> None:
        for session in sessions:
            run(session.scans, _peer_file(folder, name, session))

    return all_sessions


def _peer_file(folder: Path, name: str, session: Session) -> Path:
    return folder / f"{name}-{session.subject}-{session.session}.npy"


def _agreements(store: Store, sessions: list[Session], folder: Path, name: str) -> list[dict[str, Any]]:
    """How nearly a peer's stacks are ours: with the same head mask they must be, with ITK's the reader judges."""
    found = []
    for number, session in enumerate(sessions):
        result = agreement(store[number].pixels, np.load(_peer_file(folder, name, session)))
        if "ITK" not in name and min(result["correlation_per_contrast"]) < LEAST_CORRELATION:
            raise RuntimeError(f"{name} did other work on {session.subject}: {result}")
        found.append(result)
    return found


class _Floor:
    """Decompressing the files and one trilinear resampling of each scan onto the stack's grid; nothing else."""

    def __init__(self, store: Store, sessions: list[Session], preprocessing: Preprocessing) -> None:
        try:
            from isal import igzip
        except ImportError:
            self.isal = None
        else:
            self.isal = igzip
        self.files = [file for session in sessions for file in session.scans.values()]
        # Volumes are held in float32 as read: converting them is not part of the floor.
        self.jobs = []
        for number, session in enumerate(sessions):
            stack = store[number]
            for contrast in preprocessing.contrasts:
                image = nib.load(session.scans[contrast])
                matrix = np.linalg.inv(image.affine) @ stack.affine
                self.jobs.append((image.get_fdata(dtype=np.float32, caching="unchanged"), matrix, stack.grid))

    def gunzip_with_gzip(self) -> None:
        for file in self.files:
            with gzip.open(file) as stream:
                stream.read()

    def gunzip_with_zlib(self) -> None:
        for file in self.files:
            zlib.decompress(file.read_bytes(), wbits=31)

    def gunzip_with_isal(self) -> None:
        for file in self.files:
            self.isal.decompress(file.read_bytes())

    def resample_with_scipy(self) -> None:
        for volume, matrix, grid in self.jobs:
            ndimage.affine_transform(volume, matrix[:3, :3], matrix[:3, 3], output_shape=grid, order=1)

    def resample_with_brainfound(self) -> None:
        for volume, matrix, grid in self.jobs:
            resample(volume, matrix, grid, order=1)


def _compare(seconds: dict[str, list[float]], num_sessions: int) -> dict[str, Any]:
    """Medians per session and ratios within rounds."""

    def add(*names: str) -> list[float]:
        return [sum(parts) for parts in zip(*(seconds[name] for name in names), strict=True)]

    floors = {
        "gzip + scipy": add("gunzip (gzip)", "resampling (scipy)"),
        "zlib + scipy": add("gunzip (zlib)", "resampling (scipy)"),
        "zlib + our resampling": add("gunzip (zlib)", "resampling (brainfound)"),
    }
    if "gunzip (isal)" in seconds:
        floors["isal + our resampling"] = add("gunzip (isal)", "resampling (brainfound)")
    ours = seconds["brainfound"]
    return {
        "seconds_per_session": {
            name: figure(statistics.median(values) / num_sessions) for name, values in {**seconds, **floors}.items()
        },
        "throughput_over": {name: ratio(seconds[name], ours) for name in _PEERS},
        "time_over_floor": {name: ratio(ours, floor) for name, floor in floors.items()},
    }


def warm_page_cache(cohorts: dict[str, Path]) -> None:
    """Read every file once, so that no tool waits for the disk."""
    for cohort in cohorts.values():
        for file in sorted(cohort.iterdir()):
            file.read_bytes()
