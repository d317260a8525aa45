"""What this very GPU can do: the bytes it reads and the products it sums in a second, measured with PyTorch's kernels.

Percentages are told against these, not against a data sheet: a card's real limits depend on its power and its cooling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qoq.kernels.timing import Variant, measure

_STREAM_BYTES = 1 << 31
_SIZES = ((8192, 8192, 8192), (4096, 8192, 8192), (4096, 28672, 4096))
"""M, N, K of the products whose best rate is taken for the peak."""


@dataclass(frozen=True)
class Roofline:
    """read_gb_s   10^9 bytes read (a copy: read and written) a second, best of several kernels
    tops        10^12 operations a second by kind of operand ("8-bit", "fp16", "bf16"), best of large products
    found_with  which kernel gave each figure
    """

    read_gb_s: float
    tops: dict[str, float] = field(default_factory=dict)
    found_with: dict[str, str] = field(default_factory=dict)

    def floor_us(self, *, nbytes: float, operations: float, kind: str) -> float:
        """Least time of work that moves `nbytes` and does `operations` on operands of `kind`."""
        memory = nbytes / self.read_gb_s * 1e-3
        peak = self.tops.get(kind)
        return memory if peak is None else max(memory, operations / peak * 1e-6)


def measure_roofline(*, repeat: int = 10, on_step: Callable[[str], None] = lambda _: None) -> Roofline:
    """Measure the current CUDA device; takes a few seconds and some 3 GB of its memory."""
    on_step("read bandwidth")
    found_with: dict[str, str] = {}
    read, found_with["read"] = _read_bandwidth(repeat)
    tops = {}
    for kind, make in _PRODUCTS.items():
        on_step(f"peak of {kind} products")
        best = _best_product(make, repeat)
        if best is not None:
            tops[kind], found_with[kind] = best
    return Roofline(read, tops, found_with)


def _read_bandwidth(repeat: int) -> tuple[float, str]:
    free, _ = torch.cuda.mem_get_info()
    nbytes = min(_STREAM_BYTES, free // 4) // 4096 * 4096
    data = torch.randn(nbytes // 4, device="cuda")
    rows = data.view(-1, 1024)
    target = torch.empty_like(data)
    moved = {"sum": nbytes, "sum of rows": nbytes, "largest": nbytes, "copy": 2 * nbytes}
    variants = [
        Variant("sum", lambda _: data.sum(), optional=True),
        Variant("sum of rows", lambda _: rows.sum(dim=1), optional=True),
        Variant("largest", lambda _: data.amax(), optional=True),
        Variant("copy", lambda _: target.copy_(data)),
    ]
    timings = measure(variants, repeat=repeat).timings
    rates = {name: moved[name] / timing.median_us * 1e-3 for name, timing in timings.items()}
    best = max(rates, key=lambda name: rates[name])
    return rates[best], best


def _best_product(make: Callable[[int, int, int], list[Variant]], repeat: int) -> tuple[float, str] | None:
    best: tuple[float, str] | None = None
    for m, n, k in _SIZES:
        try:
            variants = make(m, n, k)
        except (RuntimeError, TypeError):  # a type that this GPU or PyTorch does not have
            continue
        for name, timing in measure(variants, repeat=repeat).timings.items():
            rate = 2.0 * m * n * k / timing.median_us * 1e-6
            if best is None or rate > best[0]:
                best = (rate, f"{name}, {m} x {n} x {k}")
    return best


def _eight_bit(m: int, n: int, k: int) -> list[Variant]:
    """int8 and, where there is one, float8: the tensor cores run both at the same rate."""
    a, b = _integers(m, k), _integers(n, k)
    variants = [Variant("torch._int_mm", lambda _: torch._int_mm(a, b.t()), optional=True)]
    if torch.cuda.get_device_capability() >= (8, 9):
        x, w = (torch.randn(rows, k, device="cuda").to(torch.float8_e4m3fn) for rows in (m, n))
        one = torch.ones((), device="cuda")

        def scaled(_: int) -> Tensor:
            result: Tensor = torch._scaled_mm(
                x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
            )
            return result

        variants.append(Variant("torch._scaled_mm", scaled, optional=True))
    return variants


def _floating(dtype: torch.dtype) -> Callable[[int, int, int], list[Variant]]:
    def make(m: int, n: int, k: int) -> list[Variant]:
        a, b = (torch.randn(rows, k, device="cuda").to(dtype) for rows in (m, n))
        return [Variant("torch.mm", lambda _: torch.mm(a, b.t()), optional=True)]

    return make


def _integers(rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.int8, device="cuda").random_(-127, 128)


_PRODUCTS = {"8-bit": _eight_bit, "fp16": _floating(torch.float16), "bf16": _floating(torch.bfloat16)}
