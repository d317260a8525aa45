"""Second moments of what linears multiply, as they are served and as the float model has it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from qoq.calib.round.gptq import Moments
from qoq.formats.arithmetic import quantize_activation


class MomentObserver:
    """Sums over the inputs x [tokens, K] of linears that multiply the same input.

    `act_bits` 8: x as int8 activations represent it.
    """

    def __init__(self, act_bits: int) -> None:
        self._act_bits = act_bits
        self._tokens = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, served: Tensor, exact: Tensor | None = None, missing: Tensor | None = None) -> None:
        """One batch of inputs, [..., K], beside those of the float model, if any.

        missing [..., N]: what the outputs of a linear should make up for besides, if anything.
        """
        x = served.flatten(0, -2).float()
        wanted = None if exact is None else exact.flatten(0, -2).float()
        if self._act_bits == 8:
            codes = quantize_activation(x)
            x = codes.codes.float() * codes.scales.unsqueeze(1)
        self._tokens += x.shape[0]
        self._add("matrix", x.t() @ x)
        if wanted is not None:
            self._add("shift", (wanted - x).t() @ x)
        if missing is not None:
            self._add("missing", missing.flatten(0, -2).float().t() @ x)

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
        return Moments(means["matrix"], self._tokens, means.get("shift"), means.get("missing"))


class _Seen(Exception):
    """Ends a forward pass of which everything that was asked for has been seen."""


def inputs_of(block: nn.Module, names: list[str], forward: Callable[[], object]) -> list[Tensor]:
    """What enters these submodules of `block` while `forward` runs it, as far as the last of them in this order."""
    seen: list[Tensor] = []

    def see(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        if len(seen) == len(names):
            raise _Seen

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(block.get_submodule(name).register_forward_pre_hook(see).remove)
        try:
            forward()
        except _Seen:
            return seen
    raise RuntimeError(f"{type(block).__name__} did not run {names[-1]}")
