"""Round to nearest, on the progressive grid and per channel."""

from __future__ import annotations

import torch
from torch import Tensor

from qoq.formats.packing import padded_in_features
from qoq.formats.quantized_linear import CODE_MAX, PROTECTIVE_QMAX, QuantizedLinear, ZeroPoints
from qoq.recipes.schema import GROUP_SIZE

_FLOAT16 = torch.finfo(torch.float16)


def round_to_nearest(weight: Tensor, bias: Tensor | None, group_size: int | None) -> QuantizedLinear:
    """Quantize weight float32 [N, K] with its bias [N], on the weight's device; the result is on the CPU.

    group_size 128: int8 scale per channel, then uint4 codes with integer scale and zero per group (QServe paper,
    section 4.1). None: uint4 codes with one scale and zero per channel. K is padded to a multiple of 128 with codes
    that decode to zero. Raises ValueError when a scale or the bias does not fit float16.
    """
    n, in_features = weight.shape
    padded = torch.zeros(n, padded_in_features(in_features), device=weight.device)
    padded[:, :in_features] = weight
    if group_size is None:
        codes, s1, zeros = _round_channels(padded)
        s2 = None
    else:
        codes, s1, s2, zeros = _round_progressive(padded)
    bias16 = None if bias is None else bias.to(torch.float16).cpu()
    return QuantizedLinear(
        codes=codes.to(torch.uint8).cpu(),
        s1_scales=s1.cpu(),
        s2_scales=None if s2 is None else s2.to(torch.uint8).cpu(),
        zeros=ZeroPoints(zeros.to(torch.uint8).cpu()),
        bias=bias16,
        in_features=in_features,
    )


def scales_float16(ranges: Tensor, levels: int) -> Tensor:
    """ranges / levels rounded to float16 [N], never zero and never so small that more than `levels` steps are needed.

    A range of zero gives scale 1. Raises ValueError when a scale is beyond float16.
    """
    exact = ranges / levels
    if bool((exact > _FLOAT16.max).any()):
        raise ValueError(f"channel {int(exact.argmax())} spans {float(ranges.max()):g}: its scale exceeds float16")
    scales = exact.to(torch.float16).clamp(min=_FLOAT16.smallest_normal * _FLOAT16.eps)
    # Only among subnormals can rounding down lose more than half a step; the next float16 up then covers the range.
    short = ranges / scales.float() > levels + 0.5
    scales = (scales.view(torch.int16) + short).view(torch.float16)
    return torch.where(ranges > 0, scales, torch.ones_like(scales))


def _round_progressive(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes [N, K], s1 float16 [N], s2 [N, G], zeros [N, G] of a padded weight (algorithm: two-level, pre-scale)."""
    n = weight.shape[0]
    s1 = scales_float16(weight.abs().amax(dim=1), PROTECTIVE_QMAX)
    # Level 2 quantizes the unrounded quotient: rounding it to int8 first would add an error of its own.
    level1 = (weight / s1.float().unsqueeze(1)).clamp(-PROTECTIVE_QMAX, PROTECTIVE_QMAX).view(n, -1, GROUP_SIZE)
    high = level1.amax(dim=2).clamp(min=0)
    low = level1.amin(dim=2).clamp(max=0)
    s2 = torch.round((high - low) / CODE_MAX).clamp(min=1)
    zeros = torch.round(-low / s2).clamp(0, CODE_MAX)
    codes = torch.round(level1 / s2.unsqueeze(2) + zeros.unsqueeze(2)).clamp(0, CODE_MAX)
    return codes.view(n, -1), s1, s2, zeros


def _round_channels(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """codes [N, K], s1 float16 [N], zeros [N, 1] of a padded weight; ranges are widened to contain 0."""
    high = weight.amax(dim=1).clamp(min=0)
    low = weight.amin(dim=1).clamp(max=0)
    s1 = scales_float16(high - low, CODE_MAX)
    scale = s1.float().unsqueeze(1)
    zeros = torch.round(-low.unsqueeze(1) / scale).clamp(0, CODE_MAX)
    codes = torch.round(weight / scale + zeros).clamp(0, CODE_MAX)
    return codes, s1, zeros
