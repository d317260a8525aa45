"""Scales and zeros chosen by the error they leave, instead of by the range of the weights alone.

A grid that spans all weights is coarse in the middle, where most of them are. Narrower ones are tried, centred or some
steps off, and each group (each row, with one level per channel) takes the one whose nearest codes are closest, inputs
weighted by their mean square. On the progressive grid level-2 scales are integers from 1 to 16, so trying is cheap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qoq.calib.round.grid import Grid, padded, scales_float16
from qoq.formats.quantized_linear import CODE_MAX
from qoq.recipes.schema import GROUP_SIZE, ZeroDomain

_NARROWER = 6
"""Level-2 scales that are tried below the one that spans the group: at 4 bits, half of a range is always too little."""
_SHARES = tuple(1 - i / 40 for i in range(25))
"""Of the range of a row, with one level per channel."""
_STEPS_OFF = (0, -1, 1, -2, 2)
_PARTS_OFF = tuple(i / 4 for i in range(-6, 7))
"""Steps by which zeros are tried around the one that centres the range; parts of them where zeros need not be codes."""


def search_grid(
    weight: Tensor,
    group_size: int | None,
    importance: Tensor | None,
    zero_domain: ZeroDomain = "pre_scale",
    *,
    symmetric: bool = False,
) -> Grid:
    """The grid for weight float32 [N, K]; importance [K], not negative, weighs the squared errors of inputs.

    `symmetric`: as for `Grid.of`. Raises ValueError when a scale does not fit float16.
    """
    start = Grid.of(weight, group_size, zero_domain, symmetric=symmetric)
    weights = padded(torch.ones(1, weight.shape[1], device=weight.device) if importance is None else importance[None])
    weights = weights.float()
    if group_size is None:
        return _search_channels(start, padded(weight), weights)
    return _search_groups(start, start.units(weight), weights, symmetric=symmetric)


def _search_groups(start: Grid, units: Tensor, importance: Tensor, *, symmetric: bool) -> Grid:
    grouped = units.view(units.shape[0], -1, GROUP_SIZE)
    importance = importance.view(1, -1, GROUP_SIZE)
    high, low = grouped.amax(dim=2).clamp(min=0), grouped.amin(dim=2).clamp(max=0)
    span = 2 * torch.maximum(high, -low) if symmetric else high - low
    widest = torch.ceil(span / CODE_MAX).clamp(min=1)
    best = _Best(*(torch.empty_like(high) for _ in range(2)))
    for narrower in range(_NARROWER + 1):
        s2 = (widest - narrower).clamp(min=1)
        tried = [start.zeros] if symmetric else _offsets(low, high, s2) if start.offsets else _zeros(low, high, s2)
        for zeros in tried:
            scale, zero = s2.unsqueeze(2), zeros.unsqueeze(2)
            codes = torch.round(grouped / scale + zero).clamp_(0, CODE_MAX)
            errors = ((codes - zero) * scale - grouped).square_().mul_(importance).sum(dim=2)
            best.offer(errors, s2, zeros)
    return replace(start, s2=best.scale, zeros=best.zeros)


def _search_channels(start: Grid, weight: Tensor, importance: Tensor) -> Grid:
    high, low = weight.amax(dim=1).clamp(min=0), weight.amin(dim=1).clamp(max=0)
    best = _Best(torch.empty_like(start.s1), torch.empty_like(high))
    for share in _SHARES:
        s1 = scales_float16((high - low) * share, CODE_MAX)
        scale = s1.float()
        for zeros in _zeros(low, high, scale):
            codes = torch.round(weight / scale.unsqueeze(1) + zeros.unsqueeze(1)).clamp_(0, CODE_MAX)
            stored = (zeros * scale).to(torch.float16).float()  # as QuantizedLinear.s1_szeros has it
            values = codes * scale.unsqueeze(1) - stored.unsqueeze(1)
            # In units of the widest grid: squares of tiny rows would vanish.
            errors = ((values - weight) / start.s1.float().unsqueeze(1)).square_().mul_(importance).sum(dim=1)
            best.offer(errors, s1, zeros)
    return Grid(best.scale, None, best.zeros.unsqueeze(1), start.limit)


def _zeros(low: Tensor, high: Tensor, scale: Tensor) -> Iterator[Tensor]:
    """Zeros of grids with this scale: what does not fit is cut off at both ends alike, or more of it at one of them."""
    cut = ((high - low) - CODE_MAX * scale).clamp(min=0) / 2
    centred = torch.round(-(low + cut) / scale)
    for off in _STEPS_OFF:
        yield (centred + off).clamp(0, CODE_MAX)


def _offsets(low: Tensor, high: Tensor, s2: Tensor) -> Iterator[Tensor]:
    """The same in level-1 units, divided by the scale again."""
    cut = ((high - low) - CODE_MAX * s2).clamp(min=0) / 2
    for off in _PARTS_OFF:
        yield torch.round((off * s2 - (low + cut)).clamp(min=0).minimum(CODE_MAX * s2)) / s2


class _Best:
    """The scale and zeros with the least error so far; of equals the first."""

    def __init__(self, scale: Tensor, zeros: Tensor) -> None:
        self.scale, self.zeros = scale, zeros
        self._errors = torch.full_like(zeros, torch.inf)

    def offer(self, errors: Tensor, scale: Tensor, zeros: Tensor) -> None:
        better = errors < self._errors
        self._errors = torch.where(better, errors, self._errors)
        self.scale = torch.where(better, scale, self.scale)
        self.zeros = torch.where(better, zeros, self.zeros)
