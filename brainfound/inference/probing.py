"""Linear probes of frozen embeddings: a label, the site, and test-retest reliability.

Axis legend: N sessions, D width.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainfound.data.splits.dividing import label_text
from brainfound.data.store import Store
from brainfound.data.store.store import restrict_contrasts
from brainfound.errors import TrainingError, UsageError
from brainfound.finetuning.embedding_cache import EmbeddingCache
from brainfound.inference.evaluation import require_same_preprocessing
from brainfound.inference.loading import load
from brainfound.metrics.embedding_probes import SiteProbe, TestRetest, site_probe, test_retest, validate_probe_columns
from brainfound.models.infer import unwrap_peft


@dataclass(frozen=True)
class ProbedEmbeddings:
    """Probe scores of label and site, and test-retest reliability.

    Attributes:
        label, site: the probed columns.
        probed: scores of label and site; None without a label.
        retest: None where fewer than two subjects have two sessions.
        num_probed: sessions with a label and a site, the basis of `probed`.
        num_sessions: sessions of the store, the basis of `retest`.
    """

    label: str | None
    site: str
    probed: SiteProbe | None
    retest: TestRetest | None
    num_probed: int
    num_sessions: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the median ICC in place of one per dimension."""
        content: dict[str, Any] = {"label": self.label, "site": self.site, "num_sessions": self.num_sessions}
        if self.probed is not None:
            content |= {"num_probed": self.num_probed, "probed": _nan_as_none(asdict(self.probed))}
        if self.retest is not None:
            content["retest"] = _nan_as_none({k: value for k, value in asdict(self.retest).items() if k != "icc"})
        return content


def _nan_as_none(content: dict[str, Any]) -> dict[str, Any]:
    plain = {name: _nan_as_none(value) if isinstance(value, dict) else value for name, value in content.items()}
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in plain.items()}


def probe(
    model: str | Path,
    data: str | Path | Store,
    label: str | None = None,
    *,
    site: str = "site",
    num_slices: int = 32,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ProbedEmbeddings:
    """Probe frozen embeddings; a session's embedding is the mean over its slices.

    Args:
        model: an encoder, or a fine-tuned classification or regression model, whose encoder is probed.
        data: a store, prepared like the training data.
        label: a column of the store; None: only test-retest.
        site: the column of the site or scanner.
        num_slices: evenly spaced slices of each session.
        seed: seed of folds and bootstrap.
        cache: a folder for the embeddings, so that further probes take seconds; None: a temporary one.

    Raises:
        UsageError: no such column, too few sites, classes or subjects, or nothing to probe.
        ModelError: there is no such model. TrainingError: non-finite embeddings.
    """
    store = data if isinstance(data, Store) else Store.open(data)
    predictor = load(model).as_encoder()
    require_same_preprocessing(predictor, store)
    store = restrict_contrasts(store, predictor.input_contrasts)
    sessions = np.flatnonzero(store.present.any(axis=1))
    subjects = store.sessions["subject"].to_numpy()
    names = store.sessions["session"].to_numpy()
    known = sessions
    if label is not None:
        columns = [store.covariate(name).to_numpy() for name in (label, site)]
        known = np.array([i for i in sessions if all(label_text(column[i]) != "missing" for column in columns)], int)
        if not len(known):
            raise UsageError("no session has a label and a site", where=f"columns {label}, {site}")
        labels, sites = (column[known] for column in columns)
        validate_probe_columns(sites, labels, subjects[known])  # before any embedding
    twice = {
        subject for subject in set(subjects[sessions]) if len(set(names[sessions][subjects[sessions] == subject])) > 1
    }
    if label is None and len(twice) < 2:
        raise UsageError(
            "there is nothing to ask: no label, and fewer than two subjects with two sessions",
            where=f"store {store.path.name}",
            got=f"{len(twice)} such subjects",
            remedy="Give --label COLUMN",
        )
    with ExitStack() as stack:
        folder = cache if cache is not None else stack.enter_context(tempfile.TemporaryDirectory())
        encoder = unwrap_peft(predictor.model)
        embedding_cache = EmbeddingCache(getattr(encoder, "brainfound", encoder), store, folder, num_slices)
        embedding_cache.ensure_embedded(sessions.tolist(), progress)
        embeddings = dict(zip(sessions.tolist(), embedding_cache.mean_embeddings(sessions.tolist()), strict=True))
    if not np.isfinite(list(embeddings.values())).all():
        raise TrainingError("the model gives embeddings that are not finite", where=model, remedy="Give another model")

    def rows(indices: np.ndarray) -> np.ndarray:
        return np.stack([embeddings[int(i)] for i in indices]).astype(np.float64)

    probed = None
    if label is not None:
        probed = site_probe(rows(known), sites, labels, subjects[known], seed)
    retest = test_retest(rows(sessions), subjects[sessions], names[sessions]) if len(twice) > 1 else None
    return ProbedEmbeddings(label, site, probed, retest, len(known), len(sessions))
