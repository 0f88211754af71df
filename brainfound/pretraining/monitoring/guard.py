"""The guard: collapse metrics and probe scores that stop a run, or roll it back, before it ruins its model.

Collapse shows in log lines: features that span few directions (effective rank, mean cosine), crops of one image no more
alike than others (view margin), unused prototypes (teacher entropy), or a CLS loss of ln K, the cost of a uniform
output. Damage shows in probe scores: the target's probe, or a retention probe, below its best so far. The
best teacher has the best target score among those without a retention drop.

One value proves nothing, so a failure is confirmed over several in a row. Thresholds follow public reports of DINO runs
that collapsed in large batches.

Axis legend: ``N`` rows (crops), ``D`` width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from brainfound.errors import TrainingError
from brainfound.recipes import Recipe
from brainfound.training.task import RollbackPolicy, RollbackRequested

MAX_HEALTH_IMAGES = 256
"""Enough for the metrics; a singular value decomposition of the rows of many ranks would take seconds."""


def effective_rank(features: Float[Tensor, "N D"]) -> float:
    """exp(entropy of normalised singular values) of centred features (Roy and Vetterli 2007), at most min(N − 1, D).

    0 for constant features, NaN if any is not finite.
    """
    if not torch.isfinite(features).all():
        return math.nan
    centred = features.double() - features.double().mean(dim=0)
    # Smaller differences are rounding errors of the features themselves.
    if len(features) < 2 or centred.abs().max() <= 1e-6 * features.abs().max():
        return 0.0
    singular = torch.linalg.svdvals(centred)
    fractions = singular / singular.sum()
    return math.exp(-torch.special.xlogy(fractions, fractions).sum().item())


def mean_cosine(features: Float[Tensor, "N D"]) -> float:
    """Mean cosine between different rows; 1 for fewer than two rows, NaN if any feature is not finite."""
    if len(features) < 2:
        return 1.0 if torch.isfinite(features).all() else math.nan
    unit = F.normalize(features.double(), dim=-1)
    total = unit.sum(dim=0).square().sum() - unit.square().sum()
    return (total / (len(unit) * (len(unit) - 1))).item()


def view_margin(features: Float[Tensor, "N D"], images: Int[Tensor, "N"]) -> float:
    """Mean cosine between centred rows of one image, minus that between rows of different images.

    About 0 if features do not depend on the image (or are constant), at most 1. NaN for fewer than two images, if
    none has two rows, or if a feature is not finite.
    """
    ids, image_index = torch.unique(images, return_inverse=True)
    counts = torch.bincount(image_index).double()
    num_same, num_all = (counts * (counts - 1)).sum(), len(images) * (len(images) - 1)
    if len(ids) < 2 or num_same == 0:
        return math.nan
    unit = F.normalize(features.double() - features.double().mean(dim=0), dim=-1)
    # Sums over pairs are squares of sums, so no N × N matrix is needed.
    diagonal = unit.square().sum()
    image_sums = unit.new_zeros(len(ids), unit.shape[1]).index_add(0, image_index, unit)
    same_image = image_sums.square().sum() - diagonal
    all_pairs = unit.sum(dim=0).square().sum() - diagonal
    return (same_image / num_same - (all_pairs - same_image) / (num_all - num_same)).item()


def feature_health_metrics(features: Float[Tensor, "N D"], images: Int[Tensor, "N"] | None = None) -> dict[str, float]:
    """All metrics of a batch of CLS features, from at most `MAX_HEALTH_IMAGES` images; NaN if one is not finite.

    Without `images` (the image number of each row) each row is a different image, and there is no view margin.
    """
    features = features.detach().cpu()
    rows = torch.arange(len(features)) if images is None else images.cpu()
    ids = torch.unique(rows)[:MAX_HEALTH_IMAGES]
    if len(ids) == MAX_HEALTH_IMAGES:
        chosen = rows <= ids[-1]
        features, rows = features[chosen], rows[chosen]
    metrics = {
        "effective_rank": effective_rank(features),
        # Of images, not rows: features that tell images apart but ignore crops have n − 1 directions.
        "highest_rank": float(min(len(ids) - 1, features.shape[1])),
        "mean_cosine": mean_cosine(features),
    }
    if len(rows) > len(ids) > 1:
        metrics["view_margin"] = view_margin(features, rows)
    return metrics


MARGIN_PER_IMAGE = 1 / 160
"""The threshold of the view margin is at most this per image: few images make it noisy (by 0.15 at 8 of them)."""
UNINFORMATIVE_LOSS_RATIO = 0.99
"""At this fraction of ln K or above, the CLS loss is no better than that of an output that ignores the image."""

RetentionScores = Mapping[str, tuple[float, float]]
"""Name of a retention probe → score and standard error."""


class GuardRecipe(Recipe):
    """When to warn, when to stop or roll back, and which teacher to export."""

    enabled: bool = True
    """Whether the guard may stop the run or roll it back; collapse metrics are logged in any case."""
    grace_steps: int = Field(default=1000, ge=0)
    """Initial steps in which collapse metrics do not count: new heads, and features of new weights, look collapsed."""
    confirm_log_lines: int = Field(default=5, ge=1)
    """Log lines in a row that must show collapse."""
    min_teacher_entropy: float = Field(default=0.1, ge=0, le=1)
    """Entropy of the teacher's mean output over ln K; 0.7–1 is healthy, below this is collapse."""
    min_effective_rank: float = Field(default=2.0, ge=0)
    """Effective rank of the CLS features; below this is collapse."""
    warn_effective_rank: float = Field(default=10.0, ge=0)
    """An effective rank below this gives a warning; 50 or more is healthy in large batches."""
    rank_share: float = Field(default=0.25, ge=0, le=1)
    """Both thresholds of rank are at most this fraction of the largest rank that the batch can show (images − 1)."""
    max_mean_cosine: float = Field(default=0.995, gt=0, le=1)
    """Mean cosine between CLS features of different crops; at this or above it is collapse."""
    min_view_margin: float = Field(default=0.1, ge=-1, le=1)
    """How much more alike (centred cosine) two crops of one image are than crops of different images; below this, with
    a CLS loss no better than ln K, it is collapse. 0.3–0.6 is healthy, 0 is a data set of one image."""
    ln_k_tolerance: float = Field(default=1e-4, ge=0)
    """A CLS loss within this fraction of ln K, in each of the log lines, shows a uniform output: collapse."""
    warn_gram_distance: float = Field(default=0.02, ge=0)
    """Mean squared change of the cosines between patches of an image since the start; above this, a warning."""
    probe_drop: float = Field(default=0.05, ge=0)
    """A score this far below the best one, and by at least two standard errors, is a drop."""
    probe_patience: int = Field(default=3, ge=1)
    """Probes in a row that must show the drop, of the target or of one and the same retention probe."""
    retention_drop: float = Field(default=0.05, ge=0)
    """A retention probe (`probe.retention`) this far below its own best score, and by `retention_errors` standard
    errors of its difference to the start, is a drop."""
    kept_drop: float = Field(default=0.2, ge=0)
    """The same for the start's features (`kept_slices`, `kept_patches`): learning changes features, so only the loss of
    a fifth of their linear information is a drop. At 1 or above it is only logged."""
    retention_errors: float = Field(default=3.0, ge=0)
    """More than the target's two because there are many retention probes: at three, 1 in 700 drops by chance."""
    on_failure: Literal["stop", "roll_back"] = "stop"
    """After a confirmed failure: stop, or return to the checkpoint of the best probe with a lower learning rate."""
    max_rollbacks: int = Field(default=2, ge=1)
    """Rollbacks per run; the next failure stops it."""
    rollback_lr_factor: float = Field(default=0.3, gt=0, lt=1)
    """Factor on all learning rates at each rollback."""
    export: Literal["best", "last"] = "best"
    """"best" exports an earlier teacher if its probe beat the last one's by a drop; "last" never does."""


@dataclass
class RetentionState:
    """The guard's memory of one retention probe."""

    first_score: float
    best_score: float
    best_step: int
    last_score: float
    last_margin: float
    dropped_probes: int = 0

    def is_dropped(self) -> bool:
        return not self.last_score >= self.best_score - self.last_margin  # NaN is below every score


def read_retention_scores(line: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Score and standard error of each retention probe in a line of the log."""
    names = [key.removeprefix("retention/") for key in line if key.startswith("retention/")]
    return {name: (line[f"retention/{name}"], line[f"retention_error/{name}"]) for name in names}


@dataclass
class GuardState:
    """The guard's memory; part of every checkpoint. A drop begins `last_margin` below the best score."""

    collapsed_log_lines: int = 0
    dropped_probes: int = 0
    first_score: float | None = None
    best_score: float | None = None
    best_step: int | None = None
    last_score: float | None = None
    last_step: int | None = None
    last_margin: float = 0.0
    kept_step: int | None = None
    """Step of the checkpoint that a rollback would restore."""
    rollbacks: int = 0
    lr_scale: float = 1.0
    failed: bool = False
    retention: dict[str, RetentionState] = field(default_factory=dict)


@dataclass
class Guard(RollbackPolicy):
    """Judges log lines and probe scores. All ranks see the same numbers, so all stop together.

    Scores of random features are no baseline, and early training often lowers them. So if a run begins `from_scratch`,
    each probe within `grace_steps` counts as the best, and retention is only logged.
    """

    recipe: GuardRecipe
    state: GuardState = field(default_factory=GuardState)
    from_scratch: bool = False
    _warned: set[str] = field(default_factory=set, init=False, repr=False)

    @property
    def may_roll_back(self) -> bool:
        return self.recipe.enabled and self.recipe.on_failure == "roll_back"

    def collapse_symptoms(self, line: Mapping[str, Any]) -> list[str]:
        """Descriptions of the signs of collapse in a log line."""
        recipe, symptoms = self.recipe, []
        if math.isnan(line.get("effective_rank", 0.0)):
            return ["they are not finite"]
        entropy, rank, cosine = (line.get(name) for name in ("teacher_entropy", "effective_rank", "mean_cosine"))
        if entropy is not None and not entropy >= recipe.min_teacher_entropy:
            symptoms.append(f"teacher entropy {entropy:.3g} of ln K, below {recipe.min_teacher_entropy:g}")
        min_rank = self._rank_threshold(recipe.min_effective_rank, line)
        if rank is not None and not rank >= min_rank:
            symptoms.append(f"effective rank {rank:.3g}, below {min_rank:.3g}")
        several_images = line.get("highest_rank", math.inf) > 0  # crops of a single image should be alike
        if cosine is not None and several_images and not cosine < recipe.max_mean_cosine:
            symptoms.append(f"mean cosine {cosine:.4f}, from {recipe.max_mean_cosine:g} on")
        return symptoms + self._uninformative_outputs(line)

    def _rank_threshold(self, threshold: float, line: Mapping[str, Any]) -> float:
        return min(threshold, self.recipe.rank_share * line.get("highest_rank", math.inf))

    def _uninformative_outputs(self, line: Mapping[str, Any]) -> list[str]:
        """Signs of outputs that do not depend on the image; the CLS loss is a mean over pairs of crops."""
        recipe, loss, ln_k, margin = self.recipe, *(line.get(k) for k in ("loss_dino", "ln_k", "view_margin"))
        if loss is None or ln_k is None:
            return []
        symptoms = []
        if abs(loss - ln_k) <= recipe.ln_k_tolerance * ln_k:
            symptoms.append(f"CLS loss {loss:.4f} equals ln K ({ln_k:.4f})")
        # The margin alone proves nothing: crops of different contrasts may be unlike and still be learnt.
        min_margin = min(recipe.min_view_margin, MARGIN_PER_IMAGE * (line.get("highest_rank", math.inf) + 1))
        if margin is not None and margin < min_margin and not loss < UNINFORMATIVE_LOSS_RATIO * ln_k:
            symptoms.append(
                f"crops of one image are no more alike than those of others (view margin {margin:.2f}, below"
                f" {min_margin:.2g}), and the CLS loss {loss:.4f} is no better than ln K ({ln_k:.4f})"
            )
        return symptoms

    def new_warnings(self, line: Mapping[str, Any]) -> list[str]:
        """Signs that do not yet justify a stop; each kind once per run."""
        texts = {}
        step = line.get("step", 0)
        rank, distance = line.get("effective_rank"), line.get("gram_distance")
        min_rank = self._rank_threshold(self.recipe.warn_effective_rank, line)
        if rank is not None and rank < min_rank and step > self.recipe.grace_steps:
            texts["rank"] = f"effective rank {rank:.3g}, below {min_rank:.3g}"
        if distance is not None and distance > self.recipe.warn_gram_distance:
            texts["gram"] = f"Gram distance {distance:.3g} to the start, above {self.recipe.warn_gram_distance:g}"
        chance = line.get("probe_chance") if self.state.first_score is None else None
        if chance is not None and not line["probe"] - chance > self._drop_margin(line["probe_standard_error"]):
            texts["blind"] = (
                f"the probe of {line['probe_target']} is not clearly above chance"
                f" ({line['probe']:.3f}, chance {chance:.3f}): it cannot see a drop; another probe.target may"
            )
        new = [f"step {step}: {text}" for kind, text in texts.items() if kind not in self._warned]
        self._warned |= texts.keys()
        return new

    def on_log_line(self, step: int, line: Mapping[str, Any]) -> None:
        """Judge the collapse metrics of a line; `confirm_log_lines` bad ones in a row are a failure."""
        symptoms = self.collapse_symptoms(line)
        # Features that are not finite never recover, so they get no grace.
        counts = step > self.recipe.grace_steps or math.isnan(line.get("effective_rank", 0.0))
        self.state.collapsed_log_lines = self.state.collapsed_log_lines + 1 if symptoms and counts else 0
        if self.state.collapsed_log_lines >= self.recipe.confirm_log_lines:
            lines = f"in {self.state.collapsed_log_lines} log lines in a row"
            what = f"the features collapsed: {'; '.join(symptoms)}, {lines}"
            self.handle_failure(step, what, "Lower optim.lr or lengthen schedule.head_warmup_steps")

    def is_best(self, step: int, score: float, retention: RetentionScores | None = None) -> bool:
        """Whether a teacher is the best so far: by the target's score, and without a retention drop."""
        after = self._updated_retention(step, retention or {})
        if not math.isfinite(score) or any(probe.is_dropped() for probe in after.values()):
            return False
        in_grace_period = self.from_scratch and step <= self.recipe.grace_steps
        return self.state.best_score is None or in_grace_period or score > self.state.best_score

    def record_probe(
        self, step: int, score: float, standard_error: float, retention: RetentionScores | None = None
    ) -> None:
        """Record the scores of a probe; NaN is a drop from any score.

        A drop of the target, or of one retention probe, in `probe_patience` probes in a row is a failure.
        """
        state = self.state
        is_best = self.is_best(step, score, retention)
        state.retention |= self._updated_retention(step, retention or {})
        state.last_score, state.last_step = score, step
        state.last_margin = self._drop_margin(standard_error)
        if state.first_score is None:
            state.first_score = score
        if is_best:
            state.best_score, state.best_step = score, step
            if self.may_roll_back:
                state.kept_step = step
        state.dropped_probes = state.dropped_probes + 1 if self._target_dropped() else 0
        probes: dict[str, Any] = {"the probe": state, **state.retention}
        drops = [
            f"{name} fell from {probe.best_score:.3f} (step {probe.best_step}) to {probe.last_score:.3f}"
            for name, probe in probes.items()
            if probe.dropped_probes >= self.recipe.probe_patience
        ]
        if drops:
            longest = max(probe.dropped_probes for probe in probes.values())
            self.handle_failure(step, f"{', '.join(drops)} and stayed down for {longest} probes", "Lower optim.lr")

    def _updated_retention(self, step: int, retention: RetentionScores) -> dict[str, RetentionState]:
        """The memory of the retention probes after these scores; `state` is not changed."""
        if self.from_scratch:
            return {}
        after = {}
        for name, (score, error) in retention.items():
            min_drop = self.recipe.kept_drop if name in ("kept_slices", "kept_patches") else self.recipe.retention_drop
            margin = max(min_drop, self.recipe.retention_errors * error)
            probe = after[name] = RetentionState(score, score, step, score, margin)
            if before := self.state.retention.get(name):
                probe.first_score = before.first_score
                if not (score > before.best_score or math.isnan(before.best_score)):
                    probe.best_score, probe.best_step = before.best_score, before.best_step
                probe.dropped_probes = before.dropped_probes + 1 if probe.is_dropped() else 0
        return after

    def _drop_margin(self, standard_error: float) -> float:
        return max(self.recipe.probe_drop, 2 * standard_error)

    def _target_dropped(self) -> bool:
        best, last = self.state.best_score, self.state.last_score
        return best is not None and last is not None and not last >= best - self.state.last_margin

    def handle_failure(self, step: int, what: str, remedy: str | None) -> None:
        """Raise RollbackRequested or TrainingError after a confirmed failure; a disabled guard does nothing."""
        recipe, state = self.recipe, self.state
        if not recipe.enabled:
            return
        remedy = remedy or "Lower optim.lr"
        if self.may_roll_back and state.kept_step is not None and state.rollbacks < recipe.max_rollbacks:
            raise RollbackRequested(what, step=state.kept_step, where=f"step {step}", remedy=remedy)
        if state.rollbacks:
            what += f", after {state.rollbacks} rollback{'s' if state.rollbacks > 1 else ''}"
        elif self.may_roll_back:
            what += ", and no probe gave a step to return to"
        self._stop(step, what, remedy)

    def _stop(self, step: int, what: str, remedy: str) -> None:
        self.state.failed = True
        exported = f"the teacher of step {self.state.best_step}" if self.should_export_best() else "the last teacher"
        raise TrainingError(what, where=f"step {step}", remedy=f"{remedy}; export/ holds {exported}")

    def should_keep_checkpoint(self, step: int) -> bool:
        return self.state.kept_step == step

    def on_nonfinite_steps(self, step: int, error: TrainingError) -> None:
        self.handle_failure(step, error.what, error.remedy)

    def on_rollback(self) -> dict[str, Any]:
        state = self.state
        state.rollbacks += 1
        state.lr_scale *= self.recipe.rollback_lr_factor
        state.collapsed_log_lines = state.dropped_probes = 0
        # The kept step is that of the best probe, where no retention probe was dropped.
        state.last_score, state.last_step = state.best_score, state.best_step
        for probe in state.retention.values():
            probe.last_score, probe.dropped_probes = probe.best_score, 0
        return {"rollbacks": state.rollbacks, "lr_scale": state.lr_scale}

    def on_rollback_failed(self, step: int, request: RollbackRequested, error: TrainingError) -> None:
        self._stop(step, f"{request.what}, and {error.what} ({error.got})", request.remedy or "Lower optim.lr")

    def should_export_best(self) -> bool:
        """Whether to export the best teacher: the last probe had dropped, or the run failed."""
        state = self.state
        dropped = self._target_dropped() or any(probe.is_dropped() for probe in state.retention.values())
        return self.recipe.export == "best" and (dropped or (state.failed and state.best_step is not None))

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        retention = {name: RetentionState(**probe) for name, probe in state.get("retention", {}).items()}
        self.state = GuardState(**{**state, "retention": retention})
