"""Extend attention over 4-bit pages beside flash attention over a contiguous bfloat16 cache of the same tokens.

    python benchmarks/extend_attention.py --out benchmarks/extend-h100.json

Shapes of Llama-3-8B (32 query heads, 8 KV heads, D = 128). Both run as a user's program runs them, without a graph:
extend attention takes its lengths from the host. Times are medians of single calls between CUDA events, in turns.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import qoq.kernels.ops  # noqa: F401  (registers the operators)
from qoq.kernels.attention import extend_attention
from qoq.kernels.gpu_facts import read_facts
from qoq.kernels.layouts import PAGE_SIZE, page_bytes

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
CASES = ((1, 1, 8192), (1, 4, 8192), (1, 16, 8192), (1, 64, 8192), (1, 512, 8192), (1, 8192, 8192), (1, 8192, 16384))
CASES += ((8, 1, 8192), (8, 8, 8192), (8, 64, 8192), (8, 512, 8192), (4, 512, 32768))
"""Sequences, new tokens and tokens of each, the new ones included."""


def paged(batch: int, length: int) -> tuple[Tensor, Tensor]:
    pages_each = math.ceil(length / PAGE_SIZE)
    table = torch.randperm(batch * pages_each, device="cuda").int().view(batch, pages_each)
    pages = torch.zeros(batch * pages_each, KV_HEADS, page_bytes(HEAD_DIM, 4), dtype=torch.uint8, device="cuda")
    for start in range(0, batch * pages_each * PAGE_SIZE, 16384):
        slots = torch.arange(start, min(start + 16384, batch * pages_each * PAGE_SIZE), device="cuda")
        key, value = torch.randn(2, len(slots), KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        torch.ops.qoq.append_kv(key, value, pages, slots, 4)
    return pages, table


def flash_call(query: Tensor, batch: int, new: int, length: int) -> Callable[[], object]:
    key, value = torch.randn(2, batch * length, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    rows, keys = (torch.arange(batch + 1, dtype=torch.int32, device="cuda") * n for n in (new, length))
    scale = 1 / math.sqrt(HEAD_DIM)
    return lambda: torch.ops.aten._flash_attention_forward(
        query, key, value, rows, keys, new, length, 0.0, True, False, scale=scale
    )


def medians(calls: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeat + 3):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            if turn >= 3:
                samples[name].append(start.elapsed_time(end) * 1000)
    return {name: statistics.median(values) for name, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeat", type=int, default=20)
    arguments = parser.parse_args()
    rows = []
    for batch, new, length in CASES:
        torch.manual_seed(0)
        pages, table = paged(batch, length)
        query = torch.randn(batch * new, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        scale = 1 / math.sqrt(HEAD_DIM)
        extend = partial(extend_attention, query, pages, table, [new] * batch, [length] * batch, scale, 4)
        calls = {"kv4_us": extend, "flash_bf16_us": flash_call(query, batch, new, length)}
        times = medians(calls, arguments.repeat)
        row = {"sequences": batch, "new": new, "tokens": length, **{name: round(t, 1) for name, t in times.items()}}
        row["ratio"] = round(times["kv4_us"] / times["flash_bf16_us"], 2)
        rows.append(row)
        print(row, flush=True)
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"gpu": asdict(read_facts(torch.cuda.current_device())), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
