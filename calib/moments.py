"""Second moments of what the linears of a block multiply, observed while the block runs in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from qoq.calib.round.gptq import Moments


class MomentObserver:
    """Sums x x^T over the inputs x of linears; those that share an input (`shared`, names) share one sum."""

    def __init__(self, block: nn.Module, shared: Iterable[tuple[str, ...]]) -> None:
        self._block, self._shared = block, tuple(shared)
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def run(self, forward: Callable[[], object]) -> None:
        """Call `forward`, which runs the block, and observe it."""
        with ExitStack() as hooks:
            for first, *_ in self._shared:
                linear = self._block.get_submodule(first)

                def observe(_module: nn.Module, inputs: tuple[Tensor, ...], *, first: str = first) -> None:
                    self._add(first, inputs[0].flatten(0, -2))

                hooks.callback(linear.register_forward_pre_hook(observe).remove)
            forward()

    def _add(self, name: str, x: Tensor) -> None:
        # The products of one batch in float32, which is exact enough; their sum over many batches in float64.
        product = (x.t() @ x).double()
        if name in self._sums:
            self._sums[name] += product
            self._tokens[name] += x.shape[0]
        else:
            self._sums[name], self._tokens[name] = product, x.shape[0]

    def moments(self) -> dict[str, Moments]:
        """By the name of every linear. Raises ValueError where an input was NaN or infinite."""
        found: dict[str, Moments] = {}
        for names in self._shared:
            tokens = self._tokens[names[0]]
            moments = Moments(self._sums[names[0]] / tokens, tokens)
            if not bool(torch.isfinite(moments.matrix).all()):
                raise ValueError(f"{names[0]}: NaN or infinite inputs")
            found |= dict.fromkeys(names, moments)
        return found
