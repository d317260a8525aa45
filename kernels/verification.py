"""Proof, on the CPU, that a packed linear means what it should: ranges, and the kernels' packed arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.formats.quantized_linear import INT8_MAX, INT8_MIN, QuantizedLinear
from qoq.kernels.oracles import emulate_packed_codes, emulate_packed_level1


@dataclass(frozen=True)
class LinearCheck:
    """level1_min, level1_max: extremes of the integer weights, computed without wrapping.

    margin: steps between them and the ends of int8; problems: empty when the packed arithmetic agrees.
    """

    level1_min: int
    level1_max: int
    problems: tuple[str, ...]

    @property
    def margin(self) -> int:
        return min(self.level1_min - INT8_MIN, INT8_MAX - self.level1_max)


def emulate_weight(packed: Mapping[str, Tensor]) -> Tensor:
    """The integers [N, K] that kernels feed to the tensor cores: level-1 weights int8, or (per channel) codes uint8."""
    if "s2_scales" in packed:
        return emulate_packed_level1(packed["qweight"], packed["s2_scales"], packed["s2_zeros"])
    return emulate_packed_codes(packed["qweight"])


def check_linear(linear: QuantizedLinear, emulated: Tensor) -> LinearCheck:
    """Compare plain integer arithmetic on a decoded linear with the register arithmetic on its packed bytes.

    emulated: `emulate_weight` of the packed tensors.
    """
    level1 = linear.level1()
    problems = []
    expected = level1 if linear.is_progressive else linear.codes
    wrong = int((emulated.to(torch.int16) != expected).sum())
    if wrong:
        problems.append(f"packed-register arithmetic differs from integer arithmetic in {wrong} weights")
    return LinearCheck(int(level1.min()), int(level1.max()), tuple(problems))
