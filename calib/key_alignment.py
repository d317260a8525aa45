"""Key alignment: each RoPE pair of keys is turned so that its mean lies on the diagonal.

RoPE turns channels i and i + D/2 of a head together, as points of a plane. Turning keys and queries by one more angle,
the same at every position, changes no score, and can be folded into q_proj and k_proj. A pair whose mean lies on the
diagonal shares it between its two channels: the range of the head's channels, which the 4-bit cache divides into 15
steps, becomes as small as the mean allows, and lies on one side of zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qoq.calib.attention import AttentionCall
from qoq.recipes.families import Family


class MeanKeyObserver:
    """Sums post-RoPE keys, float64 [kv_heads, D]."""

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> None:
        total = key.sum(dim=(0, 2), dtype=torch.float64)
        self._total = total if self._total is None else self._total + total

    @property
    def total(self) -> Tensor:
        if self._total is None:
            raise ValueError("no attention was observed")
        return self._total


def angles(mean: Tensor) -> Tensor:
    """By how much to turn each pair, radians [kv_heads, D/2], for mean keys [kv_heads, D] or a multiple of them."""
    first, second = mean.chunk(2, dim=1)
    return math.pi / 4 - torch.atan2(second, first)


def fold(tensors: dict[str, Tensor], turned: Tensor, family: Family, num_heads: int) -> dict[str, Tensor]:
    """Turn rows and biases of k_proj and q_proj of a block by `turned` [kv_heads, D/2]; the input is left alone."""
    folded = dict(tensors)
    group = num_heads // turned.shape[0]
    for role, by in (("attn_k", turned), ("attn_q", turned.repeat_interleave(group, dim=0))):
        for part in ("weight", "bias"):
            name = f"{family.roles[role]}.{part}"
            if name in tensors:
                folded[name] = _turn(tensors[name], by)
    return folded


def _turn(rows: Tensor, by: Tensor) -> Tensor:
    """rows [heads * D, ...], pairs turned by angles [heads, D/2]."""
    heads, half = by.shape
    pairs = rows.double().view(heads, 2, half, -1)
    cosine, sine = by.double().cos().unsqueeze(2), by.double().sin().unsqueeze(2)
    first, second = pairs[:, 0], pairs[:, 1]
    turned = torch.stack((cosine * first - sine * second, sine * first + cosine * second), dim=1)
    return turned.reshape(rows.shape).to(rows.dtype)
