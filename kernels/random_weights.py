"""Random linears as they are on disk: legal, and of no meaning. For benchmarks and tests."""

from __future__ import annotations

import torch
from torch import Tensor

from qoq.formats.packing import padded_in_features
from qoq.formats.quantized_linear import CODE_MAX, INT8_MAX, INT8_MIN, S2_MAX
from qoq.recipes.schema import GROUP_SIZE


def random_packed_linear(
    out_features: int, in_features: int, *, progressive: bool, generator: torch.Generator
) -> dict[str, Tensor]:
    """The packed tensors of one linear (names, dtypes and shapes of `packed_shapes`) on the generator's device.

    Every code is drawn from 0..15. s2 is drawn from 1..16 and the zero from those that keep every code within int8, so
    a progressive linear has groups up to both ends of the range. Padding is not zero: activations are, there.
    """
    device = generator.device
    n, k = out_features, padded_in_features(in_features)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator, device=device, dtype=torch.int32)

    # Random level-1 weights have a root mean square near 50, so outputs of random activations stay within float16.
    scales = torch.rand(n, generator=generator, device=device) * 1e-4 + 1e-4
    packed = {
        "qweight": torch.empty(n, k // 2, dtype=torch.int8, device=device).random_(-128, 128, generator=generator),
        "s1_scales": (scales if progressive else scales * 16).half(),
    }
    if not progressive:
        points = integers(0, CODE_MAX, n)
        packed["s1_szeros"] = (points.float() * packed["s1_scales"].float()).half()
        return packed
    groups = k // GROUP_SIZE
    s2 = integers(1, S2_MAX, groups, n)
    least = torch.div(CODE_MAX * s2 - INT8_MAX + s2 - 1, s2, rounding_mode="floor").clamp(min=0)
    most = torch.div(torch.full_like(s2, -INT8_MIN), s2, rounding_mode="floor").clamp(max=CODE_MAX)
    drawn = torch.rand(groups, n, generator=generator, device=device)
    points = least + (drawn * (most - least + 1)).int().clamp(max=most - least)
    packed["s2_scales"] = s2.to(torch.int8)
    packed["s2_zeros"] = (-points * s2).to(torch.int8)
    return packed


def random_act_codes(rows: int, in_features: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized activations: codes int8 [M, K_pad] (padding zero), scales float32 [M], sums int32 [M]."""
    device = generator.device
    codes = torch.zeros(rows, padded_in_features(in_features), dtype=torch.int8, device=device)
    drawn = torch.randint(-127, 128, (rows, in_features), generator=generator, device=device, dtype=torch.int16)
    codes[:, :in_features] = drawn.to(torch.int8)
    scales = torch.rand(rows, generator=generator, device=device) * 0.01 + 0.001
    return codes, scales, codes.sum(dim=1, dtype=torch.int32)
