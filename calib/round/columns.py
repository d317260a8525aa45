"""The inner loop of GPTQ: one column of a weight after the other, 128 of them at a time.

Each step is some operations on a short vector. On a GPU, to launch them takes longer than to run them, so the loop over
128 columns is captured once for each shape as a CUDA graph, and replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from qoq.formats.quantized_linear import CODE_MAX

COLUMNS = 128


def nearest(units: Tensor, scale: Tensor, zero: Tensor, limit: float) -> Tensor:
    """The nearest codes of units, clamped to +-limit first so that no code leaves int8. Ties go to even codes."""
    return torch.round(units.clamp(-limit, limit) / scale + zero).clamp(0, CODE_MAX)


def round_columns(units: Tensor, scale: Tensor, zero: Tensor, factor: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """GPTQ over units [N, C]: codes [N, C], and errors [N, C] divided by the diagonal of `factor` [C, C].

    scale, zero [N, C]: of each column; factor: upper triangular. Codes are those of `nearest`.
    """
    # In steps of the grid, a column takes few operations: round, clamp, subtract, multiply, and the update of the rest.
    low, high = (nearest(torch.full_like(units, end), scale, zero, limit) for end in (-torch.inf, torch.inf))
    return _run(_round_columns, units / scale + zero, 1 / scale, scale / factor.diagonal(), low, high, factor)


_Step = Callable[..., tuple[Tensor, Tensor]]


def _round_columns(
    steps: Tensor, inverse: Tensor, cost: Tensor, low: Tensor, high: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    left, codes, errors = steps.clone(), torch.empty_like(steps), torch.empty_like(steps)
    for i in range(steps.shape[1]):
        now, rest = slice(i, i + 1), slice(i + 1, None)
        torch.clamp(torch.round(left[:, now]), low[:, now], high[:, now], out=codes[:, now])
        torch.mul(left[:, now] - codes[:, now], cost[:, now], out=errors[:, now])
        left[:, rest].addcmul_(errors[:, now] * factor[i, rest], inverse[:, rest], value=-1)
    return codes, errors


def _run(step: _Step, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    if not inputs[0].is_cuda:
        return step(*inputs)
    return _graph(step, tuple(tensor.shape for tensor in inputs), inputs[0].device)(*inputs)


class _Graph:
    """A step captured with inputs of these shapes, float32."""

    def __init__(self, step: _Step, shapes: tuple[torch.Size, ...], device: torch.device) -> None:
        self._inputs = [torch.ones(shape, device=device) for shape in shapes]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            step(*self._inputs)  # what is loaded at a first use cannot be captured
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph):
                self._outputs = step(*self._inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        first, second = self._outputs
        return first.clone(), second.clone()


@cache
def _graph(step: _Step, shapes: tuple[torch.Size, ...], device: torch.device) -> _Graph:
    return _Graph(step, shapes, device)
