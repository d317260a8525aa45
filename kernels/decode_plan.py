"""Which instantiation of the decode kernels serves a shape on an architecture, as data: nothing is launched here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qoq.kernels.compiler import KernelSpec
from qoq.kernels.gemm_tiles import shared_bytes_of_sm
from qoq.kernels.layouts import block_bytes

FORMATS = (torch.float16, torch.bfloat16)
"""Of queries and outputs, by the number that the kernels' FORMAT has."""
COLUMNS = (4, 8)
"""Queries of a KV head that one pass of the kernel may compute."""
_WARPS = (12, 8, 6, 4)
_STAGES = (2, 4)
"""Sub-blocks in a warp's ring, at least and at most; with more in flight, the first one arrives later."""
_IN_FLIGHT_BYTES = 112 << 10
"""What the rings of Hopper's kernel hold at most, with two stages or more; more only makes all wait longer."""
_RESERVED_BYTES = 1024 + 4096
"""Shared memory that the driver takes of each block, and the most that the kernel declares itself."""


@dataclass(frozen=True)
class DecodeShape:
    """Sizes of a decode step; `passes` of `queries_of_pass` queries compute the queries of a KV head."""

    sequences: int
    kv_heads: int
    queries_of_kv: int
    head_dim: int
    passes: int
    queries_of_pass: int

    @property
    def columns(self) -> int:
        return next(columns for columns in COLUMNS if self.queries_of_pass <= columns)

    @staticmethod
    def of(sequences: int, heads: int, kv_heads: int, head_dim: int) -> DecodeShape:
        share = heads // kv_heads
        passes = math.ceil(share / COLUMNS[-1])
        return DecodeShape(sequences, kv_heads, share, head_dim, passes, math.ceil(share / passes))


def decode_spec(arch: str, head_dim: int, bits: int, columns: int, dtype: torch.dtype) -> KernelSpec:
    """The portable kernel for `columns` (4 or 8) queries a pass, with the warps and stages that `arch` has room for."""
    ring = _largest_ring(arch, head_dim, bits, columns, lambda _: _STAGES[1])
    return _decode_spec("sm80", head_dim, bits, columns, dtype, ring)


def hopper_decode_spec(
    head_dim: int, bits: int, columns: int, dtype: torch.dtype, ring: tuple[int, int] | None = None
) -> KernelSpec:
    """Hopper's kernel; `ring`: other warps and stages than it has by default."""
    default = _largest_ring("sm_90", head_dim, bits, columns, lambda stage_bytes: _IN_FLIGHT_BYTES // stage_bytes)
    return _decode_spec("sm90", head_dim, bits, columns, dtype, ring or default)


def _largest_ring(arch: str, head_dim: int, bits: int, columns: int, most: Callable[[int], int]) -> tuple[int, int]:
    """Warps, and sub-blocks in the ring of each: at least two, at most as many as `most` says of one of each warp."""
    block = block_bytes(head_dim, bits)
    room = shared_bytes_of_sm(arch) - _RESERVED_BYTES
    for warps in _WARPS:
        stages = min(max(most(warps * block), _STAGES[0]), (room // warps - 4 * columns * head_dim) // block)
        if stages >= _STAGES[0]:
            return warps, stages
    raise ValueError(f"decode attention does not fit the shared memory of {arch}")


def _decode_spec(
    folder: str, head_dim: int, bits: int, columns: int, dtype: torch.dtype, ring: tuple[int, int]
) -> KernelSpec:
    warps, stages = ring
    defines = {
        "HEAD_DIM": head_dim,
        "BITS": bits,
        "QUERIES": columns,
        "FORMAT": FORMATS.index(dtype),
        "WARPS": warps,
        "STAGES": stages,
    }
    shared = warps * (stages * block_bytes(head_dim, bits) + 4 * columns * head_dim)
    return KernelSpec(
        f"{folder}/decode_attention.cu",
        f"qoq_decode_attention_{folder}",
        tuple(defines.items()),
        32 * warps,
        shared,
    )


def combine_spec(head_dim: int, dtype: torch.dtype) -> KernelSpec:
    """The kernel that joins what blocks of the decode kernel computed of the same sequence."""
    defines = (("HEAD_DIM", head_dim), ("FORMAT", FORMATS.index(dtype)))
    return KernelSpec("sm80/decode_combine.cu", "qoq_decode_combine_sm80", defines, head_dim)
