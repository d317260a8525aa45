"""Which instantiation of the decode kernels serves a shape on an architecture, as data: nothing is launched here."""

from __future__ import annotations

import math
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
_HOPPER_RINGS = {(64, 4): (12, 4), (64, 8): (12, 2), (128, 4): (12, 2), (128, 8): (10, 2)}
"""Warps and stages by head_dim and bits: some 100 KB in flight, more for KV8 of 128 dimensions."""
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
    """The kernel for `columns` (4 or 8) queries a pass, with as many warps and stages as `arch` has room for."""
    block = block_bytes(head_dim, bits)
    first_pieces = 4 * columns * head_dim
    room = shared_bytes_of_sm(arch) - _RESERVED_BYTES
    fewest, most = _STAGES
    for warps in _WARPS:
        stages = min(most, (room // warps - first_pieces) // block)
        if stages >= fewest:
            break
    else:
        raise ValueError(f"decode attention does not fit the shared memory of {arch}")
    defines = {
        "HEAD_DIM": head_dim,
        "BITS": bits,
        "QUERIES": columns,
        "FORMAT": FORMATS.index(dtype),
        "WARPS": warps,
        "STAGES": stages,
    }
    shared = warps * (stages * block + first_pieces)
    return KernelSpec(
        "sm80/decode_attention.cu", "qoq_decode_attention_sm80", tuple(defines.items()), 32 * warps, shared
    )


def hopper_decode_spec(
    head_dim: int, bits: int, columns: int, dtype: torch.dtype, ring: tuple[int, int] | None = None
) -> KernelSpec:
    """Hopper's kernel for `columns` (4 or 8) queries a pass; `ring`: warps and stages, for tuning."""
    block = block_bytes(head_dim, bits)
    warps, stages = ring or _HOPPER_RINGS[head_dim, bits]
    defines = {
        "HEAD_DIM": head_dim,
        "BITS": bits,
        "QUERIES": columns,
        "FORMAT": FORMATS.index(dtype),
        "WARPS": warps,
        "STAGES": stages,
    }
    shared = warps * (stages * block + 4 * columns * head_dim)
    return KernelSpec(
        "sm90/decode_attention.cu", "qoq_decode_attention_sm90", tuple(defines.items()), 32 * warps, shared
    )


def combine_spec(head_dim: int, dtype: torch.dtype) -> KernelSpec:
    """The kernel that joins what blocks of the decode kernel computed of the same sequence."""
    defines = (("HEAD_DIM", head_dim), ("FORMAT", FORMATS.index(dtype)))
    return KernelSpec("sm80/decode_combine.cu", "qoq_decode_combine_sm80", defines, head_dim)
