"""curves.png from any subset of what a run may log."""

from __future__ import annotations

import json
import math
import random

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from brainfound.report.curves import plot_curves

_ALL_KEYS = (
    "loss", "loss_dino", "loss_ibot", "lr", "teacher_entropy", "effective_rank", "mean_cosine", "gram_distance",
    "grad_norm", "probe", "skipped_steps", "validation/auroc", "validation/loss", "images_per_second",
)  # fmt: skip


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look at what is in them."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k))[1])
    return figures


def _log(folder, keys, num_steps=6, **more):
    generator = random.Random(0)
    with (folder / "log.jsonl").open("w") as log:
        for step in range(num_steps):
            log.write(json.dumps({"step": step, **{key: generator.random() + 0.1 for key in keys}, **more}) + "\n")


def _titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_every_key_has_a_panel(tmp_path, drawn):
    _log(tmp_path, _ALL_KEYS)
    path = plot_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    assert imread(path).shape[0] > 500
    assert _titles(drawn[0]) == [
        "Loss", "Parts of the loss", "Learning rate", "Entropy (share of ln K)", "Effective rank of CLS",
        "Mean cosine between CLS", "Gram distance to the anchor", "Gradient norm", "Probe of the teacher",
        "Skipped steps", "Validation · auroc", "Validation · loss", "Images per second",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "log.jsonl"]


@pytest.mark.parametrize("keys", [(), ("loss",), ("lr", "probe"), ("validation/dice",), ("grad_norm", "unheard_of")])
def test_any_subset_of_keys(tmp_path, drawn, keys):
    _log(tmp_path, keys)
    plot_curves(tmp_path)
    assert len(drawn[0].axes) == len(keys)
    says_empty = any("No numbers" in text.get_text() for text in drawn[0].texts)
    assert says_empty == (not keys)


def test_a_torn_last_line_and_an_empty_log(tmp_path, drawn):
    _log(tmp_path, ("loss",))
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')
    plot_curves(tmp_path)
    assert len(drawn[0].axes[0].get_lines()[0].get_xdata()) == 6
    (tmp_path / "log.jsonl").write_text("")
    assert plot_curves(tmp_path).stat().st_size > 0


def test_ln_k_is_drawn_with_the_loss(tmp_path, drawn):
    _log(tmp_path, ("loss",), ln_k=math.log(65536))
    plot_curves(tmp_path)
    lines = {line.get_label(): line for line in drawn[0].axes[0].get_lines()}
    assert lines["ln K = 11.09"].get_ydata()[0] == pytest.approx(math.log(65536))
    assert len(drawn[0].axes) == 1  # ln K has no panel of its own


def test_ln_k_is_drawn_with_the_parts_of_a_loss_and_not_with_their_sum(tmp_path, drawn):
    _log(tmp_path, ("loss", "loss_dino", "loss_ibot"), ln_k=math.log(65536))
    plot_curves(tmp_path)
    labels = [[line.get_label() for line in axes.get_lines()] for axes in drawn[0].axes]
    assert "ln K = 11.09" not in labels[0]
    assert "ln K = 11.09" in labels[1]


def test_alarms_of_the_gauges_are_in_view(tmp_path, drawn):
    _log(tmp_path, ("mean_cosine",))
    plot_curves(tmp_path)
    low, high = drawn[0].axes[0].get_ylim()
    assert low < 0.995 < high
    assert any(text.get_text() == "alarm above 0.995" for text in drawn[0].axes[0].texts)


def test_values_that_are_not_finite_are_counted_and_the_best_is_found(tmp_path, drawn):
    probes = [0.5, math.nan, 0.7, None, 0.6]  # in both spellings
    lines = [json.dumps({"step": 10 * i, "probe": value, "probe/knn": 0.9}) for i, value in enumerate(probes)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    plot_curves(tmp_path)
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    assert "2 not finite" in texts
    assert drawn[0].axes[0].get_title(loc="right") == "best 0.7 at step 20"


def test_long_logs_are_smoothed_without_shifting(tmp_path, drawn):
    lines = [{"step": s, "loss": float(s % 2)} for s in range(1000)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_curves(tmp_path)
    raw, smooth = drawn[0].axes[0].get_lines()
    assert set(raw.get_ydata()) == {0.0, 1.0}
    assert smooth.get_ydata() == pytest.approx([0.5] * 1000, abs=0.06)


def test_panels_beyond_the_most_are_named_in_the_title(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr("brainfound.report.curves._MOST_PANELS", 4)
    _log(tmp_path, [f"extra_{i}" for i in range(7)], num_steps=2)
    plot_curves(tmp_path)
    assert len(drawn[0].axes) == 4
    assert "3 more panels not shown: extra_4" in drawn[0].get_suptitle()


def test_a_rollback_is_marked_and_reported(tmp_path, drawn):
    _log(tmp_path, ("loss", "probe"))
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 3, "rollback": 1, "rolled_back_from": 5, "reason": "x", "lr_scale": 0.3}) + "\n")
    plot_curves(tmp_path)
    assert _titles(drawn[0]) == ["Loss", "Probe of the teacher"]
    assert "rolled back 1 ×" in drawn[0].get_suptitle()
    for axes in drawn[0].axes:
        assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [3]
