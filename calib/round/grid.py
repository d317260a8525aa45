"""Where codes may lie: scales and zeros of a weight, fixed before any code is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.calib.round.columns import nearest
from qoq.formats.packing import padded_in_features
from qoq.formats.quantized_linear import (
    CODE_MAX,
    PROTECTIVE_QMAX,
    SYMMETRIC_ZERO,
    QuantizedLinear,
    S2Offsets,
    ZeroPoints,
)
from qoq.recipes.schema import GROUP_SIZE, ZeroDomain

_FLOAT16 = torch.finfo(torch.float16)


@dataclass(frozen=True)
class Grid:
    """Scales and zeros of a weight [N, K], on its device.

    s1      float16 [N]; a weight counts in units of it
    s2      float32 [N, G] on the progressive grid, with G groups of 128 (K padded); None for one level per channel
    zeros   float32 [N, G], or [N, 1] per channel; in codes, and whole, but where they are `offsets`
    limit   units beyond which a weight is clamped before it is rounded, so that no code leaves int8
    """

    s1: Tensor
    s2: Tensor | None
    zeros: Tensor
    limit: float
    offsets: bool = False
    """Zeros are whole in units of s1 (post-scale), not in codes: zeros * s2 are the offsets that are stored."""

    @staticmethod
    def of(
        weight: Tensor, group_size: int | None, zero_domain: ZeroDomain = "pre_scale", *, symmetric: bool = False
    ) -> Grid:
        """The grid that spans rows and groups of weight float32 [N, K]. Post-scale zeros and `symmetric` need groups.

        `symmetric`: zeros are code 8 everywhere; the largest weight is at most half a step beyond the largest code.
        Raises ValueError when a scale does not fit float16.
        """
        weight = padded(weight)
        if group_size is None:
            # Ranges contain 0, so that zero weights, and padding, stay zero.
            high, low = weight.amax(dim=1).clamp(min=0), weight.amin(dim=1).clamp(max=0)
            s1 = scales_float16(high - low, CODE_MAX)
            zeros = torch.round(-low / s1.float()).clamp(0, CODE_MAX)
            return Grid(s1, None, zeros.unsqueeze(1), torch.inf)
        s1 = scales_float16(weight.abs().amax(dim=1), PROTECTIVE_QMAX)
        units = (weight / s1.float().unsqueeze(1)).clamp(-PROTECTIVE_QMAX, PROTECTIVE_QMAX)
        groups = units.view(weight.shape[0], -1, GROUP_SIZE)
        if symmetric:
            s2 = torch.ceil(groups.abs().amax(dim=2) / (CODE_MAX / 2)).clamp(min=1)
            return Grid(s1, s2, torch.full_like(s2, SYMMETRIC_ZERO), PROTECTIVE_QMAX)
        high, low = groups.amax(dim=2).clamp(min=0), groups.amin(dim=2).clamp(max=0)
        s2 = torch.round((high - low) / CODE_MAX).clamp(min=1)
        if zero_domain == "post_scale":
            return Grid(s1, s2, (torch.round(-low) / s2).clamp(0, CODE_MAX), PROTECTIVE_QMAX, offsets=True)
        return Grid(s1, s2, torch.round(-low / s2).clamp(0, CODE_MAX), PROTECTIVE_QMAX)

    @staticmethod
    def of_linear(linear: QuantizedLinear) -> Grid:
        """The grid that the codes of a finished layer lie on."""
        zeros = linear.zeros.values.float()
        if linear.s2_scales is None:
            return Grid(linear.s1_scales, None, zeros, torch.inf)
        s2, offsets = linear.s2_scales.float(), isinstance(linear.zeros, S2Offsets)
        return Grid(linear.s1_scales, s2, zeros / s2 if offsets else zeros, PROTECTIVE_QMAX, offsets)

    def grouped(self, values: Tensor) -> Tensor:
        """values [N, K_padded] as [N, G, 128], or [N, 1, K_padded] per channel."""
        return values.view(values.shape[0], self.zeros.shape[1], -1)

    @property
    def group_scales(self) -> Tensor:
        """In units of s1, float32 [N, G, 1]; 1 per channel."""
        return (torch.ones_like(self.zeros) if self.s2 is None else self.s2).unsqueeze(2)

    @property
    def group_zeros(self) -> Tensor:
        """In codes, float32 [N, G, 1]."""
        return self.zeros.unsqueeze(2)

    def code_range(self) -> tuple[Tensor, Tensor]:
        """The least and the largest code that `nearest` gives in each group, float32 [N, G, 1]."""
        scales, zeros = self.group_scales, self.group_zeros
        ends = (torch.full_like(zeros, end) for end in (-torch.inf, torch.inf))
        low, high = (nearest(end, scales, zeros, self.limit) for end in ends)
        return low, high

    def units(self, weight: Tensor) -> Tensor:
        """weight [N, K] in units of s1, clamped, float32 [N, K_padded]."""
        return (padded(weight) / self.s1.float().unsqueeze(1)).clamp(-self.limit, self.limit)

    def spread(self, columns: int) -> tuple[Tensor, Tensor]:
        """Scales (1 per channel) and zeros of every weight, in units of s1: float32 [N, columns] each."""
        if self.s2 is None:
            zeros = self.zeros.expand(-1, columns)
            return torch.ones_like(zeros), zeros
        return self.s2.repeat_interleave(GROUP_SIZE, dim=1), self.zeros.repeat_interleave(GROUP_SIZE, dim=1)

    def weight(self, codes: Tensor) -> Tensor:
        """What codes [N, K_padded] decode to, as `QuantizedLinear.dequantize` has it: float32, on the grid's device."""
        s1 = self.s1.float().unsqueeze(1)
        if self.s2 is None:
            return codes * s1 - (self.zeros * s1).to(torch.float16).float()
        scale, zero = self.spread(codes.shape[1])
        return torch.round((codes - zero) * scale) * s1

    def nearest(self, units: Tensor) -> Tensor:
        """The nearest codes of units [N, K_padded], float32.

        Level 2 rounds the unrounded quotient: rounding it to int8 first would add an error of its own.
        """
        return nearest(units, *self.spread(units.shape[1]), self.limit)

    def positions(self, units: Tensor) -> Tensor:
        """Where units [N, K_padded] lie between codes, float32, not rounded."""
        scale, zero = self.spread(units.shape[1])
        return units / scale + zero

    def linear(self, codes: Tensor, bias: Tensor | None, in_features: int) -> QuantizedLinear:
        """The layer with these codes [N, K_padded], on their device. Raises ValueError when a value leaves float16."""
        return QuantizedLinear(
            codes=codes.to(torch.uint8),
            s1_scales=self.s1,
            s2_scales=None if self.s2 is None else self.s2.to(torch.uint8),
            zeros=self._stored_zeros(),
            bias=None if bias is None else bias.to(torch.float16),
            in_features=in_features,
        )

    def _stored_zeros(self) -> ZeroPoints | S2Offsets:
        if self.offsets and self.s2 is not None:
            return S2Offsets(torch.round(self.zeros * self.s2).to(torch.uint8))
        return ZeroPoints(self.zeros.to(torch.uint8))


def padded(weight: Tensor) -> Tensor:
    """weight [N, K] with columns of zeros up to a multiple of 128."""
    k = weight.shape[1]
    return torch.nn.functional.pad(weight, (0, padded_in_features(k) - k))


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
