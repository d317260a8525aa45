"""Benchmark of decode attention: one new token a sequence over a paged KV4 or KV8 cache, beside PyTorch's attention.

PyTorch's gets contiguous 16-bit keys and values, grouped queries without copying, and the best of its backends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qoq.kernels.attention import DecodeOptions, run_decode
from qoq.kernels.bench import Rates
from qoq.kernels.layouts import PAGE_SIZE, page_bytes
from qoq.kernels.roofline import Roofline
from qoq.kernels.timing import REST, Timing, Variant, copies_beyond_cache, measure
from qoq.recipes.shapes import ModelShape

ATTENTION_VARIANTS = ("kv4", "kv8", "sdpa-fp16", "sdpa-bf16")
DEFAULT_CASES = ((64, 1024), (128, 1536), (128, 4096), (1, 8192), (8, 32768))
"""Sequences and tokens of each."""
DECODE_LAUNCHES = {
    "": (DecodeOptions(), None),
    "-apart": (DecodeOptions(overlapping=False), None),
    "-early": (DecodeOptions(), 1),
    "-portable": (DecodeOptions(portable=True), None),
}
"""What may follow "kv4" or "kv8": how a call is launched, and the fresh tokens of one that reads early. On Hopper other
calls are launched early too but then wait, except for those that are apart."""
_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
_PagedCalls = Callable[[DecodeOptions, int | None], Callable[[int], object]]
_DTYPES = {"sdpa-fp16": torch.float16, "sdpa-bf16": torch.bfloat16}
_APPEND_TOKENS = 8192


@dataclass(frozen=True)
class AttentionResult:
    """One step of `batch` sequences with `length` tokens each; `backend` says which of PyTorch's was the fastest."""

    batch: int
    length: int
    variant: str
    backend: str | None
    timing: Timing
    rates: Rates


@dataclass
class AttentionReport:
    """Results in the order they were measured; `skipped` maps "B = b, L = l: variant" to a reason."""

    results: list[AttentionResult] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def kv_bytes(variant: str, batch: int, length: int, shape: ModelShape) -> int:
    """Bytes of the keys and values that one step reads."""
    if variant in _DTYPES:
        return 4 * batch * length * shape.num_kv_heads * shape.head_dim
    return batch * length * shape.num_kv_heads * page_bytes(shape.head_dim, _parts(variant)[0]) // PAGE_SIZE


def bench_attention(
    shape: ModelShape,
    cases: Sequence[tuple[int, int]],
    variants: Sequence[str],
    roofline: Roofline,
    *,
    repeat: int = 20,
    rest: float = REST,
    seed: int = 0,
    on_step: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> AttentionReport:
    """Time decode attention for each (sequences, tokens) of `cases` on the current CUDA device.

    A variant whose cache does not fit is left out with the reason; errors of our own kernels come through.
    """
    import qoq.kernels.kv_cache  # noqa: F401  (registers operators)

    report = AttentionReport()
    generator = torch.Generator("cuda").manual_seed(seed)
    for i, (batch, length) in enumerate(cases):
        on_step(i, len(cases), f"B = {batch}, L = {length}")
        torch.cuda.empty_cache()
        case = f"B = {batch}, L = {length}"
        candidates = list(_variants(shape, batch, length, variants, generator, case, report.skipped))
        measured = measure(candidates, repeat=repeat, rest=rest)
        del candidates
        for variant in variants:
            # A 16-bit variant was timed once a backend: the fastest counts.
            timings = {
                name.partition("/")[2]: timing
                for name, timing in measured.timings.items()
                if name.partition("/")[0] == variant
            }
            if not timings:
                continue
            backend = min(timings, key=lambda name: timings[name].median_us)
            rates = Rates.of(
                timings[backend],
                operations=4.0 * batch * length * shape.num_heads * shape.head_dim,
                nbytes=kv_bytes(variant, batch, length, shape),
                kind="fp16",
                roofline=roofline,
            )
            report.results.append(AttentionResult(batch, length, variant, backend or None, timings[backend], rates))
        report.skipped.update({f"{case}: {name}": why for name, why in measured.skipped.items()})
    return report


def _variants(
    shape: ModelShape,
    batch: int,
    length: int,
    wanted: Sequence[str],
    generator: torch.Generator,
    case: str,
    skipped: dict[str, str],
) -> Iterator[Variant]:
    device = generator.device
    cache_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
    query = torch.randn(batch, shape.num_heads, shape.head_dim, generator=generator, device=device)
    pools: dict[int, tuple[_PagedCalls, int]] = {}
    for name in wanted:
        if name not in _DTYPES and _parts(name)[0] in pools:
            calls, copies = pools[_parts(name)[0]]
            yield Variant(name, calls(*DECODE_LAUNCHES[_parts(name)[1]]), copies=copies)
            continue
        free, _ = torch.cuda.mem_get_info()
        size = kv_bytes(name, batch, -(-length // PAGE_SIZE) * PAGE_SIZE, shape)
        copies = copies_beyond_cache(size, cache_bytes=cache_bytes, budget_bytes=int(0.8 * free))
        if not copies:
            skipped[f"{case}: {name}"] = f"its cache ({size / 1e9:.1f} GB) does not fit the memory left on the GPU"
            continue
        if name in _DTYPES:
            dtype = _DTYPES[name]
            caches = [_random_cache(shape, batch, length, dtype, generator) for _ in range(copies)]
            for backend, chosen in _BACKENDS.items():
                call = _sdpa_call(query.to(dtype)[:, :, None], caches, chosen)
                yield Variant(f"{name}/{backend}", call, copies=copies, optional=True)
        else:
            bits, launch = _parts(name)
            calls = _paged_calls(shape, query.half(), batch, length, bits, copies, generator)
            pools[bits] = calls, copies
            yield Variant(name, calls(*DECODE_LAUNCHES[launch]), copies=copies)


def _parts(variant: str) -> tuple[int, str]:
    """The bits of "kv4-early" and what follows them, a key of DECODE_LAUNCHES."""
    return int(variant[2]), variant[3:]


def _random_cache(
    shape: ModelShape, batch: int, length: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    size = (batch, shape.num_kv_heads, length, shape.head_dim)
    key, value = (torch.randn(size, generator=generator, device=generator.device, dtype=dtype) for _ in range(2))
    return key, value


def _sdpa_call(query: Tensor, caches: Sequence[tuple[Tensor, Tensor]], backend: SDPBackend) -> Callable[[int], object]:
    def call(i: int) -> object:
        key, value = caches[i]
        with sdpa_kernel([backend]):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, enable_gqa=query.shape[1] != key.shape[1]
            )

    return call


def paged_call(
    shape: ModelShape, batch: int, length: int, bits: int, generator: torch.Generator
) -> Callable[[], object]:
    """One decode step over a random cache, as the operator launches it: for tools that look at a single launch."""
    query = torch.randn(batch, shape.num_heads, shape.head_dim, generator=generator, device=generator.device)
    call = _paged_calls(shape, query.half(), batch, length, bits, 1, generator)(*DECODE_LAUNCHES[""])
    return lambda: call(0)


def _paged_calls(
    shape: ModelShape, query: Tensor, batch: int, length: int, bits: int, copies: int, generator: torch.Generator
) -> _PagedCalls:
    """Pages of all sequences and copies lie shuffled in one pool, filled by our own append."""
    device = generator.device
    pages_each = -(-length // PAGE_SIZE)
    num_pages = copies * batch * pages_each
    order = torch.randperm(num_pages, generator=generator, device=device).int()
    tables = order.view(copies, batch, pages_each)
    pages = torch.zeros(
        num_pages, shape.num_kv_heads, page_bytes(shape.head_dim, bits), dtype=torch.uint8, device=device
    )
    for start in range(0, num_pages * PAGE_SIZE, _APPEND_TOKENS):
        slots = torch.arange(start, min(start + _APPEND_TOKENS, num_pages * PAGE_SIZE), device=device)
        size = (len(slots), shape.num_kv_heads, shape.head_dim)
        key, value = (torch.randn(size, generator=generator, device=device, dtype=torch.float16) for _ in range(2))
        torch.ops.qoq.append_kv(key, value, pages, slots, bits)
    lens = torch.full((batch,), length, dtype=torch.int32, device=device)
    scale = 1 / math.sqrt(shape.head_dim)

    def calls(options: DecodeOptions, fresh_tokens: int | None) -> Callable[[int], object]:
        return lambda i: run_decode(
            query, pages, tables[i], lens, scale, bits, 0, fresh_tokens=fresh_tokens, options=options
        )

    return calls
