"""The kernels between the products of a decoder layer: what each adds to a chain, and the bandwidth of large calls.

    python benchmarks/small_kernels.py --out benchmarks/small-kernels-h100.json

Shapes of Llama-3-8B: 4096 and 14336 inputs, 32 query heads and 8 KV heads of 128. Trains of CUDA graphs in turns
(`qoq.kernels.timing`): medians. On Hopper quantizers write the tiles of its products.

chains      microseconds that a kernel adds to a chain of itself (its operands stay in the L2), launched overlapping and
            not; beside_gemm_us is what it adds, overlapping, before each of a chain of products whose weights come from
            memory
bandwidths  of calls on operands that come from memory: microseconds, GB/s of the bytes that must move, and that as a
            percentage of what a copy of as many bytes does in the same turns
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import qoq.kernels.ops  # noqa: F401  (registers the operators)
from qoq.formats.packing import padded_in_features
from qoq.kernels import act_quant, kv_cache
from qoq.kernels.act_quant import run_quantizer
from qoq.kernels.gpu_facts import read_facts
from qoq.kernels.launch import is_hopper
from qoq.kernels.layouts import PAGE_SIZE, page_bytes
from qoq.kernels.random_weights import random_packed_linear
from qoq.kernels.tiles import tile_weights
from qoq.kernels.timing import Variant, copies_beyond_cache, measure

CASES = [("plain", 4096), ("rms_norm", 4096), ("add_rms_norm", 4096), ("plain", 14336), ("silu_mul", 14336)]
HEADS, KV_HEADS, HEAD_DIM, BITS = 32, 8, 128, 4
GEMM_OUT = 4096
EPS = 1e-5

Call = Callable[[], object]


class Operands:
    """Inputs and outputs of one call of a quantizer, or (K = 0) of RoPE and append."""

    def __init__(self, operation: str, m: int, k: int, *, tiled: bool) -> None:
        self.operation, self.tiled, self.k = operation, tiled, k
        self.nbytes, self.call = self._append(m) if operation == "rope_append" else self._quantizer(m, k)

    def _quantizer(self, m: int, k: int) -> tuple[int, Call]:
        x = random(m, 2 * k if self.operation == "silu_mul" else k)
        residual = random(m, k) if self.operation == "add_rms_norm" else None
        weight = random(k) if self.operation.endswith("rms_norm") else None
        out = act_quant._outputs(x, k, tiled=self.tiled)
        self.out = out
        call = partial(
            run_quantizer, self.operation, x, residual=residual, weight=weight, eps=EPS, out=out, tiled=self.tiled
        )
        moved = 2 * x.numel() + m * padded_in_features(k) + 8 * m + (0 if residual is None else 4 * residual.numel())
        return moved, call

    def _append(self, m: int) -> tuple[int, Call]:
        qkv = random(m, HEADS + 2 * KV_HEADS, HEAD_DIM)
        parts = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        cos, sin = torch.randn(2, max(m, 64), HEAD_DIM // 2, device="cuda")
        positions = torch.arange(m, dtype=torch.int32, device="cuda")
        size = page_bytes(HEAD_DIM, BITS)
        pages = torch.zeros(-(-m // PAGE_SIZE), KV_HEADS, size, dtype=torch.uint8, device="cuda")
        turned = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
        operands = (*parts, cos, sin, positions, pages, positions.long(), BITS, (turned, None, None))
        call = partial(kv_cache.run_rope_append, *operands, settled=True)  # as the runtime calls it
        read, stored = 2 * qkv.numel() + m * (4 * HEAD_DIM + 12), 2 * turned.numel()
        return read + stored + m * 2 * KV_HEADS * (HEAD_DIM // 2 + 4), call


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float16)


@contextmanager
def one_after_the_other() -> Iterator[None]:
    """Launches without the attribute."""
    modules = act_quant, kv_cache
    before = [module.may_overlap for module in modules]
    for module in modules:
        module.may_overlap = lambda _: False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            module.may_overlap = function  # type: ignore[assignment]


def bench_chains(rows: list[int], repeat: int, *, tiled: bool) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    for m in rows:
        for operation, k in [*CASES, ("rope_append", 0)]:
            operands = Operands(operation, m, k, tiled=tiled)
            variants = [Variant("overlapping", lambda _, run=operands.call: run())]
            apart = Variant("apart", lambda _, run=operands.call: not_overlapping(run))
            variants.append(apart)
            if tiled and operation != "rope_append":
                variants += gemm_chains(operands)
            times = {name: t.median_us for name, t in measure(variants, repeat=repeat).timings.items()}
            row = {"operation": operation, "m": m, "k": k}
            row |= {f"{name}_us": round(times[name], 2) for name in ("overlapping", "apart")}
            if "gemm" in times:
                row["beside_gemm_us"] = round(times["with_gemm"] - times["gemm"], 2)
            results.append(row)
            print(json.dumps(row), flush=True)
    return results


def not_overlapping(run: Call) -> None:
    with one_after_the_other():
        run()


def gemm_chains(operands: Operands) -> list[Variant]:
    """Products of what the quantizer writes, with it before each and without."""
    k = operands.k
    packed = random_packed_linear(GEMM_OUT, k, progressive=True, generator=torch.Generator("cuda").manual_seed(0))
    tiles, s1_scales = tile_weights(packed), packed["s1_scales"]
    cache_bytes = int(torch.cuda.get_device_properties("cuda").L2_cache_size)
    copies = [
        tiles.clone() for _ in range(copies_beyond_cache(tiles.nbytes, cache_bytes=cache_bytes, budget_bytes=1 << 33))
    ]
    codes, scales, sums = operands.out

    def gemm(i: int) -> object:
        return torch.ops.qoq.w4a8_gemm_sm90(codes, scales, sums, copies[i], s1_scales, None, None, torch.float16)

    def both(i: int) -> object:
        operands.call()
        return gemm(i)

    torch.cuda.synchronize()
    return [Variant("gemm", gemm, len(copies)), Variant("with_gemm", both, len(copies))]


def bench_bandwidths(rows: list[int], repeat: int, *, tiled: bool) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    cache_bytes = int(torch.cuda.get_device_properties("cuda").L2_cache_size)
    for m in rows:
        for operation, k in [*CASES, ("rope_append", 0)]:
            torch.cuda.empty_cache()
            nbytes = Operands(operation, m, k, tiled=tiled).nbytes
            number = copies_beyond_cache(nbytes, cache_bytes=cache_bytes, budget_bytes=1 << 34)
            copies = [Operands(operation, m, k, tiled=tiled) for _ in range(number)]
            halves = [random(2, nbytes // 4) for _ in range(number)]
            variants = [
                Variant("kernel", lambda i, copies=copies: copies[i].call(), number),
                Variant("copy", lambda i, halves=halves: halves[i][0].copy_(halves[i][1]), number),
            ]
            times = {name: t.median_us for name, t in measure(variants, repeat=repeat).timings.items()}
            row = {
                "operation": operation,
                "m": m,
                "k": k,
                "megabytes": round(nbytes / 1e6, 1),
                "us": round(times["kernel"], 2),
                "gb_s": round(nbytes / times["kernel"] * 1e-3),
                "copy_gb_s": round(nbytes / times["copy"] * 1e-3),
                "percent_of_copy": round(100 * times["copy"] / times["kernel"], 1),
            }
            results.append(row)
            print(json.dumps(row), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--chain-rows", type=int, nargs="*", default=[1, 8, 16])
    parser.add_argument("--rows", type=int, nargs="*", default=[128, 2048, 4096, 8192, 16384])
    parser.add_argument("--in-order", action="store_true", help="codes in rows, also on Hopper")
    arguments = parser.parse_args()
    device = torch.cuda.current_device()
    tiled = is_hopper(device) and not arguments.in_order
    report = {
        "gpu": asdict(read_facts(device)),
        "tiled": tiled,
        "chains": bench_chains(arguments.chain_rows, arguments.repeat, tiled=tiled),
        "bandwidths": bench_bandwidths(arguments.rows, arguments.repeat, tiled=tiled),
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
