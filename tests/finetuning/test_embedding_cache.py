"""Embeddings that are computed once: what they are, when they are made anew, and training on them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from brainfound.data.batches import collate, evenly_spaced_slices
from brainfound.errors import ModelError, RecipeError, TrainingError
from brainfound.finetuning.embedding_cache import EmbeddingCache
from brainfound.finetuning.finetune import finetune
from brainfound.finetuning.recipe import FinetuneRecipe
from brainfound.models import BrainFoundForRegression, BrainFoundModel
from brainfound.recipes import validate
from tests.tiny_runs import log_lines, tiny_finetuning

TINY = tiny_finetuning(
    engine={"steps": 4, "checkpoint_every": 4},
    name="tiny",
    adapter="head-only",
    cached_embeddings=True,
    head_fit_passes=1,
    frozen_baseline=False,
)


@pytest.fixture
def network(tiny_backbone, small_store):
    return BrainFoundModel.from_backbone(tiny_backbone, contrasts=small_store.contrasts, aggregator="attention")


@pytest.fixture
def calls(monkeypatch):
    """How many volumes were encoded."""
    seen = []
    embed = EmbeddingCache._embed
    monkeypatch.setattr(EmbeddingCache, "_embed", lambda self, session: seen.append(session) or embed(self, session))
    return seen


def test_it_holds_what_the_encoder_says_of_the_slices_that_evaluation_reads(network, small_store, tmp_path):
    cache = EmbeddingCache(network, small_store, tmp_path, num_slices=3)
    assert cache.ensure_embedded([0, 2]) == 2
    stacks = [small_store[0], small_store[2]]
    index = [evenly_spaced_slices(len(stack.pixels), 3) for stack in stacks]
    inputs = collate(stacks, index)
    with torch.no_grad():
        expected = network(**inputs.inputs())
        found = network(**cache.batch([0, 2]).inputs())
    torch.testing.assert_close(found.slice_embeddings, expected.slice_embeddings)
    torch.testing.assert_close(found.volume_embedding, expected.volume_embedding)
    assert torch.equal(cache.batch([0, 2]).positions_mm, inputs.positions_mm)
    np.testing.assert_allclose(
        cache.mean_embeddings([2])[0], expected.slice_embeddings[1].mean(dim=0), rtol=1e-5, atol=1e-6
    )


def test_volumes_of_several_lengths_are_padded_as_images_are(network, small_store, tmp_path, monkeypatch):
    lengths = iter([5, 3])
    monkeypatch.setattr(
        "brainfound.finetuning.embedding_cache.evenly_spaced_slices", lambda n, wanted: np.arange(next(lengths, n))
    )
    cache = EmbeddingCache(network, small_store, tmp_path)
    cache.ensure_embedded([0, 1])
    batch = cache.batch([0, 1])
    assert batch.slice_mask.sum(dim=1).tolist() == [5, 3]
    with torch.no_grad():
        alone = network(**cache.batch([1]).inputs()).volume_embedding[0]
        together = network(**batch.inputs()).volume_embedding[1]
    assert torch.equal(alone, together)


def test_a_session_is_embedded_once_and_survives_a_cut(network, small_store, tmp_path, calls):
    first = EmbeddingCache(network, small_store, tmp_path, 3)
    first.ensure_embedded([0, 1])
    again = EmbeddingCache(network, small_store, tmp_path, 3)
    assert again.path == first.path
    again.ensure_embedded([1, 2])
    assert calls == [0, 1, 2]
    # Cut off between the numbers and their mark: the session is embedded again.
    again._done[2] = False
    again._done.flush()
    EmbeddingCache(network, small_store, tmp_path, 3).ensure_embedded([2])
    assert calls == [0, 1, 2, 2]
    with pytest.raises(TrainingError, match="not in the cache"):
        again.slices(3)


def test_other_weights_other_slices_and_other_data_have_a_cache_of_their_own(network, small_store, tmp_path):
    paths = {
        EmbeddingCache(network, small_store, tmp_path, 3).path,
        EmbeddingCache(network, small_store, tmp_path).path,
    }
    with torch.no_grad():
        network.encoder.backbone.layernorm.weight[0] += 1
    paths.add(EmbeddingCache(network, small_store, tmp_path, 3).path)
    network.config.image_mean = 0.3
    paths.add(EmbeddingCache(network, small_store, tmp_path, 3).path)
    network.config.slice_features = "patches"
    paths.add(EmbeddingCache(network, small_store, tmp_path, 3).path)
    assert len(paths) == 5


@pytest.mark.parametrize("features", ["patches", "cls_and_patches"])
def test_other_features_of_a_slice_are_kept_as_the_model_gives_them(tiny_backbone, small_store, tmp_path, features):
    model = BrainFoundModel.from_backbone(tiny_backbone, contrasts=small_store.contrasts, slice_features=features)
    cache = EmbeddingCache(model, small_store, tmp_path, num_slices=3)
    cache.ensure_embedded([1])
    stack = small_store[1]
    with torch.no_grad():
        expected = model(**collate([stack], [evenly_spaced_slices(len(stack.pixels), 3)]).inputs()).slice_embeddings[0]
    torch.testing.assert_close(torch.from_numpy(cache.slices(1)), expected)


def test_a_damaged_cache_is_reported(network, small_store, tmp_path):
    path = EmbeddingCache(network, small_store, tmp_path, 3).path
    (path / "embeddings.npy").write_bytes((path / "embeddings.npy").read_bytes()[:200])
    with pytest.raises(TrainingError, match="cannot be used"):
        EmbeddingCache(network, small_store, tmp_path, 3)
    np.save(path / "embeddings.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(TrainingError, match="cannot be used"):
        EmbeddingCache(network, small_store, tmp_path, 3)


def test_embeddings_come_in_the_place_of_images(network):
    embeddings = torch.rand(2, 3, network.config.hidden_size)
    with pytest.raises(ModelError, match=r"slice_embeddings replace images \(got"):
        network(torch.rand(2, 3, 3, 28, 28), slice_embeddings=embeddings)
    with pytest.raises(ModelError, match="nothing to embed"):
        network()
    with pytest.raises(ModelError, match="do not fit"):
        network(slice_embeddings=embeddings[..., :-1])
    with pytest.raises(ModelError, match="no valid slice"):
        network(slice_embeddings=embeddings, slice_mask=torch.tensor([[True] * 3, [False] * 3]))
    answer = BrainFoundForRegression(network.config).eval()(slice_embeddings=embeddings, labels=torch.ones(2))
    assert answer.loss.isfinite()
    assert answer.predictions.shape == (2,)


def test_training_on_kept_embeddings_is_training_on_images_that_stay_as_they_are(
    small_store, tiny_backbone, tmp_path, monkeypatch, calls
):
    """The same losses, but for rounding, as with images of which the same slices are read, unchanged."""
    recipe = validate(FinetuneRecipe, TINY)
    kept = finetune(recipe, small_store, tiny_backbone, "age_years", tmp_path / "kept", quiet=True)
    num_sessions = len(calls)
    assert 0 < num_sessions <= len(small_store)
    monkeypatch.setattr(
        "brainfound.finetuning.volumes.sample_jittered_slices", lambda n, wanted, rng: evenly_spaced_slices(n, wanted)
    )
    monkeypatch.setattr("brainfound.finetuning.training_task.augment_volumes", lambda batch, recipe, key: batch)
    monkeypatch.setattr("brainfound.finetuning.fitted_heads.augment_volumes", lambda batch, recipe, key: batch)
    recipe = validate(FinetuneRecipe, TINY, ["cached_embeddings=false"])
    images = finetune(recipe, small_store, tiny_backbone, "age_years", tmp_path / "images", quiet=True)
    asked = []
    monkeypatch.setattr("brainfound.finetuning.scoring.infer", lambda *_: asked.append(0))
    losses = [[line["loss"] for line in log_lines(run)] for run in (kept, images)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(calls) == num_sessions
    scores = [json.loads((run / "scores.json").read_text())["scores"]["mae"] for run in (kept, images)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)
    # Two runs share a cache, and do not look at an image again to be scored.
    shared = tmp_path / "shared"
    for seed in (0, 1):
        recipe = validate(FinetuneRecipe, TINY, [f"seed={seed}"])
        finetune(recipe, small_store, tiny_backbone, "age_years", tmp_path / f"s{seed}", cache=shared, quiet=True)
    assert len(calls) == 2 * num_sessions
    assert not asked


def test_a_run_that_was_cut_off_while_it_embedded_is_begun_again(small_store, tiny_backbone, tmp_path, monkeypatch):
    embed, recipe = EmbeddingCache._embed, validate(FinetuneRecipe, TINY)

    def interrupted(self, session):
        monkeypatch.setattr(EmbeddingCache, "_embed", embed)
        raise KeyboardInterrupt

    monkeypatch.setattr(EmbeddingCache, "_embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, small_store, tiny_backbone, "age_years", tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "embeddings").is_dir()
    run = finetune(recipe, small_store, tiny_backbone, "age_years", tmp_path / "run", quiet=True)
    assert (run / "export").is_dir()


@pytest.mark.parametrize("changes", [["adapter=lora-r8"], ["task=segmentation"]])
def test_embeddings_that_training_would_change_are_not_kept(small_store, tiny_backbone, tmp_path, changes):
    recipe = validate(FinetuneRecipe, TINY, changes)
    target = "mask" if "segmentation" in changes[0] else "age_years"
    with pytest.raises(RecipeError, match="frozen backbone only"):
        finetune(recipe, small_store, tiny_backbone, target, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "recipe.yaml").exists()
