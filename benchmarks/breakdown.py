"""Where the time of a run goes: seconds by kind of work, from one extra profiled pass.

Each call counts towards the innermost kind of work that it belongs to, by file or function, so the kinds add up to
the total. Profiling costs a little per call and next to nothing per voxel.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

_BY_FILE = {
    "/data/reading/": "reading",
    "/nibabel/": "reading",
    "/data/preprocessing/foreground.py": "head mask",
    "/data/preprocessing/grids.py": "resampling",
    "/data/preprocessing/stack_builder.py": "percentiles and scaling",
    "/data/preprocessing/stack.py": "quality facts",
    "/data/store/contact_sheet.py": "contact sheet",
    "/data/cohort.py": "cohort and file facts",
    "/data/sources/": "cohort and file facts",
    "/data/store/plan.py": "cohort and file facts",
    "/data/store/": "writing",
    "/datasets/": "writing",
}
_BY_C_MODULE = {"_hashlib": "hashing", "_sha2": "hashing", "_blake2": "hashing"}
_GUNZIP = ("zlib", "isal")


def seconds_by_kind(run: Callable[[], Any]) -> dict[str, float]:
    """Run once under the profiler; seconds of each kind of work, largest first."""
    seconds: dict[str, float] = {}
    stack = ["else"]
    last = time.perf_counter()

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[stack[-1]] = seconds.get(stack[-1], 0.0) + now - last
        if event == "call":
            stack.append(_kind_of_frame(frame) or stack[-1])
        elif event == "c_call":
            stack.append(_kind_of_builtin(argument) or stack[-1])
        elif len(stack) > 1:
            stack.pop()
        last = time.perf_counter()

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _kind_of_frame(frame: FrameType) -> str | None:
    code = frame.f_code
    for part, kind in _BY_FILE.items():
        if part in code.co_filename:
            return kind
    return None


def _kind_of_builtin(function: Any) -> str | None:
    owner = getattr(function, "__self__", None)
    module = getattr(function, "__module__", None) or type(owner).__module__
    if module.split(".")[0] in _GUNZIP:
        return "gunzip"
    return _BY_C_MODULE.get(module)
