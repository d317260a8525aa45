"""Rounding methods: a float weight in, a `QuantizedLinear` out. One function each, named in the recipe schema."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qoq.calib.round.rtn import round_to_nearest
from qoq.formats.quantized_linear import QuantizedLinear

RoundingMethod = Callable[[Tensor, Tensor | None, int | None], QuantizedLinear]
"""(weight float32 [N, K], bias float32 [N] or None, group_size) -> QuantizedLinear on the CPU."""

ROUNDING: dict[str, RoundingMethod] = {"rtn": round_to_nearest}
