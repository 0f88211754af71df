"""Where the time of a training step goes, by kind of work, from the profiler. Needs only torch."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

VIEWS, TEACHER, MODEL = "benchmark: views", "benchmark: teacher", "benchmark: forward and backward"
"""Names of `torch.profiler.record_function` that workers put around what no operator's name tells."""

_MATMUL = ("mm", "addmm", "convolution", "mkldnn", "slow_conv", "cudnn_conv", "linear")
_ATTENTION = ("bmm", "baddbmm", "scaled_dot_product", "softmax")
_FOREACH = ("_foreach", "_fused_adam")
_OPTIMIZER_STEP = "Optimizer.step"


class StepProfile:
    """A context for one step; `shares` says where its time went.

    Args:
        prototypes: an operator with an axis of this length that is no product is the work of the prototype losses.
    """

    def __init__(self, prototypes: int) -> None:
        self.prototypes = prototypes
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._profile = profile(activities=activities, record_shapes=True)

    def __enter__(self) -> StepProfile:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)

    def shares(self, wall_seconds: float) -> dict[str, Any]:
        """Seconds by kind, and the operators that took most; the rest of the wall time is Python and waiting."""
        by_kind: dict[str, float] = defaultdict(float)
        by_operator: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
        for event in self._profile.events():
            seconds = (event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total) / 1e6
            if seconds <= 0:
                continue
            kind = self._kind(event)
            by_kind[kind] += seconds
            entry = by_operator[kind, event.name]
            entry[0] += seconds
            entry[1] += 1
        by_kind["Python and waiting"] = max(0.0, wall_seconds - sum(by_kind.values()))
        most = sorted(by_operator.items(), key=lambda item: -item[1][0])[:25]
        return {
            "by_kind": {kind: by_kind[kind] for kind in sorted(by_kind, key=lambda kind: -by_kind[kind])},
            "operators": [
                {"kind": kind, "operator": name, "seconds": seconds, "calls": calls}
                for (kind, name), (seconds, calls) in most
            ],
        }

    def _kind(self, event: Any) -> str:
        name = event.name.removeprefix("aten::")
        part = _part(event)
        if part == VIEWS:
            return "views"
        if part == TEACHER or part.startswith(_OPTIMIZER_STEP) or name.startswith(_FOREACH):
            return "optimiser, clipping and teacher"
        touches_prototypes = any(self.prototypes in shape for shape in event.input_shapes if isinstance(shape, list))
        if name.startswith(_MATMUL):
            return "matrix products"
        if touches_prototypes:
            return "prototype losses"
        if any(part in name for part in _ATTENTION):
            return "attention"
        return "elementwise, norms, copies"


def _part(event: Any) -> str:
    """The innermost named part around an event; Lightning computes the loss inside of the optimiser's step."""
    while event is not None:
        if event.name in (VIEWS, TEACHER, MODEL) or event.name.startswith(_OPTIMIZER_STEP):
            return str(event.name)
        event = event.cpu_parent
    return ""
