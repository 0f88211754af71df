"""Model cards say what is known, and no more."""

from __future__ import annotations

import re

import pytest
import yaml

from brainfound.errors import UsageError
from brainfound.recipes import find, recipe_folder
from brainfound.report.cards import NOT_RECORDED, write_model_card

_FACTS = {
    "name": "brainfound-tiny",
    "license": "apache-2.0",
    "tags": ["dinov2", "mri"],
    "base_model": "facebook/dinov2-small",
    "kind": "encoder",
    "contrasts": ("T1w", "FLAIR"),
    "preprocessing": {"spacing_mm": (1.0, 1.0, None), "size": [224, 224]},
    "training_data": "phantom",
    "data_hash": "abc123",
    "num_sessions": 12,
    "metrics": [
        {"metric": "AUROC", "value": 0.81234, "data": "held out", "low": 0.7},
        {"metric": "Dice", "value": None, "data": "a|b"},
    ],
    "versions": {"torch": "2.13.0", "transformers": "5.23"},
    "spent_joules": 12.0,
    "warnings": {},
}


def read_front_matter(card):
    return yaml.safe_load(card.read_text().split("---\n")[1])


def test_a_full_card(tmp_path):
    path = write_model_card(tmp_path / "export", _FACTS)
    assert path == tmp_path / "export" / "README.md"
    front = read_front_matter(path)
    assert front["library_name"] == "brainfound"
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == "facebook/dinov2-small"
    assert front["tags"].count("mri") == 1
    assert "dinov2" in front["tags"]
    text = path.read_text()
    assert "\n# brainfound-tiny\n" in text
    assert "not a medical device" in text
    assert "independent implementation" in text
    assert "Contrasts, in the order of the channels: T1w, FLAIR" in text
    assert "| spacing_mm | 1, 1, null |" in text  # null is the setting "as acquired"
    assert "| Data hash | abc123 |" in text
    assert "| Versions | torch 2.13.0, transformers 5.23 |" in text
    assert "| AUROC | 0.8123 | held out | 0.7 |" in text
    assert f"| Dice | {NOT_RECORDED} | a\\|b | {NOT_RECORDED} |" in text
    assert "| spent_joules | 12 |" in text
    assert "warnings" not in text
    assert 'predictor.predict(T1w="sub-01_T1w.nii.gz", FLAIR="sub-01_FLAIR.nii.gz")' in text
    assert "BrainFoundModel.from_pretrained(" in text
    assert "$" not in text


def test_nothing_known_is_nothing_invented(tmp_path):
    text = write_model_card(tmp_path, {"license": None}).read_text()
    front = read_front_matter(tmp_path / "README.md")
    assert front["license"] == "other"
    assert front["license_name"] == "not-recorded"
    assert "base_model" not in front
    for row in ("Started from", "Objective", "Data", "Data hash", "Seed", "Recipe", "Versions"):
        assert f"| {row} | {NOT_RECORDED} |" in text
    assert f"## Results\n\n{NOT_RECORDED}\n" in text
    assert "apache" not in text.lower()
    assert "Also recorded" not in text


def test_a_local_base_model_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    for base in ("runs/teacher", str(tmp_path / "runs" / "teacher")):
        path = write_model_card(tmp_path / "card", {"base_model": base})
        assert "base_model" not in read_front_matter(path)
        assert "| Started from | teacher (a local folder) |" in path.read_text()
        assert str(tmp_path) not in path.read_text()


def test_new_weights_stand_in_place_of_a_base_model(tmp_path):
    text = write_model_card(tmp_path, {"start": "new weights"}).read_text()
    assert "| Started from | new weights |" in text
    assert "Also recorded" not in text


def test_an_export_has_the_name_of_its_run(tmp_path):
    for base in ("runs/teacher/export", str(tmp_path / "teacher" / "export")):
        assert (
            "| Started from | teacher/export (a local folder) |"
            in write_model_card(tmp_path / "card", {"base_model": base}).read_text()
        )


def test_text_that_would_break_the_card_is_kept_in_its_place(tmp_path):
    facts = {"name": "a\n---\nlicense: mit", "license": "mit: [", "kind": "x\n| y", "summary": "costs $5 and ${name}"}
    path = write_model_card(tmp_path, facts)
    assert read_front_matter(path)["license"] == "mit: ["
    assert "| Kind | x \\| y |" in path.read_text()
    assert "costs $5 and ${name}" in path.read_text()


@pytest.mark.parametrize("metrics", ["0.8", [0.8], [{"metric": "AUROC"}]])
def test_metrics_of_another_form_are_refused(tmp_path, metrics):
    with pytest.raises(UsageError, match="metric"):
        write_model_card(tmp_path, {"metrics": metrics})
    assert not (tmp_path / "README.md").exists()


def test_metrics_may_be_a_mapping(tmp_path):
    assert "| Dice | 0.5 |" in write_model_card(tmp_path, {"metrics": {"Dice": 0.5}}).read_text()


@pytest.mark.parametrize("card", ["brainfound-vitl14.md", "brainfound-vitb14.md", "brainfound-vits14.md"])
def test_cards_of_configurations_claim_no_weights(card):
    path = recipe_folder("model_cards") / card
    front = read_front_matter(path)
    assert front["library_name"] == "brainfound"
    assert front["base_model"].startswith("facebook/dinov2-")
    text = path.read_text()
    assert "No weights of this configuration have been published yet" in text
    assert "not a medical device" in text
    assert "independent implementation" in text
    # The card names a recipe that ships and that starts from the same model.
    (name,) = set(re.findall(r"pretrain-\w+-(?:24gb|8gpu)", text))
    recipe = yaml.safe_load(find(name, "train").read_text())
    assert recipe["init"]["source"] == front["base_model"]
