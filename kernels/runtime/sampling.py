"""Drawing the next token of each row on the device: the likeliest, or from the smallest set that holds top_p.

What a row draws depends on its logits, its seed and the place of the token in its sequence, and on nothing else: not on
the rows beside it, the step, or the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""Constants of SplitMix64 (Steele, Lea and Flood, 2014)."""
_FRACTION_BITS = 24
ROWS_AT_ONCE = 64
"""Rows that are drawn together; more would only take more memory."""
ROW_NBYTES = 48
"""Memory that drawing takes, for each row and each token of the vocabulary."""


_ARGMAX_PARTS, _ARGMAX_ROWS = 256, 128
"""Of a row, at most, and rows from which on it is not cut."""


@dataclass(frozen=True)
class Draws:
    """How each row draws: temperatures float32 [B] (0: the likeliest token), top_ps float32 [B], seeds int64 [B] and
    places int64 [B], the number of the token in its sequence."""

    temperatures: Tensor
    top_ps: Tensor
    seeds: Tensor
    places: Tensor


def sample(logits: Tensor, draws: Draws | None) -> Tensor:
    """Tokens int64 [B] of logits [B, V]; without draws, the likeliest of each row."""
    likeliest = _likeliest(logits)
    if draws is None:
        return likeliest
    drawn = [
        _draw(logits[start : start + ROWS_AT_ONCE], *(part[start : start + ROWS_AT_ONCE] for part in (
            draws.temperatures, draws.top_ps, uniforms(draws.seeds, draws.places)
        )))
        for start in range(0, len(logits), ROWS_AT_ONCE)
    ]  # fmt: skip
    return torch.where(draws.temperatures <= 0, likeliest, torch.cat(drawn))


def _likeliest(logits: Tensor) -> Tensor:
    """logits.argmax(-1), the first of several that are equal. Of few rows in two steps: PyTorch gives each of them to
    one multiprocessor, which takes longer than a small product."""
    rows, vocabulary = logits.shape
    parts = math.gcd(vocabulary, _ARGMAX_PARTS)
    if rows >= _ARGMAX_ROWS or parts == 1:
        return logits.argmax(-1)
    width = vocabulary // parts
    highest, places = logits.reshape(rows, parts, width).max(-1)
    places = places + torch.arange(0, vocabulary, width, device=logits.device)
    return places.gather(1, highest.argmax(-1, keepdim=True)).squeeze(1)


def _draw(logits: Tensor, temperatures: Tensor, top_ps: Tensor, targets: Tensor) -> Tensor:
    """Tokens [B]: ordered by falling probability, those before which top_p is reached already are left out, and the
    inverse of the distribution over the rest is taken at targets [B]."""
    temperatures = torch.where(temperatures <= 0, 1.0, temperatures)
    probabilities, order = (logits.float() / temperatures.unsqueeze(1)).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    is_kept = before < top_ps.unsqueeze(1)
    is_kept[:, 0] = True  # whatever top_p is
    kept = probabilities * is_kept
    sums = kept.cumsum(-1)
    index = (sums <= targets.unsqueeze(1) * sums[:, -1:]).sum(-1)
    last = is_kept.sum(-1) - 1
    return order.gather(1, torch.minimum(index, last).unsqueeze(1)).squeeze(1)


def uniforms(seeds: Tensor, places: Tensor) -> Tensor:
    """float32 [B] in [0, 1), multiples of 2^-24: the `places`-th numbers of SplitMix64 from `seeds`, int64 [B] both."""
    state = seeds + (places + 1) * _signed(_GOLDEN)
    for shift, factor in _MIX:
        state = (state ^ _shifted(state, shift)) * _signed(factor)
    state = state ^ _shifted(state, 31)
    return _shifted(state, 64 - _FRACTION_BITS).float() / (1 << _FRACTION_BITS)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of 64 bits without a sign; PyTorch's int64 has one, and its sums and products wrap."""
    return (x >> bits) & (_MASK >> bits)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >> 63 else constant
