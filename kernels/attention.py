"""Attention of one new token a sequence over the paged KV4 or KV8 cache.

    qoq::paged_decode_attention   one new token a sequence, straight from the codes (cuda/sm80/decode_attention.cu)

Several new tokens a sequence: `extend`, which uses the same kernel for few.

Keys and values are those after the round trip through the cache (`formats.arithmetic.kv_round_trip`), in every path.
Queries, probabilities and outputs are 16-bit; sums are float32. Against float64 over the same codes the decode kernel
is off by some 2 to 4 parts in 10^4 (L2) in float16 and 2 in 10^3 in bfloat16, which is the rounding of probabilities
to float16 and of the output. Queries may be as large as 2^120, scales and zeros any float16.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qoq.kernels.compiler import KernelSpec
from qoq.kernels.decode_plan import COLUMNS, FORMATS, DecodeShape, combine_spec, decode_spec
from qoq.kernels.launch import architecture, load_kernel, num_sms
from qoq.kernels.layouts import BLOCK_TOKENS, HEAD_DIMS, KV_BITS, PAGE_SIZE, check_page_shape, page_bytes

_INT_MAX = 2**31 - 1


def specs(architecture: str) -> list[KernelSpec]:
    """All that attention can ask for on `architecture`."""
    decode = [
        decode_spec(architecture, head_dim, bits, columns, dtype)
        for head_dim in HEAD_DIMS
        for bits in KV_BITS
        for columns in COLUMNS
        for dtype in FORMATS
    ]
    return decode + [combine_spec(head_dim, dtype) for head_dim in HEAD_DIMS for dtype in FORMATS]


@torch.library.custom_op("qoq::paged_decode_attention", mutates_args=(), device_types="cuda")
def paged_decode_attention(
    query: Tensor, kv_pages: Tensor, page_table: Tensor, kv_lens: Tensor, scale: float, bits: int, window: int
) -> Tensor:
    """softmax(scale * query @ keys) @ values, one row a sequence: [B, H, D] in query's dtype.

    query       float16 or bfloat16 [B, H, D], D of 64 or 128, after RoPE, and rotated if the cache's keys are
                (`kv_cache.rotate_heads`); rows may be strided
    kv_pages    uint8 [num_pages, num_kv_heads, page_bytes(D, bits)] (`layouts`), bits 4 or 8; H a multiple of the heads
    page_table  int32 [B, max_pages]: the page of each 64 tokens; a page that does not exist, where it is needed, stops
                the kernel with an error of the CUDA context
    kv_lens     int32 [B]: tokens in the cache, the new one included; 0 gives zeros, more than the row of page_table
                has places for counts as all of these
    window      attend to the last `window` tokens only; 0 for all

    Safe in CUDA graphs: a replay reads kv_lens and page_table anew. Raises ValueError for operands of another form.
    """
    return run_decode(query, kv_pages, page_table, kv_lens, scale, bits, window)


@paged_decode_attention.register_fake
def _(
    query: Tensor,
    kv_pages: Tensor,  # noqa: ARG001
    page_table: Tensor,  # noqa: ARG001
    kv_lens: Tensor,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    bits: int,  # noqa: ARG001
    window: int,  # noqa: ARG001
) -> Tensor:
    return query.new_empty(query.shape)


def run_decode(
    query: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    scale: float,
    bits: int,
    window: int,
    *,
    out: Tensor | None = None,
    blocks: int | None = None,
) -> Tensor:
    """Check the operands and launch both kernels; `out`: contiguous [B, H, D]; `blocks`: how many, for tests."""
    shape = check_decode_operands(query, kv_pages, page_table, kv_lens, scale, bits, window)
    if out is None:
        out = query.new_empty(query.shape)
    if shape.sequences == 0:
        return out
    device = query.device.index
    blocks = num_sms(device) if blocks is None else blocks
    sums = blocks * 2 * shape.columns * shape.head_dim
    workspace = query.new_empty(sums + 4 * blocks + blocks * 2 * shape.columns * 2, dtype=torch.float32)
    partial_sums, tails, partial_stats = workspace, workspace[sums:], workspace[sums + 4 * blocks :]
    decode = load_kernel(decode_spec(architecture(device), shape.head_dim, bits, shape.columns, query.dtype), device)
    combine = load_kernel(combine_spec(shape.head_dim, query.dtype), device)
    heads = (shape.kv_heads, shape.queries_of_kv, shape.passes, shape.queries_of_pass)
    tensors = (query, kv_pages, page_table, kv_lens, out, partial_sums, partial_stats, tails)
    sizes = (shape.sequences, page_table.shape[1], kv_pages.shape[0], *heads, query.stride(0), window)
    with torch.cuda.device(device):
        decode.launch((blocks, 1, 1), (*tensors, *sizes, float(scale)))
        combine.launch(
            (blocks, shape.queries_of_pass, 1), (partial_sums, partial_stats, tails, out, shape.columns, *heads)
        )
    return out


def check_decode_operands(
    query: Tensor, kv_pages: Tensor, page_table: Tensor, kv_lens: Tensor, scale: float, bits: int, window: int
) -> DecodeShape:
    """The sizes of a decode step. Raises ValueError for operands that the kernels cannot take."""
    check_cache(query, kv_pages, page_table, scale, bits, window)
    sequences, heads, head_dim = query.shape
    shape = DecodeShape.of(sequences, heads, kv_pages.shape[1], head_dim)
    if page_table.shape[0] != sequences:
        raise ValueError(f"page_table: expected a row for each of {sequences} queries, got {page_table.shape[0]}")
    if kv_lens.dtype != torch.int32 or tuple(kv_lens.shape) != (sequences,) or not kv_lens.is_contiguous():
        raise ValueError(f"kv_lens: expected contiguous torch.int32 [{sequences}], got {_form(kv_lens)}")
    if kv_lens.device != query.device:
        raise ValueError(f"kv_lens: expected it on {query.device}, got {kv_lens.device}")
    units = sequences * page_table.shape[1] * (PAGE_SIZE // BLOCK_TOKENS) * shape.kv_heads * shape.passes
    if units > _INT_MAX or query.stride(0) > _INT_MAX:
        raise ValueError("the batch is too large for one call: split it")
    return shape


def check_cache(query: Tensor, kv_pages: Tensor, page_table: Tensor, scale: float, bits: int, window: int) -> None:
    """Raise ValueError for queries [rows, heads, D] and a cache that attention cannot take, whatever the lengths."""
    if query.dtype not in FORMATS or query.ndim != 3:
        raise ValueError(f"query: expected torch.float16 or torch.bfloat16 [rows, heads, D], got {_form(query)}")
    rows, heads, head_dim = query.shape
    check_page_shape(head_dim, bits)
    strides = (query.stride(0) if rows > 1 else 0, query.stride(1) if heads > 1 else head_dim, query.stride(2))
    if strides[1:] != (head_dim, 1) or strides[0] % 8 or query.data_ptr() % 16:
        raise ValueError(
            f"query: expected heads side by side, rows that begin at multiples of 16 bytes, got strides "
            f"{list(query.stride())} (call .contiguous())"
        )
    expected = page_bytes(head_dim, bits)
    if kv_pages.dtype != torch.uint8 or kv_pages.ndim != 3 or kv_pages.shape[2] != expected:
        raise ValueError(f"kv_pages: expected torch.uint8 [pages, kv_heads, {expected}], got {_form(kv_pages)}")
    if not kv_pages.is_contiguous() or kv_pages.data_ptr() % 16:
        raise ValueError("kv_pages: expected contiguous pages that begin at a multiple of 16 bytes")
    kv_heads = kv_pages.shape[1]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"query has {heads} heads, expected a multiple of the {kv_heads} KV heads")
    if kv_pages.shape[0] * kv_heads * (PAGE_SIZE // BLOCK_TOKENS) > _INT_MAX:
        raise ValueError(f"kv_pages: {kv_pages.shape[0]} pages of {kv_heads} KV heads are too many")
    if page_table.dtype != torch.int32 or page_table.ndim != 2 or not page_table.is_contiguous():
        raise ValueError(f"page_table: expected contiguous torch.int32 [sequences, pages], got {_form(page_table)}")
    for name, tensor in (("kv_pages", kv_pages), ("page_table", page_table)):
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected it on {query.device}, got {tensor.device}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if not 0 <= window <= _INT_MAX:
        raise ValueError(f"window: expected 0 (no window) or a number of tokens, got {window}")


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
