"""The guard: gauges of collapse, a stop before a run ruins its model, and the best teacher so far.

Axis legend: ``N`` rows (crops), ``D`` width.

Thresholds follow public reports of DINO runs that collapsed; a single look proves nothing, so every
stop is confirmed over several looks in a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from brainfound.errors import TrainingError
from brainfound.recipes import Recipe


class RollBack(TrainingError):
    """The run is to go back to a kept checkpoint, and on from there with a lower learning rate.

    Args:
        step: of the kept checkpoint that is to be restored.
    """

    def __init__(self, what: str, *, step: int, where: object | None = None, remedy: str | None = None) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.step = step


class GuardRecipe(Recipe):
    """When to warn, when to stop, and which teacher to export."""

    enabled: bool = True
    """Whether the guard may stop the run; the gauges are logged in any case."""
    grace_steps: int = Field(default=1000, ge=0)
    """Steps before collapse gauges count; new heads look collapsed at first."""
    confirm_looks: int = Field(default=5, ge=1)
    """Looks (log lines) in a row that must show collapse."""
    min_teacher_entropy: float = Field(default=0.1, ge=0, le=1)
    """Entropy of the teacher's mean answer over ln K; 0.7–1 is healthy, below this is collapse."""
    min_effective_rank: float = Field(default=2.0, ge=0)
    """Effective rank of the CLS features; below this is collapse."""
    warn_effective_rank: float = Field(default=10.0, ge=0)
    """Below this the log line carries a warning; 50 and more is healthy in large batches."""
    max_mean_cosine: float = Field(default=0.995, gt=0, le=1)
    """Mean cosine between CLS features of different crops; from this on it is collapse."""
    ln_k_tolerance: float = Field(default=1e-4, ge=0)
    """A CLS loss within this part of ln K says that the output is uniform: collapse."""
    probe_drop: float = Field(default=0.1, ge=0)
    """A probe this far below the best one, and by two standard errors, is a drop."""
    probe_patience: int = Field(default=3, ge=1)
    """Probes in a row that must show the drop."""
    on_failure: Literal["stop", "roll_back"] = "stop"
    """What a confirmed drop or collapse leads to: the end of the run, or the checkpoint of the best probe
    once more, with a lower learning rate."""
    max_rollbacks: int = Field(default=2, ge=1)
    """Times that a run may be rolled back; the next failure stops it."""
    rollback_lr_factor: float = Field(default=0.3, gt=0, lt=1)
    """What all learning rates are multiplied by at each rollback."""
    export: Literal["best", "last"] = "best"
    """"best" exports an earlier teacher where its probe beat the last one's by a drop; "last" never does."""


def effective_rank(features: Float[Tensor, "N D"]) -> float:
    """exp(entropy of the normalised singular values) of centred features; 0 for constant features.

    Source: Roy and Vetterli 2007. At most min(N − 1, D).
    """
    centred = features.double() - features.double().mean(dim=0)
    singular = torch.linalg.svdvals(centred)
    total = singular.sum()
    if not torch.isfinite(total) or total <= 0:
        return 0.0
    share = singular / total
    return math.exp(-torch.special.xlogy(share, share).sum().item())


def mean_cosine(features: Float[Tensor, "N D"]) -> float:
    """Mean cosine between different rows; 1 for fewer than two rows."""
    if len(features) < 2:
        return 1.0
    unit = F.normalize(features.double(), dim=-1)
    total = unit.sum(dim=0).square().sum() - unit.square().sum()
    return (total / (len(unit) * (len(unit) - 1))).item()


def feature_gauges(features: Float[Tensor, "N D"]) -> dict[str, float]:
    """Gauges of a batch of CLS features; all NaN if any feature is not finite."""
    if not torch.isfinite(features).all():
        return {"effective_rank": math.nan, "mean_cosine": math.nan}
    return {"effective_rank": effective_rank(features), "mean_cosine": mean_cosine(features)}


@dataclass
class GuardState:
    """What the guard remembers between looks; part of every checkpoint."""

    collapsed_looks: int = 0
    dropped_probes: int = 0
    first_score: float | None = None
    best_score: float | None = None
    best_step: int | None = None
    last_score: float | None = None
    last_step: int | None = None
    last_margin: float = 0.0
    """How far below the best score a drop begins, at the last probe."""
    kept_step: int | None = None
    """Step of the checkpoint that a rollback would restore."""
    rollbacks: int = 0
    """Times that the run was rolled back."""
    lr_scale: float = 1.0
    """What the learning rates are multiplied by, after the rollbacks so far."""


@dataclass
class Guard:
    """Looks at log lines and probe scores. All ranks look at the same numbers, so all stop together."""

    recipe: GuardRecipe
    state: GuardState = field(default_factory=GuardState)

    def symptoms(self, line: Mapping[str, Any]) -> list[str]:
        """What in a log line says collapse, in words."""
        recipe = self.recipe
        found = []
        entropy, rank, cosine = (line.get(name) for name in ("teacher_entropy", "effective_rank", "mean_cosine"))
        if entropy is not None and not entropy >= recipe.min_teacher_entropy:
            found.append(f"teacher entropy {entropy:.3g} of ln K, below {recipe.min_teacher_entropy:g}")
        if rank is not None and not rank >= recipe.min_effective_rank:
            found.append(f"effective rank {rank:.3g}, below {recipe.min_effective_rank:g}")
        if cosine is not None and not cosine < recipe.max_mean_cosine:
            found.append(f"mean cosine {cosine:.4f}, from {recipe.max_mean_cosine:g} on")
        loss, ln_k = line.get("loss_dino"), line.get("ln_k")
        if loss is not None and ln_k is not None and abs(loss - ln_k) <= recipe.ln_k_tolerance * ln_k:
            found.append(f"CLS loss {loss:.4f} equals ln K ({ln_k:.4f})")
        return found

    def warnings(self, line: Mapping[str, Any]) -> list[str]:
        """Signs that are not yet a reason to stop."""
        rank = line.get("effective_rank")
        soft = self.recipe.warn_effective_rank
        return [f"effective rank {rank:.3g}, below {soft:g}"] if rank is not None and rank < soft else []

    def look(self, step: int, line: Mapping[str, Any]) -> None:
        """Look at a log line.

        Raises:
            TrainingError: if collapse has shown in `confirm_looks` lines in a row.
        """
        symptoms = self.symptoms(line) if step > self.recipe.grace_steps else []
        self.state.collapsed_looks = self.state.collapsed_looks + 1 if symptoms else 0
        if self.recipe.enabled and self.state.collapsed_looks >= self.recipe.confirm_looks:
            raise TrainingError(
                f"the features collapsed: {'; '.join(symptoms)}, in {self.state.collapsed_looks} log lines in a row",
                where=f"step {step}",
                remedy="Lower optim.lr or lengthen schedule.head_warmup_steps; export/ holds the teacher that was kept",
            )

    def is_best(self, score: float) -> bool:
        """Whether a score would be the best so far."""
        return math.isfinite(score) and (self.state.best_score is None or score > self.state.best_score)

    def judge(self, step: int, score: float, standard_error: float) -> None:
        """Take note of a probe's score.

        Raises:
            TrainingError: if the score has been below the best by a drop in `probe_patience` probes in a row.
        """
        state = self.state
        state.last_score, state.last_step = score, step
        state.last_margin = max(self.recipe.probe_drop, 2 * standard_error)
        if state.first_score is None:
            state.first_score = score
        if self.is_best(score):
            state.best_score, state.best_step, state.dropped_probes = score, step, 0
            return
        state.dropped_probes = state.dropped_probes + 1 if self._dropped() else 0
        if self.recipe.enabled and state.dropped_probes >= self.recipe.probe_patience:
            raise TrainingError(
                f"the probe fell from {state.best_score:.3f} (step {state.best_step}) to {score:.3f}"
                f" and stayed down for {state.dropped_probes} probes",
                where=f"step {step}",
                remedy="Lower optim.lr; the teacher of the best probe was exported",
            )

    def _dropped(self) -> bool:
        state = self.state
        if state.best_score is None or state.last_score is None:
            return False
        # A score that is not a number is below every score.
        return not state.last_score >= state.best_score - state.last_margin

    def exports_best(self) -> bool:
        """Whether an earlier teacher is to be exported: it was better by more than the probe's noise."""
        return self.recipe.export == "best" and self._dropped()

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = GuardState(**state)
