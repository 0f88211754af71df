"""The slice encoder: a 2-D ViT that reads the contrasts of one slice.

Axis legend: N slices, C contrasts, M images given to the ViT, H W pixels, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from transformers import PreTrainedModel

from brainfound.data.batches import to_unit_range
from brainfound.errors import ModelError
from brainfound.models.backbones import FAMILIES, build_backbone, get_image_size, get_patch_size
from brainfound.models.blocks import BlockRunner, SavedActivations
from brainfound.models.configuration import BrainFoundConfig
from brainfound.models.kernels import PACKED, Kernel
from brainfound.models.stem import NUM_NEIGHBOUR_SLICES, PresentImages, build_stem, pack_contrast_number, pack_planes


class SliceEncoding(NamedTuple):
    """Output of the encoder for N slices; `cls` and `patches` are after the backbone's last layer norm."""

    cls: Float[Tensor, "slices width"]
    patches: Float[Tensor, "slices patches width"]
    hidden: dict[int, Tensor]
    """1-based block → its patch tokens (N, P, D), before the last layer norm."""

    def embedding(self, features: str) -> Float[Tensor, "slices embedding"]:
        """One vector per slice.

        Args:
            features: one of `brainfound.models.configuration.SLICE_FEATURES`.
        """
        if features == "cls":
            return self.cls
        # In float32: a mean over hundreds of bfloat16 tokens would lose the differences between slices.
        mean = self.patches.mean(dim=1, dtype=torch.promote_types(self.patches.dtype, torch.float32))
        return mean if features == "patches" else torch.cat([self.cls.to(mean.dtype), mean], dim=1)


class SliceEncoder(nn.Module):
    """Normalisation, stem and backbone.

    With the stem "per_contrast" the backbone reads M images for N slices, one per present contrast, and its outputs
    after the last layer norm are averaged over the images of a slice. An absent contrast is never read and costs
    nothing. With the stem "slices" axis C holds three planes: the slice below, the slice, and the slice above.

    Args:
        config: the model's configuration.
        backbone: a loaded RGB ViT to start from; None builds one with new weights.
    """

    backbone: Any
    """The library's ViT, with the stem in place of its patch embedding."""

    def __init__(self, config: BrainFoundConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.contrasts = tuple(config.contrasts)
        self.stem = config.stem
        self.image_mean = config.image_mean
        self.image_std = config.image_std
        self.patch_size = get_patch_size(config.backbone_config)
        self.embed_dim = config.hidden_size
        self.num_layers = int(config.backbone_config.num_hidden_layers)
        self.backbone = build_backbone(config.backbone_config) if backbone is None else backbone
        self.num_prefix_tokens = 1 + int(getattr(config.backbone_config, "num_register_tokens", 0))
        self._family = FAMILIES[config.backbone_config.model_type]
        self._runner = BlockRunner()
        stem = build_stem(config, self.patch_size, get_image_size(config.backbone_config))
        if backbone is not None:
            stem.init_from(self.backbone.embeddings.patch_embeddings)
            for module in stem.modules():
                # The flag by which the library's `post_init` leaves loaded weights alone.
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.backbone.embeddings.patch_embeddings = stem

    def change_stem(self, config: BrainFoundConfig) -> None:
        """Replace the stem by the configuration's, which starts from the weights of the old one."""
        old = self.backbone.embeddings.patch_embeddings
        stem = build_stem(config, self.patch_size, get_image_size(config.backbone_config)).to(old.projection.weight)
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
        pixel_values: Float[Tensor, "slices contrasts height width"] | UInt8[Tensor, "slices contrasts height width"],
        contrast_mask: Bool[Tensor, "slices contrasts"] | None = None,
        bool_masked_pos: Bool[Tensor, "slices patches"] | None = None,
        layers: Sequence[int] = (),
    ) -> SliceEncoding:
        """Encode slices.

        Args:
            pixel_values: 0–1, or uint8; with the stem "slices" three planes, see `ValidSlices.encode`.
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
            raise ModelError(
                "a slice has no contrast", where="contrast_mask", remedy="Leave such slices out of the batch"
            )
        images = PresentImages(present)
        pixels = self._normalise(pixel_values[images.slices, images.contrasts][:, None], images.contrasts)[:, 0]
        masked = None if bool_masked_pos is None else bool_masked_pos[images.slices]
        planes = pack_contrast_number(pixels, images.contrasts)
        encoding = self._run(self.backbone.embeddings(planes, bool_masked_pos=masked), layers)
        hidden = {layer: images.mean(tokens) for layer, tokens in encoding.hidden.items()}
        return SliceEncoding(images.mean(encoding.cls), images.mean(encoding.patches), hidden)

    def _run(self, tokens: Tensor, layers: Sequence[int]) -> SliceEncoding:
        """Embedded tokens through the library's blocks, one after the other."""
        hidden = {}
        # The library's own loop keeps the tokens of all blocks or of none.
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens)
            if number in layers:
                hidden[number] = tokens[:, self.num_prefix_tokens :]
        return self.encoding(self.norm(tokens))._replace(hidden=hidden)

    def embed(
        self,
        pixel_values: Float[Tensor, "slices contrasts height width"] | UInt8[Tensor, "slices contrasts height width"],
        contrast_mask: Bool[Tensor, "slices contrasts"] | None = None,
        bool_masked_pos: Bool[Tensor, "slices patches"] | None = None,
    ) -> Float[Tensor, "slices tokens width"]:
        """Slices → tokens in front of the first block: CLS, registers, then patches row by row, with their positions.

        Not with the stem "per_contrast": there a slice has one row of tokens per present contrast, which are averaged
        only after the last layer norm.

        Raises:
            ModelError: if the shape does not fit the model, or the stem is "per_contrast".
        """
        if self.stem == "per_contrast":
            self.require_single_slices()
        if self.stem == "slices":
            self._require_neighbours(pixel_values)
            planes = self._normalise(pixel_values)
        else:
            self.require_shape(pixel_values)
            planes = pack_planes(self._normalise(pixel_values), contrast_mask)
        return self.backbone.embeddings(planes, bool_masked_pos=bool_masked_pos)

    def transform(
        self, groups: Sequence[Float[Tensor, "slices tokens width"]], drop_path: float = 0.0
    ) -> list[Float[Tensor, "slices tokens width"]]:
        """Tokens of groups of several lengths through all blocks and the last layer norm, packed into one sequence.

        Args:
            drop_path: stochastic depth by subset (see `brainfound.models.blocks`); not in evaluation mode.
        """
        # Looked up by the library's modules at every call; it stays, because checkpointing calls them again later.
        self.backbone.config._attn_implementation = PACKED
        groups = self._runner.run(self.blocks, groups, drop_path if self.training else 0.0)
        return [self.norm(group) for group in groups]

    def encoding(self, tokens: Float[Tensor, "slices tokens width"]) -> SliceEncoding:
        """The tokens of one group after `transform`, as CLS token and patches."""
        return SliceEncoding(tokens[:, 0], tokens[:, self.num_prefix_tokens :], {})

    def configure_blocks(self, kernel: Kernel = "sdpa", compiled: bool = False, kept: SavedActivations = "all") -> None:
        """Choose how `transform` runs the blocks; the result changes only by rounding.

        Args:
            kernel: of attention; see `brainfound.models.kernels.choose_kernel`.
            compiled: compile the two branches of a block with torch.compile.
            kept: the activations kept for the backward pass; see `brainfound.models.blocks.BlockRunner`.
        """
        runner = BlockRunner(kernel=kernel, kept=kept)
        self._runner = runner.compiled() if compiled else runner

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of `height` × `width` pixels."""
        return height // self.patch_size, width // self.patch_size

    def require_single_slices(self) -> None:
        """Refuse a stem that cannot embed a slice by itself, as pretraining needs.

        Raises:
            ModelError: names the stem.
        """
        if self.stem != "channels":
            why = "its neighbours" if self.stem == "slices" else "one row of tokens per contrast"
            raise ModelError(
                f"the stem {self.stem!r} cannot embed a slice by itself, since it has {why}",
                where="config.stem",
                expected="channels in pretraining",
                remedy="Pretrain with channels and fine-tune with this stem",
            )

    def require_shape(self, pixel_values: Tensor) -> None:
        """Check (…, C, H, W) against the model.

        Raises:
            ModelError: names the shape.
        """
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

    def _normalise(
        self, pixel_values: Tensor, contrasts: Tensor | None = None
    ) -> Float[Tensor, "slices contrasts height width"]:
        """(Pixels − mean) / standard deviation; `contrasts` holds the contrast of each image if it has a single one."""
        pixel_values = to_unit_range(pixel_values)
        mean, std = (_per_contrast(value, pixel_values, contrasts) for value in (self.image_mean, self.image_std))
        return (pixel_values - mean) / std


def _per_contrast(value: float | list[float], like: Tensor, contrasts: Tensor | None) -> float | Tensor:
    if isinstance(value, (int, float)):
        return value
    values = like.new_tensor(value)
    return (values if contrasts is None else values[contrasts][:, None])[..., None, None]
