"""The networks of the objectives: encoders with projection heads or a pixel decoder, and gradients pass by pass.

Axis legend: ``N`` rows, ``D`` width of the encoder, ``K`` prototypes; ``n`` or ``m`` crops, ``T`` tokens of a crop,
``P`` patches, ``V`` visible and ``M`` masked ones, ``W`` width of the decoder.

Sources: DINO (arXiv 2104.14294, appendix C); MAE (2111.06377, section 3 and appendix A.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from brainfound.data.augmentation import Views
from brainfound.models.encoder import SliceEncoder
from brainfound.pretraining.objectives.base import TrainedModel
from brainfound.pretraining.objectives.prototypes import Projection, normalise_rows
from brainfound.recipes import Recipe
from brainfound.training.randomness import INITIALISATION, torch_generator


class HeadRecipe(Recipe):
    """The size of a projection head."""

    prototypes: int = Field(default=65_536, ge=2)
    """K, the number of prototypes."""
    hidden: int = Field(default=2048, ge=1)
    """Width of the hidden layers."""
    bottleneck: int = Field(default=256, ge=1)
    """Width in front of the prototypes."""
    layers: int = Field(default=3, ge=1)
    """Linear layers of the MLP, without the prototypes."""


class ProjectionHead(nn.Module):
    """MLP, L2 normalisation, and prototypes of fixed length 1 (DINO's `norm_last_layer`): scores are cosines."""

    is_shard_unit = True  # for `brainfound.training.distributed.shard`

    def __init__(self, width: int, recipe: HeadRecipe) -> None:
        super().__init__()
        widths = [width] + [recipe.hidden] * (recipe.layers - 1) + [recipe.bottleneck]
        layers: list[nn.Module] = []
        for index, (fan_in, fan_out) in enumerate(pairwise(widths)):
            layers += [nn.Linear(fan_in, fan_out)] + ([nn.GELU()] if index < recipe.layers - 1 else [])
        self.mlp = nn.Sequential(*layers)
        self.last_layer = nn.Linear(recipe.bottleneck, recipe.prototypes, bias=False)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights: truncated normal, std 1 / sqrt(fan-in) in the MLP, 0.02 for the prototypes; biases 0.

        The first is DINO's 0.02 at its width of 2,048. In narrower heads it keeps the bottleneck away from 0, where the
        gradient of the normalisation explodes.
        """
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.last_layer.weight, std=0.02, generator=generator)

    def forward(self, embeddings: Float[Tensor, "N D"]) -> Projection:
        # A larger eps than the default keeps the gradient of a near-zero bottleneck finite in bfloat16.
        narrow = self.mlp(embeddings)
        unit = F.normalize(narrow.to(torch.promote_types(narrow.dtype, torch.float32)), dim=-1, eps=1e-6)
        return Projection(unit, normalise_rows(self.last_layer.weight))


class PixelDecoderRecipe(Recipe):
    """The size of the decoder, which is not exported."""

    width: int = Field(default=512, ge=4, multiple_of=4)
    """W; a multiple of 4 (for the sines and cosines of two axes) and of `heads`."""
    layers: int = Field(default=8, ge=1)
    """Transformer blocks."""
    heads: int = Field(default=16, ge=1)
    """Attention heads."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of a block's MLP over W."""

    @model_validator(mode="after")
    def _require_divisible_width(self) -> PixelDecoderRecipe:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class PixelDecoder(nn.Module):
    """A light transformer over all patches of a crop, with `num_outputs` values per patch."""

    positions: Tensor

    def __init__(self, encoder_width: int, grid: tuple[int, int], num_outputs: int, recipe: PixelDecoderRecipe) -> None:
        super().__init__()
        self.num_patches = grid[0] * grid[1]
        self.embed = nn.Linear(encoder_width, recipe.width)
        self.mask_token = nn.Parameter(torch.zeros(recipe.width))
        self.register_buffer("positions", sincos_position_embedding(grid, recipe.width), persistent=False)
        block = partial(nn.TransformerEncoderLayer, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        sizes = (recipe.width, recipe.heads, int(recipe.width * recipe.mlp_ratio))
        self.blocks = nn.ModuleList(block(*sizes) for _ in range(recipe.layers))
        self.norm = nn.LayerNorm(recipe.width)
        self.predict = nn.Linear(recipe.width, num_outputs)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights: Xavier uniform, biases 0, norms 1."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        nn.init.normal_(self.mask_token, std=0.02, generator=generator)

    def forward(
        self,
        cls: Float[Tensor, "n D"],
        visible: Float[Tensor, "n V D"],
        kept: Int[Tensor, "n V"],
        hidden: Int[Tensor, "n M"],
    ) -> Float[Tensor, "n M outputs"]:
        """The predicted values of the hidden patches, in the order of `hidden`."""
        embedded = self.embed(torch.cat([cls[:, None], visible], dim=1))
        width = embedded.shape[-1]
        patches = self.mask_token.to(embedded.dtype).expand(len(embedded), self.num_patches, width)
        patches = patches.scatter(1, kept[..., None].expand(-1, -1, width), embedded[:, 1:])
        # The CLS token has no place in the grid.
        tokens = torch.cat([embedded[:, :1], patches + self.positions.to(embedded.dtype)], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        # Only hidden patches are normalised and predicted.
        masked = tokens[:, 1:].gather(1, hidden[..., None].expand(-1, -1, width))
        return self.predict(self.norm(masked))


def sincos_position_embedding(grid: tuple[int, int], width: int) -> Float[Tensor, "P W"]:
    """Sines and cosines of rows and columns, frequencies 1 to 1/10,000 (Vaswani et al. 2017, section 3.5; MAE)."""
    rows, columns = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [axis.flatten()[:, None] * frequencies for axis in (rows, columns)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()


class EncoderWithHeads(TrainedModel):
    """An encoder (not copied) with named heads."""

    def __init__(self, encoder: SliceEncoder, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict(heads)


class DistillationOutput(NamedTuple):
    """The outputs for global crops."""

    cls: Float[Tensor, "m D"]
    patches: Float[Tensor, "m P D"]
    cls_projection: Projection
    masked_projection: Projection


class DistillationModel(EncoderWithHeads):
    """An encoder with DINO and iBOT heads, or one shared head; student and teacher are each one of these."""

    def __init__(self, encoder: SliceEncoder, head: HeadRecipe, shared_head: bool, drop_path: float, seed: int) -> None:
        names = ["dino"] if shared_head else ["dino", "ibot"]
        super().__init__(encoder, {name: ProjectionHead(encoder.embed_dim, head) for name in names})
        self.drop_path = drop_path
        self.initialise_heads(seed)

    def initialise_heads(self, seed: int, first_stream: int = 0) -> None:
        """Give the heads new weights, each from a stream of its own."""
        for stream, head in enumerate(self.heads.values(), start=first_stream):
            assert isinstance(head, ProjectionHead)
            head.initialise(torch_generator(INITIALISATION, seed, stream))

    @property
    def ibot_head(self) -> nn.Module:
        return self.heads["ibot"] if "ibot" in self.heads else self.heads["dino"]

    def embed(self, views: Views, masked: Bool[Tensor, "m P"] | None = None) -> Float[Tensor, "m T D"]:
        return self.encoder.embed(views.pixels, views.contrast_mask, bool_masked_pos=masked)

    def project_cls(self, tokens: Float[Tensor, "m T D"]) -> Projection:
        return self.heads["dino"](self.encoder.encoding(tokens).cls)

    def project(self, tokens: Float[Tensor, "m T D"], masked: Int[Tensor, "M"]) -> DistillationOutput:
        """Encoded global crops through both heads; `masked` are positions in the flattened (m · P) patches."""
        encoding = self.encoder.encoding(tokens)
        cls, patches = encoding.cls, encoding.patches
        hidden = patches.flatten(0, 1).index_select(0, masked)
        return DistillationOutput(cls, patches, self.heads["dino"](cls), self.ibot_head(hidden))


def backward_per_pass(passes: Sequence[Callable[[], Tensor]], parameters: Iterable[nn.Parameter]) -> Float[Tensor, ""]:
    """The sum of the losses of `passes`, whose gradients for `parameters` are computed now, pass by pass.

    The activations of a pass are freed before the next one begins: the memory of a step is that of its largest pass.
    The backward pass of the sum hands the gradients on, once. Anything else that a loss depends on gets none. If
    gradients are disabled (evaluation), it is the plain sum.
    """
    if not torch.is_grad_enabled():
        return torch.stack([compute() for compute in passes]).sum()
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    collected: dict[int, Tensor] = {}
    total = torch.stack([_collect(collected, compute(), trained) for compute in passes]).sum()
    return _PrecomputedGradients.apply(total, list(collected.values()), *(trained[index] for index in collected))


def _collect(
    collected: dict[int, Tensor], loss: Float[Tensor, ""], parameters: Sequence[nn.Parameter]
) -> Float[Tensor, ""]:
    """Add the gradients of a loss to those collected, by the index of the parameter; returns the loss without graph.

    New gradients share one piece of memory: scattered, they would keep the allocator from reusing that of the pass.
    """
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    reached = {index: gradient for index, gradient in enumerate(gradients) if gradient is not None}
    known = [index for index in reached if index in collected]
    new = [index for index in reached if index not in collected]
    if known:
        torch._foreach_add_([collected[index] for index in known], [reached[index] for index in known])
    if new:
        pieces = torch.cat([reached[index].flatten() for index in new]).split([reached[p].numel() for p in new])
        collected.update({index: piece.view_as(reached[index]) for index, piece in zip(new, pieces, strict=True)})
    return loss.detach()


class _PrecomputedGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("gradients that were computed early can be handed on once")
        # In place: a copy would double their memory while the last pass still holds its activations.
        torch._foreach_mul_(ctx.gradients, gradient)
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *gradients
