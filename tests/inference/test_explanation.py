"""Explanations against independent formulas, and against models whose answer is known to come from one place."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from brainfound.adapters import AdapterRecipe, attach_adapter, merge
from brainfound.data.batches import collate, remove_contrasts
from brainfound.errors import ModelError, UsageError
from brainfound.finetuning.tasks import Classification, Regression, Segmentation
from brainfound.inference import explanation_methods
from brainfound.inference.cohort import explain_cohort
from brainfound.inference.explanation import METHODS, choose_methods, explain_stack
from brainfound.inference.explanation_methods import ExplanationInputs, principal_components, scale_to_unit_range
from brainfound.inference.predictor import Predictor
from brainfound.models import (
    BrainFoundForClassification,
    BrainFoundForRegression,
    BrainFoundForSegmentation,
    BrainFoundModel,
)
from brainfound.models.aggregators import Aggregator
from brainfound.models.stack_prediction import infer

PATCH = 8
FAMILIES = {
    "dinov2": (Dinov2Config, Dinov2Model),
    "dinov2_with_registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
}
KINDS = {
    "classification": (BrainFoundForClassification, Classification("diagnosis", names=("healthy", "patient"))),
    "regression": (BrainFoundForRegression, Regression("age_years", mean=50.0, std=20.0)),
    "segmentation": (BrainFoundForSegmentation, Segmentation("mask", names=("background", "lesion"), codes=(0, 1))),
    "embedding": (BrainFoundModel, None),
}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Folders of tiny ViTs, by family, whose attention is far from even."""
    folders = {}
    for family, (config_class, model_class) in FAMILIES.items():
        torch.manual_seed(3)
        config = config_class(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, patch_size=PATCH, image_size=32
        )
        model = model_class(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(std=1.0 if "q_proj" in name or "norm1" in name else 0.3)
        folders[family] = tmp_path_factory.mktemp("explained") / family
        model.save_pretrained(folders[family])
    return folders


@pytest.fixture(scope="module")
def make(backbones):
    """Copies of a model of a task, whose aggregator and head are far from their first weights, with its target."""
    made = {}

    def make(task="classification", **options):
        key = (task, json.dumps(options))
        if key not in made:
            made[key] = build(task, **options)
        return copy.deepcopy(made[key])

    def build(task, family="dinov2", contrasts=("T1w", "T2w", "FLAIR"), **config):
        kind, target = KINDS[task]
        torch.manual_seed(0)
        fields = {"aggregator": "attention", "decoder_width": 8, "target_mean": 50.0, "target_std": 20.0, **config}
        model = kind.from_backbone(backbones[family], contrasts=contrasts, **fields)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "aggregator" in name or "head" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        return model.eval(), target

    return make


@pytest.fixture(scope="module")
def stack(small_store):
    """A session whose reference scan has the grid of the stack, so that maps come back as they were made."""
    stack = small_store[1]
    return replace(stack, native_shape=stack.grid, native_affine=stack.affine, mask=None)


def only(stack, contrast):
    number = stack.contrasts.index(contrast)
    keep = slice(number, number + 1)
    return replace(stack, pixels=stack.pixels[:, keep], contrasts=(contrast,), present=stack.present[keep])


def values(explanation, method):
    return np.asarray(explanation.maps[method].dataobj)


# Attention


def rollout_by_the_formula(attentions, num_prefix):
    """Abnar and Zuidema (2020), section 3, matrix by matrix: the class token's row, of patches, with sum 1."""
    rows = []
    for image in range(len(attentions[0])):
        rolled = np.eye(attentions[0].shape[-1])
        for attention in attentions:
            rolled = (0.5 * attention[image].mean(axis=0) + 0.5 * np.eye(len(rolled))) @ rolled
        rows.append(rolled[0, num_prefix:] / rolled[0, num_prefix:].sum())
    return np.stack(rows)


def test_the_rollout_is_of_what_the_model_reads_of_a_slice(make, stack):
    rolled = {}
    for features in ("cls", "patches", "cls_and_patches"):
        model, _ = make("embedding", slice_features=features)
        rolled[features] = ExplanationInputs(model, stack, np.arange(3)).encode_all(rollout=True).rollout
        torch.testing.assert_close(rolled[features].sum(dim=(1, 2)), torch.ones(3))
    assert not torch.allclose(rolled["cls"], rolled["patches"], atol=1e-3)
    low, high = torch.stack([rolled["cls"], rolled["patches"]]).aminmax(dim=0)
    assert ((rolled["cls_and_patches"] >= low - 1e-6) & (rolled["cls_and_patches"] <= high + 1e-6)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_rollout_is_the_formula_on_the_library_s_own_attention(make, backbones, stack, family):
    model, _ = make("embedding", family=family, slice_chunk=4)
    plain = FAMILIES[family][1].from_pretrained(backbones[family], attn_implementation="eager").eval()
    pixels = (torch.from_numpy(stack.pixels).float() / 255 - 0.449) / 0.226
    with torch.no_grad():
        attentions = [layer.double().numpy() for layer in plain(pixels, output_attentions=True).attentions]
    assert len(attentions) == 3
    num_prefix = 1 if family == "dinov2" else 5
    expected = rollout_by_the_formula(attentions, num_prefix)
    found = ExplanationInputs(model, stack, np.arange(len(stack.pixels))).encode_all(rollout=True).rollout
    assert found.shape == (len(stack.pixels), 4, 4)
    np.testing.assert_allclose(found.flatten(1).numpy(), expected, atol=1e-5)
    assert expected.max() > 2 * expected.mean(), "an even attention would prove nothing"


def test_rollout_of_single_contrasts_is_averaged(make, stack):
    model, _ = make("embedding", stem="per_contrast", slice_chunk=7)
    every = np.arange(len(stack.pixels))

    def of(shown):
        return ExplanationInputs(model, shown, every).encode_all(rollout=True).rollout.numpy()

    singles = [of(remove_contrasts(stack, [c for c in stack.contrasts if c != name])) for name in stack.contrasts]
    assert np.abs(singles[0] - singles[1]).max() > 1e-3
    np.testing.assert_allclose(of(stack), np.mean(singles, axis=0), atol=1e-6)


def test_the_rollout_map_is_relative_to_an_even_share(make, stack):
    attention, target = make()
    weighted = explain_stack(attention, stack, target, method=("rollout", "slice-attention"))
    per_slice = values(weighted, "rollout").mean(axis=(1, 2))
    assert weighted.numbers["rollout"] == {"weighted_by_slice_attention": True}
    np.testing.assert_allclose(per_slice / len(per_slice), weighted.numbers["slice-attention"]["weights"], atol=1e-5)
    plain = explain_stack(make(aggregator="mean")[0], stack, target, method="rollout")
    np.testing.assert_allclose(values(plain, "rollout").mean(axis=(1, 2)), 1, atol=1e-5)
    assert plain.numbers["rollout"] == {"weighted_by_slice_attention": False}


def test_slice_attention_is_the_aggregator_s_and_fills_the_slices(make, stack):
    model, target = make()
    found = explain_stack(model, stack, target, num_slices=5, method="slice-attention")
    weights = found.numbers["slice-attention"]["weights"]
    answer = infer(model, stack, 5)
    np.testing.assert_allclose(weights, answer.slice_weights, atol=1e-6)
    assert list(found.slices) == answer.slices.tolist()
    np.testing.assert_array_equal(found.positions_mm, stack.positions_mm[answer.slices])
    assert max(weights) > 1.2 * min(weights)
    image = values(found, "slice-attention")
    for number, plane in enumerate(image):
        nearest = np.abs(answer.slices - number).argmin()
        np.testing.assert_array_equal(plane, np.float32(weights[nearest]))


@pytest.mark.parametrize("layers", [1, 2])
def test_slice_attention_of_the_transformer_is_its_class_token_s(make, stack, layers):
    model, target = make(aggregator="transformer", aggregator_layers=layers)
    inputs = []
    aggregator = model.brainfound.aggregator
    for layer in aggregator.layers:
        layer.query_key_value.register_forward_hook(lambda module, given, made: inputs.append(made.double()))
    infer(model, stack)
    attentions = []
    for projected in inputs:
        query, key, _ = projected.reshape(1, -1, 3, 1, 32).permute(2, 0, 3, 1, 4).numpy()
        scores = np.exp(query @ key.swapaxes(-1, -2) / np.sqrt(32))
        attentions.append(scores / scores.sum(axis=-1, keepdims=True))
    assert len(attentions) == layers
    for layer in aggregator.layers:
        layer.query_key_value._forward_hooks.clear()
    weights = explain_stack(model, stack, target, method="slice-attention").numbers["slice-attention"]["weights"]
    if layers == 1:
        expected = attentions[0][0, 0, 0, 1:] / attentions[0][0, 0, 0, 1:].sum()
    else:
        expected = rollout_by_the_formula(attentions, 1)[0]
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    assert sum(weights) == pytest.approx(1, abs=1e-5)


# Gradients


def full_gradient(model, stack, score):
    """Gradient × input of a score in one pass through the whole model, summed over patches: (S, C, h, w)."""
    inputs = collate([stack]).inputs()
    pixels = (inputs["pixel_values"].float() / 255).requires_grad_()
    score(model(**{**inputs, "pixel_values": pixels})).backward()
    model.zero_grad(set_to_none=True)
    products = (pixels.grad * pixels).detach()[0]
    return products.unflatten(-1, (-1, PATCH)).unflatten(-3, (-1, PATCH)).sum(dim=(-1, -3)).numpy()


@pytest.mark.parametrize(
    ("stem", "features"),
    [("channels", "cls"), ("per_contrast", "cls"), ("slices", "cls"), ("channels", "patches"),
     ("per_contrast", "cls_and_patches")],
)  # fmt: skip
def test_gradients_in_chunks_are_those_of_the_whole_model(make, stack, monkeypatch, stem, features):
    if stem == "slices":
        model, target = make(stem=stem, contrasts=("T1w",))
        shown = only(stack, "T1w")
    else:
        model, target = make(stem=stem, slice_features=features)
        shown = remove_contrasts(stack, ["T2w"])
    expected = full_gradient(model, shown, lambda output: output.logits[0, 1])
    upsampled = F.interpolate(torch.from_numpy(expected), scale_factor=PATCH, mode="bilinear").numpy()
    for chunk in (3, 1000):
        monkeypatch.setattr(explanation_methods, "CHUNK", chunk)
        found = explain_stack(model, shown, target, method="gradient", class_name="patient")
        image = values(found, "gradient")
        assert image.shape == (*shown.grid, len(shown.contrasts))
        tolerance = 1e-4 * float(np.abs(expected).max())
        np.testing.assert_allclose(np.moveaxis(image, -1, 1), upsampled, atol=tolerance)
    numbers = found.numbers["gradient"]
    assert (numbers["of"], tuple(numbers["volumes"])) == ("patient", shown.contrasts)
    for number, contrast in enumerate(shown.contrasts):
        total = float(expected[:, number].sum())
        assert numbers["sum"][contrast] == pytest.approx(total, rel=1e-3, abs=10 * tolerance)
        assert image[..., number].any() == shown.present[number], "an absent contrast is exactly 0"


def test_the_gradient_follows_the_answer(make, stack):
    model, target = make()
    probabilities = infer(model, stack).probabilities
    found = explain_stack(model, stack, target, method="gradient")
    assert found.numbers["gradient"]["of"] == target.names[probabilities.argmax()]
    np.testing.assert_allclose(list(found.answer["probabilities"].values()), probabilities, atol=1e-5)
    other = explain_stack(model, stack, target, method="gradient", class_name=target.names[probabilities.argmin()])
    assert found.numbers["gradient"]["score"] > other.numbers["gradient"]["score"]
    assert not np.allclose(values(found, "gradient"), values(other, "gradient"))
    model, target = make("regression")
    found = explain_stack(model, stack, target, method="gradient")
    assert found.numbers["gradient"]["of"] == "age_years"
    assert found.numbers["gradient"]["score"] == pytest.approx(infer(model, stack).value, rel=1e-5)
    assert found.answer == {"target": "age_years", "value": pytest.approx(infer(model, stack).value, rel=1e-5)}


class OneSlice(Aggregator):
    """Reads one slice and no other."""

    has_weights = False

    def __init__(self, number):
        super().__init__()
        self.number = number

    def pool(self, slices, positions_mm):
        return slices[:, self.number], None


class FirstSlicesMore(Aggregator):
    """A mean with fixed weights that differ between slices."""

    def pool(self, slices, positions_mm):
        weights = torch.arange(slices.shape[1], 0, -1.0).expand(slices.shape[:2])
        weights = weights / weights.sum(dim=1, keepdim=True)
        return (weights[..., None] * slices).sum(dim=1), weights


def test_a_new_aggregator_with_weights_is_explained_by_them(make, stack):
    model, target = make(aggregator="mean")
    model.brainfound.aggregator = FirstSlicesMore()
    found = explain_stack(model, stack, target, num_slices=3, method="slice-attention")
    np.testing.assert_allclose(found.numbers["slice-attention"]["weights"], [3 / 6, 2 / 6, 1 / 6], atol=1e-6)


def test_a_model_that_reads_one_slice_is_explained_by_it(make, stack):
    model, target = make(aggregator="mean")
    model.brainfound.aggregator = OneSlice(9)
    image = np.abs(values(explain_stack(model, stack, target, method="gradient"), "gradient")).sum(axis=(1, 2, 3))
    assert image.argmax() == 9
    assert np.count_nonzero(image) == 1


def test_a_model_that_reads_one_region_is_explained_by_it(make, stack):
    model, target = make()
    row, column = 1, 2
    mask = torch.zeros(16, 1)
    mask[4 * row + column] = 1
    model.encoder.backbone.embeddings.patch_embeddings.register_forward_hook(lambda module, given, made: made * mask)
    image = np.abs(values(explain_stack(model, stack, target, method="gradient"), "gradient")).sum(axis=(0, 3))
    y, x = np.unravel_index(image.argmax(), image.shape)
    assert (y // PATCH, x // PATCH) == (row, column)
    half = PATCH // 2
    image[row * PATCH - half : (row + 1) * PATCH + half, column * PATCH - half : (column + 1) * PATCH + half] = 0
    assert not image.any(), "bilinear interpolation reaches half a patch beyond the region, and nothing does further"


def randomise(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)


@pytest.mark.parametrize("part", ["head", "last block"])
def test_sanity_check_the_gradient_depends_on_what_was_learnt(make, stack, part):
    """Model parameter randomisation test (Adebayo et al. 2018)."""
    model, target = make()
    how = {"method": ("gradient", "pca"), "class_name": "patient"}
    before, again = (explain_stack(model, stack, target, **how) for _ in range(2))
    for method in ("gradient", "pca"):
        np.testing.assert_array_equal(values(before, method), values(again, method))
    randomise(model.head.score if part == "head" else model.encoder.blocks[-1])
    after = explain_stack(model, stack, target, **how)
    similarity = np.corrcoef(values(before, "gradient").ravel(), values(after, "gradient").ravel())[0, 1]
    assert abs(similarity) < 0.9
    assert np.array_equal(values(before, "pca"), values(after, "pca")) == (part == "head")


# Principal components


def test_components_are_those_of_a_singular_value_decomposition():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(200, 12)) * np.linspace(3, 0.5, 12) + 5).astype(np.float32)
    scores, ratio = principal_components(features)
    centred = features.astype(np.float64) - features.mean(axis=0)
    left, singular, right = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(scores), np.abs(left[:, :3] * singular[:3]), atol=1e-3)
    np.testing.assert_allclose(ratio, singular[:3] ** 2 / (singular**2).sum(), rtol=1e-6)
    for k in range(3):
        sign = np.sign(right[k][np.abs(right[k]).argmax()])
        np.testing.assert_allclose(scores[:, k], sign * left[:, k] * singular[k], atol=1e-3)


def test_the_sign_of_a_component_does_not_hang_on_chance():
    rng = np.random.default_rng(1)
    features = (rng.normal(size=(300, 10)) * np.linspace(3, 0.5, 10)).astype(np.float32)
    scores, _ = principal_components(features)
    order = rng.permutation(len(features))
    np.testing.assert_allclose(principal_components(features[order])[0], scores[order], atol=1e-4)
    np.testing.assert_allclose(principal_components(-features)[0], -scores, atol=1e-4)


def test_components_of_almost_nothing():
    with pytest.raises(ModelError, match="got 3 foreground patches of width 10"):
        principal_components(np.zeros((3, 10), dtype=np.float32))
    scores, ratio = principal_components(np.ones((20, 10), dtype=np.float32))
    assert not scores.any()
    assert not ratio.any()
    assert not scale_to_unit_range(scores).any()


@pytest.mark.parametrize("task", ["embedding", "segmentation", "classification"])
def test_components_lie_on_the_input(make, small_store, write_scan, head, centred, task):
    """On an oblique scan the map has its shape and affine, and is where the head is."""
    model, target = make(task)
    linear = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]]) @ np.diag([-3.0, 3.0, 4.0])
    affine = centred((42, 44, 30), linear)
    path = write_scan("sub-1_T1w.nii.gz", head.image((42, 44, 30), affine), affine=affine)
    found = Predictor(model, small_store.preprocessing, target).explain(path, method="pca")
    image = found.maps["pca"]
    colours = np.asarray(image.dataobj)
    assert colours.shape == (42, 44, 30, 3)
    assert colours.dtype == np.float32
    np.testing.assert_array_equal(image.affine, nib.load(path).affine)
    assert (colours.min(), colours.max()) == (0, pytest.approx(1, abs=0.05))
    inside, brain = colours.any(axis=-1), np.asarray(nib.load(path).dataobj) > 0
    assert 2 * (inside & brain).sum() / (inside.sum() + brain.sum()) > 0.8
    assert found.missing == ("T2w", "FLAIR")
    assert len(found.numbers["pca"]["explained_variance_ratio"]) == 3


def test_a_segmentation_shows_the_tokens_that_its_decoder_reads(make, stack):
    model, target = make("segmentation", decoder_layers=[1, 2])
    before = explain_stack(model, stack, target)
    assert list(before.maps) == ["pca"]
    randomise(model.encoder.blocks[2])
    np.testing.assert_array_equal(values(explain_stack(model, stack, target), "pca"), values(before, "pca"))
    randomise(model.encoder.blocks[1])
    assert not np.allclose(values(explain_stack(model, stack, target), "pca"), values(before, "pca"))


# All methods


@pytest.mark.parametrize("aggregator", ["attention", "transformer"])
def test_adapters_change_nothing_but_what_they_learnt(make, stack, aggregator):
    model, target = make(aggregator=aggregator)
    plain = explain_stack(model, stack, target, class_name="patient")
    assert tuple(plain.maps) == METHODS
    adapted = attach_adapter(model, AdapterRecipe(method="lora", roles=("query", "key", "value"), rank=4)).eval()
    attached = explain_stack(adapted, stack, target, class_name="patient")
    for method in METHODS:
        np.testing.assert_array_equal(values(attached, method), values(plain, method))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    learnt = explain_stack(adapted, stack, target, class_name="patient")
    assert np.abs(values(learnt, "rollout") - values(plain, "rollout")).max() > 1e-2
    merge(adapted)
    merged = explain_stack(adapted, stack, target, class_name="patient")
    for method in METHODS:
        scale = np.abs(values(learnt, method)).max()
        np.testing.assert_allclose(values(merged, method), values(learnt, method), atol=1e-3 * scale)


def test_the_model_stays_as_it_was(make, stack, monkeypatch):
    model, target = make(aggregator="transformer")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kernel, answer = model.encoder.backbone.config._attn_implementation, infer(model, stack)
    explain_stack(model, stack, target)
    assert model.encoder.backbone.config._attn_implementation == kernel
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    np.testing.assert_array_equal(infer(model, stack).probabilities, answer.probabilities)

    def fail(tokens):
        raise ModelError("interrupted")

    monkeypatch.setattr(model.encoder.backbone.layernorm, "forward", fail)
    with pytest.raises(ModelError, match="interrupted"):
        explain_stack(model, stack, target)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("task", "config", "how", "words"),
    [
        ("classification", {}, {"method": "rolout"}, "unknown method 'rolout'. Did you mean rollout?"),
        ("classification", {}, {"method": ()}, "no method is given"),
        ("classification", {"aggregator": "mean"}, {"method": "slice-attention"}, "'mean' of the model weighs no"),
        ("regression", {"aggregator": "max"}, {"method": "slice-attention"}, "can give: rollout, gradient, pca"),
        ("embedding", {"aggregator": "mean"}, {"method": "gradient"}, "an encoder has no score to follow back"),
        ("segmentation", {}, {"method": "slice-attention"}, "a segmentation weighs no slices"),
        ("segmentation", {}, {"method": ("pca", "rollout")}, "does not read the class token"),
        ("segmentation", {}, {"method": "gradient"}, "a score for every voxel"),
        ("classification", {}, {"class_name": "patients"}, "no class 'patients'. Did you mean patient?"),
        ("classification", {}, {"class_name": "patient", "method": "pca"}, "a class is for the gradient"),
        ("regression", {}, {"class_name": "patient"}, "a class is for the gradient of a classification"),
    ],
)
def test_what_cannot_be_explained_is_one_line(make, stack, task, config, how, words):
    model, target = make(task, **config)
    with pytest.raises(UsageError) as error:
        explain_stack(model, stack, target, **how)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_by_default_all_that_a_model_can_give(make):
    assert choose_methods(*make("classification"), None) == METHODS
    assert choose_methods(*make("regression", aggregator="mean"), None) == ("rollout", "gradient", "pca")
    assert choose_methods(*make("embedding", aggregator="mean"), None) == ("rollout", "pca")
    assert choose_methods(*make("segmentation"), None) == ("pca",)


def test_a_stack_of_other_contrasts_is_refused(make, stack):
    model, target = make()
    with pytest.raises(ModelError, match="contrasts are not the model's"):
        explain_stack(model, replace(stack, contrasts=("T2w", "T1w", "FLAIR")), target)
    with pytest.raises(ModelError, match="multiples of 8"):
        explain_stack(model, replace(stack, pixels=stack.pixels[..., :30]), target)


def test_numbers_that_are_not_finite_are_refused(make, stack):
    model, target = make()
    with torch.no_grad():
        model.head.score.weight.fill_(float("inf"))
    with pytest.raises(ModelError, match="not finite"):
        explain_stack(model, stack, target, method="gradient", class_name="patient")


def test_a_cohort_is_explained_session_by_session(make, small_store, make_cohort, tmp_path):
    model, target = make()
    predictor = Predictor(model, small_store.preprocessing, target, num_slices=3)
    source, out, seen = make_cohort(tmp_path / "source", num_subjects=2), tmp_path / "maps", []
    outcomes = explain_cohort(
        predictor, source, out, method=["rollout", "pca"], progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 2), (2, 2)]
    endings = ("rollout.nii.gz", "pca.nii.gz", "explanation.json")
    names = {f"s{n:02d}_ses-1_{ending}" for n in range(2) for ending in endings}
    assert {file.name for file in out.iterdir()} == names
    content = json.loads((out / "s01_ses-1_explanation.json").read_text())
    assert content["pca"] == outcomes[1].result.numbers["pca"]
    assert len(content["slices"]) == len(content["positions_mm"]) == 3
    assert "no evidence" in content["caution"]
    again = explain_cohort(predictor, source, out, method=["rollout", "pca"])
    assert {outcome.reason for outcome in again} == {"already done"}
    for other in ({"method": "gradient"}, {}):
        with pytest.raises(UsageError, match=r"other options \(got methods \['rollout', 'pca'\]"):
            explain_cohort(predictor, source, out, **other)
