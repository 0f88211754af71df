"""Hooks on the whole road: run when preparing, written down, and asked for again where the model is used."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from brainfound.data.cohort import Cohort, Session
from brainfound.data.hooks import Hook
from brainfound.data.preprocessing.session import prepare_session
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.store.prepare import prepare
from brainfound.errors import UsageError
from brainfound.inference.predictor import Predictor

SETTINGS = Preprocessing(spacing_mm=(4, 4, 4), size=(32, 32))
HALF = """
import sys, nibabel as nib, numpy as np
image = nib.load(sys.argv[1])
data = np.asarray(image.dataobj).astype(np.float32)
if data.max() > 1e6: sys.exit("too bright")
data[: data.shape[0] // 2] = 0
nib.save(nib.Nifti1Image(data, image.affine), sys.argv[2])
"""


@pytest.fixture
def hook(tmp_path) -> Hook:
    script = tmp_path / "tool.py"
    script.write_text(HALF)
    return Hook(name="half", step="skull_strip", command=f"{sys.executable} {script} {{input}} {{output}}")


def test_hooks_change_the_scans_and_the_store_says_so(tmp_path, make_cohort, hook):
    source = make_cohort(tmp_path / "cohort", num_subjects=2)
    whole = prepare(source, tmp_path / "whole", SETTINGS)
    half = prepare(source, tmp_path / "half", SETTINGS, hooks=[hook])
    for one, other in zip([half[0], half[1]], [whole[0], whole[1]], strict=True):
        share = (one.pixels > 0).sum() / (other.pixels > 0).sum()
        assert 0.4 < share < 0.6
    assert half.preprocessing.hooks == ("half",)
    assert whole.preprocessing.hooks == ()
    facts = json.loads((half.path / "store.json").read_text())
    assert facts["hooks"][0]["name"] == "half"
    assert facts["hooks"][0]["step"] == "skull_strip"
    assert str(tmp_path) not in json.dumps(facts)


def test_a_scan_that_a_hook_fails_on_is_rejected_alone(tmp_path, make_cohort, hook, write_scan):
    source = make_cohort(tmp_path / "cohort", num_subjects=2)
    session = next(Cohort.read(source).sessions())
    import nibabel as nib

    image = nib.load(session.scans["T2w"])
    nib.save(nib.Nifti1Image(image.get_fdata() * 1e6, image.affine), session.scans["T2w"])
    prepared = prepare_session(session, SETTINGS, hooks=[hook])
    assert prepared.stack is not None
    assert prepared.stack.present.tolist() == [True, False, True]
    assert [entry.file.name for entry in prepared.refused] == ["s00_T2w.nii.gz"]
    assert "too bright" in prepared.refused[0].reason


def test_a_model_gets_scans_as_those_that_it_learnt_from(tmp_path, make_cohort, hook, tiny_backbone):
    from brainfound.models import BrainFoundModel

    source = make_cohort(tmp_path / "cohort", num_subjects=2)
    learnt = prepare(source, tmp_path / "half", SETTINGS, hooks=[hook]).preprocessing
    with pytest.raises(UsageError, match=r"other hooks \(got none, expected half\). Give --hook half"):
        prepare(source, tmp_path / "like", learnt)
    done = prepare(source, tmp_path / "done", learnt, hooks_done=True)
    assert done.preprocessing == learnt
    assert done.facts["hooks"] == [{"name": "half", "done_before": True}]
    model = BrainFoundModel.from_backbone(str(tiny_backbone), contrasts=SETTINGS.contrasts)
    session: Session = next(Cohort.read(source).sessions())
    plain = Predictor(model, learnt).predict_session(session)
    assert "learnt from scans that went through half" in plain.notes[0]
    through = Predictor(model, learnt, hooks=[hook]).predict_session(session)
    assert through.notes == ()
    assert not np.allclose(plain.embedding, through.embedding)
    with pytest.raises(UsageError, match="other hooks"):
        Predictor(model, SETTINGS, hooks=[hook])
