"""Second moments of what linears multiply, as they are served and as the float model has it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qoq.calib.round.gptq import Moments


class MomentObserver:
    """Sums over the inputs x [tokens, K] of linears that multiply the same input."""

    def __init__(self) -> None:
        self._tokens = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, served: Tensor, exact: Tensor | None = None) -> None:
        """One batch of inputs, [..., K], beside those of the float model, if any."""
        x = served.flatten(0, -2).float()
        self._tokens += x.shape[0]
        self._add("matrix", x.t() @ x)
        if exact is not None:
            self._add("shift", (exact.flatten(0, -2).float() - x).t() @ x)

    def _add(self, name: str, product: Tensor) -> None:
        # The products of one batch in float32, which is exact enough; their sum over many batches in float64.
        if name in self._sums:
            self._sums[name] += product
        else:
            self._sums[name] = product.double()

    def moments(self) -> Moments:
        """Raises ValueError where an input was NaN or infinite."""
        means = {name: total / self._tokens for name, total in self._sums.items()}
        if not all(bool(torch.isfinite(mean).all()) for mean in means.values()):
            raise ValueError("NaN or infinite inputs")
        return Moments(means["matrix"], self._tokens, means.get("shift"))


class _Seen(Exception):
    """Ends a forward pass that was run only to see what enters one of its modules."""


def input_of(block: nn.Module, name: str, forward: Callable[[], object]) -> Tensor:
    """What enters the submodule `name` of `block` while `forward` runs it; what comes after it is not computed."""
    seen: list[Tensor] = []

    def see(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _Seen

    hook = block.get_submodule(name).register_forward_pre_hook(see)
    try:
        forward()
    except _Seen:
        return seen[0]
    finally:
        hook.remove()
    raise RuntimeError(f"{type(block).__name__} did not run {name}")
