"""The valid slices of a batch of volumes, in one row.

Axis legend: B volumes, S slices, C contrasts, H W pixels, N valid slices of the batch in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from brainfound.errors import ModelError
from brainfound.models.encoder import SliceEncoder, SliceEncoding


class ValidSlices:
    """The valid slices of a batch of volumes: checked, encoded in chunks, and scattered back to (B, S, …).

    Padding is never encoded: it costs nothing and cannot change a result.

    Args:
        encoder: the slice encoder.
        chunk: the largest number of images per forward pass, see `encode`.
        pixel_values, contrast_mask, slice_mask, positions_mm: as for `BrainFoundModel`.

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
        if positions_mm is not None and tuple(positions_mm.shape) != self.volumes_slices:
            raise shape_error("positions_mm", positions_mm, self.volumes_slices)
        self.pixels = pixel_values.flatten(0, 1)
        self.index = None if self.slice_mask is None else self.slice_mask.flatten().nonzero()[:, 0]
        self._require_valid_input()

    def encode(self, layers: Sequence[int] = ()) -> Iterator[SliceEncoding]:
        """Encode the valid slices in their order, at most `chunk` images at once.

        An image is a slice, or with the stem "per_contrast" a present contrast of a slice; the contrasts of one slice
        stay together. With the stem "slices" each slice comes with its neighbours below and above: the next valid
        slices of its volume in the given order, at any distance in mm. The first and the last slice stand in
        for the neighbour that they lack.
        """
        num_slices_each = self.volumes_slices[1]
        for rows, pixels in self._chunks():
            contrast_mask = None if self.contrast_mask is None else self.contrast_mask[rows // num_slices_each]
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

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows of the valid slices and the encoder's input for them, chunk by chunk."""
        rows = self._rows()
        neighbours = self._neighbours(rows) if self.encoder.stem == "slices" else None
        start = 0
        for count in self._chunk_sizes(rows):
            part = slice(start, start + count)
            start += count
            if neighbours is not None:
                yield rows[part], self.pixels[neighbours[part]].flatten(1, 2)
            else:
                # All slices valid and in one chunk is the common case, and needs no copy of the pixels.
                whole = self.index is None and count == len(self.pixels)
                yield rows[part], self.pixels if whole else self.pixels[rows[part]]

    def _chunk_sizes(self, rows: Tensor) -> list[int]:
        """Slices of each chunk; a slice with more contrasts than fit is a chunk by itself."""
        if self.encoder.stem != "per_contrast":
            return [len(part) for part in rows.split(self.chunk)]
        num_volumes, num_contrasts = self.volumes_slices[0], self.pixels.shape[1]
        each = [num_contrasts] * num_volumes if self.contrast_mask is None else self.contrast_mask.sum(dim=1).tolist()
        sizes, num_images = [0], 0
        for images, num_slices in zip(each, self.slices_per_volume(), strict=True):
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

    def _rows(self) -> Tensor:
        return torch.arange(len(self.pixels), device=self.pixels.device) if self.index is None else self.index

    def _require_valid_input(self) -> None:
        if not all(self.volumes_slices) or (self.slice_mask is not None and not self.slice_mask.any(dim=1).all()):
            raise _no_valid_slice_error()
        if self.contrast_mask is not None and not self.contrast_mask.any(dim=1).all():
            raise ModelError(
                "a volume has no contrast", where="contrast_mask", remedy="Leave such volumes out of the batch"
            )


def validate_embeddings(
    slice_embeddings: Tensor, width: int, slice_mask: Tensor | None, positions_mm: Tensor | None
) -> Tensor | None:
    """Check slice embeddings that replace images, and return their mask of valid slices.

    Raises:
        ModelError: if shapes do not fit, or a volume has no valid slice.
    """
    shape = tuple(slice_embeddings.shape)
    if len(shape) != 3 or shape[2] != width or not all(shape):
        raise ModelError(
            "slice_embeddings do not fit", got=f"shape {shape}", expected=f"(volumes, slices, {width}), none empty"
        )
    mask = _as_mask("slice_mask", slice_mask, shape[:2], "slice_embeddings")
    if positions_mm is not None and tuple(positions_mm.shape) != shape[:2]:
        raise shape_error("positions_mm", positions_mm, shape[:2], "slice_embeddings")
    if mask is not None and not mask.any(dim=1).all():
        raise _no_valid_slice_error()
    return mask


def _no_valid_slice_error() -> ModelError:
    return ModelError("a volume has no valid slice", where="slice_mask", remedy="Leave such volumes out of the batch")


def _as_mask(
    name: str, mask: Tensor | None, shape: tuple[int, ...], reference_name: str = "pixel_values"
) -> Tensor | None:
    if mask is None:
        return None
    if tuple(mask.shape) != shape:
        raise shape_error(name, mask, shape, reference_name)
    return mask.bool()


def shape_error(name: str, value: Tensor, shape: tuple[int, ...], reference_name: str = "pixel_values") -> ModelError:
    """The error for a tensor whose shape does not fit another one."""
    return ModelError(
        f"{name} does not fit {reference_name}", got=f"shape {tuple(value.shape)}", expected=f"shape {shape}"
    )
