"""Age by ridge regression on volumes of brain regions, and without any image: baselines for a model.

Axes: N sessions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

INSIDE_THE_SKULL = range(1, 8)
"""Codes of the tissue segmentation of simulated heads (`brainfound.phantom`): fluid and brain."""


def regional_shares(store: Any, cohort: Path) -> np.ndarray:
    """(N, regions): the volume of every region of the masks, as a share of all regions of the session."""
    import nibabel as nib
    import pandas as pd

    table = pd.read_csv(cohort / "manifest.tsv", sep="\t", dtype={"subject": str})
    masks = dict(zip(table["subject"], table["mask"], strict=True))
    counts = []
    for subject in store.sessions["subject"]:
        codes = np.asarray(nib.load(cohort / masks[str(subject)]).dataobj).round().astype(int)
        counts.append(np.bincount(codes.ravel(), minlength=256)[1:256].astype(float))
    volumes = np.stack(counts)
    return volumes[:, volumes.any(axis=0)] / volumes.sum(axis=1, keepdims=True)


def measured_shares(store: Any, segmenter: Path) -> np.ndarray:
    """(N, tissues): the same of what a segmentation finds in the scans; no mask of these brains is read.

    Args:
        store: on the grid of the segmentation.
        segmenter: a fine-tuning run on the tissues of simulated heads.
    """
    import torch

    import brainfound
    from brainfound.errors import UsageError
    from brainfound.models.stack_prediction import infer

    predictor = brainfound.load(segmenter)
    expected = tuple(range(max(INSIDE_THE_SKULL) + 1))
    if predictor.preprocessing != store.preprocessing or predictor.target.codes[: len(expected)] != expected:
        raise UsageError(
            "no segmentation of simulated tissue on the grid of these scans",
            where="--segmenter",
            remedy="Make it as docs/reference/results.md says",
        )
    torch.set_num_threads(1)
    classes = (infer(predictor.model, store[session]).classes for session in range(len(store)))
    volumes = np.stack([np.bincount(of.ravel(), minlength=256)[list(INSIDE_THE_SKULL)] for of in classes]).astype(float)
    return volumes / volumes.sum(axis=1, keepdims=True)


def regional_ridge(store: Any, shares: np.ndarray, parts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Ridge regression of age on the regions' volumes, its penalty by leave-one-out within the training part."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    ages = store.covariate("age_years").to_numpy(dtype=float)
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 5, 25)))
    model.fit(shares[parts["train"]], ages[parts["train"]])
    error = np.abs(model.predict(shares[parts["test"]]) - ages[parts["test"]])
    return {"rows": parts["test"].tolist(), "age": error.tolist()}


def mean_age(store: Any, parts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The mean age of the training part, for everybody."""
    ages = store.covariate("age_years").to_numpy(dtype=float)
    error = np.abs(ages[parts["test"]] - ages[parts["train"]].mean())
    return {"rows": parts["test"].tolist(), "age": error.tolist()}
