"""Which device to use, and how fast it is right now."""

from __future__ import annotations

import time


def resolve_device(name: str) -> str:
    """`auto` becomes cuda where PyTorch sees one, cpu otherwise; other names are left for the job to check."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def measure_speed(device: str) -> float:
    """float32 operations a second of a matrix product on `device`, measured for about 0.2 s."""
    import torch

    from qoq.calib.job import check_device

    check_device(device)
    a = torch.ones(1024, 1024, device=device)
    a @ a
    products = 0
    started = time.perf_counter()
    while time.perf_counter() - started < 0.2:
        a @ a
        if device != "cpu":
            torch.cuda.synchronize(device)
        products += 1
    return products * 2 * 1024**3 / (time.perf_counter() - started)
