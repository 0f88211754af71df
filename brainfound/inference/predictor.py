"""From files to answers: a bundle or an encoder, loaded once, asked many times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from brainfound.contrasts import CONTRASTS
from brainfound.data.batches import remove_contrasts
from brainfound.data.checking.contract import InputContract, missing_contrast_note
from brainfound.data.cohort import Session
from brainfound.data.hooks import Hook
from brainfound.data.preprocessing.session import PreparedSession, prepare_session
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.preprocessing.stack import Stack
from brainfound.errors import ScanError, UsageError
from brainfound.finetuning.calibration import AnswerCalibration
from brainfound.finetuning.tasks import Segmentation, Task, VolumeTask
from brainfound.inference.explanation import Explanation, choose_methods, explain_stack
from brainfound.inference.given_scans import resolve_scans
from brainfound.inference.prediction import Prediction
from brainfound.inference.segmentation import SegmentationOptions, build_segmentation_fields
from brainfound.models.stack_inference import infer


@dataclass(frozen=True)
class PredictorInput:
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
        withheld: contrasts that the model learnt without, and that are not shown to it: its recipe's `contrasts`
            leaves them out.

    Raises:
        UsageError: the model's scans went through other hooks, or the options are for a segmentation and it is none.
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
    ) -> None:
        self.contract, self.withheld = contract, tuple(withheld)
        self.calibration = calibration or AnswerCalibration()
        if options != SegmentationOptions() and not (target and target.per_voxel):
            raise UsageError(
                "flips, overlap and a smallest volume are for segmentations",
                where="options",
                got="an encoder" if target is None else f"a {target.kind} model",
                remedy="Leave them out",
            )
        if hooks:
            preprocessing.require_hooks([hook.name for hook in hooks])
        self.hooks, self.options = tuple(hooks), options
        self.device = resolve_device(device)
        self.model = model.to(self.device).eval()
        self.preprocessing, self.target, self.num_slices = preprocessing, target, num_slices

    def as_encoder(self) -> Predictor:
        """The same model, asked for the volume embedding before its head.

        Raises:
            UsageError: a segmentation, which makes no volume embedding.
        """
        if self.per_voxel:
            raise UsageError(
                "a segmentation model makes no volume embedding",
                expected="an encoder, or a classification or regression model",
                remedy="Use predict for its answer, or embed with the encoder that it was fine-tuned from",
            )
        return Predictor(
            self.model,
            self.preprocessing,
            None,
            self.num_slices,
            self.device,
            self.hooks,
            contract=self.contract,
            withheld=self.withheld,
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
            self.withheld,
        )

    @property
    def input_contrasts(self) -> tuple[str, ...]:
        """The contrasts that the model is shown: those that it learnt from, as far as that is known."""
        learnt = self.contract.coarsest_mm if self.contract else {}
        known = (name for name in self.preprocessing.contrasts if name not in self.withheld)
        return tuple(name for name in known if not learnt or name in learnt)

    @property
    def task(self) -> str:
        return "embedding" if self.target is None else self.target.kind

    @property
    def per_voxel(self) -> bool:
        """Whether it answers with a map on the scan's grid: a segmentation."""
        return self.target is not None and self.target.per_voxel

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
        return self.predict_prepared(self._prepare_files(paths, contrast_paths))

    def explain(
        self,
        *paths: str | Path,
        method: str | Sequence[str] | None = None,
        class_name: str | None = None,
        **contrast_paths: str | Path,
    ) -> Explanation:
        """Maps of what the model looks at in one session; see `brainfound.inference.explanation`.

        Args:
            paths, contrast_paths: as for `predict`.
            method: one or several of `brainfound.inference.explanation.METHODS`; None: all that the model can give.
            class_name: the class whose score the gradient follows; None: the most probable one.

        Raises:
            UsageError: as `predict`; or a method is unknown, the model cannot give it, or has no such class.
            ScanError: a scan cannot be used.
        """
        methods = choose_methods(self.model, self.target, method, class_name)
        ready = self._prepare_files(paths, contrast_paths)
        return self.explain_stack(ready.stack, ready.notes, ready.rejected, method=methods, class_name=class_name)

    def explain_stack(
        self,
        stack: Stack,
        notes: tuple[str, ...] = (),
        rejected: tuple[str, ...] = (),
        *,
        method: str | Sequence[str] | None = None,
        class_name: str | None = None,
    ) -> Explanation:
        """Explain a stack that this predictor's preprocessing made; notes and rejected scans are passed on."""
        stack, told = self._select_contrasts(stack)
        how = (method, class_name, (*notes, *told), rejected)
        return explain_stack(self.model, stack, self.target, self.num_slices, *how)

    def _prepare_files(self, paths: Sequence[str | Path], contrast_paths: dict[str, str | Path]) -> PredictorInput:
        """The files of one session as the model will see them."""
        files, notes = resolve_scans(paths, contrast_paths, self.input_contrasts)
        prepared = prepare_session(Session("", "", files, {}, {}), self.preprocessing, hooks=self.hooks)
        for entry in prepared.refused:
            raise ScanError(entry.reason, where=entry.file.name)
        assert prepared.stack is not None, "nothing was refused, so there is a stack"
        return PredictorInput(prepared.stack, (*notes, *self._notes_on(prepared)))

    def predict_session(self, session: Session) -> Prediction:
        """Ask about a session of a cohort; scans that cannot be used are treated as absent and noted.

        Raises:
            ScanError: no scan of the session can be used.
        """
        return self.predict_prepared(self.prepare(session))

    def prepare(self, session: Session) -> PredictorInput:
        """Read a session of a cohort as the model will see it; the model is not asked.

        Scans that cannot be used, and those of contrasts that the model never learnt to read, are left out and noted.

        Raises:
            ScanError: no scan of the session can be used.
        """
        unread = [
            contrast for contrast in session.scans if contrast in CONTRASTS and contrast not in self.input_contrasts
        ]
        scans = {contrast: file for contrast, file in session.scans.items() if contrast not in unread}
        extra = tuple((contrast, file) for contrast, file in session.extra_scans if contrast not in unread)
        known = replace(session, scans=scans, extra_scans=extra, covariates={}, masks={})
        prepared = prepare_session(known, self.preprocessing, hooks=self.hooks)
        further = [f"{entry.contrast}: {entry.reason}" for entry in prepared.further_scans]
        further += [f"{contrast}: not read, the model was not trained with it" for contrast in unread]
        rejected = tuple(f"{entry.contrast}: {entry.file.name}: {entry.reason}" for entry in prepared.refused)
        if prepared.stack is None:
            raise ScanError(f"no scan can be used; {[*rejected, *further, 'none is there'][0]}", where=session.subject)
        return PredictorInput(prepared.stack, (*further, *self._notes_on(prepared)), rejected)

    def predict_prepared(self, ready: PredictorInput) -> Prediction:
        """Ask about a session that this predictor's `prepare` has read."""
        return self.predict_stack(ready.stack, ready.notes, ready.rejected)

    def _notes_on(self, prepared: PreparedSession) -> list[str]:
        notes = [f"{quality.contrast}: {note}" for quality in prepared.quality for note in quality.notes]
        if self.preprocessing.hooks and not self.hooks:
            names = ", ".join(self.preprocessing.hooks)
            notes.append(f"the model learnt from scans that went through {names}; these were taken as they are")
        return notes

    def predict_stack(self, stack: Stack, notes: tuple[str, ...] = (), rejected: tuple[str, ...] = ()) -> Prediction:
        """Ask about a stack that this predictor's preprocessing made; notes and rejected scans are passed on.

        Raises:
            ScanError: it has only contrasts that the model does not read.
        """
        target, options = self.target, self.options
        stack, told = self._select_contrasts(stack)
        notes = (*notes, *told)
        several = isinstance(target, Segmentation) and target.has_named_structures
        answer = infer(
            self.model, stack, self.num_slices, options.augmentation, options.class_probabilities and several
        )
        present = tuple(c for c, here in zip(stack.contrasts, stack.present, strict=True) if here)
        common: dict[str, Any] = {
            "task": self.task,
            "contrasts": present,
            "missing": tuple(c for c in self.input_contrasts if c not in present),
            "subject": stack.subject,
            "session": stack.session,
            "notes": notes,
            "rejected": rejected,
        }
        if target is None:
            assert answer.embedding is not None
            return Prediction(
                answer={"dimensions": len(answer.embedding)},
                embedding=answer.embedding,
                **common,
            )
        if isinstance(target, VolumeTask):
            return Prediction(
                answer=target.format_answer(answer) | target.calibrate(self.calibration, answer), **common
            )
        assert isinstance(target, Segmentation)
        return Prediction(**build_segmentation_fields(stack, answer, target, options), **common)

    def _select_contrasts(self, stack: Stack) -> tuple[Stack, tuple[str, ...]]:
        """A stack as the model sees it, a note on each contrast that this hides, and on each that it cannot do without.

        Raises:
            ScanError: it has only contrasts that the model does not read.
        """
        present = [name for name, here in zip(stack.contrasts, stack.present, strict=True) if here]
        hidden = tuple(name for name in present if name not in self.input_contrasts)
        if hidden and len(hidden) == len(present):
            raise ScanError(
                "there is no contrast that the model reads",
                got=", ".join(hidden),
                expected=", ".join(self.input_contrasts),
            )
        told = [f"{contrast} was not read: the model learnt without it" for contrast in hidden]
        needed = () if self.contract is None else self.contract.never_absent
        told += [
            missing_contrast_note(contrast)
            for contrast in needed
            if contrast in self.input_contrasts and contrast not in present
        ]
        return (remove_contrasts(stack, hidden) if hidden else stack), tuple(told)


def resolve_device(device: str | torch.device | None) -> torch.device:
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
