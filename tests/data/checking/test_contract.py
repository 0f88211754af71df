"""The input contract: what a store's scans were like, and its file."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from brainfound.data.checking.contract import FILE_NAME, InputContract
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.errors import ModelError, RecipeError


def _store(skulls=("stripped",) * 4, minima=(0.0,) * 4):
    """Four sessions of one T1w each; the first has a FLAIR of 4 mm slices as well."""
    preprocessing = Preprocessing(contrasts=("T1w", "T2w", "FLAIR"), spacing_mm=(1, 1, None), size=(64, 48))
    preprocessing = preprocessing.model_copy(update={"hooks": ("synthstrip",)})
    subjects = ["a", "b", "c", "c"]
    sessions = ["1", "1", "1", "2"]
    table = pd.DataFrame(
        {
            "subject": subjects,
            "session": sessions,
            "num_slices": [100, 110, 120, 130],
            "age_years": [20, None, 40, 71.5],
        }
    )
    quality = pd.DataFrame(
        {
            "subject": subjects,
            "session": sessions,
            "contrast": "T1w",
            "spacing_mm": ["1x1x1", "1x1.2x0.9", "1x1x1", "1x1x1.5"],
            "skull": list(skulls),
            "foreground_ml": [1200.0, 1300.0, 1400.0, 1500.0],
            "minimum": list(minima),
        }
    )
    flair = quality.iloc[[0]].assign(contrast="FLAIR", spacing_mm="0.5x0.5x4", foreground_ml=1100.0)
    store = SimpleNamespace(
        preprocessing=preprocessing,
        contrasts=preprocessing.contrasts,
        shown=preprocessing.contrasts,
        sessions=table,
        present=np.zeros((4, 3), dtype=bool),
        quality=pd.concat([quality, flair], ignore_index=True),
    )
    return type("Fake", (), {**vars(store), "__len__": lambda self: 4})()


def test_ranges_are_those_of_the_store():
    contract = InputContract.of(_store())
    assert contract.contrasts == ("T1w", "T2w", "FLAIR")
    assert contract.spacing_mm == (1, 1, None)
    assert contract.size == (64, 48)
    assert contract.hooks == ("synthstrip",)
    assert contract.num_sessions == 4
    assert contract.coarsest_mm == {"T1w": 1.5, "FLAIR": 4.0}
    assert contract.age_years == (20.0, 71.5)
    assert contract.num_slices == (100, 130)
    assert contract.foreground_ml == (1100.0, 1500.0)
    assert contract.negative_values is False
    assert contract.is_measured


def test_only_the_sessions_that_are_learnt_from_count():
    contract = InputContract.of(_store(minima=(0, -3, 0, 0)), [2])
    assert contract.num_sessions == 1
    assert contract.coarsest_mm == {"T1w": 1.0}
    assert contract.age_years == (40.0, 40.0)
    assert contract.num_slices == (120, 120)
    assert contract.foreground_ml == (1400.0, 1400.0)
    assert contract.negative_values is False
    assert InputContract.of(_store(minima=(0, -3, 0, 0)), [1]).negative_values is True
    assert InputContract.of(_store(), [1]).age_years is None


def test_what_training_always_showed_is_known_where_nothing_was_withheld(small_store):
    assert InputContract.of(small_store).never_absent == ()
    everywhere = [
        name for name, here in zip(small_store.contrasts, small_store.present.all(axis=0), strict=True) if here
    ]
    assert everywhere, "else nothing is tested"
    assert InputContract.of(small_store, withheld_in_training=False).never_absent == tuple(everywhere)


@pytest.mark.parametrize(
    ("skulls", "state"),
    [
        (["stripped"] * 4, "stripped"),
        (["head"] * 3 + ["unclear"], "head"),
        (["head", "head", "stripped", "stripped"], "mixed"),
        (["head", "stripped", "stripped", "stripped"], "mixed"),
        (["unclear"] * 4, "unknown"),
        (["unclear", "unclear", "unclear", "head"], "unknown"),
    ],
)
def test_the_skull_state_is_what_most_scans_show(skulls, state):
    store = _store(skulls=skulls)
    store.quality = store.quality[store.quality["contrast"] == "T1w"]
    assert InputContract.of(store).skull == {"T1w": state}


def test_a_rare_exception_is_no_mixture():
    store = _store()
    store.quality = pd.concat([store.quality] * 10, ignore_index=True)
    store.quality.loc[0, "skull"] = "head"
    assert InputContract.of(store).skull == {"T1w": "stripped", "FLAIR": "stripped"}


def test_each_contrast_has_a_skull_state_of_its_own():
    store = _store()
    store.quality.loc[store.quality["contrast"] == "FLAIR", "skull"] = "head"
    assert InputContract.of(store).skull == {"T1w": "stripped", "FLAIR": "head"}


def test_nothing_about_a_single_subject_is_kept():
    text = InputContract.of(_store()).model_dump_json()
    assert "subject" not in text
    assert '"a"' not in text


def test_it_is_saved_and_loaded(tmp_path):
    contract = InputContract.of(_store())
    assert contract.save(tmp_path).name == FILE_NAME
    assert InputContract.load(tmp_path) == contract == InputContract.load_or_none(tmp_path)


def test_a_missing_or_broken_file(tmp_path):
    assert InputContract.load_or_none(tmp_path) is None
    with pytest.raises(ModelError, match=r"input_contract\.json is missing"):
        InputContract.load(tmp_path)
    (tmp_path / FILE_NAME).write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        InputContract.load_or_none(tmp_path)
    (tmp_path / FILE_NAME).write_text('{"contrasts": ["T1w"], "spacing_mm": [1, 1, 1], "size": [8, 8], "skul": "head"}')
    with pytest.raises(RecipeError, match="Did you mean skull"):
        InputContract.load(tmp_path)


def test_a_model_without_a_contract_says_what_its_preprocessing_says():
    contract = InputContract.from_preprocessing(Preprocessing(contrasts=("T1w",), size=(96, 96)))
    assert not contract.is_measured
    assert (contract.contrasts, contract.size, contract.skull) == (("T1w",), (96, 96), {})
    assert contract.age_years is contract.num_slices is contract.foreground_ml is contract.negative_values is None
