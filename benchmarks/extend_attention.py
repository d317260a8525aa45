"""Extend attention over 4-bit pages beside flash attention over a contiguous bfloat16 cache of the same tokens.

    python benchmarks/extend_attention.py --out benchmarks/extend-h100.json

Shapes of Llama-3-8B (32 query heads, 8 KV heads, D = 128). A layer's calls, with a step prepared once, in trains of
CUDA graphs in turns (`qoq.kernels.timing`): medians. prepare_us is the host's time to prepare a step, which all layers
share; host_us its time for a layer's call without a graph.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import qoq.kernels.ops  # noqa: F401  (registers the operators)
from qoq.kernels.extend import run_extend
from qoq.kernels.extend_batch import prepare_extend
from qoq.kernels.gpu_facts import read_facts
from qoq.kernels.layouts import PAGE_SIZE, page_bytes
from qoq.kernels.timing import Variant, copies_beyond_cache, measure

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SCALE = 1 / math.sqrt(HEAD_DIM)
CASES: list[tuple[int, int, int]] = [
    *((1, new, 8192) for new in (1, 4, 16, 64, 512, 8192)),
    *((1, new, total) for new, total in ((8192, 16384), (16, 32768))),
    *((8, new, 8192) for new in (1, 8, 16, 32, 64, 512)),
    *((64, 1, 1024), (16, 4, 2048), (4, 512, 32768), (8, 64, 65536)),
]
"""Sequences, new tokens and tokens of each, the new ones included."""

_APPEND_TOKENS = 16384


def copies_of(nbytes: int) -> int:
    free, _ = torch.cuda.mem_get_info()
    cache_bytes = int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    copies = copies_beyond_cache(nbytes, cache_bytes=cache_bytes, budget_bytes=int(0.4 * free))
    if not copies:
        raise RuntimeError(f"a cache of {nbytes / 1e9:.1f} GB does not fit the memory left on the GPU")
    return copies


def paged(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """A pool of shuffled pages, and the page tables [copies, batch, pages]."""
    pages_each = math.ceil(length / PAGE_SIZE)
    size = page_bytes(HEAD_DIM, 4)
    copies = copies_of(batch * pages_each * KV_HEADS * size)
    num_pages = copies * batch * pages_each
    tables = torch.randperm(num_pages, device="cuda").int().view(copies, batch, pages_each)
    pages = torch.zeros(num_pages, KV_HEADS, size, dtype=torch.uint8, device="cuda")
    for start in range(0, num_pages * PAGE_SIZE, _APPEND_TOKENS):
        slots = torch.arange(start, min(start + _APPEND_TOKENS, num_pages * PAGE_SIZE), device="cuda")
        key, value = torch.randn(2, len(slots), KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        torch.ops.qoq.append_kv(key, value, pages, slots, 4)
    return pages, tables


def flash_variant(query: Tensor, batch: int, new: int, length: int) -> Variant:
    tokens = batch * length
    copies = copies_of(2 * tokens * KV_HEADS * HEAD_DIM * 2)
    caches = [torch.randn(2, tokens, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
    rows, keys = (torch.arange(batch + 1, dtype=torch.int32, device="cuda") * n for n in (new, length))

    def call(i: int) -> object:
        key, value = caches[i]
        return torch.ops.aten._flash_attention_forward(
            query, key, value, rows, keys, new, length, 0.0, True, False, scale=SCALE
        )

    return Variant("flash_bf16_us", call, copies)


def host_us(call: Callable[[], object], repeat: int) -> float:
    """Median time until a call returns, with an idle GPU."""
    samples = []
    for _ in range(repeat + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(samples[3:])


def bench(batch: int, new: int, length: int, repeat: int) -> dict[str, float]:
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    pages, tables = paged(batch, length)
    query = torch.randn(batch * new, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    prepare = partial(
        prepare_extend,
        [new] * batch,
        [length] * batch,
        max_pages=tables.shape[2],
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        device=query.device,
    )
    step = prepare()

    def call(i: int) -> object:
        return run_extend(query, pages, tables[i], step, SCALE, 4)

    variants = [Variant("kv4_us", call, len(tables)), flash_variant(query, batch, new, length)]
    times = {name: timing.median_us for name, timing in measure(variants, repeat=repeat).timings.items()}
    row = {"sequences": batch, "new": new, "tokens": length, **{name: round(t, 1) for name, t in times.items()}}
    row["ratio"] = round(times["kv4_us"] / times["flash_bf16_us"], 2)
    row["prepare_us"] = round(host_us(prepare, repeat), 1)
    row["host_us"] = round(host_us(partial(call, 0), repeat), 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeat", type=int, default=20)
    arguments = parser.parse_args()
    rows = []
    for case in CASES:
        rows.append(bench(*case, arguments.repeat))
        print(rows[-1], flush=True)
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"gpu": asdict(read_facts(torch.cuda.current_device())), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
