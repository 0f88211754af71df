"""The slice encoder, a 2-D ViT that reads the contrasts of one slice, and the batching of valid slices.

Axis legend: B volumes, S slices of each, N valid slices of all, C contrasts, M input images of the ViT, H W pixels,
P patches, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from brainfound.errors import ModelError
from brainfound.models.backbones import FAMILIES, get_patch_size, mark_as_loaded
from brainfound.models.block_runner import BlockRunner, SavedActivations
from brainfound.models.configuration import BrainFoundConfig
from brainfound.models.kernels import PACKED, Kernel
from brainfound.models.stem import (
    NUM_NEIGHBOUR_SLICES,
    STEMS,
    PresentImages,
    normalise,
    pack_contrast_number,
    pack_planes,
)

Slices = Float[Tensor, "slices contrasts height width"] | UInt8[Tensor, "slices contrasts height width"]


class SliceEncoding(NamedTuple):
    """Output of the encoder for N slices; `cls` and `patches` are taken after the backbone's last layer norm."""

    cls: Float[Tensor, "slices width"]
    patches: Float[Tensor, "slices patches width"]
    hidden: dict[int, Tensor]
    """1-based block → its patch tokens (N, P, D), before the last layer norm."""
    blocks: tuple[tuple[Tensor, Tensor], ...] = ()
    """`cls` and `patches` of each of `config.feature_layers`; empty if only the last block is read."""

    def embedding(self, features: str) -> Float[Tensor, "slices embedding"]:
        """One vector per slice; `features` is a `config.slice_features`."""
        vectors: list[Tensor] = []
        for cls, patches in self.blocks or ((self.cls, self.patches),):
            # In float32: a mean over hundreds of bfloat16 tokens would lose the differences between slices.
            mean = patches.mean(dim=1, dtype=torch.promote_types(patches.dtype, torch.float32))
            own = {"cls": (cls,), "patches": (mean,), "cls_and_patches": (cls.to(mean.dtype), mean)}
            vectors += own[features]
        return vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=1)


class SliceEncoder(nn.Module):
    """Normalisation, stem and backbone; starts from a loaded RGB ViT, or from new weights.

    With the stem "per_contrast" the backbone reads M images for N slices, one per present contrast, and its outputs
    after the last layer norm are averaged over the images of a slice. An absent contrast is never read. With the stem
    "slices" axis C holds three planes: the slice below, the slice, and the slice above.
    """

    backbone: Any
    """The transformers ViT, with the stem in place of its patch embedding."""

    def __init__(self, config: BrainFoundConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.contrasts = tuple(config.contrasts)
        self.stem = config.stem
        self.image_mean = config.image_mean
        self.image_std = config.image_std
        self.patch_size = get_patch_size(config.backbone_config)
        self.embed_dim = config.hidden_size
        self.num_layers = int(config.backbone_config.num_hidden_layers)
        self.feature_layers = tuple(config.feature_layers or ())
        self.backbone = AutoModel.from_config(config.backbone_config) if backbone is None else backbone
        self.num_prefix_tokens = 1 + int(getattr(config.backbone_config, "num_register_tokens", 0))
        self._family = FAMILIES[config.backbone_config.model_type]
        self._runner = BlockRunner()
        stem = STEMS[config.stem](config)
        if backbone is not None:
            stem.init_from(self.backbone.embeddings.patch_embeddings)
            mark_as_loaded(stem)
        self.backbone.embeddings.patch_embeddings = stem

    def change_stem(self, config: BrainFoundConfig) -> None:
        """Switch to the stem of `config`, initialised from the current one."""
        old = self.backbone.embeddings.patch_embeddings
        stem = STEMS[config.stem](config).to(old.projection.weight)
        stem.init_from(old)
        self.backbone.embeddings.patch_embeddings = stem
        self.stem = config.stem

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, first to last."""
        return self.backbone.get_submodule(self._family.blocks)

    @property
    def norm(self) -> nn.Module:
        """The last layer norm."""
        return self.backbone.get_submodule(self._family.norm)

    def forward(
        self,
        pixel_values: Slices,
        contrast_mask: Bool[Tensor, "slices contrasts"] | None = None,
        bool_masked_pos: Bool[Tensor, "slices patches"] | None = None,
        layers: Sequence[int] = (),
    ) -> SliceEncoding:
        """Encode slices with pixels in 0–1 or uint8.

        Args:
            contrast_mask: True where a contrast is present; None: all are.
            bool_masked_pos: True where a patch is replaced by the mask token, in every contrast.
            layers: 1-based blocks whose patch tokens are also returned.

        Raises:
            ModelError: if the shape does not fit the model, or with the stem "per_contrast" a slice has no contrast.
        """
        if self.stem == "per_contrast":
            return self._forward_per_contrast(pixel_values, contrast_mask, bool_masked_pos, layers)
        return self._run(self.embed(pixel_values, contrast_mask, bool_masked_pos), layers)

    def _forward_per_contrast(
        self, pixel_values: Tensor, contrast_mask: Tensor | None, bool_masked_pos: Tensor | None, layers: Sequence[int]
    ) -> SliceEncoding:
        self.require_shape(pixel_values)
        if contrast_mask is None:
            contrast_mask = torch.ones(pixel_values.shape[:2], dtype=torch.bool, device=pixel_values.device)
        present = contrast_mask.bool()
        if not present.any(dim=1).all():
            remedy = "Leave such slices out of the batch"
            raise ModelError("a slice has no contrast", where="contrast_mask", remedy=remedy)
        images = PresentImages(present)
        pixels = self._normalise(pixel_values[images.slices, images.contrasts][:, None], images.contrasts)[:, 0]
        masked = None if bool_masked_pos is None else bool_masked_pos[images.slices]
        planes = pack_contrast_number(pixels, images.contrasts)
        encoding = self._run(self.backbone.embeddings(planes, bool_masked_pos=masked), layers)
        hidden = {layer: images.mean(tokens) for layer, tokens in encoding.hidden.items()}
        blocks = tuple((images.mean(cls), images.mean(patches)) for cls, patches in encoding.blocks)
        return SliceEncoding(images.mean(encoding.cls), images.mean(encoding.patches), hidden, blocks)

    def _run(self, tokens: Tensor, layers: Sequence[int]) -> SliceEncoding:
        """Run embedded tokens through the transformers blocks, one after the other."""
        hidden, blocks = {}, {}
        # The transformers loop keeps the tokens of all blocks or of none.
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens)
            if number in layers:
                hidden[number] = tokens[:, self.num_prefix_tokens :]
            if number in self.feature_layers:
                encoding = self.encoding(self.norm(tokens))
                blocks[number] = encoding.cls, encoding.patches
        in_order = tuple(blocks[number] for number in self.feature_layers)
        return self.encoding(self.norm(tokens))._replace(hidden=hidden, blocks=in_order)

    def embed(
        self,
        pixel_values: Slices,
        contrast_mask: Bool[Tensor, "slices contrasts"] | None = None,
        bool_masked_pos: Bool[Tensor, "slices patches"] | None = None,
    ) -> Float[Tensor, "slices tokens width"]:
        """Slices → input tokens of the first block: CLS, registers, then patches row by row, with their positions.

        The stem "per_contrast" is refused: it gives a slice one token sequence per present contrast, and these are
        averaged only after the last layer norm.
        """
        if self.stem == "slices":
            self._require_neighbours(pixel_values)
            planes = self._normalise(pixel_values)
        else:
            self.require_single_slices()
            self.require_shape(pixel_values)
            planes = pack_planes(self._normalise(pixel_values), contrast_mask)
        return self.backbone.embeddings(planes, bool_masked_pos=bool_masked_pos)

    def transform(
        self, groups: Sequence[Float[Tensor, "slices tokens width"]], drop_path: float = 0.0
    ) -> list[Float[Tensor, "slices tokens width"]]:
        """Run groups of different lengths through all blocks and the last layer norm, packed into one sequence.

        `drop_path` is stochastic depth by subset (see `brainfound.models.block_runner`), off in evaluation mode.
        """
        # Transformers looks this up at every call. Not restored: checkpointing calls the modules again later.
        self.backbone.config._attn_implementation = PACKED
        groups = self._runner.run(self.blocks, groups, drop_path if self.training else 0.0)
        return [self.norm(group) for group in groups]

    def encoding(self, tokens: Float[Tensor, "slices tokens width"]) -> SliceEncoding:
        """Split the tokens of one group after `transform` into CLS token and patches."""
        return SliceEncoding(tokens[:, 0], tokens[:, self.num_prefix_tokens :], {})

    def configure_blocks(self, kernel: Kernel = "sdpa", compiled: bool = False, kept: SavedActivations = "all") -> None:
        """Choose how `transform` runs the blocks (see `BlockRunner`); the result changes only by rounding."""
        runner = BlockRunner(kernel=kernel, kept=kept)
        self._runner = runner.compiled() if compiled else runner

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of `height` × `width` pixels."""
        return height // self.patch_size, width // self.patch_size

    def require_single_slices(self) -> None:
        """Refuse a stem that cannot embed a single slice, which pretraining requires."""
        if self.stem != "channels":
            why = "its neighbours" if self.stem == "slices" else "one row of tokens per contrast"
            raise ModelError(
                f"the stem {self.stem!r} cannot embed a slice by itself, since it has {why}",
                where="config.stem",
                expected="channels in pretraining",
                remedy="Pretrain with channels and fine-tune with this stem",
            )

    def require_shape(self, pixel_values: Tensor) -> None:
        """Check (…, C, H, W) against the model."""
        shape = tuple(pixel_values.shape)
        if len(shape) < 4:
            raise ModelError("pixel_values lacks axes", got=f"shape {shape}", expected="(…, contrasts, height, width)")
        num_contrasts, height, width = shape[-3:]
        if num_contrasts != len(self.contrasts):
            raise ModelError(
                f"pixel_values has {num_contrasts} contrasts",
                got=f"shape {shape}",
                expected=f"{len(self.contrasts)} ({', '.join(self.contrasts)})",
                remedy="Give one channel per contrast of the model and mark absent ones in contrast_mask",
            )
        self._require_patches(height, width)

    def _require_neighbours(self, pixel_values: Tensor) -> None:
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != NUM_NEIGHBOUR_SLICES:
            raise ModelError(
                "the stem 'slices' reads a slice with its neighbours below and above",
                got=f"shape {shape}",
                expected=f"(slices, {NUM_NEIGHBOUR_SLICES}, height, width)",
                remedy="Give volumes to the model, which finds the neighbours",
            )
        self._require_patches(*shape[2:])

    def _require_patches(self, height: int, width: int) -> None:
        if height % self.patch_size or width % self.patch_size or not height or not width:
            raise ModelError(
                "height and width must be multiples of the patch size",
                got=f"{height} × {width} pixels",
                expected=f"multiples of {self.patch_size}",
                remedy="Crop or pad the slices",
            )

    def _normalise(self, pixel_values: Tensor, contrasts: Tensor | None = None) -> Tensor:
        return normalise(pixel_values, self.image_mean, self.image_std, contrasts)


class ValidSlices:
    """The valid slices of a batch of volumes: checked, encoded in chunks, and scattered back to (B, S, …).

    Padding is never encoded: it costs nothing and cannot change a result. Arguments as for `BrainFoundModel`.

    Raises:
        ModelError: if shapes do not fit, or a volume has no valid slice or no contrast.
    """

    def __init__(
        self,
        encoder: SliceEncoder,
        chunk: int,
        pixel_values: Tensor,
        contrast_mask: Tensor | None,
        slice_mask: Tensor | None,
        positions_mm: Tensor | None = None,
    ) -> None:
        self.encoder = encoder
        self.chunk = chunk
        if pixel_values.dim() != 5:
            raise ModelError(
                "pixel_values must have five axes",
                got=f"shape {tuple(pixel_values.shape)}",
                expected="(volumes, slices, contrasts, height, width)",
                remedy="Add the missing axis, for one volume with pixel_values[None]",
            )
        self.encoder.require_shape(pixel_values)
        if pixel_values.dtype != torch.uint8 and not pixel_values.is_floating_point():
            raise ModelError("pixel_values must be float in 0–1 or uint8", got=pixel_values.dtype)
        num_volumes, num_slices, num_contrasts = pixel_values.shape[:3]
        self.volumes_slices = (num_volumes, num_slices)
        self.contrast_mask = _as_mask("contrast_mask", contrast_mask, (num_volumes, num_contrasts))
        self.slice_mask = _as_mask("slice_mask", slice_mask, self.volumes_slices)
        require_same_shape("positions_mm", positions_mm, self.volumes_slices)
        self.pixels = pixel_values.flatten(0, 1)
        self.index = None if self.slice_mask is None else self.slice_mask.flatten().nonzero()[:, 0]
        _require_valid_slices(self.volumes_slices, self.slice_mask)
        if self.contrast_mask is not None and not self.contrast_mask.any(dim=1).all():
            remedy = "Leave such volumes out of the batch"
            raise ModelError("a volume has no contrast", where="contrast_mask", remedy=remedy)

    def encode(self, layers: Sequence[int] = ()) -> Iterator[SliceEncoding]:
        """Encode the valid slices in their order, at most `chunk` images at once (see `BrainFoundConfig.slice_chunk`).

        With the stem "slices" each slice comes with its neighbours below and above: the adjacent valid slices of its
        volume in the given order, at any distance in mm. End slices replace their own missing neighbour.
        """
        rows = torch.arange(len(self.pixels), device=self.pixels.device) if self.index is None else self.index
        neighbours = self._neighbours(rows) if self.encoder.stem == "slices" else None
        start = 0
        for count in self._chunk_sizes(rows):
            part = slice(start, start + count)
            start += count
            if neighbours is not None:
                pixels = self.pixels[neighbours[part]].flatten(1, 2)
            else:
                # In the common case all slices are valid and fit one chunk: no copy of the pixels is needed.
                whole = self.index is None and count == len(self.pixels)
                pixels = self.pixels if whole else self.pixels[rows[part]]
            mask = self.contrast_mask
            contrast_mask = None if mask is None else mask[rows[part] // self.volumes_slices[1]]
            yield self.encoder(pixels, contrast_mask, layers=layers)

    def scatter(self, values: Tensor) -> Tensor:
        """Values of the valid slices (N, …) → (B, S, …), zeros at padded slices."""
        if self.index is not None:
            num_all = self.volumes_slices[0] * self.volumes_slices[1]
            values = values.new_zeros(num_all, *values.shape[1:]).index_copy(0, self.index, values)
        return values.unflatten(0, self.volumes_slices)

    def select(self, values: Tensor) -> Tensor:
        """Values (B, S, …) → those of the valid slices (N, …)."""
        values = values.flatten(0, 1)
        return values if self.index is None else values[self.index]

    def slices_per_volume(self) -> list[int]:
        """The number of valid slices of each volume."""
        num_volumes, num_slices = self.volumes_slices
        return [num_slices] * num_volumes if self.slice_mask is None else self.slice_mask.sum(dim=1).tolist()

    def _chunk_sizes(self, rows: Tensor) -> list[int]:
        """Number of slices per chunk; a slice with more contrasts than fit forms its own chunk."""
        if self.encoder.stem != "per_contrast":
            return [len(part) for part in rows.split(self.chunk)]
        num_volumes, num_contrasts = self.volumes_slices[0], self.pixels.shape[1]
        mask = self.contrast_mask
        num_present = [num_contrasts] * num_volumes if mask is None else mask.sum(dim=1).tolist()
        sizes, num_images = [0], 0
        for images, num_slices in zip(num_present, self.slices_per_volume(), strict=True):
            for _ in range(num_slices):
                if sizes[-1] and num_images + images > self.chunk:
                    sizes.append(0)
                    num_images = 0
                sizes[-1] += 1
                num_images += images
        return sizes

    def _neighbours(self, rows: Tensor) -> Tensor:
        """(N, 3): the rows of the valid slice below, of the slice, and of the valid slice above."""
        volumes = rows // self.volumes_slices[1]
        same = volumes[1:] == volumes[:-1]
        below, above = rows.clone(), rows.clone()
        below[1:] = torch.where(same, rows[:-1], rows[1:])
        above[:-1] = torch.where(same, rows[1:], rows[:-1])
        return torch.stack((below, rows, above), dim=1)


def validate_embeddings(
    slice_embeddings: Tensor, width: int, slice_mask: Tensor | None, positions_mm: Tensor | None
) -> Tensor | None:
    """Check slice embeddings (B, S, `width`) that replace images, and return their mask of valid slices."""
    shape = tuple(slice_embeddings.shape)
    if len(shape) != 3 or shape[2] != width or not all(shape):
        raise ModelError(
            "slice_embeddings do not fit", got=f"shape {shape}", expected=f"(volumes, slices, {width}), none empty"
        )
    mask = _as_mask("slice_mask", slice_mask, shape[:2], "slice_embeddings")
    require_same_shape("positions_mm", positions_mm, shape[:2], "slice_embeddings")
    _require_valid_slices(shape, mask)
    return mask


def _require_valid_slices(shape: tuple[int, ...], mask: Tensor | None) -> None:
    if not all(shape) or (mask is not None and not mask.any(dim=1).all()):
        remedy = "Leave such volumes out of the batch"
        raise ModelError("a volume has no valid slice", where="slice_mask", remedy=remedy)


def _as_mask(name: str, mask: Tensor | None, shape: tuple[int, ...], like: str = "pixel_values") -> Tensor | None:
    require_same_shape(name, mask, shape, like)
    return None if mask is None else mask.bool()


def require_same_shape(name: str, value: Tensor | None, shape: tuple[int, ...], like: str = "pixel_values") -> None:
    """Refuse a tensor whose shape is not `shape`, that of the tensor named `like`."""
    if value is not None and tuple(value.shape) != shape:
        raise ModelError(f"{name} does not fit {like}", got=f"shape {tuple(value.shape)}", expected=f"shape {shape}")
