"""Random linears that are legal to the last value: shared by the tests of formats/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from qoq.formats.quantized_linear import QuantizedLinear, S2Offsets, ZeroPoints

Mode = Literal["pre_scale", "post_scale", "per_channel"]
MakeLinear = Callable[..., QuantizedLinear]


@pytest.fixture(scope="session")
def make_linear() -> MakeLinear:
    """make_linear(mode, n, in_features, seed, has_bias=False): every legal value of every field can occur."""
    return _make_linear


def _make_linear(mode: Mode, n: int, in_features: int, seed: int, *, has_bias: bool = False) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: Tensor, high: Tensor) -> Tensor:
        """Integers uniform in low..high, elementwise and inclusive."""
        span = (high - low + 1).double()
        return low + (torch.rand(span.shape, generator=generator, dtype=torch.float64) * span).long()

    groups = -(-in_features // 128)
    width = 1 if mode == "per_channel" else groups
    floor, ceiling = torch.zeros(n, width, dtype=torch.long), torch.full((n, width), 15)
    s2 = uniform(floor + 1, ceiling + 1)
    if mode == "post_scale":
        zeros = uniform(floor, torch.clamp(15 * s2 + 128, max=240))
        offsets = zeros
    else:
        zeros = uniform(floor, ceiling)
        offsets = zeros * s2
    if mode != "per_channel":  # the codes that decode into int8
        floor = torch.clamp(-((128 - offsets) // s2), min=0)
        ceiling = torch.clamp((127 + offsets) // s2, max=15)
    repeats = groups * 128 // width
    codes = uniform(floor.repeat_interleave(repeats, dim=1), ceiling.repeat_interleave(repeats, dim=1))
    s1 = torch.exp2(torch.rand(n, generator=generator) * 34 - 24)  # float16's smallest subnormal up to 1024
    return QuantizedLinear(
        codes=codes.to(torch.uint8),
        s1_scales=s1.to(torch.float16),
        s2_scales=None if mode == "per_channel" else s2.to(torch.uint8),
        zeros=S2Offsets(zeros.to(torch.uint8)) if mode == "post_scale" else ZeroPoints(zeros.to(torch.uint8)),
        bias=torch.randn(n, generator=generator).to(torch.float16) if has_bias else None,
        in_features=in_features,
    )
