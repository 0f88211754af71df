"""The step that a fine-tuning run exports: the best on the validation part, from step 0 on.

At step 0 the head is already fitted to the frozen features, so training may only make the model worse. A later step
counts as better if it gains at least a given share of the best score so far; training ends after a number of
evaluations in a row without such a gain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from brainfound.metrics.registry import METRICS, format_score


class BestStep:
    """The best step so far and the weights of a model at that step, kept in main memory.

    Only parameters that are trained and floating-point buffers are kept. All ranks see the same scores.

    Args:
        metric: a metric of `brainfound.metrics.registry`, by which steps are compared.
        patience: evaluations in a row without a gain after which training ends; 0: never.
        min_gain: the smallest gain that counts, as a share of the best score.
    """

    def __init__(self, model: nn.Module, metric: str, patience: int, min_gain: float) -> None:
        self.metric, self.patience, self.min_gain = METRICS[metric], patience, min_gain
        self.scores: dict[int, float] = {}
        self.step: int | None = None
        self._model = model
        self.weights = {name: value.cpu().clone() for name, value in self._trained().items()}

    def add(self, step: int, score: float) -> None:
        """Compare the score of a step; weights of a better one are kept."""
        self.scores[step] = score
        if self.step is None or self.metric.drop(score, self.scores[self.step]) > self._least_gain:
            self.step = step
            for name, value in self._trained().items():
                self.weights[name].copy_(value)

    @property
    def _least_gain(self) -> float:
        assert self.step is not None
        return self.min_gain * abs(self.scores[self.step])

    @property
    def is_finished(self) -> bool:
        """Whether the last `patience` evaluations brought no gain."""
        later = [step for step in self.scores if self.step is not None and step > self.step]
        return 0 < self.patience <= len(later)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights of the best step back into the model; without any score it is left as it is."""
        if self.step is not None:
            for name, value in self._trained().items():
                value.copy_(self.weights[name])

    def describe(self) -> str:
        """One line: the exported step and its score, with those of the first and the last evaluation."""
        if self.step is None:
            return "the last step: there was no validation score to choose by"
        texts = {step: format_score(self.metric.name, score) for step, score in self.scores.items()}
        others = [f"{texts[step]} at step {step}" for step in sorted({min(texts), max(texts)} - {self.step})]
        compared = f" ({', '.join(others)})" if others else ""
        return f"step {self.step} of {max(texts)}: validation {self.metric.name} {texts[self.step]}{compared}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for scores.json and the checkpoint."""
        return {"metric": self.metric.name, "step": self.step, "scores": {str(s): v for s, v in self.scores.items()}}

    def load_dict(self, content: Mapping[str, Any]) -> None:
        """Restore `to_dict`; the weights are restored on their own."""
        self.step, self.scores = content["step"], {int(step): float(v) for step, v in content["scores"].items()}

    @property
    def worsening(self) -> float:
        """How much worse the last score is than the best, as a share of the best; 0 without scores."""
        if self.step is None:
            return 0.0
        best, last = self.scores[self.step], self.scores[max(self.scores)]
        share = self.metric.drop(best, last) / max(abs(best), 1e-12)
        return share if math.isfinite(share) else 0.0

    def _trained(self) -> dict[str, Tensor]:
        parameters = {name: p.detach() for name, p in self._model.named_parameters() if p.requires_grad}
        buffers = {name: b for name, b in self._model.named_buffers() if b.is_floating_point()}
        return parameters | buffers
