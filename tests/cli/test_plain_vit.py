"""``probe`` and ``embed`` with a plain ViT that was never trained here, and the tokens of ``embed``."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import Dinov2Model

from brainfound.inference.probing import NEW_WEIGHTS, probe, probe_models


def library_outputs(folder, stack, slices):
    """The hidden states of transformers' model, (N, 1 + P, D) after each block, and the last after its norm."""
    model = Dinov2Model.from_pretrained(folder).eval()
    images = torch.from_numpy(stack.pixels[slices]).float() / 255
    with torch.no_grad():
        output = model((images - 0.449) / 0.226, output_hidden_states=True)
    return output.hidden_states, output.last_hidden_state


@pytest.fixture
def full_session(small_store) -> int:
    """A session with all contrasts, for which the stem is exactly that of the plain ViT."""
    return int(np.flatnonzero(small_store.present.all(axis=1))[0])


def test_tokens_are_those_of_the_plain_vit(cli, small_store, source, tiny_backbone, full_session, tmp_path):
    more = ("--slices", "--patches", "--layers", "1,3")
    answer = cli("embed", tiny_backbone, source, "--like", small_store.path, "--out", tmp_path, *more)
    assert answer.code == 0, answer.err
    stack = small_store[full_session]
    (file,) = tmp_path.glob(f"{stack.subject}*_tokens.npz")
    found = dict(np.load(file))
    states, last = library_outputs(tiny_backbone, stack, found["slices"])
    close = {"rtol": 2e-3, "atol": 2e-3}  # float16
    np.testing.assert_allclose(found["slice_embeddings"], last[:, 0], **close)
    np.testing.assert_allclose(found["patch_tokens"], last[:, 1:], **close)
    assert found["layers"].tolist() == [1, 3]
    np.testing.assert_allclose(found["layer_patch_tokens"], torch.stack([states[1], states[3]])[:, :, 1:], **close)
    assert not np.allclose(found["layer_patch_tokens"][0], found["layer_patch_tokens"][1], **close)
    assert {found[name].dtype for name in ("slice_embeddings", "patch_tokens", "layer_patch_tokens")} == {
        np.dtype("f2")
    }
    np.testing.assert_array_equal(found["positions_mm"], stack.positions_mm[found["slices"]])
    np.testing.assert_allclose(found["affine"], stack.affine)
    assert (found["grid"].tolist(), int(found["patch_size"])) == ([4, 4], 8)
    vector = np.load(str(file).replace("_tokens.npz", "_embedding.npy"))
    np.testing.assert_allclose(vector, last[:, 0].mean(0), rtol=1e-4, atol=1e-5)
    shapes = json.loads(next(tmp_path.glob(f"{stack.subject}*.json")).read_text())["tokens"]
    assert shapes["layer_patch_tokens"] == [2, len(stack.pixels), 16, 32]


def test_other_tokens_are_another_answer(cli, small_store, source, tiny_backbone, tmp_path):
    arguments = ("embed", tiny_backbone, source, "--like", small_store.path, "--out", tmp_path)
    assert cli(*arguments, "--slices").code == 0
    assert cli(*arguments, "--slices").code == 0, "what is there is not done again"
    again = cli(*arguments, "--patches")
    assert again.code == 2
    assert "other options" in again.err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], ["plain ViT", "states no preprocessing", "--like"]),
        (["--like", "{store}", "--layers", "4"], ["no such block", "got 4", "1 to 3"]),
        (["--like", "{store}", "--layers", "2,2"], ["given twice"]),
        (["--like", "{store}", "--layers", "all"], ["--layers", "not a block"]),
        (["--like", "{store}", "--layers", "x"], ["not a list of whole numbers"]),
    ],
)
def test_what_a_plain_vit_cannot_do_is_one_line(cli, small_store, source, tiny_backbone, tmp_path, more, words):
    more = [word.format(store=small_store.path) for word in more]
    answer = cli("embed", tiny_backbone, source / "s00_T1w.nii.gz", "--out", tmp_path / "out", *more)
    assert answer.code == 2
    assert all(word in answer.err for word in words), answer.err
    assert not (tmp_path / "out").exists()


def test_another_preprocessing_than_the_models_is_refused(cli, classifier, small_store, source, tmp_path):
    small_store.preprocessing.model_copy(update={"bits": 16}).save(tmp_path)
    scan = source / "s00_T1w.nii.gz"
    answer = cli("embed", classifier, scan, "--out", tmp_path / "out", "--like", tmp_path)
    assert answer.code == 2
    assert "Leave --like out" in answer.err
    assert cli("embed", classifier, scan, "--out", tmp_path / "out", "--like", small_store.path, "--slices").code == 0
    assert np.load(tmp_path / "out" / "s00_T1w_tokens.npz")["slice_embeddings"].shape[1] == 32


def test_a_plain_vit_is_probed_as_the_encoder_that_it_becomes(small_store, tiny_backbone, tmp_path):
    from brainfound.models import BrainFoundModel

    BrainFoundModel.from_backbone(tiny_backbone, contrasts=small_store.contrasts).save_pretrained(tmp_path / "export")
    small_store.preprocessing.save(tmp_path / "export")
    plain = probe(tiny_backbone, small_store, "age_years", num_slices=3)
    assert plain.probed == probe(tmp_path / "export", small_store, "age_years", num_slices=3).probed


def test_models_stand_in_one_table_with_new_weights_as_floor(cli, classifier, small_store, tiny_backbone):
    arguments = ("probe", tiny_backbone, classifier, "--data", small_store.path, "--label", "diagnosis", "--slices", 2)
    answer = cli(*arguments, "--floor")
    assert answer.code == 0, answer.err
    assert NEW_WEIGHTS in answer.out
    found = json.loads(cli(*arguments, "--floor", "--json").out)
    assert list(found) == [str(tiny_backbone), str(classifier), NEW_WEIGHTS]
    floor = {seed: _floor(small_store, tiny_backbone, seed) for seed in (0, 1)}
    assert floor[0] == _floor(small_store, tiny_backbone, 0)
    assert floor[0] != floor[1], "the weights follow the seed"


def _floor(store, model, seed):
    return probe_models([model], store, "age_years", num_slices=2, seed=seed, floor=True)[NEW_WEIGHTS].probed


def test_every_model_is_read_before_one_is_embedded(cli, small_store, tiny_backbone, monkeypatch, tmp_path):
    monkeypatch.setattr("brainfound.inference.probing.EmbeddingCache", None)
    answer = cli("probe", tiny_backbone, tmp_path / "none", "--data", small_store.path, "--label", "age_years")
    assert answer.code == 2
    assert "no such" in answer.err


def test_patches_that_do_not_tile_the_slices_are_refused_first(cli, small_store, tmp_path, monkeypatch):
    from transformers import Dinov2Config

    Dinov2Model(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28)).save_pretrained(
        tmp_path / "vit"
    )
    monkeypatch.setattr("brainfound.inference.probing.EmbeddingCache", None)
    answer = cli("probe", tmp_path / "vit", "--data", small_store.path, "--label", "age_years")
    assert answer.code == 2
    assert "32 × 32 pixels" in answer.err
    assert "multiples of 14" in answer.err


def test_one_site_gives_the_probe_of_the_label(cli, small_store, tiny_backbone, monkeypatch):
    monkeypatch.setattr("brainfound.data.store.Store.open", lambda path: small_store)
    monkeypatch.setitem(small_store.sessions, "site", ["Oslo"] * 12)
    answer = cli("probe", tiny_backbone, "--data", small_store.path, "--label", "age_years", "--slices", 2)
    assert answer.code == 0, answer.err
    assert "site is not probed" in answer.line
    assert "age_years" in answer.out


def test_a_cohort_is_embedded_as_its_store(cli, small_store, source, tiny_backbone, tmp_path):
    assert cli("embed", tiny_backbone, source, "--like", small_store.path, "--out", tmp_path).code == 0
    assert len(list(tmp_path.glob("*_embedding.npy"))) == 12
    assert not list(tmp_path.glob("*_tokens.npz"))
