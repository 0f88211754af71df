"""From files to answers: a bundle or an encoder, loaded once, asked many times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from brainfound.adapters import load_adapters, load_bundle
from brainfound.adapters.bundle_reader import Bundle
from brainfound.contrasts import CONTRASTS, parse_contrast
from brainfound.data.checking.contract import InputContract
from brainfound.data.cohort import Session
from brainfound.data.hooks import Hook, load_hooks
from brainfound.data.prepare_session import PreparedSession, prepare_session
from brainfound.data.preprocessing import Preprocessing
from brainfound.data.stack import Stack
from brainfound.errors import ModelError, ScanError, UsageError
from brainfound.models import BrainFoundModel
from brainfound.models.backbone import LOAD_FAILURES, is_hub_id, unreadable
from brainfound.models.inference import infer, inner_model
from brainfound.predict.given_scans import given_scans
from brainfound.predict.prediction import Prediction
from brainfound.predict.predictor_set import PredictorSet
from brainfound.predict.segmentation_answer import SegmentationOptions, segmentation_answer
from brainfound.train.answer_calibration import AnswerCalibration
from brainfound.train.run_files import holds_run
from brainfound.train.targets import Target

WHOLE_BUNDLE = ("*.json", "*.safetensors", "README.md")
"""The files of a bundle; what else a Hub repository holds is not downloaded."""


@dataclass(frozen=True)
class ReadySession:
    """A session as a predictor has read it, before the model is asked.

    Attributes:
        stack: what the model will see.
        notes: what a reader of the answer should know of the scans.
        rejected: scans that could not be used, with the reason.
    """

    stack: Stack
    notes: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()


class Predictor:
    """A model with its own preprocessing, ready to be asked.

    Args:
        model: a BrainFound model, or a PEFT model around one.
        preprocessing: the one that the model was trained with.
        target: how its answers read; None for an encoder.
        num_slices: slices to read per session; None for all.
        device: where it runs; None: the first GPU that there is, else the CPU.
        hooks: tools that are run on each scan first, as they were on the training scans.
        calibration: what was fitted on the validation part; its answers stand beside the raw ones.
        options: of a segmentation: averaging, small pieces, probabilities of classes.
        contract: what the scans were like that it learnt from; None where that is not known.

    Raises:
        UsageError: the model's scans went through other hooks, or the options are for a segmentation and it is none.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        target: Target | None = None,
        num_slices: int | None = None,
        device: str | torch.device | None = None,
        hooks: Sequence[Hook] = (),
        calibration: AnswerCalibration | None = None,
        options: SegmentationOptions = SegmentationOptions(),
        contract: InputContract | None = None,
    ) -> None:
        self.contract = contract
        self.calibration = calibration or AnswerCalibration()
        if options != SegmentationOptions() and (target is None or target.task != "segmentation"):
            raise UsageError(
                "flips, overlap and a smallest volume are for segmentations",
                where="options",
                got="an encoder" if target is None else f"a {target.task} model",
                remedy="Leave them out",
            )
        if hooks:
            preprocessing.require_hooks([hook.name for hook in hooks])
        self.hooks, self.options = tuple(hooks), options
        self.device = usable_device(device)
        self.model = model.to(self.device).eval()
        self.preprocessing, self.target, self.num_slices = preprocessing, target, num_slices

    def as_encoder(self) -> Predictor:
        """The same model, asked for the volume embedding before its head.

        Raises:
            UsageError: a segmentation, which makes no volume embedding.
        """
        if self.task == "segmentation":
            raise UsageError(
                "a segmentation model makes no volume embedding",
                where="embed",
                expected="an encoder, or a classification or regression model",
                remedy="Use predict for its answer, or embed with the encoder that it was fine-tuned from",
            )
        return Predictor(
            self.model, self.preprocessing, None, self.num_slices, self.device, self.hooks, contract=self.contract
        )

    def with_options(self, options: SegmentationOptions) -> Predictor:
        """The same model with other options of a segmentation.

        Raises:
            UsageError: it is no segmentation.
        """
        return Predictor(
            self.model,
            self.preprocessing,
            self.target,
            self.num_slices,
            self.device,
            self.hooks,
            self.calibration,
            options,
            self.contract,
        )

    @property
    def task(self) -> str:
        return "embedding" if self.target is None else self.target.task

    def predict(self, *paths: str | Path, **contrast_paths: str | Path) -> Prediction:
        """Ask about one session.

        Args:
            paths: scans whose file names say their contrast (``…_T1w.nii.gz``, ``flair.nii.gz``).
            contrast_paths: scans by contrast: ``predict("a.nii.gz", flair="b.nii.gz")``. One single path whose name
                says nothing is taken for the model's contrast if it has only one.

        Raises:
            UsageError: a contrast is given twice, is not one of the model's, or cannot be told from the name.
            ScanError: a scan cannot be used.
        """
        files, notes = given_scans(paths, contrast_paths, self.preprocessing.contrasts, self.has_seen)
        prepared = prepare_session(Session("", "", files, {}, {}), self.preprocessing, hooks=self.hooks)
        for entry in prepared.refused:
            raise ScanError(entry.reason, where=entry.file.name)
        assert prepared.stack is not None, "nothing was refused, so there is a stack"
        return self.predict_stack(prepared.stack, (*notes, *self._notes_on(prepared)))

    def predict_session(self, session: Session) -> Prediction:
        """Ask about a session of a cohort; scans that cannot be used are treated as absent and noted.

        Raises:
            ScanError: no scan of the session can be used.
        """
        return self.answer(self.prepare(session))

    def prepare(self, session: Session) -> ReadySession:
        """Read a session of a cohort as the model will see it; the model is not asked.

        Scans that cannot be used, and those of contrasts that the model never learnt to read, are left out and noted.

        Raises:
            ScanError: no scan of the session can be used.
        """
        unread = [contrast for contrast in session.scans if contrast in CONTRASTS and not self.has_seen(contrast)]
        scans = {contrast: file for contrast, file in session.scans.items() if contrast not in unread}
        extra = tuple((contrast, file) for contrast, file in session.extra_scans if contrast not in unread)
        known = replace(session, scans=scans, extra_scans=extra, covariates={}, masks={})
        prepared = prepare_session(known, self.preprocessing, hooks=self.hooks)
        further = [f"{entry.contrast}: {entry.reason}" for entry in prepared.further_scans]
        further += [f"{contrast}: not read, the model was not trained with it" for contrast in unread]
        rejected = tuple(f"{entry.contrast}: {entry.file.name}: {entry.reason}" for entry in prepared.refused)
        if prepared.stack is None:
            raise ScanError(f"no scan can be used; {[*rejected, *further, 'none is there'][0]}", where=session.subject)
        return ReadySession(prepared.stack, (*further, *self._notes_on(prepared)), rejected)

    def answer(self, ready: ReadySession) -> Prediction:
        """Ask about a session that this predictor's `prepare` has read."""
        return self.predict_stack(ready.stack, ready.notes, ready.rejected)

    def has_seen(self, contrast: str) -> bool:
        """Whether the model reads a contrast and, as far as its input contract says, learnt from scans of it."""
        if contrast not in self.preprocessing.contrasts:
            return False
        learnt = self.contract.coarsest_mm if self.contract else {}
        return not learnt or contrast in learnt

    def _notes_on(self, prepared: PreparedSession) -> list[str]:
        notes = [f"{quality.contrast}: {note}" for quality in prepared.quality for note in quality.notes]
        if self.preprocessing.hooks and not self.hooks:
            names = ", ".join(self.preprocessing.hooks)
            notes.append(f"the model learnt from scans that went through {names}; these were taken as they are")
        return notes

    def predict_stack(self, stack: Stack, notes: tuple[str, ...] = (), rejected: tuple[str, ...] = ()) -> Prediction:
        """Ask about a stack that this predictor's preprocessing made; notes and rejected scans are passed on."""
        target, options = self.target, self.options
        several = target is not None and (bool(target.regions) or len(target.codes) > 2)
        answer = infer(self.model, stack, self.num_slices, options.readings, options.class_probabilities and several)
        present = tuple(c for c, here in zip(stack.contrasts, stack.present, strict=True) if here)
        common: dict[str, Any] = {
            "task": self.task,
            "contrasts": present,
            "missing": tuple(c for c in stack.contrasts if c not in present),
            "subject": stack.subject,
            "session": stack.session,
            "notes": notes,
            "rejected": rejected,
        }
        if target is None:
            assert answer.embedding is not None
            return Prediction(answer={"dimensions": len(answer.embedding)}, embedding=answer.embedding, **common)
        if target.task == "regression":
            values: dict[str, Any] = {"target": target.column, "value": answer.value}
            values |= {} if answer.value_std is None else {"standard_deviation": answer.value_std}
            values |= self.calibration.of_answer(answer, target)
            return Prediction(answer=values, **common)
        if target.task == "classification":
            assert answer.probabilities is not None
            probabilities = {name: float(p) for name, p in zip(target.names, answer.probabilities, strict=True)}
            if target.multi_label:
                said: dict[str, Any] = {"present": [name for name, p in probabilities.items() if p > 0.5]}
            else:
                said = {"class": max(probabilities, key=probabilities.__getitem__)}
            values = {"target": target.column, **said, "probabilities": probabilities}
            values |= self.calibration.of_answer(answer, target)
            return Prediction(answer=values, **common)
        return Prediction(**segmentation_answer(stack, answer, target, options), **common)


@overload
def load(
    path_or_id: str | Path,
    device: str | torch.device | None = None,
    hooks: Iterable[str | Path] = (),
    options: SegmentationOptions = SegmentationOptions(),
) -> Predictor: ...
@overload
def load(
    path_or_id: Mapping[str, str | Path],
    device: str | torch.device | None = None,
    hooks: Iterable[str | Path] = (),
    options: SegmentationOptions = SegmentationOptions(),
) -> PredictorSet: ...
def load(
    path_or_id: str | Path | Mapping[str, str | Path],
    device: str | torch.device | None = None,
    hooks: Iterable[str | Path] = (),
    options: SegmentationOptions = SegmentationOptions(),
) -> Predictor | PredictorSet:
    """Load a bundle (the ``export`` of a fine-tuning run) or an encoder (the ``export`` of a pretraining run).

    Args:
        path_or_id: a run folder, its export folder, or a Hub id. Several bundles that were trained on one backbone,
            by name, make a `PredictorSet`: ``load({"age": "runs/age", "tumour": "runs/tumour"})``.
        device: where it runs; None: the first GPU that there is, else the CPU.
        hooks: tools to run on each scan first (``"synthstrip"``, …), see `brainfound.data.hooks.load_hooks`.
        options: of a segmentation: averaging over flips and patch grids, the smallest piece that stays.

    Raises:
        UsageError: a hook is not installed, or not the one that the model's scans went through; options for a
            segmentation and a model of another kind.
        ModelError: there is nothing that can be loaded, or it is damaged; of several, one has a backbone of its own.
    """
    device = usable_device(device)
    tools = load_hooks(hooks)
    if isinstance(path_or_id, Mapping):
        return _load_set(path_or_id, device, tools, options)
    path = _bundle_folder(path_or_id)
    if (path / "bundle.json").is_file():
        return _of_bundle(load_bundle(path), device, tools, options)
    if holds_run(path):
        raise ModelError(
            "the run has no export: it has not finished",
            where=path,
            remedy="Go on with it: the same command and --resume",
        )
    if (path / "store.json").is_file():
        raise ModelError("this is a store, not a model", where=path, remedy="Give the model first, then the scans")
    source = str(path) if path.exists() else str(path_or_id)
    model = BrainFoundModel.from_pretrained(source)
    kinds = [kind for kind in model.config.architectures or () if kind != BrainFoundModel.__name__]
    if kinds:
        raise ModelError(
            f"this is a {kinds[0]} by itself: what its answers mean is not there",
            where=source,
            expected="a bundle",
            remedy="Save it with save_bundle, which keeps labels and preprocessing with the weights",
        )
    preprocessing = Preprocessing.load(local_folder(source))
    return Predictor(model, preprocessing, None, None, device, tools, options=options)


def _bundle_folder(path_or_id: str | Path) -> Path:
    """The folder that a bundle would be in: the export of a run, or for a Hub id what was downloaded."""
    path = Path(path_or_id)
    if (path / "export").is_dir():
        return path / "export"
    if not is_hub_id(str(path_or_id)):
        return path
    try:
        folder = local_folder(str(path_or_id))
        return local_folder(str(path_or_id), WHOLE_BUNDLE) if (folder / "bundle.json").is_file() else path
    except LOAD_FAILURES as error:
        raise unreadable(str(path_or_id), error) from error


def _load_set(
    bundles: Mapping[str, str | Path], device: torch.device, tools: Sequence[Hook], options: SegmentationOptions
) -> PredictorSet:
    adapters = load_adapters({name: _bundle_folder(source) for name, source in bundles.items()}).to(device)
    segmenting = [name for name in adapters if adapters[name].task == "segmentation"]
    if options != SegmentationOptions() and not segmenting:
        raise UsageError(
            "flips, overlap and a smallest volume are for segmentations", where="options", remedy="Leave them out"
        )
    return PredictorSet(
        {
            name: _of_bundle(adapters[name], device, tools, options if name in segmenting else SegmentationOptions())
            for name in adapters
        }
    )


def _of_bundle(bundle: Bundle, device: torch.device, tools: Sequence[Hook], options: SegmentationOptions) -> Predictor:
    metadata = bundle.metadata
    return Predictor(
        bundle.model,
        bundle.preprocessing,
        _target_of(bundle),
        metadata.get("num_slices"),
        device,
        tools,
        AnswerCalibration.from_dict(metadata.get("calibration")),
        options,
        InputContract.load_or_none(bundle.folder),
    )


def _target_of(bundle: Bundle) -> Target | None:
    """How a bundle's answers read; None of an encoder."""
    if bundle.task == "embedding":
        return None
    try:
        target = Target.from_dict(bundle.labels)
    except TypeError:  # other fields than a target has
        target = None
    num_names = None if bundle.task == "regression" else inner_model(bundle.model).config.num_classes
    if target is None or target.task != bundle.task or num_names not in (None, len(target.names)):
        raise ModelError(
            "the labels do not say what its answers mean",
            where=bundle.folder,
            expected=f"a target of a {bundle.task}" + (f" with {num_names} names" if num_names else ""),
            remedy="Save it with save_bundle(…, labels=target.to_dict())",
        )
    return target


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device that is asked for; None: the first GPU that there is, else the CPU.

    Raises:
        UsageError: there is no such device.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        # A torch without CUDA says so with an AssertionError.
        raise UsageError(
            "no such device here", where="device", got=device, remedy="Give cpu, or cuda where there is a GPU"
        ) from None
    return chosen


def local_folder(source: str, patterns: Sequence[str] = ("*.json",)) -> Path:
    """The folder of a model's files; for a Hub id the cached snapshot, with the files of some patterns."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=list(patterns)))


def parse_inputs(inputs: Iterable[str]) -> tuple[list[Path], dict[str, Path]]:
    """``FILE`` and ``CONTRAST=FILE`` arguments → paths, and paths by contrast."""
    paths: list[Path] = []
    named: dict[str, Path] = {}
    for text in inputs:
        name, equals, path = text.partition("=")
        if equals and not Path(text).exists():
            contrast = parse_contrast(name)
            if contrast in named:
                raise UsageError(f"two scans of {contrast}", got=f"{named[contrast]} and {path}", remedy="Give one")
            named[contrast] = Path(path)
        else:
            paths.append(Path(text))
    return paths, named
