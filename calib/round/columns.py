"""The inner loops of GPTQ and of its refinement: one column of a weight after the other, 128 of them at a time.

Each step is a dozen operations on a short vector. On a GPU, to launch them takes longer than to run them, so the loop
over 128 columns is captured once for each shape as a CUDA graph, and replayed.
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

    scale, zero [N, C]: of each column; factor: upper triangular.
    """
    return _run(_round_columns, limit, units, scale, zero, factor)


_Step = Callable[..., tuple[Tensor, Tensor]]


def _round_columns(limit: float, units: Tensor, scale: Tensor, zero: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    left, codes, errors = units.clone(), torch.empty_like(units), torch.empty_like(units)
    for i in range(units.shape[1]):
        codes[:, i] = nearest(left[:, i], scale[:, i], zero[:, i], limit)
        errors[:, i] = (left[:, i] - (codes[:, i] - zero[:, i]) * scale[:, i]) / factor[i, i]
        left[:, i:] -= errors[:, i : i + 1] * factor[i, i:]
    return codes, errors


def _run(step: _Step, limit: float, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    if not inputs[0].is_cuda:
        return step(limit, *inputs)
    return _graph(step, limit, tuple(tensor.shape for tensor in inputs), inputs[0].device)(*inputs)


class _Graph:
    """A step captured with inputs of these shapes, float32."""

    def __init__(self, step: _Step, limit: float, shapes: tuple[torch.Size, ...], device: torch.device) -> None:
        self._inputs = [torch.ones(shape, device=device) for shape in shapes]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            step(limit, *self._inputs)  # what is loaded at a first use cannot be captured
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph):
                self._outputs = step(limit, *self._inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._graph.replay()
        first, second = self._outputs
        return first.clone(), second.clone()


@cache
def _graph(step: _Step, limit: float, shapes: tuple[torch.Size, ...], device: torch.device) -> _Graph:
    return _Graph(step, limit, shapes, device)
