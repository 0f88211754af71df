"""The predictor: a bundle or an encoder with its own preprocessing, from files to answers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from brainfound.contrasts import CONTRASTS
from brainfound.data.batches import remove_contrasts
from brainfound.data.checking.check import image_findings
from brainfound.data.checking.contract import InputContract, missing_contrast_note
from brainfound.data.checking.rules import (
    LEVEL_SYMBOLS,
    Finding,
    Level,
    age_finding,
    contrast_finding,
    slices_finding,
    worst_level,
)
from brainfound.data.cohort import Session
from brainfound.data.given_scans import session_from_scans
from brainfound.data.hooks import Hook
from brainfound.data.preprocessing.session import PreparedSession, prepare_session
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.preprocessing.stack import Stack
from brainfound.data.preprocessing.stack_builder import StackBuilder
from brainfound.data.reading.image_names import stem
from brainfound.data.reading.scan import Scan
from brainfound.errors import RefusedInputError, ScanError, UsageError
from brainfound.finetuning.tasks import AnswerCalibration, Segmentation, Task, VolumeTask
from brainfound.inference.explanation import Explanation, choose_methods, explain_stack
from brainfound.inference.prediction import Prediction
from brainfound.inference.segmentation import SegmentationOptions, build_segmentation_fields
from brainfound.inference.tokens import TokenOptions, session_tokens
from brainfound.models.stack_prediction import StackPrediction, infer, unwrap_peft


@dataclass(frozen=True)
class PredictorInput:
    """A prepared session: the model's input, remarks on the scans, and scans that cannot be used with the reason.

    ``level`` is the gravest finding of the input contract, None if the scans were not compared with one; ``name`` is
    for files, of scans that were given as files.
    """

    stack: Stack
    notes: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    level: Level | None = None
    name: str = ""


class Predictor:
    """A model with its own preprocessing.

    Args:
        model: a BrainFound model, or a PEFT model around one.
        target: the model's task; None for an encoder.
        num_slices: slices to read per session; None for all.
        device: None: the first GPU, else the CPU.
        hooks: external tools to run on each scan first, as on the training scans.
        calibration: adds calibrated answers to the raw ones.
        contract: properties of the training scans; each scan that is read from a file is compared with them.
        withheld: contrasts that the recipe excluded from training; the model never reads them.
        strict: refuse a session that the contract finds unfit (✗), rather than answer with a note.

    Raises:
        UsageError: the training scans went through other hooks, or segmentation options for another task.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        target: Task | None = None,
        num_slices: int | None = None,
        device: str | torch.device | None = None,
        hooks: Sequence[Hook] = (),
        calibration: AnswerCalibration | None = None,
        options: SegmentationOptions = SegmentationOptions(),
        contract: InputContract | None = None,
        withheld: Sequence[str] = (),
        strict: bool = False,
    ) -> None:
        if hooks:
            preprocessing.require_hooks([hook.name for hook in hooks])
        self.device = resolve_device(device)
        self.model = model.to(self.device).eval()
        self.preprocessing, self.target, self.num_slices = preprocessing, target, num_slices
        self.hooks, self.contract, self.withheld = tuple(hooks), contract, tuple(withheld)
        self.calibration, self.strict = calibration or AnswerCalibration(), strict
        self.options = self._validated(options)
        self.tokens = TokenOptions()

    def _validated(self, options: SegmentationOptions) -> SegmentationOptions:
        if options != SegmentationOptions() and not self.per_voxel:
            raise UsageError(
                "flips, overlap and a smallest volume are for segmentations",
                where="options",
                got="an encoder" if self.target is None else f"a {self.task} model",
                remedy="Leave them out",
            )
        options.augmentation(self.target)  # labels whose sides cannot be exchanged are refused here
        return options

    def as_encoder(self, tokens: TokenOptions = TokenOptions()) -> Predictor:
        """The same model without its head: its answer is the volume embedding, and tokens on request.

        UsageError: a segmentation, or a block that the model does not have.
        """
        if self.per_voxel:
            raise UsageError(
                "a segmentation model makes no volume embedding",
                expected="an encoder, or a classification or regression model",
                remedy="Use predict for its answer, or embed with the encoder that it was fine-tuned from",
            )
        encoder = copy.copy(self)
        encoder.target, encoder.calibration = None, AnswerCalibration()
        tokens.require_layers(unwrap_peft(self.model).encoder.num_layers)
        encoder.tokens = tokens
        return encoder

    def with_options(self, options: SegmentationOptions) -> Predictor:
        """The same segmentation model with other options."""
        other = copy.copy(self)
        other.options = self._validated(options)
        return other

    def as_strict(self, strict: bool = True) -> Predictor:
        """The same model, which refuses a session that its input contract finds unfit."""
        other = copy.copy(self)
        other.strict = strict
        return other

    @property
    def input_contrasts(self) -> tuple[str, ...]:
        """The contrasts that the model reads: those of its training sessions, as far as they are known."""
        trained = self.contract.coarsest_mm if self.contract else {}
        names = (name for name in self.preprocessing.contrasts if name not in self.withheld)
        return tuple(name for name in names if not trained or name in trained)

    @property
    def task(self) -> str:
        return "embedding" if self.target is None else self.target.kind

    @property
    def per_voxel(self) -> bool:
        """Whether its answer is a map on the scan's grid (a segmentation)."""
        return self.target is not None and self.target.per_voxel

    def predict(self, *paths: str | Path, **contrast_paths: str | Path) -> Prediction:
        """Predict one session from files.

        Args:
            paths: scans whose file names state their contrast (``…_T1w.nii.gz``, ``flair.nii.gz``).
            contrast_paths: scans by contrast: ``predict("a.nii.gz", flair="b.nii.gz")``. A single path without a
                contrast in its name is taken for the model's only remaining contrast.

        Raises:
            UsageError: a contrast is given twice, unknown to the model, or does not follow from the name.
            ScanError: a scan cannot be used, or is unfit for a strict predictor.
        """
        return self.predict_prepared(self._prepare_files(paths, contrast_paths))

    def explain(
        self,
        *paths: str | Path,
        method: str | Sequence[str] | None = None,
        class_name: str | None = None,
        **contrast_paths: str | Path,
    ) -> Explanation:
        """Explanation maps of one session; see `brainfound.inference.explanation`.

        Args:
            paths, contrast_paths: as for `predict`, with the same errors.
            method: one or several of `brainfound.inference.explanation.METHODS`; None: all that fit the model.
            class_name: the class whose score the gradient follows; None: the most probable one.
        """
        methods = choose_methods(self.model, self.target, method, class_name)
        return self.explain_prepared(self._prepare_files(paths, contrast_paths), methods, class_name)

    def explain_prepared(
        self, ready: PredictorInput, method: str | Sequence[str] | None = None, class_name: str | None = None
    ) -> Explanation:
        """Explanation maps of a session that `prepare` has read."""
        ready = self._restrict(ready)
        explanation = explain_stack(self.model, ready.stack, self.target, self.num_slices, method, class_name)
        return replace(
            explanation,
            notes=ready.notes,
            rejected=ready.rejected,
            input_level=ready.level,
            name=ready.name,
            model_hash=self.model_hash,
            settings=self.explanation_settings(method, class_name),
        )

    def explain_stack(
        self, stack: Stack, *, method: str | Sequence[str] | None = None, class_name: str | None = None
    ) -> Explanation:
        """Explanation maps of a stack that was prepared with this predictor's preprocessing; see `explain`."""
        return self.explain_prepared(PredictorInput(stack), method, class_name)

    def predict_session(self, session: Session) -> Prediction:
        """Predict a session of a cohort; a scan that cannot be used counts as absent and is noted."""
        return self.predict_prepared(self.prepare(session))

    def predict_stack(self, stack: Stack) -> Prediction:
        """Predict a stack that was prepared with this predictor's preprocessing."""
        return self.predict_prepared(PredictorInput(stack))

    def prepare(self, session: Session) -> PredictorInput:
        """Read and preprocess a session of a cohort.

        Scans that cannot be used, and contrasts that the model does not read, are left out and noted.

        Raises:
            ScanError: no scan of the session can be used, or one is unfit and the predictor is strict.
        """
        unread = [name for name in session.scans if name in CONTRASTS and name not in self.input_contrasts]
        scans = {contrast: path for contrast, path in session.scans.items() if contrast not in unread}
        extra = tuple((contrast, path) for contrast, path in session.extra_scans if contrast not in unread)
        age_years = session.covariates.get("age_years")
        session = replace(session, scans=scans, extra_scans=extra, covariates={}, masks={})
        found: list[tuple[str, Finding]] = []
        prepared = prepare_session(session, self.preprocessing, hooks=self.hooks, inspect=self._inspector(found))
        further = [f"{entry.contrast}: {entry.reason}" for entry in prepared.further_scans]
        further += [f"{contrast}: not read, the model was not trained with it" for contrast in unread]
        rejected = tuple(f"{entry.contrast}: {entry.file.name}: {entry.reason}" for entry in prepared.refused)
        if prepared.stack is None:
            raise ScanError(f"no scan can be used; {[*rejected, *further, 'none is there'][0]}", where=session.subject)
        return self._input(prepared, found, further, rejected, age_years)

    def _prepare_files(self, paths: Sequence[str | Path], contrast_paths: dict[str, str | Path]) -> PredictorInput:
        """Read and preprocess the files of one session; a file that cannot be used is an error."""
        session, notes = session_from_scans(paths, contrast_paths, self.input_contrasts)
        found: list[tuple[str, Finding]] = []
        prepared = prepare_session(session, self.preprocessing, hooks=self.hooks, inspect=self._inspector(found))
        for entry in prepared.refused:
            raise ScanError(entry.reason, where=entry.file.name)
        assert prepared.stack is not None, "nothing was refused, so there is a stack"
        first = Path(next(iter([*paths, *contrast_paths.values()])))
        return replace(self._input(prepared, found, notes), name=stem(first))

    def _inspector(self, found: list[tuple[str, Finding]]) -> Callable[[Scan, StackBuilder], None] | None:
        """Compares each scan with the contract while it is in memory; None without a contract."""
        if (contract := self.contract) is None:
            return None

        def inspect(scan: Scan, builder: StackBuilder) -> None:
            contrast = builder.quality[-1].contrast
            findings = [contrast_finding(contrast, contract), *image_findings(scan, builder, contract)]
            found.extend((contrast, finding) for finding in findings)

        return inspect

    def _input(
        self,
        prepared: PreparedSession,
        found: list[tuple[str, Finding]],
        notes: Sequence[str],
        rejected: tuple[str, ...] = (),
        age_years: Any = None,
    ) -> PredictorInput:
        """A prepared session with the findings of the contract among its notes, the gravest first."""
        assert prepared.stack is not None
        if self.contract is None:
            return PredictorInput(prepared.stack, (*notes, *self._notes_on(prepared)), rejected)
        of_session = [slices_finding(len(prepared.stack.pixels), self.contract)]
        if age_years is not None:
            of_session.append(age_finding(age_years, self.contract))
        found = [*found, *(("", finding) for finding in of_session if finding is not None)]
        lines: dict[str, list[str]] = {"fail": [], "warn": [], "note": []}
        for contrast, finding in found:
            # A remark of another check than the position is nothing that a reader of the answer could act on.
            if finding.level in ("fail", "warn") or (finding.level, finding.check) == ("note", "position"):
                text = f"{contrast}: {finding.message}" if contrast else finding.message
                lines[finding.level].append(f"{LEVEL_SYMBOLS[finding.level]} {text}")
        level = worst_level([finding for _, finding in found])
        if self.strict and level == "fail":
            raise RefusedInputError(
                f"unfit for the model: {'; '.join(lines['fail'])}",
                remedy=next(finding.remedy for _, finding in found if finding.level == "fail") or None,
            )
        every = (*lines["fail"], *lines["warn"], *notes, *self._notes_on(prepared), *lines["note"])
        return PredictorInput(prepared.stack, every, rejected, level)

    def _notes_on(self, prepared: PreparedSession) -> list[str]:
        notes = [f"{quality.contrast}: {note}" for quality in prepared.quality for note in quality.notes]
        if self.preprocessing.hooks and not self.hooks:
            names = ", ".join(self.preprocessing.hooks)
            notes.append(f"the model learnt from scans that went through {names}; these were taken as they are")
        return notes

    def _restrict(self, ready: PredictorInput) -> PredictorInput:
        """Hide contrasts that the model does not read, and note those that it was never trained without."""
        stack = ready.stack
        present = stack.present_contrasts
        hidden = tuple(name for name in present if name not in self.input_contrasts)
        if hidden and len(hidden) == len(present):
            raise ScanError(
                "there is no contrast that the model reads",
                got=", ".join(hidden),
                expected=", ".join(self.input_contrasts),
            )
        notes = [f"{contrast} was not read: the model learnt without it" for contrast in hidden]
        needed = () if self.contract is None else self.contract.never_absent
        missing = [name for name in needed if name in self.input_contrasts and name not in present]
        notes += [missing_contrast_note(name) for name in missing]
        return replace(ready, stack=remove_contrasts(stack, hidden) if hidden else stack, notes=(*ready.notes, *notes))

    @cached_property
    def model_hash(self) -> str:
        """A hash of the weights, which identifies the model of an answer."""
        adapters, active = getattr(self.model, "peft_config", {}), getattr(self.model, "active_adapter", None)
        digest = hashlib.blake2b(digest_size=16)
        for name, values in sorted(self.model.state_dict().items()):
            parts = set(name.split("."))
            # PEFT keeps the random start of replaced modules.
            if "original_module" in parts or parts & (set(adapters) - {active}):
                continue
            digest.update(name.replace(f".{active}.", ".").encode())
            digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def prediction_settings(self) -> dict[str, Any]:
        """What a prediction depends on besides scans and weights, as plain values."""
        options = asdict(self.options) if self.per_voxel else {}
        options.pop("class_probabilities", None)  # adds files; the answer is the same
        if self.tokens:
            options["tokens"] = asdict(self.tokens) | {"layers": list(self.tokens.layers)}
        return {"task": self.task, "num_slices": self.num_slices, "hooks": [h.name for h in self.hooks], **options}

    def explanation_settings(
        self, method: str | Sequence[str] | None = None, class_name: str | None = None
    ) -> dict[str, Any]:
        """What an explanation depends on besides scans and weights, as plain values."""
        methods = list(choose_methods(self.model, self.target, method, class_name))
        shared = {name: self.prediction_settings[name] for name in ("num_slices", "hooks")}
        return {"methods": methods, "class": class_name, **shared}

    def predict_prepared(self, ready: PredictorInput) -> Prediction:
        """Predict a session that `prepare` has read."""
        ready = self._restrict(ready)
        stack = ready.stack
        several = isinstance(self.target, Segmentation) and self.target.has_named_structures
        answer = self.infer_stack(stack, self.options.class_probabilities and several)
        present = stack.present_contrasts
        fields = self._build_fields(stack, answer)
        return Prediction(
            task=self.task,
            contrasts=present,
            missing=tuple(c for c in self.input_contrasts if c not in present),
            subject=stack.subject,
            session=stack.session,
            notes=(*ready.notes, *self._notes_on_answer()),
            rejected=ready.rejected,
            input_level=ready.level,
            name=ready.name,
            model_hash=self.model_hash,
            settings=self.prediction_settings,
            **fields,
        )

    def infer_stack(self, stack: Stack, class_probabilities: bool = False) -> StackPrediction:
        """The model's output for a stack, before it is put in words or on the grid of the scan."""
        augmentation = self.options.augmentation(self.target)
        return infer(self.model, stack, self.num_slices, augmentation, class_probabilities)

    def _build_fields(self, stack: Stack, answer: StackPrediction) -> dict[str, Any]:
        """The fields of a `Prediction` that hold the answer."""
        target = self.target
        if target is None:
            assert answer.embedding is not None
            tokens = session_tokens(self.model, stack, self.num_slices, self.tokens) if self.tokens else {}
            content: dict[str, Any] = {"dimensions": len(answer.embedding)}
            if tokens:
                content["tokens"] = {name: list(values.shape) for name, values in tokens.items()}
            return {"answer": content, "embedding": answer.embedding, "tokens": tokens}
        if isinstance(target, VolumeTask):
            return {"answer": target.format_answer(answer) | target.calibrate(self.calibration, answer)}
        assert isinstance(target, Segmentation)
        return build_segmentation_fields(stack, answer, target, self.options)

    def _notes_on_answer(self) -> list[str]:
        target = self.target
        # A regression without an interval: its validation part was too small for the confidence.
        notes = [f"no {line}" for line in self.calibration.left_out if line.startswith("interval")]
        codes = target.names if isinstance(target, Segmentation) else ()
        if self.options.flips and sum(name.startswith("label ") for name in codes) > 1:
            notes.append("averaged with mirrored slices: wrong for codes without a name that stand for one side")
        return notes


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The requested device; None: the first GPU, else the CPU."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        # A torch built without CUDA raises an AssertionError.
        raise UsageError(
            "no such device here", where="device", got=device, remedy="Give cpu, or cuda where there is a GPU"
        ) from None
    return chosen
