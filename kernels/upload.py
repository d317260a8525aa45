"""Lists of numbers that a step needs on the device, sent in one copy that the host does not wait for."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 16
"""Bytes; of every list on the device."""
_CODES = {torch.int32: "i", torch.int64: "q", torch.float32: "f"}


class Upload:
    """Numbers for the device, in one copy: `add` gives each list's tensor at once, `send` its memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.empty(0, device=device).device  # with an index, where `device` may have none
        self._bytes = bytearray()
        self._tensors: list[tuple[Tensor, int, tuple[int, ...]]] = []

    def add(self, numbers: Sequence[float], dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> Tensor:
        """The contiguous tensor of `shape` ([len(numbers)] by default) and `dtype`: int32, int64 or float32."""
        tensor = torch.empty(0, dtype=dtype, device=self.device)
        self._tensors.append((tensor, len(self._bytes) // tensor.element_size(), shape or (len(numbers),)))
        self._bytes += array(_CODES[dtype], numbers).tobytes()
        self._bytes += bytes(-len(self._bytes) % _ALIGNMENT)
        return tensor

    def send(self) -> None:
        """Copy everything; the host does not wait."""
        if not self._bytes:
            return
        host = torch.frombuffer(self._bytes, dtype=torch.uint8)
        if self.device.type == "cuda":
            host = host.pin_memory()  # PyTorch gives this memory to nobody else before the copy is done
        storage = host.to(self.device, non_blocking=True).untyped_storage()
        for tensor, start, shape in self._tensors:
            strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
            tensor.set_(storage, start, shape, strides)
