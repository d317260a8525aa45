"""GPTQ: inputs are rounded one after the other, and what rounding one changes is made up for by those to come.

The loss is the output error on the calibration inputs, tr(D H D^T) for a change D of the weight and the mean outer
product H of the inputs (Frantar et al., 2022, "GPTQ", equations 2 to 4). The grid is fixed beforehand, so rounding one
input asks only for its nearest code, on the progressive grid as on any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.calib.round.grid import Grid
from qoq.calib.round.grid_search import search_grid
from qoq.formats.packing import padded_in_features
from qoq.formats.quantized_linear import CODE_MAX, QuantizedLinear

_LAZY = 128
"""Inputs after which the rest of the weight is brought up to date, in one matrix product."""
_DAMPING_STEPS = (1, 3, 10, 30, 100)
"""Multiples of the recipe's damping that are tried in turn until H can be factored."""


@dataclass(frozen=True)
class Moments:
    """mean(x x^T) of the inputs x of a linear, float64 [K, K], over `tokens` tokens."""

    matrix: Tensor
    tokens: int


@dataclass(frozen=True)
class Inputs:
    """What GPTQ needs of the inputs of a linear; linears that multiply the same input share one.

    order    of rounding: falling diag(H), int64 [K_padded]
    factor   upper triangular U, float32 [K_padded, K_padded], in that order: U^T U is the inverse of H, damped;
             None where there is none
    """

    moments: Moments
    order: Tensor
    factor: Tensor | None

    @staticmethod
    def of(moments: Moments, *, damping: float) -> Inputs:
        """Damping, a share of the mean of diag(H), is added to the diagonal, and more where H cannot be factored."""
        k = moments.matrix.shape[0]
        matrix = torch.nn.functional.pad(moments.matrix, (0, padded_in_features(k) - k) * 2)
        order = torch.argsort(matrix.diagonal(), descending=True, stable=True)
        return Inputs(moments, order, _inverse_factor(matrix[order][:, order], damping))


@dataclass(frozen=True)
class Rounded:
    """A quantized layer, and why it was rounded to nearest instead (None where GPTQ did it)."""

    linear: QuantizedLinear
    fallback: str | None


def gptq(
    weight: Tensor, bias: Tensor | None, group_size: int | None, inputs: Inputs, *, search: bool = False
) -> Rounded:
    """Quantize weight float32 [N, K] for these inputs, on the weight's device; the result is on the CPU.

    `search`: scales and zeros by the error they leave on inputs of these mean squares, else by ranges. Inputs that are
    always zero get the codes of zero. Falls back on rounding to nearest where there are fewer tokens than inputs, where
    H has no factor, or where GPTQ gains nothing. Raises ValueError when a scale or the bias does not fit float16.
    """
    in_features, moments = weight.shape[1], inputs.moments
    grid = search_grid(weight, group_size, moments.matrix.diagonal()) if search else Grid.of(weight, group_size)
    nearest = grid.nearest(grid.units(weight))

    def rounded(codes: Tensor, fallback: str | None) -> Rounded:
        return Rounded(grid.linear(codes, bias, in_features), fallback)

    if moments.tokens < in_features:
        return rounded(nearest, f"{moments.tokens} calibration tokens for {in_features} inputs")
    if inputs.factor is None:
        return rounded(nearest, "the moments of its inputs are not positive definite")
    codes = _round_in_order(grid, weight, inputs.order, inputs.factor, moments.matrix.diagonal() <= 0)
    losses = [_loss(grid, weight, chosen, moments.matrix) for chosen in (codes, nearest)]
    if not losses[0] < losses[1]:
        return rounded(nearest, "GPTQ gains nothing on the calibration text")
    return rounded(codes, None)


def _inverse_factor(matrix: Tensor, damping: float) -> Tensor | None:
    """Upper triangular U, float32, with U^T U the inverse of `matrix` damped; None where there is none."""
    diagonal = matrix.diagonal()
    mean = diagonal[diagonal > 0].mean()
    if not bool(torch.isfinite(mean)):
        return None
    for step in _DAMPING_STEPS:
        damped = matrix.clone()
        # Inputs that are always zero take part in nothing: any positive number will do.
        damped.diagonal().add_(torch.where(diagonal > 0, damping * step * mean, mean))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(failed) == 0 and bool(torch.isfinite(upper).all()):
                factor: Tensor = upper.float()
                return factor
    return None


def _round_in_order(grid: Grid, weight: Tensor, order: Tensor, factor: Tensor, silent: Tensor) -> Tensor:
    """Codes float32 [N, K_padded] for weight [N, K], columns taken in `order`. silent [K]: inputs that are zero."""
    limit = grid.limit
    left = grid.units(weight.masked_fill(silent, 0))[:, order]
    codes = torch.empty_like(left)
    columns = order.tolist()
    for first in range(0, len(columns), _LAZY):
        last = min(first + _LAZY, len(columns))
        block, errors = left[:, first:last].clone(), torch.empty_like(left[:, first:last])
        local = factor[first:last, first:last]
        for i in range(last - first):
            scale, zero = grid.scale_and_zero(columns[first + i])
            wanted = block[:, i]
            code = torch.round(wanted.clamp(-limit, limit) / scale + zero).clamp(0, CODE_MAX)
            errors[:, i] = (wanted - (code - zero) * scale) / local[i, i]
            block[:, i:] -= errors[:, i : i + 1] * local[i, i:]
            codes[:, columns[first + i]] = code
        left[:, last:] -= errors @ factor[first:last, last:]
    return codes


def _loss(grid: Grid, weight: Tensor, codes: Tensor, matrix: Tensor) -> float:
    """tr(D H D^T) for the change D of weight [N, K] that these codes mean."""
    linear = grid.linear(codes, None, weight.shape[1])
    change = (linear.dequantize().to(weight.device) - weight).double()
    return float(((change @ matrix) * change).sum())
