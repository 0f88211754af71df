"""Several bundles on one backbone, asked by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from brainfound.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from brainfound.data.cohort import Session
    from brainfound.data.stack import Stack
    from brainfound.predict.prediction import Prediction
    from brainfound.predict.predictor import Predictor


class PredictorSet:
    """Predictors that share the weights of one backbone; each request says which adapter answers.

    Choosing changes no state, so requests may come in any order. ``predictors["age"]`` is a `Predictor` of its own,
    for a cohort for example.

    Args:
        predictors: by name; `brainfound.load` makes them from bundles.
    """

    def __init__(self, predictors: Mapping[str, Predictor]) -> None:
        self._predictors = dict(predictors)

    def __getitem__(self, name: str) -> Predictor:
        if name not in self._predictors:
            raise UsageError(f"no adapter named {name!r}", remedy=did_you_mean(name, self._predictors))
        return self._predictors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._predictors

    def __iter__(self) -> Iterator[str]:
        return iter(self._predictors)

    def __len__(self) -> int:
        return len(self._predictors)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}: {predictor.task}" for name, predictor in self._predictors.items())
        return f"PredictorSet({parts})"

    def predict(self, *paths: str | Path, adapter: str, **contrast_paths: str | Path) -> Prediction:
        """Ask one adapter about one session; paths as for `Predictor.predict`.

        Raises:
            UsageError: there is no such adapter, or what `Predictor.predict` raises.
            ScanError: a scan cannot be used.
        """
        return self[adapter].predict(*paths, **contrast_paths)

    def predict_session(self, session: Session, adapter: str) -> Prediction:
        """Ask one adapter about a session of a cohort, see `Predictor.predict_session`."""
        return self[adapter].predict_session(session)

    def predict_stack(self, stack: Stack, adapter: str) -> Prediction:
        """Ask one adapter about a stack that its preprocessing made."""
        return self[adapter].predict_stack(stack)
