"""Load a run, a bundle, an export or a Hub id as a predictor, or several bundles on one backbone as a set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import overload

import torch

from brainfound.adapters import load_adapters, load_bundle
from brainfound.adapters.bundle_reader import Bundle, NamedSet
from brainfound.data.checking.contract import InputContract
from brainfound.data.cohort import Session
from brainfound.data.hooks import Hook, load_hooks
from brainfound.data.preprocessing.settings import Preprocessing
from brainfound.data.preprocessing.stack import Stack
from brainfound.errors import ModelError, UsageError
from brainfound.finetuning.tasks import TASKS, AnswerCalibration, Task, from_dict
from brainfound.inference.ensemble import EnsemblePredictor, find_members
from brainfound.inference.prediction import Prediction
from brainfound.inference.predictor import Predictor, resolve_device
from brainfound.inference.segmentation import SegmentationOptions
from brainfound.models import BrainFoundModel
from brainfound.models.loading import is_brainfound, load_initial_model
from brainfound.models.model_folder import is_hub_id, reading_model
from brainfound.models.stack_prediction import unwrap_peft
from brainfound.training.run_folder import EXPORT_FOLDER, is_run_folder


class PredictorSet(NamedSet[Predictor]):
    """Predictors that share the weights of one backbone; each request names its adapter.

    Requests may come in any order. ``predictors["age"]`` is a full `Predictor`, for a cohort for example.
    """

    def predict(self, *paths: str | Path, adapter: str, **contrast_paths: str | Path) -> Prediction:
        """Predict one session with one adapter; see `Predictor.predict`."""
        return self[adapter].predict(*paths, **contrast_paths)

    def predict_session(self, session: Session, adapter: str) -> Prediction:
        """See `Predictor.predict_session`."""
        return self[adapter].predict_session(session)

    def predict_stack(self, stack: Stack, adapter: str) -> Prediction:
        """See `Predictor.predict_stack`."""
        return self[adapter].predict_stack(stack)


BUNDLE_PATTERNS = ("*.json", "*.safetensors", "README.md")
"""The files of a bundle; other files of a Hub repository are not downloaded."""


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
        path_or_id: a run folder, its export folder, or a Hub id. The folder of an experiment over folds and seeds
            gives their mean, an `EnsemblePredictor`. Several bundles that were trained on one backbone,
            by name, give a `PredictorSet`: ``load({"age": "runs/age", "tumour": "runs/tumour"})``.
        device: None: the first GPU, else the CPU.
        hooks: tools to run on each scan first (``"synthstrip"``, …), see `brainfound.data.hooks.load_hooks`.
        options: segmentation options: averaging over flips and patch grids, minimum volume of a component.

    Raises:
        UsageError: a hook is missing or differs from those in training; segmentation options for another task.
        ModelError: nothing to load, a damaged model, or several bundles with different backbones.
    """
    device = resolve_device(device)
    tools = load_hooks(hooks)
    if isinstance(path_or_id, Mapping):
        return _load_set(path_or_id, device, tools, options)
    path = bundle_folder(path_or_id)
    predictor, _ = _load_bundles(path, device, tools, options)
    if predictor is not None:
        return predictor
    if is_run_folder(path):
        raise ModelError(
            "the run has no export: it has not finished",
            where=path,
            remedy="Go on with it: the same command and --resume",
            usage=True,
        )
    if (path / "store.json").is_file():
        remedy = "Give the model first, then the scans"
        raise ModelError("this is a store, not a model", where=path, remedy=remedy, usage=True)
    source = str(path) if path.exists() else str(path_or_id)
    model = BrainFoundModel.from_pretrained(source)
    kinds = [kind for kind in model.config.architectures or () if kind != BrainFoundModel.__name__]
    if kinds:
        raise ModelError(
            f"this is a {kinds[0]} by itself, without a description of its answers",
            where=source,
            expected="a bundle",
            remedy="Save it with save_bundle, which keeps labels and preprocessing with the weights",
        )
    folder = local_folder(source)
    contract = InputContract.load_or_none(folder)
    return Predictor(model, Preprocessing.load(folder), None, None, device, tools, options=options, contract=contract)


def load_encoder(
    path_or_id: str | Path,
    preprocessing: Preprocessing | None,
    device: str | torch.device | None = None,
    hooks: Iterable[str | Path] = (),
) -> Predictor:
    """Load what `load` does as an encoder, or a plain ViT (a folder or a Hub id), untrained by BrainFound.

    A plain ViT states no preprocessing: it gets ``preprocessing`` and its contrasts. Its slice embedding is the CLS
    token, and its volume embedding the mean over slices. Other models keep their own preprocessing.

    Raises:
        ModelError: as `load`; a plain ViT without a ``preprocessing``, or whose patches do not tile its slices.
        UsageError: a segmentation, which makes no volume embedding; hooks as in `load`.
    """
    if not _is_plain_vit(path_or_id):
        return load(path_or_id, device, hooks).as_encoder()
    if preprocessing is None:
        raise ModelError(
            "this is a plain ViT, not a BrainFound model: it states no preprocessing",
            where=path_or_id,
            remedy="Give --like and a store or a model with the preprocessing",
            usage=True,
        )
    tools = load_hooks(hooks)
    model = load_initial_model(BrainFoundModel, str(path_or_id), preprocessing.contrasts)
    if any(length % model.encoder.patch_size for length in preprocessing.size):
        rows, columns = preprocessing.size
        raise ModelError(
            "the patches of the model do not tile the slices",
            where=path_or_id,
            got=f"{rows} × {columns} pixels",
            expected=f"multiples of {model.encoder.patch_size}",
            remedy="Prepare the data with another size: --set size=[ROWS,COLUMNS]",
            usage=True,
        )
    return Predictor(model, preprocessing, None, None, device, tools)


def _is_plain_vit(path_or_id: str | Path) -> bool:
    """Whether a source is a model of transformers that is not one of BrainFound."""
    path = Path(path_or_id)
    if path.exists():
        is_ours = any((path / name).exists() for name in ("export", "bundle.json", "store.json")) or is_run_folder(path)
        return not is_ours and (path / "config.json").is_file() and not is_brainfound(path)
    if not is_hub_id(str(path_or_id)) or (bundle_folder(path_or_id) / "bundle.json").is_file():
        return False
    return not is_brainfound(path_or_id)


def bundle_folder(path_or_id: str | Path) -> Path:
    """The folder of a bundle: the export of a run, or the downloaded snapshot of a Hub id."""
    path = Path(path_or_id)
    if (path / "export").is_dir():
        return path / "export"
    if not is_hub_id(str(path_or_id)):
        return path
    folder = local_folder(str(path_or_id))
    return local_folder(str(path_or_id), BUNDLE_PATTERNS) if (folder / "bundle.json").is_file() else path


def _load_set(
    bundles: Mapping[str, str | Path], device: torch.device, tools: Sequence[Hook], options: SegmentationOptions
) -> PredictorSet:
    adapters = load_adapters({name: bundle_folder(source) for name, source in bundles.items()}).to(device)
    predictors = {name: make_predictor(adapters[name], device, tools) for name in adapters}
    if options != SegmentationOptions():
        segmenting = {name: p.with_options(options) for name, p in predictors.items() if p.per_voxel}
        if not segmenting:
            raise UsageError(
                "flips, overlap and a smallest volume are for segmentations", where="options", remedy="Leave them out"
            )
        predictors |= segmenting
    return PredictorSet(predictors)


def load_with_bundles(
    path_or_id: str | Path, device: str | torch.device | None = None
) -> tuple[Predictor, list[Bundle]]:
    """What `load` gives, and the bundle that it is made of: several for an experiment, none for an encoder."""
    device = resolve_device(device)
    predictor, bundles = _load_bundles(bundle_folder(path_or_id), device, (), SegmentationOptions())
    return predictor or load(path_or_id, device), bundles


def _load_bundles(
    path: Path, device: torch.device, tools: Sequence[Hook], options: SegmentationOptions
) -> tuple[Predictor | None, list[Bundle]]:
    """The predictor of a bundle, or of the bundles of an experiment; None for anything else."""
    if (path / "bundle.json").is_file():
        bundle = load_bundle(path)
        return make_predictor(bundle, device, tools, options), [bundle]
    if (members := find_members(path)) is None:
        return None, []
    bundles = {name: load_bundle(folder / EXPORT_FOLDER) for name, folder in members.folders.items()}
    if all(bundle.content["weights"] != "full" for bundle in bundles.values()):
        shared = load_adapters(bundles).to(device)
        bundles = {name: shared[name] for name in shared}
    predictors = {name: make_predictor(bundle, device, tools, options) for name, bundle in bundles.items()}
    return EnsemblePredictor(predictors, members), list(bundles.values())


def make_predictor(
    bundle: Bundle,
    device: torch.device,
    tools: Sequence[Hook] = (),
    options: SegmentationOptions = SegmentationOptions(),
) -> Predictor:
    """A predictor from a loaded bundle."""
    metadata = bundle.metadata
    return Predictor(
        bundle.model,
        bundle.preprocessing,
        _read_target(bundle),
        metadata.get("num_slices"),
        device,
        tools,
        AnswerCalibration.from_dict(metadata.get("calibration")),
        options,
        InputContract.load_or_none(bundle.folder),
        metadata.get("withheld", ()),
    )


def _read_target(bundle: Bundle) -> Task | None:
    """The task of a bundle; None for an encoder."""
    if bundle.task == "embedding":
        return None
    try:
        target = from_dict(bundle.labels)
    except (TypeError, KeyError):  # not the fields of a task
        target = None
    num_names = unwrap_peft(bundle.model).config.num_classes if TASKS[bundle.task].has_names else None
    if target is None or target.kind != bundle.task or num_names not in (None, len(target.names)):
        raise ModelError(
            "the labels do not describe the answers of the model",
            where=bundle.folder,
            expected=f"a target of a {bundle.task}" + (f" with {num_names} names" if num_names else ""),
            remedy="Save it with save_bundle(…, labels=target.to_dict())",
        )
    return target


def local_folder(source: str, patterns: Sequence[str] = ("*.json",)) -> Path:
    """The folder of a model's files; for a Hub id the cached snapshot, with the files that match the patterns."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    with reading_model(source):
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
