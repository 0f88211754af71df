"""A recipe that cannot work with a store is refused before anything is written; what has no effect is said."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.errors import RecipeError, UsageError
from brainfound.models import BrainFoundConfig, BrainFoundModel
from brainfound.pretraining.preflight import run_preflight_checks
from brainfound.pretraining.pretrain import pretrain
from tests.table_store import TableStore

MAE = (
    "objective={kind: masked_autoencoder, decoder: {width: 16, layers: 1, heads: 2}, anchor_gram_weight: 0,"
    " anchor_cls_weight: 0}"
)


def made_up(size=(32, 32), num_slices=4, distance_mm=3.0, several=(), diagnoses=None, num_sessions=12) -> TableStore:
    """Sessions of equally many slices; those in `several` have two contrasts."""
    present = np.zeros((num_sessions, 3), dtype=bool)
    present[:, 0] = True
    present[list(several), 1] = True
    sessions = pd.DataFrame({"subject": [f"s{i}" for i in range(num_sessions)]})
    return TableStore(
        path="STORE",
        preprocessing=Preprocessing(size=size),
        contrasts=("T1w", "T2w", "FLAIR"),
        present=present,
        sessions=sessions if diagnoses is None else sessions.assign(diagnosis=diagnoses),
        slice_sessions=np.repeat(np.arange(num_sessions), num_slices),
        slice_positions_mm=np.tile(np.arange(num_slices) * distance_mm, num_sessions).astype(np.float32),
    )


FOLLOWS = "objective.momentum=[0.0,1.0]"
"""A teacher that keeps nothing of its first weights: without it there would be a note in runs of a few steps."""


def fit(recipe, *overrides, num_processes=1, **store):
    return run_preflight_checks(recipe(FOLLOWS, *overrides), made_up(**store), num_processes)


def test_what_fits_gets_no_note(recipe, store):
    assert run_preflight_checks(recipe(FOLLOWS), store) == []
    assert fit(recipe, "views.neighbour_mm=3") == []
    assert fit(recipe, "views.split_contrasts=0.5", several=range(6)) == []
    assert fit(recipe, "trained={part: lora, rank: 8, blocks: 0}") == []


def test_enlarged_slices_are_reported(recipe):
    notes = fit(recipe, "views.global_size=64", size=(40, 48))
    assert notes == [
        "slices are 40 × 48 pixels, global crops 64 × 64: they are enlarged."
        " Prepare the store with --set 'size=[64,64]', or set views.global_size=40"
    ]


def test_slices_that_cannot_be_cut_into_patches(recipe):
    line = r"STORE: .*got 60 × 36 pixels, expected multiples of the patch size 8.*size=\[56,32\]"
    with pytest.raises(UsageError, match=line):
        fit(recipe, size=(60, 36))
    (note,) = fit(recipe, "probe.every=0", size=(60, 36))
    assert "cannot read them whole" in note


def test_neighbours_out_of_reach(recipe):
    with pytest.raises(RecipeError, match=r"neighbour_mm: no slice.*got 2, expected 3 or more.*neighbour_mm=3$"):
        fit(recipe, "views.neighbour_mm=2")
    with pytest.raises(RecipeError, match=r"views\.neighbour_mm=0$"):
        fit(recipe, "views.neighbour_mm=2", num_slices=1)


def test_few_neighbours_are_counted(recipe):
    store = made_up()
    # In each session the first two slices are near each other; in a third of the sessions only.
    near = np.arange(4) * 10.0
    close = near.copy()
    close[1] = 2.0
    store.slice_positions_mm = np.concatenate([close if i < 4 else near for i in range(12)]).astype(np.float32)
    (note,) = run_preflight_checks(recipe(FOLLOWS, "views.neighbour_mm=3"), store)
    assert note.startswith("views.neighbour_mm=3: 17% of the slices have another one")


def test_contrasts_to_share_out(recipe):
    with pytest.raises(RecipeError, match=r"views\.split_contrasts: no session has two contrasts"):
        fit(recipe, "views.split_contrasts=0.5")
    (note,) = fit(recipe, "views.split_contrasts=0.5", several=range(3))
    assert note.startswith("views.split_contrasts=0.5: 25% of the slices")


def test_a_batch_of_more_than_there_is(recipe):
    (note,) = fit(recipe, "engine.batch_size=480")
    assert note.startswith("engine.batch_size is 480, and there are 48 slices: each is in a batch about 10 times")


def test_a_teacher_that_hardly_follows(recipe):
    (note,) = fit(recipe, "objective.momentum=[0.994,1.0]", "engine.steps=500")
    assert note == (
        "objective.momentum=[0.994,1.0] over 500 steps: 22% of the exported teacher will be the weights that it began"
        " with. Train for longer, or set 'objective.momentum=[0.98,1]'"
    )
    # The backbone stands still while the heads warm up.
    (note,) = fit(recipe, "objective.momentum=[0.99,1.0]", "engine.steps=500", "schedule.head_warmup_steps=100")
    assert "21% of the exported teacher" in note
    assert fit(recipe, "objective.momentum=[0.994,1.0]", "engine.steps=2000") == []
    assert fit(recipe, "objective.momentum=[0.994,1.0]", "engine.steps=0", "probe.every=0") == []


def test_local_crops_larger_than_global_ones(recipe):
    with pytest.raises(RecipeError, match=r"views\.local_size: .*got 40, expected at most views\.global_size=32"):
        fit(recipe, "views.local_size=40")
    assert fit(recipe, "views.local_size=40", "views.num_local=0") == []
    assert not [note for note in fit(recipe, MAE, "views.local_size=40", "views.num_local=8")]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("{blocks: 2}", "trained.part is full: trained.blocks=2 has no effect"),
        ("{roles: [key], alpha: 8}", "trained.part is full: trained.alpha=8, trained.roles=[key] have no effect"),
        ("{part: last_blocks, blocks: 2, rank: 8}", "trained.part is last_blocks: trained.rank=8 has no effect"),
    ],
)
def test_settings_that_the_trained_part_does_not_read(recipe, settings, expected):
    assert fit(recipe, f"trained={settings}") == [expected]


def test_settings_that_one_crop_does_not_read(recipe):
    notes = fit(recipe, MAE, "views={global_size: 32, num_local: 4, neighbour_mm: 1, split_contrasts: 0.5}")
    kind = "objective.kind is masked_autoencoder: "
    assert notes[0] == kind + "views.num_local=4, views.neighbour_mm=1 have no effect"
    assert notes[1].startswith(kind + "views.split_contrasts=0.5 has no second crop")
    assert len(notes) == 2


def test_sharded_weights_have_one_backward_pass(recipe):
    settings = ("engine.parallel=fsdp", "engine.crops=separate")
    assert fit(recipe, *settings) == []
    (note,) = fit(recipe, *settings, num_processes=2)
    assert "packed, not separate" in note


def test_a_target_that_the_store_knows_too_little_of(recipe):
    with pytest.raises(RecipeError) as error:
        fit(recipe, "probe.target=diagnosis", diagnoses=["AD"] * 7 + ["CN"] * 4 + [None])
    assert str(error.value) == (
        "probe.target: a probe of diagnosis needs two classes (got 2 classes, with so many sessions: 7, 4, expected two"
        " with 5 sessions or more). Set probe.target=auto, which takes slice_position in this store"
    )
    with pytest.raises(RecipeError, match=r"no such column \(got diagnosis\)\. Set probe\.target=auto"):
        fit(recipe, "probe.target=diagnosis")
    assert fit(recipe, "probe.target=diagnosis", "probe.every=0") == []
    assert fit(recipe, "probe.target=diagnosis", diagnoses=["AD"] * 7 + ["CN"] * 5) == []


def test_a_start_of_other_contrasts_is_refused_unread(model, recipe, tmp_path):
    config = model.config.to_dict() | {"contrasts": ["T2w", "T1w", "FLAIR"]}
    BrainFoundModel(BrainFoundConfig(**config)).save_pretrained(tmp_path / "start")
    (tmp_path / "start" / "model.safetensors").unlink()  # its configuration is enough
    with pytest.raises(UsageError, match=r"another order \(got T1w, T2w, FLAIR, expected T2w, T1w, FLAIR\)"):
        fit(recipe, f"init.source={tmp_path / 'start'}")


def test_the_patches_of_a_start_are_known_unread(model, recipe, tmp_path):
    model.save_pretrained(tmp_path / "ours")
    model.encoder.backbone.config.save_pretrained(tmp_path / "plain")
    (tmp_path / "ours" / "model.safetensors").unlink()
    for name in ("ours", "plain"):
        with pytest.raises(UsageError, match="patch size 8"):
            fit(recipe, f"init.source={tmp_path / name}", size=(60, 60))


def test_a_run_and_a_dry_run_ask(store, recipe, tmp_path, capsys):
    for dry_run in (False, True):
        with pytest.raises(RecipeError, match=r"views\.neighbour_mm"):
            pretrain(recipe("views.neighbour_mm=1"), store, out=tmp_path / "refused", dry_run=dry_run)
        assert not re.search("loss|learning rate", capsys.readouterr().err)
        pretrain(
            recipe("trained.blocks=2", "engine.steps=1", "probe.every=0"), store, out=tmp_path / "run", dry_run=dry_run
        )
        said = " ".join(capsys.readouterr().err.split())
        assert said.count("trained.part is full: trained.blocks=2 has no effect") == 1
    assert not (tmp_path / "refused").exists()
