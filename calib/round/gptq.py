"""GPTQ: inputs are rounded one after the other, and what rounding one changes is made up for by those to come.

The loss is the output error on the calibration inputs, tr(D H D^T) for a change D of the weight and the mean outer
product H of the inputs (Frantar et al., 2022, "GPTQ", equations 2 to 4). The grid is fixed beforehand, so rounding one
input asks only for its nearest code, on the progressive grid as on any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qoq.calib.round.columns import COLUMNS, round_columns
from qoq.calib.round.grid import Grid
from qoq.calib.round.grid_search import search_grid
from qoq.formats.packing import padded_in_features
from qoq.formats.quantized_linear import QuantizedLinear
from qoq.recipes.schema import ZeroDomain

_CHANCE, _LEAST_DAMPING = 1.5, 0.005
"""On SmolLM2, H of 8192 tokens generalizes best to others with damping near 1.5 K / tokens."""
_DAMPING_STEPS = (1, 3, 10, 30, 100)
"""Multiples of the recipe's damping that are tried in turn until H can be factored."""


@dataclass(frozen=True)
class Moments:
    """Means over `tokens` tokens, float64, for linears that multiply the same inputs x.

    matrix   [K, K] of x x^T, with x as it is served
    shift    [K, K] of (x' - x) x^T, with x' what the float model has in its place; None where x' is not known
    """

    matrix: Tensor
    tokens: int
    shift: Tensor | None = None


@dataclass(frozen=True)
class Inputs:
    """What GPTQ needs of the inputs of a linear; linears that multiply the same input share one.

    order    of rounding: falling diag(H), int64 [K_padded]
    cost     of the square of a rounding error, once what comes later has made up for it, float32 [K_padded]
    factor   upper triangular U, float32 [K_padded, K_padded], in that order: U^T U is the inverse of H, damped;
             None where there is none
    """

    moments: Moments
    order: Tensor
    cost: Tensor
    factor: Tensor | None

    @staticmethod
    def of(moments: Moments, *, damping: float | Literal["auto"]) -> Inputs:
        """Damping, a share of the mean of diag(H), is added to the diagonal, and more where H cannot be factored.

        "auto": as much as there is chance in H, which grows with its order and falls with the number of tokens.
        """
        matrix = _padded(moments.matrix)
        chance = _CHANCE * moments.matrix.shape[0] / moments.tokens
        share = max(chance, _LEAST_DAMPING) if damping == "auto" else damping
        order = torch.argsort(matrix.diagonal(), descending=True, stable=True)
        factor = None
        for damped in _damped(matrix, share):
            factor = _inverse_factor(damped[order][:, order])
            if factor is not None:
                break
        cost = matrix.diagonal().float()
        if factor is not None:
            cost = torch.empty_like(cost)
            cost[order] = factor.diagonal() ** -2
        return Inputs(moments, order, cost, factor)

    def wanted(self, weight: Tensor) -> Tensor:
        """The weight float32 [N, K] whose outputs on the served inputs come closest to what `weight` is meant to give.

        That is W + W E[(x' - x) x^T] H^-1; `weight` itself where nothing is known of x'.
        """
        shift, k = self.moments.shift, weight.shape[1]
        if self.factor is None or shift is None:
            return weight
        change = (weight.double() @ shift).float()
        ordered = torch.nn.functional.pad(change, (0, len(self.order) - k))[:, self.order]
        solved = torch.empty_like(ordered)
        solved[:, self.order] = (ordered @ self.factor.t()) @ self.factor
        return weight + solved[:, :k]


@dataclass(frozen=True)
class Rounded:
    """A quantized layer, and why it was rounded to nearest instead (None where GPTQ did it)."""

    linear: QuantizedLinear
    fallback: str | None


def gptq(
    weight: Tensor,
    bias: Tensor | None,
    group_size: int | None,
    inputs: Inputs,
    *,
    search: bool = False,
    zero_domain: ZeroDomain = "pre_scale",
    symmetric: bool = False,
) -> Rounded:
    """Quantize weight float32 [N, K] for these inputs; the result is on the weight's device.

    `search`: scales and zeros by the error they leave on such inputs, else by ranges; `symmetric`: as for `Grid.of`.
    Inputs that are always zero get the codes of zero. Falls back on rounding to nearest where there are fewer tokens
    than inputs, where H has no factor, or where GPTQ gains nothing. Raises ValueError when a scale or the bias does not
    fit float16.
    """
    in_features, moments = weight.shape[1], inputs.moments
    squares = moments.matrix.diagonal()

    def grid_for(weight: Tensor, cost: Tensor) -> Grid:
        if search:
            return search_grid(weight, group_size, cost, zero_domain, symmetric=symmetric)
        return Grid.of(weight, group_size, zero_domain, symmetric=symmetric)

    def fallen_back(reason: str) -> Rounded:
        plain = grid_for(weight, squares)
        return Rounded(plain.linear(plain.nearest(plain.units(weight)), bias, in_features), reason)

    if moments.tokens < in_features:
        return fallen_back(f"{moments.tokens} calibration tokens for {in_features} inputs")
    if inputs.factor is None:
        return fallen_back("the moments of its inputs are not positive definite")
    wanted = inputs.wanted(weight).masked_fill(squares <= 0, 0)
    grid = grid_for(wanted, inputs.cost[:in_features])
    codes, nearest = _round_in_order(grid, wanted, inputs.order, inputs.factor), grid.nearest(grid.units(wanted))
    if not _loss(grid, codes, wanted, moments.matrix) < _loss(grid, nearest, wanted, moments.matrix):
        return fallen_back("GPTQ gains nothing on the calibration text")
    return Rounded(grid.linear(codes, bias, in_features), None)


def _padded(matrix: Tensor) -> Tensor:
    k = matrix.shape[0]
    return torch.nn.functional.pad(matrix, (0, padded_in_features(k) - k) * 2)


def _damped(matrix: Tensor, damping: float) -> Iterator[Tensor]:
    """`matrix` with more and more on its diagonal; nothing where it has no positive entry there."""
    diagonal = matrix.diagonal()
    mean = diagonal[diagonal > 0].mean()
    if not bool(torch.isfinite(mean)):
        return
    for step in _DAMPING_STEPS:
        damped = matrix.clone()
        # Inputs that are always zero take part in nothing: any positive number will do.
        damped.diagonal().add_(torch.where(diagonal > 0, damping * step * mean, mean))
        yield damped


def _inverse_factor(matrix: Tensor) -> Tensor | None:
    """Upper triangular U, float32, with U^T U the inverse of `matrix`; None where there is none."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) == 0:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if int(failed) == 0 and bool(torch.isfinite(upper).all()):
            factor: Tensor = upper.float()
            return factor
    return None


def _round_in_order(grid: Grid, weight: Tensor, order: Tensor, factor: Tensor) -> Tensor:
    """Codes float32 [N, K_padded] for weight [N, K], columns taken in `order`."""
    left = grid.units(weight)[:, order]
    scale, zero = (spread[:, order] for spread in grid.spread(len(order)))
    ordered = torch.empty_like(left)
    for first in range(0, len(order), COLUMNS):
        now, later = slice(first, first + COLUMNS), slice(first + COLUMNS, None)
        ordered[:, now], errors = round_columns(left[:, now], scale[:, now], zero[:, now], factor[now, now], grid.limit)
        left[:, later] -= errors @ factor[now, later]
    codes = torch.empty_like(ordered)
    codes[:, order] = ordered
    return codes


def _loss(grid: Grid, codes: Tensor, weight: Tensor, matrix: Tensor) -> float:
    """tr(D H D^T) for the change D of weight [N, K] that codes [N, K_padded] mean."""
    change = (grid.weight(codes)[:, : weight.shape[1]] - weight).double()
    return float(((change @ matrix) * change).sum())
