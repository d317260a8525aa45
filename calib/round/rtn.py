"""Round to nearest, on the progressive grid and per channel."""

from __future__ import annotations

from torch import Tensor

from qoq.calib.round.grid import Grid
from qoq.calib.round.grid_search import search_grid
from qoq.formats.quantized_linear import QuantizedLinear
from qoq.recipes.schema import ZeroDomain


def round_to_nearest(
    weight: Tensor,
    bias: Tensor | None,
    group_size: int | None,
    *,
    search: bool = False,
    zero_domain: ZeroDomain = "pre_scale",
    symmetric: bool = False,
) -> QuantizedLinear:
    """Quantize weight float32 [N, K] with its bias [N]; the result is on their device.

    group_size 128: int8 scale per channel, then uint4 codes with integer scale and zero per group (QServe paper,
    section 4.1). None: uint4 codes with one scale and zero per channel. K is padded to a multiple of 128 with codes
    that decode to zero, or next to it where post-scale zeros have no code for it. `search`: scales and zeros by the
    error they leave, else by ranges; `symmetric`: as for `Grid.of`. Raises ValueError when a scale or the bias does not
    fit float16.
    """
    if search:
        grid = search_grid(weight, group_size, None, zero_domain, symmetric=symmetric)
    else:
        grid = Grid.of(weight, group_size, zero_domain, symmetric=symmetric)
    return grid.linear(grid.nearest(grid.units(weight)), bias, weight.shape[1])
