"""Linear probes of frozen embeddings: a label, the site, and test-retest reliability.

Axis legend: N sessions, D width.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainfound.data.splits.dividing import label_text
from brainfound.data.store import Store
from brainfound.data.store.store import restrict_contrasts
from brainfound.errors import TrainingError, UsageError
from brainfound.files import nan_as_none
from brainfound.finetuning.embedding_cache import EmbeddingCache
from brainfound.inference.evaluation import require_same_preprocessing
from brainfound.inference.loading import load_encoder
from brainfound.inference.predictor import Predictor
from brainfound.metrics.embedding_probes import SiteProbe, TestRetest, site_probe, test_retest, validate_probe_columns
from brainfound.models.stack_prediction import unwrap_peft

DEFAULT_SITE = "site"
NEW_WEIGHTS = "new weights"
"""The name of the floor: the first model with new weights."""


@dataclass(frozen=True)
class ProbedEmbeddings:
    """Probe scores of label and site, and test-retest reliability.

    Attributes:
        label, site: the columns.
        probed: scores of label and site; None where neither was probed.
        retest: None where fewer than two subjects have two sessions.
        num_probed: sessions with a value in each probed column, the basis of `probed`.
        num_sessions: sessions of the store, the basis of `retest`.
        notes: why a column was left out.
    """

    label: str | None
    site: str
    probed: SiteProbe | None
    retest: TestRetest | None
    num_probed: int
    num_sessions: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the median ICC in place of one per dimension."""
        content: dict[str, Any] = {"label": self.label, "site": self.site, "num_sessions": self.num_sessions}
        if self.probed is not None:
            content |= {"num_probed": self.num_probed, "probed": nan_as_none(asdict(self.probed))}
        if self.retest is not None:
            content["retest"] = nan_as_none({k: value for k, value in asdict(self.retest).items() if k != "icc"})
        if self.notes:
            content["notes"] = list(self.notes)
        return content


@dataclass(frozen=True)
class _Plan:
    """What can be probed; the columns hold one value per entry of ``rows``, and are None if they are left out."""

    sessions: np.ndarray
    rows: np.ndarray
    label: Any = None
    site: Any = None
    has_retest: bool = False
    notes: tuple[str, ...] = ()


def probe(
    model: str | Path,
    data: str | Path | Store,
    label: str | None = None,
    *,
    site: str = DEFAULT_SITE,
    num_slices: int = 32,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> ProbedEmbeddings:
    """Probe frozen embeddings; a session's embedding is the mean over its slices.

    A column with a single class, or with a class of a single subject, is left out with a note.

    Args:
        model: an encoder, a plain ViT (a Hub id or a folder, with the preprocessing of the store), or a fine-tuned
            classification or regression model, whose encoder is probed.
        data: a store, prepared like the training data.
        label: a column of the store; None: only test-retest.
        site: the column of the site or scanner.
        num_slices: evenly spaced slices of each session.
        seed: seed of folds and bootstrap.
        cache: a folder for the embeddings, so that further probes take seconds; None: a temporary one.
        notify: receives each note before anything is embedded.

    Raises:
        UsageError: no such column, or nothing can be probed.
        ModelError: there is no such model. TrainingError: non-finite embeddings.
    """
    options: dict[str, Any] = {"site": site, "num_slices": num_slices, "seed": seed, "cache": cache}
    return probe_models([model], data, label, **options, progress=progress, notify=notify)[str(model)]


def probe_models(
    models: Sequence[str | Path],
    data: str | Path | Store,
    label: str | None = None,
    *,
    site: str = DEFAULT_SITE,
    num_slices: int = 32,
    seed: int = 0,
    cache: str | Path | None = None,
    floor: bool = False,
    progress: Callable[[int, int], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> dict[str, ProbedEmbeddings]:
    """Probe several models on the same sessions and folds; see `probe`. All are read before anything is embedded.

    Args:
        floor: also probe the first model with new weights, as `NEW_WEIGHTS`: what the architecture gives by itself.
    """
    store = data if isinstance(data, Store) else Store.open(data)
    notify = notify or (lambda note: None)
    first = _plan(store, label, site)  # before the model is read
    for note in first.notes:
        notify(note)
    encoders: dict[str, tuple[Any, Store, _Plan]] = {}
    for model in dict.fromkeys(map(str, models)):
        predictor = load_encoder(model, store.preprocessing)
        require_same_preprocessing(predictor, store)
        own = restrict_contrasts(store, predictor.input_contrasts)
        plan = _plan(own, label, site)
        for note in plan.notes:
            if note not in first.notes:  # another reason, among the sessions with a contrast of the model
                notify(note)
        encoders[model] = _encoder(predictor), own, plan
    if floor:
        encoder, own, plan = next(iter(encoders.values()))
        encoders[NEW_WEIGHTS] = _with_new_weights(encoder, seed), own, plan
    return {
        name: _probe_encoder(name, encoder, own, plan, label, site, num_slices, seed, cache, progress)
        for name, (encoder, own, plan) in encoders.items()
    }


def _encoder(predictor: Predictor) -> Any:
    inner = unwrap_peft(predictor.model)
    return getattr(inner, "brainfound", inner)


def _with_new_weights(encoder: Any, seed: int) -> Any:
    device = next(encoder.parameters()).device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return type(encoder)(copy.deepcopy(encoder.config)).to(device).eval()


def _probe_encoder(
    name: str,
    encoder: Any,
    store: Store,
    plan: _Plan,
    label: str | None,
    site: str,
    num_slices: int,
    seed: int,
    cache: str | Path | None,
    progress: Callable[[int, int], None] | None,
) -> ProbedEmbeddings:
    """Embed the sessions of a plan and probe them."""
    sessions = plan.sessions.tolist()
    with ExitStack() as stack:
        folder = cache if cache is not None else stack.enter_context(tempfile.TemporaryDirectory())
        embedding_cache = EmbeddingCache(encoder, store, folder, num_slices)
        embedding_cache.ensure_embedded(sessions, progress)
        embeddings = dict(zip(sessions, embedding_cache.mean_embeddings(sessions), strict=True))
    if not np.isfinite(list(embeddings.values())).all():
        raise TrainingError("the model gives embeddings that are not finite", where=name, remedy="Give another model")

    def rows(indices: np.ndarray) -> np.ndarray:
        return np.stack([embeddings[int(i)] for i in indices]).astype(np.float64)

    subjects, names = (store.sessions[column].to_numpy() for column in ("subject", "session"))
    probed = None
    if plan.label is not None or plan.site is not None:
        probed = site_probe(rows(plan.rows), plan.site, plan.label, subjects[plan.rows], seed)
    retest = None
    if plan.has_retest:
        retest = test_retest(rows(plan.sessions), subjects[plan.sessions], names[plan.sessions])
    return ProbedEmbeddings(label, site, probed, retest, len(plan.rows), len(sessions), plan.notes)


def _plan(store: Store, label: str | None, site: str) -> _Plan:
    """Find out what can be probed, without any embedding; UsageError if nothing can."""
    sessions = np.flatnonzero(store.present.any(axis=1))
    table = store.sessions.iloc[sessions]
    num_visits = table.groupby("subject")["session"].nunique()
    num_twice = int((num_visits > 1).sum())
    plan = _Plan(sessions, np.array([], dtype=int), has_retest=num_twice > 1)
    if label is None:
        if plan.has_retest:
            return plan
        what = "there is nothing to probe: no label, and fewer than two subjects with two sessions"
        got, remedy = f"{num_twice} such subjects", "Give --label COLUMN"
        raise UsageError(what, where=f"store {store.path.name}", got=got, remedy=remedy)
    labels = store.covariate(label).to_numpy()
    # A store of one site may have no column of sites; another name was chosen by the user, and may be misspelt.
    has_sites = site != DEFAULT_SITE or site in store.covariates
    sites = store.covariate(site).to_numpy() if has_sites else np.full(len(store), None)
    subjects = store.sessions["subject"].to_numpy()

    def attempt(with_label: bool, with_site: bool) -> _Plan | str:
        """The plan for these columns, or the reason why they cannot be probed."""
        used = [column for column, wanted in ((labels, with_label), (sites, with_site)) if wanted]
        rows = np.array([i for i in sessions if all(label_text(column[i]) != "missing" for column in used)], dtype=int)
        if not len(rows):
            return "no session has a label and a site" if len(used) > 1 else "no session has a value"
        own_labels, own_sites = labels[rows] if with_label else None, sites[rows] if with_site else None
        try:
            validate_probe_columns(own_sites, own_labels, subjects[rows])
        except UsageError as error:
            return error.fault
        return replace(plan, rows=rows, label=own_labels, site=own_sites)

    alone = {label: attempt(True, False), site: attempt(False, True)}
    reasons = {name: found for name, found in alone.items() if isinstance(found, str)}
    if not reasons:
        both = attempt(True, True)
        if isinstance(both, _Plan):
            return both
        # Each can be probed alone, but not over the same sessions.
        reasons = {site: f"among the sessions with {label} and {site}, {both}"}
    notes = tuple(f"{name} is not probed: {reason}" for name, reason in reasons.items())
    kept = next((alone[name] for name in (label, site) if name not in reasons), plan)
    if isinstance(kept, _Plan) and (kept.rows.size or kept.has_retest):
        return replace(kept, notes=notes)
    what, where = "nothing can be probed: " + "; ".join(notes), f"store {store.path.name}"
    raise UsageError(what, where=where, remedy="Give --label a column of numbers, or of classes with two subjects each")
