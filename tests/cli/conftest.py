"""The real command line in this process, and a small fine-tuned model to give to it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from brainfound.cli.main import main
from tests.tiny_runs import _few_resamples  # noqa: F401


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """What stands on standard error, which must be one line."""
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("brainfound: ")
        return lines[0]


@pytest.fixture
def cli(monkeypatch, capsys):
    """Call ``brainfound ARGUMENTS`` quietly; an exception that is not `SystemExit` fails the test."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # What --quiet sets for the process is put back.
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))

    def call(*arguments: object, quiet: bool = True) -> Answer:
        monkeypatch.setattr("sys.argv", ["brainfound", *map(str, arguments), *(["-q"] if quiet else [])])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return Answer(end.value.code, out, err)

    yield call
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()


@pytest.fixture(scope="session")
def classifier(tmp_path_factory, small_store, tiny_backbone) -> Path:
    """The run folder of a classification after two steps."""
    from brainfound.finetuning.finetune import finetune

    steps = ["engine.steps=2", "engine.batch_size=2", "num_slices=4", "evaluate_every=0", "head_fit_passes=0"]
    folder = tmp_path_factory.mktemp("runs") / "diagnosis"
    return finetune(
        "finetune-classification", small_store, tiny_backbone, "diagnosis", folder, overrides=steps, quiet=True
    )


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory, small_store, tiny_backbone) -> Path:
    """The run folder of a segmentation after one step."""
    from brainfound.finetuning.finetune import finetune

    steps = ["engine.steps=1", "engine.batch_size=2", "num_slices=4", "evaluate_every=0", "task.decoder_width=8"]
    steps += ["frozen_baseline=false"]
    folder = tmp_path_factory.mktemp("runs") / "lesions"
    return finetune("finetune-segmentation", small_store, tiny_backbone, "mask", folder, overrides=steps, quiet=True)
