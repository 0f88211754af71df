"""What is compared, as it is typed: names, keys of one adapter alone, subsets of the contrasts."""

from __future__ import annotations

import pytest

from brainfound.errors import UsageError
from brainfound.experiments.systems import SystemSpec, make_subset_systems, parse_systems
from brainfound.training.run_folder import short_name


def test_one_start_and_one_adapter_have_no_name():
    assert parse_systems(["facebook/dinov2-small"]) == [SystemSpec("", "facebook/dinov2-small", start="dinov2-small")]
    (system,) = parse_systems(["runs/vits14/export"], ["full,optim.lr=1e-5,engine.steps=3"])
    assert (system.name, system.start, system.adapter) == ("", "vits14", "full")
    assert system.all_overrides == ("optim.lr=1e-5", "engine.steps=3")


def test_what_differs_is_in_the_name():
    assert [s.name for s in parse_systems(["a/x", "b/y"])] == ["x", "y"]
    assert [s.name for s in parse_systems(["a/x"], ["head-only", "my/lora.yaml"])] == ["head-only", "lora"]
    both = parse_systems(["ours=a/x", "b/y"], ["head-only", "slow=full,optim.lr=1e-5"])
    assert [s.name for s in both] == ["ours+head-only", "ours+slow", "y+head-only", "y+slow"]
    assert [(s.model, s.adapter) for s in both[:2]] == [("a/x", "head-only"), ("a/x", "full")]


@pytest.mark.parametrize(
    ("models", "adapters", "says"),
    [
        ([], [], "nothing to start from"),
        (["a/x", "b/x"], [], "two are called x"),
        (["a/x"], ["full", "full,optim.lr=1e-5"], "two are called full"),
        (["a/x"], ["full,lr"], "not a key with its value"),
        (["ours="], [], "missing"),
        (["a/x"], [""], "missing"),
    ],
)
def test_what_cannot_be_distinguished_is_refused(models, adapters, says):
    with pytest.raises(UsageError, match=says):
        parse_systems(models, adapters)


def test_a_folder_with_an_equals_sign_is_a_folder(tmp_path):
    folder = tmp_path / "lr=1"
    folder.mkdir()
    assert parse_systems([str(folder)])[0].model == str(folder)


def test_every_subset_is_a_system_and_the_full_one_comes_first():
    (system,) = parse_systems(["a/x"], ["head-only"])
    subsets = make_subset_systems(system, ("T1w", "T2w", "FLAIR"))
    assert len(subsets) == 7
    assert subsets[0].name == "T1w+T2w+FLAIR"
    assert subsets[-1].all_overrides == ("contrasts=[FLAIR]",)
    with pytest.raises(UsageError, match="two contrasts or more"):
        make_subset_systems(system, ("T1w",))


def test_a_model_is_known_by_its_last_name():
    assert [short_name(m) for m in ("facebook/dinov2-small", "/home/me/runs/age/export", "runs/age")] == [
        "dinov2-small", "age", "age",
    ]  # fmt: skip
