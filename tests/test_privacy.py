"""Names and paths stay out of messages, logs, scores and whatever is made to be given away."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from brainfound import Store, finetune, prepare, pretrain
from brainfound.data.preprocessing.settings import Preprocessing

ALLOWED = {
    # Of a run folder, not of what is below it: without them a split could not be repeated, nor a run be resumed.
    Path("splits.json"),
    Path("recipe.yaml"),
}


@pytest.fixture(scope="module")
def secrets(tmp_path_factory, make_cohort, tiny_backbone):
    """A cohort, a store and a checkpoint whose names and folders must not show up."""
    folder = tmp_path_factory.mktemp("JaneDoe")
    source = make_cohort(folder / "cohort", num_subjects=10)
    table = pd.read_csv(source / "manifest.tsv", sep="\t", dtype={"session": str})
    table["subject"] = "PATIENT" + table["subject"]
    table.to_csv(source / "manifest.tsv", sep="\t", index=False)
    (source / "s00_T1w.nii.gz").write_bytes(b"no scan")
    store = prepare(source, folder / "store", Preprocessing(spacing_mm=(4, 4, 4), size=(32, 32)))
    backbone = folder / "weights"
    backbone.symlink_to(tiny_backbone)
    return folder, store, backbone


def leaks(folder, *words: str) -> list[str]:
    found = []
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        if file.is_file() and relative.parts[0] != "checkpoints" and relative not in ALLOWED:
            content = file.read_bytes()
            found += [f"{relative}: {word}" for word in words if word.encode() in content]
    return found


def test_a_fine_tuned_model_and_its_reports_name_nobody(secrets):
    folder, store, backbone = secrets
    steps = ["engine.steps=1", "engine.batch_size=2", "num_slices=4", "evaluate_every=1", "head_fit_passes=0"]
    out = folder / "tuned"
    run = finetune("finetune-classification", store, backbone, "diagnosis", out, overrides=steps, quiet=True)
    assert leaks(run, "PATIENT", "JaneDoe") == []
    assert leaks(run / "export", "s00_T1w") == []


def test_a_pretrained_model_and_its_reports_name_nobody(secrets):
    folder, store, backbone = secrets
    overrides = ["engine.steps=1", "engine.batch_size=2", "probe.every=0"]
    run = pretrain("pretrain-demo", store, str(backbone), folder / "pretrained", overrides=overrides, quiet=True)
    assert leaks(run, "PATIENT", "JaneDoe") == []


def test_names_are_in_the_store_and_not_in_what_is_reported_of_it(secrets, capsys, monkeypatch):
    from brainfound.cli.main import main

    folder, _, _ = secrets
    coarse = ["--set", "spacing_mm=[4,4,4]", "--set", "size=[32,32]"]
    monkeypatch.setattr("sys.argv", ["brainfound", "prepare", f"{folder}/cohort", f"{folder}/store", *coarse])
    with pytest.raises(SystemExit):
        main()
    out, err = capsys.readouterr()
    assert "1 files rejected" in err
    assert "PATIENT" not in out + err
    assert "s00_T1w" not in out + err
    store = Store.open(folder / "store")
    assert store.sessions["subject"].str.startswith("PATIENT").all()
    assert store.rejected["file"].tolist() == ["s00_T1w.nii.gz"]
