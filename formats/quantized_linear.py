"""One quantized linear layer as the rooms hand it to each other: logical, unpacked, checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.recipes.schema import GROUP_SIZE

PROTECTIVE_QMAX = 119
"""Level-1 codes stay within [-119, 119], so that level-2 rounding, which adds at most s2 / 2 <= 8, stays in int8."""
CODE_MAX = 15
SYMMETRIC_ZERO = 8
"""The code of zero where a grid is symmetric: code - 8 is an int4."""
S2_MAX = 16
"""round(2 * PROTECTIVE_QMAX / CODE_MAX); keeps code * s2 <= 240, so that packed bytes never carry."""
INT8_MIN, INT8_MAX = -128, 127


@dataclass(frozen=True)
class ZeroPoints:
    """Zeros on the code grid, uint8 [N, G] in 0..15: the value is `(code - zero) * scale` (pre-scale)."""

    values: Tensor


@dataclass(frozen=True)
class S2Offsets:
    """Zeros on the level-1 grid, uint8 [N, G] in 0..240: the value is `code * s2 - offset` (post-scale)."""

    values: Tensor


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear layer with uint4 weights, checked on construction.

    codes        uint8 [N, K_padded], 0..15; K_padded is in_features rounded up to a multiple of 128
    s1_scales    float16 [N], finite and > 0
    s2_scales    uint8 [N, K_padded/128], 1..16, for the progressive grid; None for one level per channel
    zeros        ZeroPoints, or S2Offsets on the progressive grid; [N, K_padded/128], or [N, 1] per channel
    bias         float16 [N] or None
    in_features  the true K; columns past it decode to zero or meet zero activations

    Raises ValueError when a field does not fit, or when a level-1 weight leaves int8 (QServe paper, section 4.1).
    """

    codes: Tensor
    s1_scales: Tensor
    s2_scales: Tensor | None
    zeros: ZeroPoints | S2Offsets
    bias: Tensor | None
    in_features: int

    def __post_init__(self) -> None:
        if self.codes.ndim != 2:
            raise ValueError(f"codes must be [N, K], got shape {list(self.codes.shape)}")
        n, k = self.codes.shape
        if self.in_features < 1 or k % GROUP_SIZE or not k - GROUP_SIZE < self.in_features <= k:
            raise ValueError(f"codes have {k} columns, expected {self.in_features} rounded up to a multiple of 128")
        groups = k // GROUP_SIZE if self.is_progressive else 1
        _expect("codes", self.codes, torch.uint8, (n, k), 0, CODE_MAX)
        _expect("s1_scales", self.s1_scales, torch.float16, (n,))
        if not bool(torch.isfinite(self.s1_scales).all()) or bool((self.s1_scales <= 0).any()):
            row = int((~torch.isfinite(self.s1_scales) | (self.s1_scales <= 0)).nonzero()[0])
            raise ValueError(f"s1_scales[{row}] = {float(self.s1_scales[row])}, expected a finite number > 0")
        if self.bias is not None:
            _expect("bias", self.bias, torch.float16, (n,))
            if not bool(torch.isfinite(self.bias).all()):
                raise ValueError("bias holds a NaN or an infinity")
        if isinstance(self.zeros, ZeroPoints):
            _expect("zero_points", self.zeros.values, torch.uint8, (n, groups), 0, CODE_MAX)
        elif self.is_progressive:
            _expect("s2_offsets", self.zeros.values, torch.uint8, (n, groups), 0, CODE_MAX * S2_MAX)
        else:
            raise ValueError("S2Offsets need the progressive grid (s2_scales)")
        if self.s2_scales is None:
            overflow = ~torch.isfinite(self.s1_szeros())
            if bool(overflow.any()):
                row = int(overflow.nonzero()[0])
                raise ValueError(
                    f"zero_points[{row}] * s1_scales[{row}] = {int(self.zeros.values[row, 0])} * "
                    f"{float(self.s1_scales[row]):g} leaves float16"
                )
        else:
            _expect("s2_scales", self.s2_scales, torch.uint8, (n, groups), 1, S2_MAX)
            level1 = self.level1()
            bad = (level1 < INT8_MIN) | (level1 > INT8_MAX)
            if bool(bad.any()):
                row, column = (int(i) for i in bad.nonzero()[0])
                raise ValueError(
                    f"level-1 weight [{row}, {column}] = {int(level1[row, column])} leaves int8 "
                    f"({int(bad.sum())} such weights; every code * s2 - zero must be in [-128, 127])"
                )

    @property
    def is_progressive(self) -> bool:
        return self.s2_scales is not None

    @property
    def out_features(self) -> int:
        return int(self.codes.shape[0])

    def level1(self) -> Tensor:
        """Integer weights before s1, int16 [N, K_padded], computed without wrapping.

        Progressive: `code * s2 - offset`, in [-128, 127]. Per channel: `code - zero`, in [-15, 15].
        """
        codes = self.codes.to(torch.int16)
        zeros = self.zeros.values.to(torch.int16)
        if self.s2_scales is None:
            return codes - zeros
        s2 = self.s2_scales.to(torch.int16)
        offsets = zeros * s2 if isinstance(self.zeros, ZeroPoints) else zeros
        n, k = codes.shape
        grouped = codes.view(n, -1, GROUP_SIZE) * s2.unsqueeze(2) - offsets.unsqueeze(2)
        return grouped.view(n, k)

    def s1_szeros(self) -> Tensor:
        """Per-channel zero term as stored, float16 [N]: zero * s1 rounded once. Per channel only."""
        if self.is_progressive:
            raise ValueError("the progressive grid has no s1_szeros")
        return (self.zeros.values[:, 0].float() * self.s1_scales.float()).to(torch.float16)

    def dequantize(self) -> Tensor:
        """The weight that the kernels multiply by, float32 [N, in_features], padding cut off."""
        s1 = self.s1_scales.float().unsqueeze(1)
        if self.is_progressive:
            return (self.level1()[:, : self.in_features].float() * s1).contiguous()
        codes = self.codes[:, : self.in_features].float()
        return (codes * s1 - self.s1_szeros().float().unsqueeze(1)).contiguous()


def _expect(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], low: int = 0, high: int | None = None
) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    if high is not None and tensor.numel() and not low <= int(tensor.min()) <= int(tensor.max()) <= high:
        raise ValueError(f"{name}: values {int(tensor.min())}..{int(tensor.max())}, expected {low}..{high}")
