"""The guard: looks at gauges of collapse and at probes; a stop or a return before a run ruins its model.

What it looks at, and why each is there:

- effective rank and mean cosine: features that span few directions, or one;
- the view margin: crops of one image must be more alike than crops of different images. Where random
  crops are all that differs (a data set of one image, or features that have forgotten the image), rank and
  cosine look healthy, because crops do differ, and the margin is 0;
- the entropy of the teacher's mean answer: prototypes that are no longer used;
- the loss beside ln K: a uniform answer costs ln K exactly, whatever the targets;
- the probe of the teacher against its best value so far, which is at first the one before step 0;
- each of the other things that the probe watches (`retention`), likewise. A probe sees only what
  it asks for: one may rise while the features are ruined for others. A drop of any that lasts counts.

Many are watched, so each has a wide margin, and what the target's probe finds best is the best teacher only where
nothing that is watched was below its own. The Gram distance to the start only warns: it grows with any change of
features. How much of the start's features can be made again linearly from the present ones (`kept_slices`,
`kept_patches`) does not fall when features turn, are scaled or gain something: it falls when something is lost.

A single look proves nothing, so every stop is confirmed over several looks in a row. Features that are not
finite are the exception to the grace of the first steps: they never come back.

Thresholds follow public reports of DINO runs that collapsed. Those were large batches: the rank that a
batch of n images can show is at most n − 1, so the thresholds of rank are at most a part of that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pydantic import Field

from brainfound.errors import TrainingError
from brainfound.recipes import Recipe
from brainfound.training.task import RollbackRequested

MARGIN_PER_IMAGE = 1 / 160
"""The threshold of the margin is at most so much of each image: few images make it noisy (by 0.15 at 8 of them)."""
START_FEATURE_SCORES = ("kept_slices", "kept_patches")
"""What is watched of the starting checkpoint's own features."""
UNINFORMATIVE_LOSS_RATIO = 0.99
"""From this part of ln K on, the CLS loss is no better than that of an answer that ignores the image."""


class GuardRecipe(Recipe):
    """When to warn, when to stop or go back, and which teacher to export."""

    enabled: bool = True
    """Whether the guard may stop the run or roll it back; the gauges are logged in any case."""
    grace_steps: int = Field(default=1000, ge=0)
    """Steps before collapse gauges count; new heads, and features of new weights, look collapsed at first."""
    confirm_looks: int = Field(default=5, ge=1)
    """Looks (log lines) in a row that must show collapse."""
    min_teacher_entropy: float = Field(default=0.1, ge=0, le=1)
    """Entropy of the teacher's mean answer over ln K; 0.7–1 is healthy, below this is collapse."""
    min_effective_rank: float = Field(default=2.0, ge=0)
    """Effective rank of the CLS features; below this is collapse."""
    warn_effective_rank: float = Field(default=10.0, ge=0)
    """Below this there is a warning; 50 and more is healthy in large batches."""
    rank_share: float = Field(default=0.25, ge=0, le=1)
    """Both thresholds of rank are at most this part of the largest rank that the batch can show (images − 1)."""
    max_mean_cosine: float = Field(default=0.995, gt=0, le=1)
    """Mean cosine between CLS features of different crops; from this on it is collapse."""
    min_view_margin: float = Field(default=0.1, ge=-1, le=1)
    """How much more alike (centred cosine) two crops of one image are than crops of different images; below
    this, with a CLS loss that is no better than ln K, the features have forgotten the image: collapse. 0.3–0.6
    is healthy, 0 is a data set of one image."""
    ln_k_tolerance: float = Field(default=1e-4, ge=0)
    """A CLS loss within this part of ln K in each of the looks says that the output is uniform: collapse."""
    warn_gram_distance: float = Field(default=0.02, ge=0)
    """Mean squared change of the cosines between patches of an image since the start; above this there is a
    warning. It never stops a run: the probe says whether a change did harm."""
    probe_drop: float = Field(default=0.05, ge=0)
    """A probe this far below the best one, and by two standard errors, is a drop."""
    probe_patience: int = Field(default=3, ge=1)
    """Probes in a row that must show the drop, of the target or of one and the same thing that is watched."""
    watch_drop: float = Field(default=0.05, ge=0)
    """Anything watched (`probe.watch`) this far below its own best score, and by `watch_errors` standard errors of
    its difference to the start, is a drop."""
    kept_drop: float = Field(default=0.2, ge=0)
    """The same for what is kept of the start (`kept_slices`, `kept_patches`). Learning changes features, so only the
    loss of a fifth of what the start told linearly is a drop. 1 and more: how far a run goes from its start is
    logged, and stops nothing."""
    watch_errors: float = Field(default=3.0, ge=0)
    """More than the two of the target, because many things are watched: three leave each one chance in 700."""
    on_failure: Literal["stop", "roll_back"] = "stop"
    """What a confirmed drop or collapse leads to: the end of the run, or the checkpoint of the best probe
    once more, with a lower learning rate."""
    max_rollbacks: int = Field(default=2, ge=1)
    """Times that a run may be rolled back; the next failure stops it."""
    rollback_lr_factor: float = Field(default=0.3, gt=0, lt=1)
    """What all learning rates are multiplied by at each rollback."""
    export: Literal["best", "last"] = "best"
    """"best" exports an earlier teacher where its probe beat the last one's by a drop; "last" never does."""


@dataclass
class RetentionState:
    """What the guard remembers of one thing that is watched."""

    first_score: float
    best_score: float
    best_step: int
    last_score: float
    last_margin: float
    """How far below the best score a drop begins, at the last probe."""
    dropped_probes: int = 0

    def is_dropped(self) -> bool:
        """Whether the last score was a drop."""
        # A score that is not a number is below every score.
        return not self.last_score >= self.best_score - self.last_margin


def read_retention_scores(line: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """What is watched, in a line of the log: name → score and standard error."""
    names = [key.removeprefix("watch/") for key in line if key.startswith("watch/")]
    return {name: (line[f"watch/{name}"], line[f"watch_error/{name}"]) for name in names}


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
    failed: bool = False
    """Whether the guard ended the run."""
    watched: dict[str, RetentionState] = field(default_factory=dict)
    """What is watched beside the target, by name."""


@dataclass
class Guard:
    """Looks at log lines and probe scores. All ranks look at the same numbers, so all stop together.

    Args:
        from_scratch: the run began with new weights. What random features score is nothing to be kept, and
            early training often scores less: until `grace_steps` are over, each probe counts as the best.
    """

    recipe: GuardRecipe
    state: GuardState = field(default_factory=GuardState)
    from_scratch: bool = False
    _warned: set[str] = field(default_factory=set, init=False, repr=False)

    @property
    def may_roll_back(self) -> bool:
        """Whether a failure may lead back to a kept checkpoint."""
        return self.recipe.enabled and self.recipe.on_failure == "roll_back"

    def collapse_symptoms(self, line: Mapping[str, Any]) -> list[str]:
        """What in a log line says collapse, in words."""
        recipe = self.recipe
        found = []
        if math.isnan(line.get("effective_rank", 0.0)):
            return ["they are not finite"]
        entropy, rank, cosine = (line.get(name) for name in ("teacher_entropy", "effective_rank", "mean_cosine"))
        if entropy is not None and not entropy >= recipe.min_teacher_entropy:
            found.append(f"teacher entropy {entropy:.3g} of ln K, below {recipe.min_teacher_entropy:g}")
        lowest_rank = self._rank_threshold(recipe.min_effective_rank, line)
        if rank is not None and not rank >= lowest_rank:
            found.append(f"effective rank {rank:.3g}, below {lowest_rank:.3g}")
        several_images = line.get("highest_rank", math.inf) > 0  # of one image, crops are to be alike
        if cosine is not None and several_images and not cosine < recipe.max_mean_cosine:
            found.append(f"mean cosine {cosine:.4f}, from {recipe.max_mean_cosine:g} on")
        return found + self._uninformative_outputs(line)

    def _rank_threshold(self, threshold: float, line: Mapping[str, Any]) -> float:
        return min(threshold, self.recipe.rank_share * line.get("highest_rank", math.inf))

    def _uninformative_outputs(self, line: Mapping[str, Any]) -> list[str]:
        """What says that answers do not depend on the image; the CLS loss is a mean over pairs of crops."""
        recipe, loss, ln_k, margin = self.recipe, *(line.get(k) for k in ("loss_dino", "ln_k", "view_margin"))
        if loss is None or ln_k is None:
            return []
        found = []
        if abs(loss - ln_k) <= recipe.ln_k_tolerance * ln_k:
            found.append(f"CLS loss {loss:.4f} equals ln K ({ln_k:.4f})")
        # The margin alone proves nothing: crops that show different contrasts may be unlike and yet be learnt.
        lowest = min(recipe.min_view_margin, MARGIN_PER_IMAGE * (line.get("highest_rank", math.inf) + 1))
        if margin is not None and margin < lowest and not loss < UNINFORMATIVE_LOSS_RATIO * ln_k:
            found.append(
                f"crops of one image are no more alike than those of others (view margin {margin:.2f}, below"
                f" {lowest:.2g}), and the CLS loss {loss:.4f} is no better than ln K ({ln_k:.4f})"
            )
        return found

    def warnings(self, line: Mapping[str, Any]) -> list[str]:
        """Signs that are not yet a reason to stop; each kind is told once."""
        found = {}
        step = line.get("step", 0)
        rank, distance = line.get("effective_rank"), line.get("gram_distance")
        soft = self._rank_threshold(self.recipe.warn_effective_rank, line)
        if rank is not None and rank < soft and step > self.recipe.grace_steps:
            found["rank"] = f"effective rank {rank:.3g}, below {soft:.3g}"
        if distance is not None and distance > self.recipe.warn_gram_distance:
            found["gram"] = f"Gram distance {distance:.3g} to the start, above {self.recipe.warn_gram_distance:g}"
        chance = line.get("probe_chance") if self.state.first_score is None else None
        if chance is not None and not line["probe"] - chance > self._drop_margin(line["probe_standard_error"]):
            found["blind"] = (
                f"the probe of {line['probe_target']} is not clearly above chance"
                f" ({line['probe']:.3f}, chance {chance:.3f}): it cannot see a drop; another probe.target may"
            )
        new = [f"step {step}: {text}" for kind, text in found.items() if kind not in self._warned]
        self._warned |= found.keys()
        return new

    def on_log_line(self, step: int, line: Mapping[str, Any]) -> None:
        """Look at a log line.

        Raises:
            RollBack: if collapse has shown in `confirm_looks` lines in a row, and the run may go back.
            TrainingError: likewise, if it may not.
        """
        collapse_symptoms = self.collapse_symptoms(line)
        # Features that are not finite never come back, so they need no grace.
        counts = step > self.recipe.grace_steps or math.isnan(line.get("effective_rank", 0.0))
        self.state.collapsed_looks = self.state.collapsed_looks + 1 if collapse_symptoms and counts else 0
        if self.state.collapsed_looks >= self.recipe.confirm_looks:
            what = f"the features collapsed: {'; '.join(collapse_symptoms)}, in {self.state.collapsed_looks} log lines in a row"
            self.handle_failure(step, what, "Lower optim.lr or lengthen schedule.head_warmup_steps")

    def is_best(self, step: int, score: float, watched: Mapping[str, tuple[float, float]] | None = None) -> bool:
        """Whether a teacher would be the best so far: by the target's score, where nothing watched is a drop."""
        best = self.state.best_score
        if not math.isfinite(score) or any(
            one.is_dropped() for one in self._updated_retention(step, watched or {}).values()
        ):
            return False
        return best is None or self._in_grace_period(step) or score > best

    def record_probe(
        self,
        step: int,
        score: float,
        standard_error: float,
        watched: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        """Take note of a probe's score; one that is not a number is a drop from any other.

        Args:
            watched: name → score and standard error of what is watched beside the target.

        Raises:
            RollBack: if the target, or one thing that is watched, was below its best by a drop in
                `probe_patience` probes in a row, and the run may go back.
            TrainingError: likewise, if it may not.
        """
        state = self.state
        is_best = self.is_best(step, score, watched)
        state.watched |= self._updated_retention(step, watched or {})
        state.last_score, state.last_step = score, step
        state.last_margin = self._drop_margin(standard_error)
        if state.first_score is None:
            state.first_score = score
        if is_best:
            state.best_score, state.best_step = score, step
            if self.may_roll_back:
                state.kept_step = step
        state.dropped_probes = state.dropped_probes + 1 if self._target_dropped() else 0
        patience = self.recipe.probe_patience
        found = []
        if state.dropped_probes >= patience:
            found.append(f"the probe fell from {state.best_score:.3f} (step {state.best_step}) to {score:.3f}")
        found += [
            f"{name} fell from {one.best_score:.3f} (step {one.best_step}) to {one.last_score:.3f}"
            for name, one in state.watched.items()
            if one.dropped_probes >= patience
        ]
        if found:
            longest = max([state.dropped_probes, *(one.dropped_probes for one in state.watched.values())])
            self.handle_failure(step, f"{', '.join(found)} and stayed down for {longest} probes", "Lower optim.lr")

    def _in_grace_period(self, step: int) -> bool:
        return self.from_scratch and step <= self.recipe.grace_steps

    def _updated_retention(self, step: int, watched: Mapping[str, tuple[float, float]]) -> dict[str, RetentionState]:
        """What would be remembered of each thing that is watched; nothing changes yet."""
        if self.from_scratch:
            # What random features tell is nothing to be kept: learning may well cost it.
            return {}
        after = {}
        for name, (score, error) in watched.items():
            least = self.recipe.kept_drop if name in START_FEATURE_SCORES else self.recipe.watch_drop
            margin = max(least, self.recipe.watch_errors * error)
            before = self.state.watched.get(name)
            if before is None:
                after[name] = RetentionState(score, score, step, score, margin)
                continue
            one = replace(before, last_score=score, last_margin=margin)
            if score > one.best_score or math.isnan(one.best_score):
                one.best_score, one.best_step = score, step
            one.dropped_probes = before.dropped_probes + 1 if one.is_dropped() else 0
            after[name] = one
        return after

    def _drop_margin(self, standard_error: float) -> float:
        return max(self.recipe.probe_drop, 2 * standard_error)

    def _target_dropped(self) -> bool:
        state = self.state
        if state.best_score is None or state.last_score is None:
            return False
        # A score that is not a number is below every score.
        return not state.last_score >= state.best_score - state.last_margin

    def _any_dropped(self) -> bool:
        return self._target_dropped() or any(one.is_dropped() for one in self.state.watched.values())

    def handle_failure(self, step: int, what: str, remedy: str | None) -> None:
        """Act on a failure that is confirmed; nothing where the guard is disabled.

        Raises:
            RollBack: if the run may go back.
            TrainingError: if it may not.
        """
        recipe, state = self.recipe, self.state
        if not recipe.enabled:
            return
        remedy = remedy or "Lower optim.lr"
        if self.may_roll_back and state.kept_step is not None and state.rollbacks < recipe.max_rollbacks:
            raise RollbackRequested(what, step=state.kept_step, where=f"step {step}", remedy=remedy)
        if state.rollbacks:
            what += f", after {state.rollbacks} rollback{'s' if state.rollbacks > 1 else ''}"
        elif self.may_roll_back:
            what += ", and no probe has named a step to go back to"
        self.stop(step, what, remedy)

    def stop(self, step: int, what: str, remedy: str) -> None:
        """End the run, and have the best teacher exported.

        Raises:
            TrainingError: always.
        """
        state = self.state
        state.failed = True
        exported = "the last teacher" if not self.should_export_best() else f"the teacher of step {state.best_step}"
        raise TrainingError(what, where=f"step {step}", remedy=f"{remedy}; export/ holds {exported}")

    def should_keep_checkpoint(self, step: int) -> bool:
        """Whether a rollback would go back to this step: its checkpoint is to be kept."""
        return self.state.kept_step == step

    def on_rollback(self) -> dict[str, Any]:
        """Be as at the kept step again, but for a lower learning rate; gives what the log is to say of it."""
        state = self.state
        state.rollbacks += 1
        state.lr_scale *= self.recipe.rollback_lr_factor
        state.collapsed_looks = state.dropped_probes = 0
        # Only the best probe's step is kept.
        state.last_score, state.last_step = state.best_score, state.best_step
        for one in state.watched.values():
            # At the kept step nothing was a drop.
            one.last_score, one.dropped_probes = one.best_score, 0
        return {"rollbacks": state.rollbacks, "lr_scale": state.lr_scale}

    def should_export_best(self) -> bool:
        """Whether the teacher of the best probe is to be exported.

        It is, where the last probe was a drop of the target or of anything watched, or where the run failed: a
        collapse may have come after the last probe. The best is the one that the target's probe liked best among
        those at which nothing watched was a drop.
        """
        state = self.state
        return self.recipe.export == "best" and (self._any_dropped() or (state.failed and state.best_step is not None))

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = GuardState(**{**state, "watched": {}})
        # A checkpoint of an earlier version watched nothing.
        self.state.watched = {name: RetentionState(**one) for name, one in state.get("watched", {}).items()}
