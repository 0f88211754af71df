"""Losses against independent formulas, units, and heads that learn."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from brainfound.errors import ModelError
from brainfound.models import (
    BrainFoundConfig,
    BrainFoundForClassification,
    BrainFoundForRegression,
    BrainFoundForSegmentation,
)
from brainfound.models.decoders import DECODERS, pyramid_factors
from brainfound.models.heads import ClassificationHead, RegressionHead, bin_edges
from brainfound.models.losses import bins_loss, classification_loss, regression_loss, segmentation_loss, soft_labels


def test_segmentation_loss_against_numpy():
    logits, labels = torch.randn(3, 4, 6, 5), torch.randint(0, 4, (3, 6, 5))
    labels[0, :2] = -100
    scores = np.exp(logits.double().numpy())
    probabilities = np.moveaxis(scores / scores.sum(axis=1, keepdims=True), 1, -1)
    known = labels.numpy() >= 0
    probabilities, truth = probabilities[known], np.eye(4)[labels.numpy()[known]]
    cross_entropy = -np.log((probabilities * truth).sum(axis=1)).mean()
    overlap, total = (probabilities * truth).sum(axis=0), (probabilities + truth).sum(axis=0)
    dice = ((2 * overlap + 1) / (total + 1))[1:]
    expected = cross_entropy + (1 - dice).mean()
    assert segmentation_loss(logits, labels).item() == pytest.approx(expected, rel=1e-5)


def test_unlabelled_pixels_do_not_count():
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    labels[1] = -100
    changed = logits.clone()
    changed[1] = torch.randn(3, 4, 4) * 50
    assert torch.equal(segmentation_loss(logits, labels), segmentation_loss(changed, labels))
    assert segmentation_loss(logits, torch.full_like(labels, -100)).isfinite()


def test_a_perfect_segmentation_costs_nothing():
    labels = torch.randint(0, 3, (2, 8, 8))
    logits = F.one_hot(labels, 3).movedim(-1, 1) * 50.0
    assert segmentation_loss(logits, labels) < 1e-3
    assert segmentation_loss(-logits, labels) > 1


def test_padded_slices_do_not_count_in_the_loss(backbone_folder):
    model = BrainFoundForSegmentation.from_backbone(backbone_folder, num_labels=3, decoder_width=8)
    pixels, labels = torch.rand(1, 4, 3, 16, 16), torch.randint(0, 3, (1, 4, 16, 16))
    mask = torch.tensor([[True, True, False, False]])
    with torch.no_grad():
        loss = model(pixels, slice_mask=mask, labels=labels).loss
        torch.testing.assert_close(loss, model(pixels[:, :2], labels=labels[:, :2]).loss)


def test_regression_answers_in_the_unit_of_the_target(backbone_folder):
    pixels = torch.rand(3, 2, 3, 16, 16)
    plain = BrainFoundForRegression.from_backbone(backbone_folder)
    aged = BrainFoundForRegression.from_backbone(backbone_folder, target_mean=60.0, target_std=15.0)
    aged.load_state_dict(plain.state_dict())
    with torch.no_grad():
        standardised, years = plain(pixels).predictions, aged(pixels, labels=torch.tensor([60.0, 75.0, 30.0]))
        torch.testing.assert_close(years.predictions, standardised * 15 + 60)
        torch.testing.assert_close(years.loss, F.smooth_l1_loss(standardised, torch.tensor([0.0, 1.0, -2.0])))
    assert years.prediction_std is None


def test_uncertainty_is_a_gaussian_likelihood(backbone_folder):
    mean, log_variance, target = torch.randn(3, 6)
    expected = F.gaussian_nll_loss(mean, target, log_variance.exp())
    torch.testing.assert_close(regression_loss(mean, log_variance, target), expected)
    model = BrainFoundForRegression.from_backbone(backbone_folder, regression_head="gaussian", target_std=10.0)
    assert (model(torch.rand(2, 2, 3, 16, 16)).prediction_std > 0).all()


def test_point_losses_against_numpy(backbone_folder):
    mean, target = torch.randn(2, 20) * 2
    error = np.abs((mean - target).double().numpy())
    assert regression_loss(mean, None, target, "l1").item() == pytest.approx(error.mean(), rel=1e-5)
    huber = np.where(error <= 0.5, 0.5 * error**2, 0.5 * (error - 0.25))
    assert regression_loss(mean, None, target, "huber", 0.5).item() == pytest.approx(huber.mean(), rel=1e-5)
    torch.testing.assert_close(regression_loss(mean, None, target), regression_loss(mean, None, target, "huber", 1.0))
    model = BrainFoundForRegression.from_backbone(backbone_folder, regression_loss="l1", target_std=4.0)
    output = model(torch.rand(2, 2, 3, 16, 16), labels=torch.tensor([3.0, -9.0]))
    torch.testing.assert_close(output.loss, ((output.predictions - torch.tensor([3.0, -9.0])) / 4).abs().mean())


def test_soft_labels_are_the_mass_of_a_gaussian():
    edges, target = torch.linspace(20, 80, 13), torch.tensor([37.3, 22.0, -500.0, 81.0])
    labels = soft_labels(target, edges, 1.5)
    for row, age in zip(labels.numpy(), target.tolist(), strict=True):
        normal = stats.norm(age, 1.5 * 5)
        ends = [-np.inf, *edges.tolist()[1:-1], np.inf]
        np.testing.assert_allclose(row, np.diff(normal.cdf(ends)), atol=1e-6)
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(4))
    # The loss is least, and zero, where the distribution is the label.
    perfect = labels.clamp(min=1e-30).log()
    assert bins_loss(perfect, target, edges, 1.5).item() == pytest.approx(0, abs=1e-6)
    scores = torch.randn(4, 12)
    logs = scores.log_softmax(dim=1)
    expected = sum(stats.entropy(p, q) for p, q in zip(labels.double(), logs.exp().double(), strict=True)) / 4
    assert bins_loss(scores, target, edges, 1.5).item() == pytest.approx(expected, rel=1e-4)


BINS = {"regression_head": "bins", "regression_range": [20, 100], "regression_bins": 16}


def test_the_answer_of_bins_is_their_expectation(backbone_folder):
    model = BrainFoundForRegression.from_backbone(backbone_folder, **BINS, target_mean=60.0, target_std=15.0)
    pixels, ages = torch.rand(3, 2, 3, 16, 16), torch.tensor([25.0, 60.0, 150.0])
    with torch.no_grad():
        model.head.score.weight.normal_()
        output = model(pixels, labels=ages)
    centres = np.arange(16) * 5 + 22.5
    shares = output.bin_probabilities.double().numpy()
    mean = shares @ centres
    np.testing.assert_allclose(output.predictions, mean, rtol=1e-5)
    variance = (shares * (centres - mean[:, None]) ** 2).sum(axis=1) + 25 / 12
    np.testing.assert_allclose(output.prediction_std, np.sqrt(variance), rtol=1e-4)
    # The unit in which the target is standardised changes nothing.
    plain = BrainFoundForRegression.from_backbone(backbone_folder, **BINS)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        same = plain(pixels, labels=ages)
    torch.testing.assert_close(same.loss, output.loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(same.predictions, output.predictions, rtol=1e-4, atol=1e-3)


def test_bins_learn_and_are_saved(backbone_folder, tmp_path):
    model = BrainFoundForRegression.from_backbone(backbone_folder, **BINS).train()
    pixels, ages = torch.rand(4, 2, 3, 16, 16), torch.tensor([30.0, 45.0, 70.0, 90.0])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(pixels, labels=ages).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path)
    reloaded = BrainFoundForRegression.from_pretrained(tmp_path)
    with torch.no_grad():
        answers = model(pixels).predictions
        assert (answers - ages).abs().max() < 6
        assert torch.equal(reloaded(pixels).predictions, answers)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"regression_head": "bin"}, "regression_head.*point, gaussian, bins"),
        ({"regression_loss": "l2"}, "regression_loss"),
        ({"regression_head": "bins"}, "bins need a range"),
        ({"regression_head": "bins", "regression_range": [5.0, 5.0]}, "bins need a range"),
        ({**BINS, "regression_bins": 1}, "regression_bins.*at least 2"),
        ({**BINS, "regression_loss": "l1"}, "loss of its own"),
        ({"huber_delta": 0.0}, "huber_delta.*positive"),
        ({"classification_focal_gamma": -1.0}, "focal_gamma.*at least 0"),
        ({"class_weights": [1.0, 2.0, 3.0]}, "class_weights.*expected 2 values"),
        ({"class_weights": [1.0, 0.0]}, "one positive weight per class"),
        ({"decoder_layers": []}, "one block or more.*numbers from 1"),
        ({"decoder_layers": [0]}, "counted from 1"),
        ({"image_std": 0.0}, "must be positive.*image_std|image_std.*must be positive"),
        ({"image_std": [0.2, 0.2, -1.0]}, "image_std.*must be positive"),
        ({"image_mean": math.nan}, "image_mean.*finite"),
        ({"image_mean": [0.4, math.inf, 0.4]}, "image_mean.*finite"),
        ({"head_dropout": 7}, "head_dropout.*below 1"),
        ({"head_dropout": 1.0}, "head_dropout.*below 1"),
        ({"head_dropout": -0.1}, "head_dropout.*at least 0"),
        ({"target_std": math.inf}, "target_std.*positive"),
        ({"target_mean": math.nan}, "target_mean.*finite"),
        ({"initializer_range": -0.02}, "initializer_range.*positive"),
    ],
)
def test_heads_that_cannot_be_are_named(fields, said):
    with pytest.raises(ModelError, match=said) as refused:
        BrainFoundConfig(**fields)
    assert "\n" not in str(refused.value)
    assert refused.value.remedy


def test_classification_losses_against_numpy():
    logits, labels, weights = torch.randn(9, 3), torch.randint(0, 3, (9,)), [0.5, 1.0, 4.0]
    shares = np.exp(F.log_softmax(logits.double(), dim=1).numpy())
    true = shares[np.arange(9), labels.numpy()]
    weight = np.array(weights)[labels.numpy()]
    weighted = classification_loss(logits, labels, None, weights)
    assert weighted.item() == pytest.approx(np.mean(-weight * np.log(true)), rel=1e-5)
    focal = classification_loss(logits, labels, None, focal_gamma=2.0)
    assert focal.item() == pytest.approx(np.mean(-((1 - true) ** 2) * np.log(true)), rel=1e-5)
    both = classification_loss(logits, labels, None, weights, 0.5)
    assert both.item() == pytest.approx(np.mean(-weight * (1 - true) ** 0.5 * np.log(true)), rel=1e-5)
    # A batch of one rare class still weighs more: the weights do not cancel.
    rare = torch.full((9,), 2)
    torch.testing.assert_close(
        classification_loss(logits, rare, None, weights), 4 * classification_loss(logits, rare, None)
    )
    assert torch.equal(classification_loss(logits, labels, None), F.cross_entropy(logits, labels))
    torch.testing.assert_close(
        classification_loss(logits, labels, None, [1.0, 1.0, 1.0]), F.cross_entropy(logits, labels)
    )


def test_unknown_labels_do_not_count():
    logits, labels = torch.randn(4, 3), torch.tensor([0, -100, 2, -100])
    for options in ({}, {"class_weights": [1.0, 1.0, 1.0]}):
        torch.testing.assert_close(
            classification_loss(logits, labels, None, **options), F.cross_entropy(logits[::2], labels[::2])
        )


MULTI_LABEL = "multi_label_classification"


@pytest.mark.parametrize("kind", [None, MULTI_LABEL])
@pytest.mark.parametrize("options", [{}, {"class_weights": [1.0, 2.0, 0.5]}, {"focal_gamma": 1.0}])
def test_where_no_label_is_known_the_loss_is_0(kind, options):
    logits = torch.randn(4, 3, requires_grad=True)
    labels = torch.full((4, 3) if kind else (4,), -100)
    loss = classification_loss(logits, labels, kind, **options)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(4, 3))


@pytest.mark.parametrize("options", [{}, {"class_weights": [1.0, 2.0, 0.5]}, {"focal_gamma": 1.0}])
def test_unknown_labels_among_several_do_not_count(options):
    logits, labels = torch.randn(5, 3), torch.randint(0, 2, (5, 3)).float()
    labels[0], labels[3, 1] = -100, -100
    changed = torch.where(labels == -100, 30.0, logits)
    loss = classification_loss(logits, labels, MULTI_LABEL, **options)
    torch.testing.assert_close(classification_loss(changed, labels, MULTI_LABEL, **options), loss)
    rows = torch.tensor([1, 2, 4])
    known = classification_loss(logits[rows], labels[rows], MULTI_LABEL, **options) * 9
    last = logits[3:4].repeat(3, 1), labels[3:4].repeat(3, 1)
    last[1][:, 1] = -100
    expected = (known + classification_loss(*last, MULTI_LABEL, **options) * 2) / 11
    torch.testing.assert_close(loss, expected)


def test_multi_label_losses_against_numpy():
    logits, labels, weights = torch.randn(7, 3), torch.randint(0, 2, (7, 3)).float(), [2.0, 0.25, 9.0]
    kind = "multi_label_classification"
    expected = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=torch.tensor(weights))
    torch.testing.assert_close(classification_loss(logits, labels, kind, weights), expected)
    truth = labels.numpy()
    share = 1 / (1 + np.exp(-logits.double().numpy()))
    true = np.where(truth == 1, share, 1 - share)
    focal = classification_loss(logits, labels, kind, focal_gamma=2.0)
    assert focal.item() == pytest.approx(np.mean(-((1 - true) ** 2) * np.log(true)), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_certain_answers_have_finite_gradients(gamma):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    classification_loss(logits, torch.tensor([0, 0]), None, focal_gamma=gamma).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[1].abs().sum() > 0


def test_weights_and_focus_reach_the_model(backbone_folder):
    model = BrainFoundForClassification.from_backbone(
        backbone_folder, class_weights=[1.0, 3.0], classification_focal_gamma=1.0
    )
    labels = torch.tensor([1, 0])
    output = model(torch.rand(2, 2, 3, 16, 16), labels=labels)
    torch.testing.assert_close(output.loss, classification_loss(output.logits, labels, None, [1.0, 3.0], 1.0))


def test_multi_label_uses_independent_labels(backbone_folder):
    model = BrainFoundForClassification.from_backbone(
        backbone_folder, num_labels=3, problem_type="multi_label_classification"
    )
    labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    output = model(torch.rand(2, 2, 3, 16, 16), labels=labels)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, labels))


@pytest.mark.parametrize("kind", [BrainFoundForClassification, BrainFoundForRegression, BrainFoundForSegmentation])
def test_labels_of_the_wrong_shape_are_named(backbone_folder, kind):
    model = kind.from_backbone(backbone_folder, decoder_width=8)
    with pytest.raises(ModelError, match=r"labels.*shape \(2, 7\)"):
        model(torch.rand(2, 2, 3, 16, 16), labels=torch.zeros(2, 7, dtype=torch.long))


@pytest.mark.parametrize("decoder", ["linear", "fpn"])
def test_a_decoder_reaches_every_pixel(backbone_folder, decoder):
    model = BrainFoundForSegmentation.from_backbone(backbone_folder, num_labels=4, decoder=decoder, decoder_width=8)
    output = model(torch.rand(2, 3, 3, 24, 40), labels=torch.zeros(2, 3, 24, 40, dtype=torch.long))
    assert output.logits.shape == (2, 3, 4, 24, 40)
    output.loss.backward()
    # The last block's CLS path ends before the decoder, and the body's aggregator is not used.
    unused = [name for name, parameter in model.decoder.named_parameters() if parameter.grad is None]
    assert unused == []


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 6])
def test_the_pyramid_ends_at_a_quarter_of_a_patch(write_backbone, tmp_path, num_layers):
    from brainfound.models import BrainFoundConfig

    backbone = {"model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2}
    config = BrainFoundConfig(
        backbone_config=backbone, decoder_layers=list(range(1, num_layers + 1)), decoder_width=12, num_labels=3
    )
    decoder = DECODERS[config.decoder](config)
    fused = decoder.fuse({layer: torch.rand(2, 6, 16) for layer in decoder.layers}, (2, 3))
    assert decoder.refine(fused).shape == (2, 3, 8, 12)
    assert len(pyramid_factors(num_layers)) == num_layers


def test_the_pyramid_tells_pixels_of_one_patch_apart(backbone_folder):
    """A mask with an edge inside patches is learned better than one class per patch could."""
    model = BrainFoundForSegmentation.from_backbone(backbone_folder, decoder_width=16).train()
    pixels = torch.rand(1, 2, 3, 16, 16)
    labels = torch.zeros(1, 2, 16, 16, dtype=torch.long)
    labels[..., :4], labels[..., 8:12] = 1, 1
    for parameter in model.encoder.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(model.decoder.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(pixels, labels=labels).loss.backward()
        optimizer.step()
    correct = (model.eval()(pixels).logits.argmax(dim=2) == labels).float().mean()
    assert correct > 0.9


def test_slice_mixing_reads_the_neighbours_of_its_own_volume(backbone_folder):
    model = BrainFoundForSegmentation.from_backbone(backbone_folder, decoder_width=8, decoder_slice_mixing=True)
    with torch.no_grad():
        model.decoder.slice_mixing.weight.normal_()
    pixels = torch.rand(2, 3, 3, 16, 16)
    changed = pixels.clone()
    changed[0, 2] = torch.rand(3, 16, 16)
    with torch.no_grad():
        same = (model(pixels).logits == model(changed).logits).flatten(2).all(dim=2)
    assert same.tolist() == [[True, False, False], [True, True, True]]


def test_a_transformers_trainer_trains_and_evaluates(backbone_folder, tmp_path):
    torch.manual_seed(0)
    model = BrainFoundForClassification.from_backbone(backbone_folder, aggregator="attention")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    volumes = [
        {
            "pixel_values": torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8),
            "contrast_mask": torch.tensor([True, False, True]),
            "slice_mask": torch.tensor([True, True, index > 0]),
            "positions_mm": torch.arange(3.0),
            "labels": index % 2,
        }
        for index in range(4)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=volumes, eval_dataset=volumes)
    assert np.isfinite(trainer.train().training_loss)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {"head.score.weight", "brainfound.aggregator.score.weight"} <= changed
    assert any("encoder.backbone.encoder.layer.0" in name for name in changed)
    prediction = trainer.predict(volumes)
    assert prediction.predictions.shape == (4, 2)


def test_an_expectation_over_bins_is_not_rounded_by_autocast():
    """In bfloat16 an age of 70.2 years would be 70."""
    backbone = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BrainFoundConfig(
        backbone_config=backbone, regression_head="bins", regression_range=(20.0, 90.0), target_mean=55, target_std=20
    )
    torch.manual_seed(0)
    head = RegressionHead(config).eval()
    embedding = torch.randn(4, config.hidden_size)
    plain = head(embedding)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = head(embedding)
    assert mixed.mean.dtype == torch.float32
    assert torch.equal(mixed.mean, (mixed.bin_logits.softmax(1) * _centres(config)).sum(1))
    torch.testing.assert_close(mixed.mean, plain.mean, atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_autocast_rounds_no_head(kind):
    """A head fitted to embeddings that share a lot has products that cancel; rounded, its answers were off by 0.3."""
    backbone = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BrainFoundConfig(backbone_config=backbone, id2label={0: "a", 1: "b"})
    torch.manual_seed(0)
    head = (ClassificationHead if kind == "classification" else RegressionHead)(config).eval()
    embedding = torch.randn(1, config.hidden_size) + 0.01 * torch.randn(8, config.hidden_size)
    with torch.no_grad():
        head.score.weight.mul_(100)
        head.score.bias.copy_(-(head.norm(embedding) @ head.score.weight.T).mean(dim=0))
    answers = []
    for narrow in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            scores = head(embedding)
            answers.append(scores if kind == "classification" else scores.mean)
    assert answers[0].std() > 1e-3, "what is compared differs between subjects"
    torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=0)


def _centres(config):
    edges = bin_edges(config)
    return (edges[1:] + edges[:-1]) / 2


@pytest.mark.parametrize("wrong", [-1.0, 1.5])
def test_a_label_among_several_is_a_share(wrong):
    labels = torch.tensor([[0.0, 1.0], [wrong, 0.5]])
    with pytest.raises(ModelError, match="0, 1 or a share"):
        classification_loss(torch.zeros(2, 2), labels, "multi_label_classification")
