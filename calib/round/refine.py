"""Refinement after GPTQ: each code is taken up again, now that all others are known.

Coordinate descent on tr(D H D^T), the loss that GPTQ passes over once (QuantEase, Behdin et al., 2023), in turn with
the level-1 scales that fit the codes best. Neither step can make the loss larger, but for scales rounded to float16.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qoq.calib.round.columns import COLUMNS, descend_columns
from qoq.calib.round.grid import Grid, padded


def refine(grid: Grid, codes: Tensor, weight: Tensor, matrix: Tensor, order: Tensor) -> tuple[Grid, Tensor]:
    """One pass over codes float32 [N, K_padded] of weight [N, K]: the grid with its new scales, and the codes.

    matrix: H, float32 [K_padded, K_padded]; order: of the columns.
    """
    wanted = padded(weight)
    grid = _fit_scales(grid, grid.values(codes), wanted, matrix)
    return grid, _descend(grid, codes, wanted / grid.s1.float().unsqueeze(1), matrix, order)


def _fit_scales(grid: Grid, values: Tensor, wanted: Tensor, matrix: Tensor) -> Grid:
    """The scale s of each row that makes s * values closest to what is wanted, by least squares."""
    product = values @ matrix
    fit = (product * wanted).sum(dim=1) / (product * values).sum(dim=1)
    old = grid.s1.float()
    # A row that is all zeros has no fit. Far from the old scale there is nothing to gain but trouble.
    usable = torch.isfinite(fit) & (fit > 0.5 * old) & (fit < 2 * old)
    return replace(grid, s1=torch.where(usable, fit, old).to(torch.float16))


def _descend(grid: Grid, codes: Tensor, wanted: Tensor, matrix: Tensor, order: Tensor) -> Tensor:
    values = grid.values(codes)
    gradient = ((values - wanted) @ matrix)[:, order]
    scale, zero = (spread[:, order] for spread in grid.spread(len(order)))
    matrix, values, ordered = matrix[order][:, order], values[:, order], torch.empty_like(codes)
    for first in range(0, len(order), COLUMNS):
        now, later = slice(first, first + COLUMNS), slice(first + COLUMNS, None)
        ordered[:, now], moved = descend_columns(
            values[:, now], gradient[:, now], scale[:, now], zero[:, now], matrix[now, now], grid.limit
        )
        gradient[:, later] += moved @ matrix[now, later]
    result = torch.empty_like(ordered)
    result[:, order] = ordered
    return result
