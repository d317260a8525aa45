"""How far quantized values are from the exact ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class RelativeError:
    """Accumulates ||approximate - exact|| / ||exact|| over many tensors, in float64."""

    def __init__(self) -> None:
        self._error = 0.0
        self._norm = 0.0

    def update(self, approximate: Tensor, exact: Tensor) -> None:
        self._error += _square(approximate.float() - exact.float())
        self._norm += _square(exact.float())

    @property
    def value(self) -> float:
        """0 for no error; infinity when the exact values are all zero and the others are not."""
        if self._norm == 0.0:
            return 0.0 if self._error == 0.0 else float("inf")
        return float((self._error / self._norm) ** 0.5)


def _square(tensor: Tensor) -> float:
    # Not tensor.square(): in float32 the squares themselves may vanish or overflow.
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """||approximate - exact|| / ||exact|| of two tensors of one shape."""
    error = RelativeError()
    error.update(approximate, exact)
    return error.value


def paired_standard_error(a: Sequence[float], b: Sequence[float]) -> float:
    """Standard error of the mean of a - b, for two scores of each of N >= 2 documents, in float64.

    Mostly it is smaller than the errors of the two means suggest: the same documents are hard for both.
    """
    differences = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    return float(differences.std(correction=1)) / math.sqrt(len(differences))
