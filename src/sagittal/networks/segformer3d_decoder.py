"""SegFormer3D's decoder: project every stage, fuse at the finest grid, predict, and bring the logits to the image.

As published, the four maps are upsampled to the finest grid, concatenated and fused by a 1x1x1 convolution. That
convolution is linear and acts per voxel, so it commutes with the upsampling: each map goes through its own columns of
the weight at its own grid, and the sum of the upsampled products is the same, at a fraction of the multiply-adds.

Linear interpolation runs as small matrix products, one per axis: on a CPU several times faster than PyTorch's operator,
and more so in the backward pass; on a GPU the operator's backward pass adds up atomically, eight sums for each voxel
and channel, in another order at every run. At inference BatchNorm becomes part of the weights, and on a CPU the finest
map never exists at the decoder's width (`_finest_rows`). Letters: N batch, C the decoder's width, D H W the
finest grid (in 2D without D), V = N*D*H*W its voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from sagittal.kernels import choice, native
from sagittal.networks.layout import as_weight, convolution_class, crop_end
from sagittal.networks.norms import VolumeNorm, folded, folds, normalise, volume_norm

STAGES = 4
_SLAB_VOXELS = 8192
_JITTER, _LEAST_JITTER = 1e-13, 1e-30


class StageProjection(nn.Module):
    """Bring a stage's tokens to the decoder's width: Linear, then LayerNorm (called `bn` in the released weights)."""

    def __init__(self, width: int, decoder_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, decoder_dim)
        self.bn = nn.LayerNorm(decoder_dim)

    def forward(self, grid: Tensor) -> Tensor:
        """Map (N, D, H, W, C) to (N, D, H, W, decoder_dim)."""
        result: Tensor = self.bn(self.proj(grid))
        return result


class Decoder(nn.Module):
    """All-MLP decoder: project every stage, fuse at the finest grid, predict; each product at its own map's grid."""

    def __init__(
        self,
        embed_dims: Sequence[int],
        num_classes: int,
        decoder_dim: int,
        *,
        norm: VolumeNorm = "batch",
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        convolution = convolution_class(spatial_dims)
        for stage in reversed(range(STAGES)):
            self.add_module(f"linear_c{stage + 1}", StageProjection(embed_dims[stage], decoder_dim))
        self.linear_fuse = nn.Sequential(
            convolution(STAGES * decoder_dim, decoder_dim, kernel_size=1, bias=False),
            volume_norm(norm, decoder_dim, spatial_dims),
        )
        self.linear_pred = convolution(decoder_dim, num_classes, kernel_size=1)

    def forward(self, grids: Sequence[Tensor]) -> Tensor:
        """Map the encoder's grids, finest first, to logits (N, num_classes, D, H, W) at the finest grid."""
        norm = self.linear_fuse[1]
        columns = self._columns()
        is_folded = folds(norm, *grids, *columns)
        if is_folded and native.eager(*grids):
            return self._infer(grids, columns)
        if is_folded:
            return self._infer_whole(grids, columns)
        fused = _add_upsampled(
            self._projected(0, grids, columns), [self._projected(stage, grids, columns) for stage in range(1, STAGES)]
        )
        return self._predict(nn.functional.relu(normalise(norm, fused.movedim(-1, 1))).movedim(1, -1))

    def _predict(self, fused: Tensor) -> Tensor:
        weight, bias = self.linear_pred.weight.flatten(1), self.linear_pred.bias
        return nn.functional.linear(as_weight(fused, weight), weight, bias).movedim(-1, 1)

    def _columns(self) -> list[Tensor]:
        """Return each stage's columns of the fuse (C, C), finest stage first; they stand in the order 4, 3, 2, 1."""
        weight = cast(Tensor, self.linear_fuse[0].weight)
        return list(weight.flatten(1).chunk(STAGES, dim=1)[::-1])

    def _projection(self, stage: int) -> StageProjection:
        return cast(StageProjection, self.get_submodule(f"linear_c{stage + 1}"))

    def _projected(self, stage: int, grids: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
        return nn.functional.linear(self._projection(stage)(grids[stage]), columns[stage])

    def _infer(self, grids: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
        """Do what `forward` does, with BatchNorm in the weights, a slab of the finest grid at a time."""
        scale, shift = folded(self.linear_fuse[1])
        columns = [column * scale[:, None] for column in columns]
        rows, matrix, constant = _finest_rows(grids[0], self._projection(0), columns[0])
        coarse = [self._projected(stage, grids, columns) for stage in range(1, STAGES)]
        # A voxel's interpolation weights sum to one, so that what all voxels share can go through the smallest map.
        coarse[-1] += shift + constant
        return self._predict_slabs(rows, matrix, _upsampled_but_last(coarse, grids[0].shape[1:-1]), grids[0].shape)

    def _infer_whole(self, grids: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
        """Do what `forward` does, with BatchNorm in the weights: in one piece, for a GPU's few launches."""
        scale, shift = folded(self.linear_fuse[1])
        columns = [(column * scale[:, None]).to(column.dtype) for column in columns]
        finest, *coarse = (self._projected(stage, grids, columns) for stage in range(STAGES))
        coarse[-1] = coarse[-1] + shift.to(coarse[-1].dtype)
        return self._predict(_add_upsampled(finest, coarse).relu_())

    def _predict_slabs(self, rows: Tensor, matrix: Tensor, lines: _Lines, shape: torch.Size) -> Tensor:
        weight, bias = self.linear_pred.weight.flatten(1).t(), cast(Tensor, self.linear_pred.bias)
        width, length = weight.shape[0], shape[-2]
        logits = rows.new_empty(rows.shape[0], weight.shape[1])
        step = max(1, _SLAB_VOXELS // length)
        for start in range(0, lines.values.shape[0], step):
            values = lines.values[start : start + step]
            voxels = slice(start * length, (start + values.shape[0]) * length)
            fused = torch.mm(rows[voxels], matrix).view(-1, length, width)
            fused.baddbmm_(lines.matrix.expand(values.shape[0], -1, -1), values).relu_()
            torch.addmm(bias, fused.view(-1, width), weight, out=logits[voxels])
        return logits.view(*shape[:-1], -1).movedim(-1, 1)


class _Lines(NamedTuple):
    """Coarse maps interpolated along every axis but the last, side by side, and what interpolates them along that.

    values (lines, coarse positions of all maps, C); matrix (W, coarse positions of all maps).
    """

    values: Tensor
    matrix: Tensor


def _finest_rows(grid: Tensor, projection: StageProjection, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows (V, K + 1), matrix (K + 1, C), constant (C,): column(LayerNorm(proj x)) = rows @ matrix + constant.

    x has few channels K, the decoder many. LayerNorm takes the mean out of proj x, which a projection with centred
    columns does as well, and divides by the deviation, the norm of that projection of (x, 1). A triangular factor of
    K + 1 rows has the same norm, so that C enters only when the columns of the fuse are multiplied in.
    """
    linear, norm = projection.proj, projection.bn
    inputs, width = linear.in_features, linear.out_features
    centred = torch.cat([linear.weight, linear.bias[:, None]], dim=1)
    centred = centred - centred.mean(dim=0)
    # In double precision the product of the matrix with itself loses nothing that single precision would have kept.
    gram = centred.double().t() @ centred.double()
    gram.diagonal().add_(_JITTER * gram.diagonal().sum() + _LEAST_JITTER)  # a projection may lack ranks
    factor = torch.linalg.cholesky_ex(gram)[0].float()
    tokens = grid.reshape(-1, inputs)
    spread = torch.addmm(factor[inputs], tokens, factor[:inputs])
    deviation = torch.rsqrt(torch.linalg.vecdot(spread, spread) / width + norm.eps)[:, None]
    rows = torch.cat([tokens * deviation, deviation], dim=1)
    return rows, ((column * norm.weight) @ centred).t().contiguous(), column @ norm.bias


def _add_upsampled(finest: Tensor, coarse: Sequence[Tensor]) -> Tensor:
    """Return `finest` (N, D, H, W, C) plus the maps (N, ..., C), each linearly interpolated to its grid."""
    sizes = finest.shape[1:-1]
    if _by_matrices(finest, *coarse):
        lines = _upsampled_but_last(coarse, sizes)
        matrix = lines.matrix.expand(lines.values.shape[0], -1, -1)
        return torch.baddbmm(finest.reshape(-1, *finest.shape[-2:]), matrix, lines.values).view(finest.shape)
    for grid in coarse:
        finest = finest + _interpolate(grid.movedim(-1, 1), sizes).movedim(1, -1)
    return finest


def _upsampled_but_last(coarse: Sequence[Tensor], sizes: torch.Size) -> _Lines:
    lines = []
    for grid in coarse:
        # From the last axis to the first, so that the largest product reads memory in order.
        for axis in reversed(range(1, len(sizes))):
            grid = _along(grid, axis, _weights(grid.shape[axis], sizes[axis - 1], grid.device, grid.dtype))
        lines.append(grid.flatten(0, -3))
    matrix = torch.cat([_weights(grid.shape[-2], sizes[-1], grid.device, grid.dtype) for grid in coarse], dim=1)
    return _Lines(torch.cat(lines, dim=1), matrix)


def upsample_logits(logits: Tensor, factor: int, sizes: Sequence[int]) -> Tensor:
    """Return logits (N, K, ...) linearly interpolated to `factor` times their grid, then cropped at the end to `sizes`.

    The result is contiguous, corners are not aligned, as in torch.nn.functional.interpolate.
    """
    if _by_matrices(logits):
        # Three products would round half precision three times, where the operator does it once.
        with torch.autocast("cuda", enabled=False) if logits.is_cuda else nullcontext():
            result = logits.contiguous().float()
            for axis, size in enumerate(sizes, start=2):
                positions = result.shape[axis]
                matrix = _weights(positions, factor * positions, result.device, result.dtype)
                result = _along(result, axis, matrix[:size])
            return result.to(logits.dtype)
    return crop_end(_interpolate(logits.contiguous(), [factor * size for size in logits.shape[2:]]), tuple(sizes))


def _by_matrices(*tensors: Tensor) -> bool:
    """Tell whether to interpolate by matrix products: eagerly on a CPU, compiled or not where GPU kernels compute."""
    return native.eager(*tensors) or choice.way(*tensors) is not None


def _along(x: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Multiply `matrix` (m, n) to the `axis` of length n of a contiguous tensor."""
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    if after.numel() == 1:
        product = nn.functional.linear(x.reshape(-1, x.shape[axis]), matrix)
    else:
        lines = x.reshape(-1, x.shape[axis], after.numel())
        product = torch.bmm(matrix.expand(lines.shape[0], -1, -1), lines)
    return product.view(*before, matrix.shape[0], *after)


def _weights(positions: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return `interpolation_matrix` where it is needed; those of whole multiples are exact in half precision."""
    if torch.compiler.is_compiling():
        # Part of the graph: one small kernel, for any size, and no constant of another device.
        return _matrix(positions, size, device).to(dtype)
    return _kept_weights(positions, size, device, dtype)


@lru_cache(maxsize=256)
def _kept_weights(positions: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return interpolation_matrix(positions, size).to(device, dtype)


@lru_cache(maxsize=256)
def interpolation_matrix(positions: int, size: int) -> Tensor:
    """Return the weights (size, positions) of linear interpolation of an axis, corners not aligned, float32 on the CPU.

    Row i has the two weights of output i, whose centre lies at (i + 1/2) * positions / size - 1/2 of the input.
    """
    with torch.inference_mode(False), torch.no_grad():
        return _matrix(positions, size, torch.device("cpu"))


def _matrix(positions: int, size: int, device: torch.device) -> Tensor:
    rows = torch.arange(size, dtype=torch.float64, device=device)
    centres = ((rows + 0.5) * (positions / size) - 0.5).clamp(0, positions - 1)
    distance = (centres[:, None] - torch.arange(positions, dtype=torch.float64, device=device)).abs()
    return (1 - distance).clamp(min=0).float()


def _interpolate(x: Tensor, sizes: Sequence[int]) -> Tensor:
    mode = "trilinear" if x.ndim == 5 else "bilinear"
    return nn.functional.interpolate(x, size=tuple(sizes), mode=mode, align_corners=False)
