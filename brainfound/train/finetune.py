"""Fine-tuning: a backbone, an adapter and a head learn one target of a store.

The run folder:

    recipe.yaml, run.json, log.jsonl, curves.png, checkpoints/   as in pretraining
    splits.json   the subjects of each part, as a split file
    scores.json   the scores on the test part, beside the trivial baseline, and what the validation part calibrates
    cases.tsv     one row per test session
    reliability.png   of a classification: how often it is right, over how sure it is
    export/       the bundle: adapter, head, preprocessing and labels as one unit

Axis legend: B volumes, S slices, C contrasts, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import accelerate
import numpy as np
import torch
from pydantic import Field
from rich.console import Console
from torch import Tensor, nn

from brainfound.adapters.attach import AdapterRecipe, attach_adapter
from brainfound.adapters.bundle import save_bundle
from brainfound.data.checking.contract import InputContract
from brainfound.data.store import Store
from brainfound.errors import RecipeError, did_you_mean
from brainfound.models import (
    BrainFoundForClassification,
    BrainFoundForRegression,
    BrainFoundForSegmentation,
)
from brainfound.models.configuration import AGGREGATORS, DECODERS, STEMS
from brainfound.models.inference import inner_model
from brainfound.models.start import start_from
from brainfound.recipes import Recipe, load, validate
from brainfound.report.reliability import reliability_png
from brainfound.train import ranks, run_files
from brainfound.train.answer_calibration import AnswerCalibration
from brainfound.train.data_order import EpochOrder, RankBatches
from brainfound.train.embedding_cache import EmbeddingCache
from brainfound.train.engine import Engine, EngineRecipe, TrainTask, make_accelerator
from brainfound.train.finetuned_card import finetuned_card
from brainfound.train.head_recipes import (
    ClassificationHeadRecipe,
    RegressionHeadRecipe,
    classification_fields,
    regression_fields,
)
from brainfound.train.head_start import fit_head
from brainfound.train.objectives.base import StepKey
from brainfound.train.randomness import INITIALISATION, seed_of
from brainfound.train.resuming import as_begun, checkpoint_to_resume, common_facts, has_ended
from brainfound.train.run_lock import only_one_training
from brainfound.train.schedules import warm_up_then
from brainfound.train.session_scores import SessionScores, score_sessions, write_scores
from brainfound.train.session_split import SplitRecipe, hashed_split, split_sessions, split_to_follow, write_split
from brainfound.train.targets import Target, guess_task, resolve_target
from brainfound.train.volumes import EmbeddedReader, VolumeAugmentation, VolumeReader, augment_volumes

CLASSES = {
    "classification": BrainFoundForClassification,
    "regression": BrainFoundForRegression,
    "segmentation": BrainFoundForSegmentation,
}

SEGMENTATION_FIELDS = (
    "decoder",
    "decoder_width",
    "decoder_slice_mixing",
    "segmentation_loss",
    "tversky_alpha",
    "tversky_beta",
    "tversky_gamma",
    "focal_gamma",
)
"""What a recipe of a segmentation says of the model, under the names of the model's configuration."""


class FinetuneOptimRecipe(Recipe):
    """AdamW with a warm-up and a cosine."""

    lr: float = Field(5e-4, gt=0)
    """Peak learning rate of adapters (or of the backbone in full fine-tuning)."""
    head_lr: float = Field(1e-3, gt=0)
    """Peak learning rate of what is new: aggregator, decoder, head."""
    weight_decay: float = Field(0.01, ge=0)
    """Of matrices; none on biases, norms and tokens."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the rate rises."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest gradient norm."""


class FinetuneRecipe(Recipe):
    """Everything that a fine-tuning run is made of."""

    mistaken_for: ClassVar[Mapping[str, str]] = {
        "brainfound.train.pretrain:PretrainRecipe": "this is a pretraining recipe; use `brainfound pretrain`"
    }

    name: str = "finetune"
    """Name of the run; also of its default folder."""
    seed: int = Field(0, ge=0)
    """Of new weights, order, slices, augmentation and dropout."""
    task: Literal["auto", "classification", "regression", "segmentation"] = "auto"
    """auto: segmentation for the mask, regression for numbers with many values, else classification."""
    adapter: str = "lora-r8"
    """A recipe of the adapters room, by name or file."""
    stem: str | None = None
    """How contrasts enter the backbone: channels, per_contrast, or slices (neighbouring slices of a store's only
    contrast). null: as the model has it; channels for a plain ViT."""
    aggregator: str = "attention"
    """Slice embeddings → volume embedding: mean, max, attention or transformer (not used by segmentation)."""
    decoder: str = "fpn"
    """Patch embeddings → pixels (segmentation only): linear, fpn, or unetr (with skips from the image)."""
    decoder_width: int = Field(128, ge=8)
    """Channels of the decoder."""
    decoder_slice_mixing: bool = False
    """Segmentation: the decoder mixes neighbouring slices; training then reads runs of slices."""
    segmentation_loss: Literal["dice_cross_entropy", "dice_focal", "tversky", "focal_tversky"] = "dice_cross_entropy"
    """Segmentation: the last three are for small structures such as lesions."""
    tversky_alpha: float = Field(0.3, ge=0)
    """Tversky losses: weight of false positives."""
    tversky_beta: float = Field(0.7, ge=0)
    """Tversky losses: weight of false negatives."""
    tversky_gamma: float = Field(4 / 3, ge=1)
    """focal_tversky: the Tversky loss to the power 1/this."""
    focal_gamma: float = Field(2.0, ge=0)
    """dice_focal: how little pixels count that are right already; 0 is the cross-entropy."""
    regions: dict[str, list[int]] = Field(default_factory=dict)
    """Segmentation: overlapping labels made of codes, such as {whole: [1, 2, 4], core: [1, 4]}; each is a yes or no of
    its own. Empty: every code is a class, and a pixel has one."""
    head_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the head's last layer."""
    num_slices: int = Field(32, ge=1)
    """Slices read per volume, in training and, but for segmentation, in prediction."""
    head_fit_passes: int = Field(4, ge=0)
    """Classification and regression: passes over the training part whose frozen embeddings the head is first fitted
    to; 0 starts from a random head."""
    cached_embeddings: bool = False
    """Embed each session once and train on that: seconds for an epoch. For classification and regression with an
    adapter that leaves the backbone as it is (head-only); nothing is augmented, and no contrast withheld."""
    classification: ClassificationHeadRecipe = ClassificationHeadRecipe()
    """Class weights and focal loss (classification only)."""
    regression: RegressionHeadRecipe = RegressionHeadRecipe()
    """The head and its loss (regression only)."""
    foreground_share: float = Field(0.5, ge=0, le=1)
    """Segmentation: share of the training slices (or of their runs) that show the structure."""
    gradient_checkpointing: bool = False
    """Compute the backbone's blocks again in the backward pass instead of keeping what they held: less memory, more
    time."""
    merge_codes: bool = False
    """Segmentation: any label code but 0 is one class."""
    evaluate_every: int = Field(100, ge=0)
    """Steps between two looks at the validation part; 0: never."""
    split: SplitRecipe = SplitRecipe()
    optim: FinetuneOptimRecipe = FinetuneOptimRecipe()
    augmentation: VolumeAugmentation = VolumeAugmentation()
    engine: EngineRecipe = EngineRecipe(steps=500, batch_size=4, num_workers=0)


RELIABILITY_FILE = "reliability.png"

# What may change between a run and its continuation: nothing in here touches a weight.
FREE_ON_RESUME = (
    "name",
    "engine.log_every",
    "engine.checkpoint_every",
    "engine.keep_checkpoints",
    "engine.max_skipped_in_a_row",
    "engine.num_workers",
)


class FinetuneTask(TrainTask):
    """What the engine trains: a model with an adapter and a head, on the training part."""

    def __init__(
        self,
        model: nn.Module,
        store: Store,
        parts: dict[str, np.ndarray],
        target: Target,
        recipe: FinetuneRecipe,
        accelerator: accelerate.Accelerator,
        cache: EmbeddingCache | None = None,
    ) -> None:
        self.model, self.store, self.parts, self.target, self.recipe = model, store, parts, target, recipe
        self.device, self.rank = accelerator.device, accelerator.process_index
        self.world_size = accelerator.num_processes
        self.clip_norm = recipe.optim.clip_norm
        self.evaluate_every = recipe.evaluate_every
        segmenting = target.task == "segmentation"
        share = recipe.foreground_share if segmenting else None
        neighbours = segmenting and (recipe.decoder_slice_mixing or inner_model(model).config.stem == "slices")
        self.reader = _reader(recipe, store, parts["train"], cache, share, neighbours)
        values = [] if segmenting else target.values(store, parts["train"].tolist()).tolist()
        self.train_labels = values
        self.labels = dict(zip(parts["train"].tolist(), values, strict=True)) if values else {}
        self.eval_slices = None if segmenting else recipe.num_slices

    def make_optimizer(self) -> torch.optim.Optimizer:
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                role = "backbone" if ".backbone." in name else "new"
                decays = parameter.ndim > 1 and not any(word in name for word in ("token", "embedding"))
                group = groups.setdefault(
                    (role, decays), {"params": [], "role": role, "lr_scale": 1.0, "decays": decays}
                )
                group["params"].append(parameter)
        return torch.optim.AdamW(list(groups.values()), lr=self.recipe.optim.lr, fused=True)

    def batches(self, first_step: int) -> Iterator[tuple[Any, np.ndarray, StepKey]]:
        recipe = self.recipe
        order = EpochOrder(len(self.parts["train"]), recipe.seed)
        micro_batches = RankBatches(
            order,
            recipe.engine.batch_size,
            recipe.engine.accumulation,
            self.rank,
            self.world_size,
            first_step,
            recipe.engine.steps,
        )
        for number, positions in enumerate(micro_batches):
            step, micro_batch = divmod(number, recipe.engine.accumulation)
            key = StepKey(recipe.seed, first_step + step, micro_batch, self.rank)
            yield *self.reader.read(positions, key), key

    def loss(self, model: nn.Module, batch: Any, step: int, micro_batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        volumes, sessions, key = batch
        volumes = augment_volumes(volumes.to(self.device), self.recipe.augmentation, key)
        if self.target.task == "segmentation":
            codes = np.asarray(volumes.to("cpu").masks)
            labels = torch.from_numpy(self.target.encode_mask(codes).astype(np.int64)).to(self.device)
        else:
            are_classes = self.target.task == "classification" and not self.target.multi_label
            kind = torch.long if are_classes else torch.float32
            labels = torch.tensor([self.labels[int(s)] for s in sessions], dtype=kind, device=self.device)
        return model(**volumes.inputs(), labels=labels).loss, {}

    def learning_rate(self, step: int, role: str) -> float:
        recipe, steps = self.recipe.optim, self.recipe.engine.steps
        peak = recipe.lr if role == "backbone" else recipe.head_lr
        return warm_up_then(step, peak, 0.01 * peak, round(recipe.warmup * steps), steps)

    def weight_decay(self, step: int) -> float:
        return self.recipe.optim.weight_decay

    def evaluate(self, step: int) -> dict[str, Any]:
        scored = self.score("validation")
        return {f"validation/{name}": value for name, value in scored.scores.items() if np.isfinite(value)}

    def score(self, part: str) -> SessionScores:
        """Score one part of the split."""
        return score_sessions(
            self.model, self.store, self.parts[part].tolist(), self.target, self.eval_slices, self.train_labels
        )


def finetune(
    recipe: FinetuneRecipe | str | Path,
    data: str | Path | Store,
    model: str | Path,
    target: str,
    out: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    split: str | Path | None = None,
    fold: str | None = None,
    resume: bool = False,
    keep_ids: bool = False,
    cache: str | Path | None = None,
    overrides: Iterable[str] = (),
    quiet: bool = False,
) -> Path:
    """Fine-tune a model on a target of a store.

    Args:
        recipe: a recipe, its name or its file.
        data: a store or its folder.
        model: a Hub id or folder of a plain ViT, or a BrainFound folder (the export of a pretraining run).
        target: a covariate column of the store, ``"mask"``, or several columns of 0 and 1 that a session may have any
            of: ``"edema,lesion"``.
        out: the run folder; None: ``runs/<name of the recipe>``.
        adapter: overrides the recipe's adapter.
        split: a split file (of `brainfound split`, or the splits.json of another run), to learn and test on the
            subjects that it names; any overlap of its parts, by subject or image, is refused.
        fold: which fold of a split file that holds several.
        resume: go on from the newest whole checkpoint.
        keep_ids: name subjects and sessions in cases.tsv.
        cache: where embeddings lie if the recipe keeps them, for several runs together; None: in the run folder.
        overrides: ``"a.b=c"`` strings.
        quiet: no progress bar and no notes.

    Returns:
        The run folder; its ``export/`` is the bundle that `brainfound.load` reads.

    Raises:
        RecipeError, UsageError, ModelError, TrainingError.
    """
    content = resolve_recipe(recipe, adapter, overrides)
    store = data if isinstance(data, Store) else Store.open(data)
    folder = Path(out) if out is not None else Path("runs") / content.name
    content = as_begun(folder, content, ("precision",), resume)
    accelerator = make_accelerator(content.engine.precision)
    console = Console(stderr=True, quiet=quiet or not accelerator.is_main_process, highlight=False)
    engine_recipe = content.engine.model_copy(update={"precision": accelerator.mixed_precision})
    content = content.model_copy(update={"engine": engine_recipe})
    with only_one_training(folder, resume, accelerator):
        return _train(
            content, store, str(model), target, folder, split, fold, resume, keep_ids, cache, accelerator, console
        )


def _train(
    content: FinetuneRecipe,
    store: Store,
    model: str,
    target: str,
    folder: Path,
    split: str | Path | None,
    fold: str | None,
    resume: bool,
    keep_ids: bool,
    cache: str | Path | None,
    accelerator: accelerate.Accelerator,
    console: Console,
) -> Path:
    """A run in a folder that nobody else writes into."""
    checkpoint = checkpoint_to_resume(folder, content, store, resume, FREE_ON_RESUME, accelerator)
    split_file, fold = split_to_follow(folder, store, target, split, fold, resume)
    if resume and has_ended(folder, checkpoint, content.engine.steps):
        console.print(f"this run is finished; its export is {folder / run_files.EXPORT_FOLDER}", soft_wrap=True)
        return folder
    parts = split_sessions(content.split, store, target, split_file, fold, console.print)
    task_name = guess_task(store, target) if content.task == "auto" else content.task
    resolved = resolve_target(store, parts["train"].tolist(), task_name, target, content.merge_codes, content.regions)
    _require_cacheable(content, resolved)
    caches = folder / "embeddings" if cache is None else Path(cache)
    network, embedded = _build(content, store, parts, model, resolved, accelerator, caches)
    task = FinetuneTask(network, store, parts, resolved, content, accelerator, embedded)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in network.parameters())
    counts = ", ".join(f"{part} {len(index)}" for part, index in parts.items())
    console.print(f"{resolved.task} of {target}: {counts}; training {trained:,} of {everything:,} parameters")
    engine = Engine(task, content.engine, folder, accelerator, content.seed, console.quiet)
    facts = common_facts(store, accelerator, content.seed) | {
        "kind": "finetune",
        "model": Path(model).name if Path(model).exists() else model,
        "target": resolved.to_dict(),
        "num_trained_parameters": trained,
    }
    engine.require_space()

    def begin() -> None:
        # Before the recipe: a run that can be resumed has its split.
        write_split(folder, store, parts, target, content.split, split_file)
        run_files.start(folder, content, facts)

    ranks.on_main_rank(begin, accelerator.is_main_process)
    if checkpoint is not None:
        engine.resume(checkpoint)
        console.print(f"going on from {checkpoint.name}")
    else:
        engine.log.forget_after(-1)  # of a run that was killed before its first checkpoint
    accelerator.wait_for_everyone()
    engine.run()
    ranks.on_main_rank(lambda: _finish(folder, task, model, engine.step, keep_ids), accelerator.is_main_process)
    return folder


def resolve_recipe(
    recipe: FinetuneRecipe | str | Path, adapter: str | Path | None, overrides: Iterable[str]
) -> FinetuneRecipe:
    """The recipe of a run, with its overrides, checked.

    Raises:
        RecipeError: a name or a value that there is not.
    """
    overrides = list(overrides)
    if isinstance(recipe, FinetuneRecipe):
        content = validate(FinetuneRecipe, recipe.model_dump(mode="json"), overrides)
    else:
        content = load(FinetuneRecipe, recipe, "train", overrides)
        if content.name == FinetuneRecipe.model_fields["name"].default:
            content = content.model_copy(update={"name": Path(recipe).stem})
    for field, known in (("aggregator", AGGREGATORS), ("decoder", DECODERS)):
        if getattr(content, field) not in known:
            raise RecipeError(f"no {field} {getattr(content, field)!r}", where=field, expected=", ".join(known))
    if content.stem not in (None, *STEMS):
        raise RecipeError(
            f"no stem {content.stem!r}",
            where="stem",
            expected=", ".join(STEMS),
            remedy=did_you_mean(str(content.stem), STEMS),
        )
    if adapter is not None:
        content = content.model_copy(update={"adapter": str(adapter)})
    load(AdapterRecipe, content.adapter, "adapters")  # refuse a wrong name now, not after the model was built
    return content


def _require_cacheable(recipe: FinetuneRecipe, target: Target) -> None:
    """Refuse to keep embeddings that training would change, or that hold no pixels."""
    if not recipe.cached_embeddings:
        return
    method = load(AdapterRecipe, recipe.adapter, "adapters").method
    if method != "none" or target.task == "segmentation":
        raise RecipeError(
            "embeddings can be kept for classification and regression on a frozen backbone only",
            where="cached_embeddings",
            got=f"a {target.task} with an adapter of the method {method!r}",
            remedy="Use --adapter head-only, or leave cached_embeddings out",
        )


def _build(
    recipe: FinetuneRecipe,
    store: Store,
    parts: Mapping[str, np.ndarray],
    source: str,
    target: Target,
    accelerator: accelerate.Accelerator,
    caches: Path,
) -> tuple[nn.Module, EmbeddingCache | None]:
    """The model with its new head and its adapter, the same on all ranks, and the embeddings if they are kept."""
    torch.manual_seed(seed_of(INITIALISATION, recipe.seed))
    fields: dict[str, Any] = {"aggregator": recipe.aggregator, "head_dropout": recipe.head_dropout}
    if target.task == "regression":
        fields |= regression_fields(recipe.regression, target, target.values(store, parts["train"].tolist()))
    else:
        fields |= {"id2label": dict(enumerate(target.names)), "label2id": {n: k for k, n in enumerate(target.names)}}
    if target.task == "classification":
        fields |= classification_fields(recipe.classification, target, target.values(store, parts["train"].tolist()))
    if target.task == "segmentation":
        # Segmentation reads no volume embedding; an aggregator with weights would be dead weight.
        fields |= {"aggregator": "mean", "overlapping_labels": bool(target.regions)}
        fields |= {name: getattr(recipe, name) for name in SEGMENTATION_FIELDS}
        fields |= {"class_weights": None}  # of a classification that the model may have learnt before
    if recipe.stem is not None:
        fields["stem"] = recipe.stem
    model: Any = start_from(CLASSES[target.task], source, store.contrasts, **fields)
    model.to(accelerator.device)
    if recipe.gradient_checkpointing:
        _compute_blocks_again(model)
    cache = None
    if recipe.cached_embeddings:
        sessions = np.concatenate(list(parts.values())).tolist()

        def embed() -> None:
            EmbeddingCache(model.brainfound, store, caches, recipe.num_slices).require(sessions)

        ranks.on_main_rank(embed, accelerator.is_main_process)
        cache = EmbeddingCache(model.brainfound, store, caches, recipe.num_slices)
    if recipe.head_fit_passes and target.task != "segmentation":
        reader = _reader(recipe, store, parts["train"], cache)
        # Embeddings that are kept are the same in every pass.
        passes = 1 if cache else recipe.head_fit_passes
        batch = max(recipe.engine.batch_size // recipe.engine.accumulation, 1)
        fit_head(model, reader, recipe.augmentation, target, passes, batch, recipe.seed)
    return attach_adapter(model, load(AdapterRecipe, recipe.adapter, "adapters")), cache


def _reader(
    recipe: FinetuneRecipe,
    store: Store,
    train: np.ndarray,
    cache: EmbeddingCache | None,
    foreground_share: float | None = None,
    neighbours: bool = False,
) -> VolumeReader | EmbeddedReader:
    if cache is not None:
        return EmbeddedReader(cache, train.tolist())
    return VolumeReader(store, train.tolist(), recipe.num_slices, foreground_share, neighbours)


def _compute_blocks_again(model: Any) -> None:
    # The older name warns in later releases of the library, and the newer one is not in the earliest that is allowed.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # Without a gradient at its input, as with a frozen stem, the reentrant kind would give the adapters none.
    enable({"use_reentrant": False})


def _finish(folder: Path, task: FinetuneTask, source: str, step: int, keep_ids: bool) -> None:
    """Score the test part once, and leave bundle, scores and curves behind."""
    store, parts, target = task.store, task.parts, task.target
    test = task.score("test")
    calibration = None if target.task == "segmentation" else _calibrate(folder, task, test)
    facts = {} if calibration is None else {"calibration": calibration.report(test, target)}
    scores = write_scores(folder, test, keep_ids=keep_ids, part="test", step=step, **facts)
    save_bundle(
        folder / run_files.EXPORT_FOLDER,
        task.model,
        preprocessing=store.preprocessing,
        labels=target.to_dict(),
        contract=InputContract.of(store, parts["train"]),
        metadata={
            "num_slices": task.eval_slices,
            "test": scores,
            "data_hash": store.content_hash,
            "split": hashed_split(store, parts),
            "calibration": None if calibration is None else calibration.to_dict(),
        },
        card=finetuned_card(task.recipe, store, parts, target, inner_model(task.model).config, source, scores, step),
        overwrite=True,  # a run that goes on after its end writes it again
    )
    run_files.finish(folder, run_files.DONE, step, step)


def _calibrate(folder: Path, task: FinetuneTask, test: SessionScores) -> AnswerCalibration:
    """Fit on the validation part how far answers can be believed, and draw what that does on the test part."""
    confidence = task.recipe.regression.interval_confidence
    fitted = AnswerCalibration.fit(task.score("validation"), task.target, confidence)
    if task.target.task == "classification":
        curves = fitted.reliability(test, task.target)
        reliability_png(curves, path=folder / RELIABILITY_FILE, title="test part")
    return fitted
