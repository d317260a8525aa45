"""How gradients pass what has none: rounding counts as if it changed nothing (Bengio et al., 2013)."""

from __future__ import annotations

from torch import Tensor


def straight_through(rounded: Tensor, exact: Tensor) -> Tensor:
    """The values of `rounded`, the gradient of `exact`; both of one shape."""
    return exact + (rounded - exact).detach()
