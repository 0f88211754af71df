"""The log of a run: its reading, and curves.png, small multiples over the steps.

`log.jsonl` holds one JSON object per line with a `step` and any numbers. A truncated last line is ignored; any other
invalid line is an error.

Every logged number has a panel. The panels of known gauges mark their alarm levels, so that a collapse is visible to a
reader who does not know the literature.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from brainfound.errors import BrainFoundError, UsageError
from brainfound.metrics.registry import METRICS, metric_name
from brainfound.report.figures import PALETTE, save_figure

RECIPE_FILE = "recipe.yaml"
LOG_FILE = "log.jsonl"
CURVES_FILE = "curves.png"


@dataclass(frozen=True)
class RunFolder:
    """The files of a run."""

    path: Path
    recipe: dict[str, Any]
    records: tuple[dict[str, Any], ...]
    """The lines of the log in order, without rollbacks."""
    rollbacks: tuple[dict[str, Any], ...] = ()
    """The log lines of rollbacks to an earlier step."""

    @classmethod
    def read(cls, path: str | Path) -> RunFolder:
        """Read a run folder; a missing recipe.yaml reads as empty.

        Raises:
            UsageError: `path` is not a run folder: it has no log.
            BrainFoundError: a file cannot be read; the error names the file and the line.
        """
        path = Path(path)
        if not (path / LOG_FILE).is_file():
            raise UsageError(f"not a run folder: it has no {LOG_FILE}", where=path)
        records = _read_log(path / LOG_FILE)
        return cls(
            path=path,
            recipe=_read_recipe(path / RECIPE_FILE),
            records=tuple(line for line in records if "rolled_back_from" not in line),
            rollbacks=tuple(line for line in records if "rolled_back_from" in line),
        )

    def numeric_keys(self) -> list[str]:
        """The keys with a number in some line, in order of first appearance, without `step`."""
        keys = dict.fromkeys(key for record in self.records for key, value in record.items() if _is_number(value))
        return [key for key in keys if key != "step"]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (T,) and values (T,) of a key, where it was logged; ``nan`` where it was not finite."""
        points = [(record["step"], record[key]) for record in self.records if _is_number(record.get(key))]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.array(steps, dtype=float), np.array(values, dtype=float)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise BrainFoundError(f"cannot be read: {error}", where=path) from error
    if not isinstance(content, dict):
        raise BrainFoundError("must hold a mapping", where=path, got=type(content).__name__)
    return content


def _read_log(path: Path) -> list[dict[str, Any]]:
    # Bytes, because the line may end in the middle of a character.
    *complete, rest = path.read_bytes().split(b"\n")
    records = [_read_line(line, f"{path}:{number}") for number, line in enumerate(complete, start=1) if line.strip()]
    try:
        return records + ([_read_line(rest, str(path))] if rest.strip() else [])
    except BrainFoundError:  # the line is truncated
        return records


def _read_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BrainFoundError(f"not a line of JSON: {error}", where=where, remedy="Remove the line") from error
    if not isinstance(record, dict) or not _is_number(record.get("step")):
        raise BrainFoundError("not a log line", where=where, got=line[:60], expected='{"step": …}')
    # null is a number that was not finite.
    return {key: math.nan if value is None else value for key, value in record.items()}


_COLOURS = (*PALETTE, "#666666")
_ALARM, _BEST = "#B00020", "#D55E00"
_NUM_COLUMNS = 3
_MOST_PANELS = 30
_SMOOTH_FROM = 200
_VALIDATION = "validation/"
_LN_K = "ln_k"


@dataclass(frozen=True)
class _Panel:
    """One gauge: its title, its keys (``*`` ends a prefix), and its marks."""

    title: str
    keys: tuple[str, ...]
    alarm: tuple[float, ...] = ()
    alarm_side: Literal["below", "above"] = "below"
    best: Literal["highest", "lowest"] | None = None
    log_scale: bool = False
    smooth: bool = True
    mark_ln_k: bool = False


# Alarms: the collapse gauges of self-distillation. Normalised entropy 0.7–1 is healthy and below 0.1 is
# collapse; an effective rank below 10 is a soft and below 2 a hard alarm; so is a mean cosine of 0.995.
_PANELS = (
    _Panel("Loss", ("loss",), mark_ln_k=True),
    _Panel("Parts of the loss", ("loss_*",), mark_ln_k=True),
    _Panel("Learning rate", ("lr", "lr/*"), smooth=False),
    _Panel("Entropy (share of ln K)", ("teacher_entropy", "target_entropy"), alarm=(0.1,)),
    _Panel("Effective rank of CLS", ("effective_rank",), alarm=(10.0, 2.0)),
    _Panel("Mean cosine between CLS", ("mean_cosine",), alarm=(0.995,), alarm_side="above"),
    _Panel("Gram distance to the anchor", ("gram_distance",)),
    _Panel("Gradient norm", ("grad_norm", "grad_norm/*"), log_scale=True),
    _Panel("Probe of the teacher", ("probe", "probe/*"), best="highest", smooth=False),
    _Panel("Retention probes", ("retention/*",), smooth=False),
    _Panel("Standard errors of retention probes", ("retention_error/*",), smooth=False),
    _Panel("Skipped steps", ("skipped_steps",), smooth=False),
)


def plot_curves(run_folder: str | Path) -> Path:
    """Draw curves.png into a run folder, from all numbers of its log, and return its path.

    The loss and its parts show ln K where it was logged (a cross-entropy that stays at ln K means a uniform output).
    Probes and validation scores are marked at their best value. Each ``validation/…`` key and each unknown number has a
    panel of its own. A log without numbers gives an empty picture with a note: the report must not fail a run that has
    ended. Raises as `RunFolder.read`.
    """
    run = RunFolder.read(run_folder)
    panels = _select_panels(run)
    panels, left_out = panels[:_MOST_PANELS], panels[_MOST_PANELS:]
    num_columns = max(1, min(_NUM_COLUMNS, len(panels)))
    num_rows = max(1, math.ceil(len(panels) / num_columns))
    figure = Figure(figsize=(4.4 * num_columns, 2.75 * num_rows + 0.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(run, left_out), fontsize=11, x=0.01, ha="left", fontweight="bold")
    if not panels:
        figure.text(0.5, 0.45, "No numbers have been logged yet.", ha="center", color="#666666")
    for i, (panel, keys) in enumerate(panels):
        axes = figure.add_subplot(num_rows, num_columns, i + 1)
        _draw(axes, run, panel, keys)
        if i >= len(panels) - num_columns:
            axes.set_xlabel("step", fontsize=9)
    return save_figure(figure, run.path / CURVES_FILE)


def _title(run: RunFolder, left_out: Sequence[tuple[_Panel, list[str]]]) -> str:
    name = run.recipe.get("name") or run.path.resolve().name
    last = max((record["step"] for record in run.records), default=0)
    title = f"{name} · to step {last:g}"
    if run.rollbacks:
        title += f" · rolled back {len(run.rollbacks)} × (dotted), last to step {run.rollbacks[-1]['step']:g}"
    if left_out:
        title += f" · {len(left_out)} more panels not shown: " + ", ".join(keys[0] for _, keys in left_out[:3]) + " …"
    return title


def _select_panels(run: RunFolder) -> list[tuple[_Panel, list[str]]]:
    """The panels that have something to show, with the keys of each."""
    remaining = [key for key in run.numeric_keys() if key != _LN_K]
    found = []
    for panel in _PANELS:
        if keys := list(dict.fromkeys(key for pattern in panel.keys for key in remaining if _matches(key, pattern))):
            found.append((panel, keys))
            remaining = [key for key in remaining if key not in keys]
    remaining.sort(key=lambda key: not key.startswith(_VALIDATION))
    return found + [(_Panel(_format_key(key), (key,), best=_best(key)), [key]) for key in remaining]


def _matches(key: str, pattern: str) -> bool:
    return not key.startswith(_VALIDATION) and fnmatchcase(key, pattern)


def _format_key(key: str) -> str:
    group, slash, name = key.rpartition("/")
    words = name.replace("_", " ")
    return f"{group.replace('_', ' ').replace('/', ' · ').capitalize()} · {words}" if slash else words.capitalize()


def _best(key: str) -> Literal["highest", "lowest"] | None:
    metric = METRICS.get(metric_name(key.removeprefix(_VALIDATION)))
    if not key.startswith(_VALIDATION) or metric is None or metric.only_clean:
        return None
    return "highest" if metric.higher_is_better else "lowest"


def _draw(axes: Axes, run: RunFolder, panel: _Panel, keys: Sequence[str]) -> None:
    axes.set_title(panel.title, fontsize=10, loc="left")
    lines = [(key, *run.series(key)) for key in keys]
    values = np.concatenate([line[2] for line in lines])
    positive = values[np.isfinite(values)]
    if panel.log_scale and positive.size and (positive > 0).all() and positive.max() > 20 * positive.min():
        axes.set_yscale("log")
    # The first line is the main one: it is drawn last, over its parts.
    for i, (key, steps, line_values) in reversed(list(enumerate(lines))):
        _draw_line(axes, steps, line_values, _COLOURS[i % len(_COLOURS)], key, panel.smooth)
    # ln K is not the level of a sum of cross-entropies, whose parts have their own panel.
    is_sum = panel is _PANELS[0] and any(_matches(key, part) for key in run.numeric_keys() for part in _PANELS[1].keys)
    for rollback in run.rollbacks:
        axes.axvline(rollback["step"], color=_ALARM, linewidth=0.9, linestyle=":")
    marked_ln_k = panel.mark_ln_k and not is_sum and _mark_ln_k(axes, run)
    _mark_alarms(axes, panel)
    if panel.best:
        _mark_best(axes, panel.best, lines[0][1], lines[0][2])
    if len(lines) > 1 or marked_ln_k:
        axes.legend(fontsize=7, framealpha=0.8, edgecolor="none", reverse=True, ncols=2 if len(lines) > 4 else 1)
    if num_bad := int((~np.isfinite(values)).sum()):
        axes.text(0.99, 0.02, f"{num_bad} not finite", transform=axes.transAxes, fontsize=8, ha="right", color=_ALARM)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_yscale() == "linear":
        # Plain labels such as 2e-05: a factor above the axis is easily overlooked.
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.4g}"))


def _draw_line(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str, smooth: bool) -> None:
    values = np.where(np.isfinite(values), values, np.nan)
    if len(values) < _SMOOTH_FROM or not smooth:
        size = 3.5 if len(values) <= 30 else 0.0
        axes.plot(steps, values, color=colour, linewidth=1.4, marker="o", markersize=size, label=label)
        return
    # Long logs: the pale raw line under the running mean over one fiftieth of the run.
    axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
    axes.plot(steps, _running_mean(values, max(5, len(values) // 50)), color=colour, linewidth=1.5, label=label)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the finite values in a centred window, which is shorter at the ends."""
    kernel = np.ones(width)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    count = np.convolve(finite.astype(float), kernel, mode="same")
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def _mark_ln_k(axes: Axes, run: RunFolder) -> bool:
    """Draw the level of ln K; False if it was not logged."""
    _, values = run.series(_LN_K)
    if values.size:
        axes.axhline(values[-1], color=_ALARM, linewidth=1, linestyle="--", label=f"ln K = {values[-1]:.2f}")
    return bool(values.size)


def _mark_alarms(axes: Axes, panel: _Panel) -> None:
    for level in panel.alarm:
        low, high = axes.get_ylim()
        axes.axhline(level, color=_ALARM, linewidth=0.9, linestyle="--")
        axes.annotate(
            f"alarm {panel.alarm_side} {level:g}", (1, level), xycoords=("axes fraction", "data"), fontsize=7,
            xytext=(-2, 2 if panel.alarm_side == "below" else -9), textcoords="offset points", ha="right", color=_ALARM,
        )  # fmt: skip
        # Keep the alarm in view, since the panel shows the distance to it.
        margin = 0.08 * (max(high, level) - min(low, level))
        axes.set_ylim(min(low, level - margin), max(high, level + margin))


def _mark_best(axes: Axes, best: Literal["highest", "lowest"], steps: np.ndarray, values: np.ndarray) -> None:
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if not values.size:
        return
    at = int(values.argmax() if best == "highest" else values.argmin())
    axes.plot(steps[at], values[at], marker="*", markersize=10, color=_BEST, linestyle="none", zorder=5)
    axes.set_title(f"best {values[at]:.4g} at step {steps[at]:g}", loc="right", fontsize=8, color=_BEST)
