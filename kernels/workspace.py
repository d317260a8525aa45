"""Memory that kernels leave as they found it, so that the next launch of a stream can use it at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from qoq.kernels.launch import refuse_capture

T = TypeVar("T")
_CAPTURED = -1
"""In place of a stream, for what captured graphs use."""


class StreamMemory(Generic[T]):
    """What `make(device)` gives, one for each stream of a device, so that streams do not mix.

    All captured graphs of a device share one, made by the first call outside a capture: do not replay two of them at
    the same time, nor capture calls on branches that run side by side.
    """

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        self._found: dict[tuple[int, int], T] = {}

    def of(self, device: int) -> T:
        """The one of the current stream of `device`, which is the current device."""
        captured = (device, _CAPTURED)
        if torch.cuda.is_current_stream_capturing():
            if captured not in self._found:
                refuse_capture()
            return self._found[captured]
        key = (device, torch.cuda.current_stream(device).cuda_stream)
        for each in (captured, key):
            if each not in self._found:
                self._found[each] = self._make(device)
        return self._found[key]
