"""The energy that a GPU takes, read from its driver."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch


class EnergyMeter:
    """`joules` of a GPU between entering and leaving the context; None on the CPU, or where the driver does not say.

    The counter is NVML's (Volta and newer), of the whole board: whatever else runs on it counts too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: float | None = None
        self.joules: float | None = None

    def __enter__(self) -> Self:
        self._before = _read_joules(self._device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        after = _read_joules(self._device)
        if self._before is not None and after is not None:
            self.joules = after - self._before


def _read_joules(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    try:
        import pynvml  # type: ignore[import-untyped]
    except ImportError:
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    library: Any = pynvml
    try:
        library.nvmlInit()
        try:
            return float(library.nvmlDeviceGetTotalEnergyConsumption(library.nvmlDeviceGetHandleByUUID(uuid))) / 1000
        finally:
            library.nvmlShutdown()
    except library.NVMLError:
        return None
