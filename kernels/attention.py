"""Attention of one new token a sequence over the paged KV4 or KV8 cache.

    qoq::paged_decode_attention        one new token a sequence, straight from the codes
    qoq::overlapping_decode_attention  the same, begun while what was enqueued last still runs

Hopper has a kernel of its own (cuda/sm90/decode_attention.cu), of one launch. Everywhere else the portable one runs
(cuda/sm80/decode_attention.cu), and a second one that joins what its blocks computed of the same sequence.
Several new tokens a sequence: `extend`, which uses the same kernels for few.

Keys and values are those after the round trip through the cache (`formats.arithmetic.kv_round_trip`), in every path.
Queries, probabilities and outputs are 16-bit; sums are float32. Against float64 over the same codes the decode kernel
is off by some 2 to 4 parts in 10^4 (L2) in float16 and 2 in 10^3 in bfloat16, which is the rounding of probabilities
to float16 and of the output. Queries may be as large as 2^120, scales and zeros any float16.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qoq.kernels.compiler import KernelSpec
from qoq.kernels.decode_plan import COLUMNS, FORMATS, DecodeShape, combine_spec, decode_spec, hopper_decode_spec
from qoq.kernels.launch import architecture, is_hopper, load_kernel, num_sms
from qoq.kernels.layouts import BLOCK_TOKENS, HEAD_DIMS, KV_BITS, PAGE_SIZE, check_page_shape, page_bytes
from qoq.kernels.workspace import StreamMemory

_INT_MAX = 2**31 - 1


def specs(architecture: str) -> list[KernelSpec]:
    """All that attention can ask for on `architecture`."""
    cases = list(itertools.product(HEAD_DIMS, KV_BITS, COLUMNS, FORMATS))
    decode = [decode_spec(architecture, *case) for case in cases]
    if architecture == "sm_90":
        decode += [hopper_decode_spec(*case) for case in cases]
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

    Safe in CUDA graphs: a replay reads kv_lens and page_table anew. Nothing is read before all that was enqueued
    earlier has ended. Raises ValueError for operands of another form.
    """
    return run_decode(query, kv_pages, page_table, kv_lens, scale, bits, window)


@torch.library.custom_op("qoq::overlapping_decode_attention", mutates_args=(), device_types="cuda")
def overlapping_decode_attention(
    query: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    scale: float,
    bits: int,
    window: int,
    fresh_tokens: int,
) -> Tensor:
    """`paged_decode_attention` that on Hopper begins while kernels enqueued before it still run.

    What they may still be writing is query and, of each sequence, the last `fresh_tokens` (0 or more) of its kv_lens
    tokens; it is waited for. All else, kv_lens and page_table and the tokens before, is read at once, and must have
    been written before the last kernel that was launched the ordinary way: every one but qoq's own that overlap. In a
    decode step these are 1 fresh token, and lengths and page numbers that were written before the embedding was looked
    up. The same bits as `paged_decode_attention`.
    """
    if fresh_tokens < 0:
        raise ValueError(f"fresh_tokens: expected 0 or more, got {fresh_tokens}")
    return run_decode(query, kv_pages, page_table, kv_lens, scale, bits, window, fresh_tokens=fresh_tokens)


paged_decode_attention.register_fake(lambda query, *_: query.new_empty(query.shape))
overlapping_decode_attention.register_fake(lambda query, *_: query.new_empty(query.shape))


@dataclass(frozen=True)
class DecodeOptions:
    """How a decode step is launched; other than by default for tests, tuning and benchmarks.

    blocks       how many; None: as many as the GPU has SMs
    portable     the kernel of all architectures, on Hopper too
    overlapping  Hopper's kernel may start before the one enqueued last has ended
    ring         warps and stages of Hopper's kernel
    """

    blocks: int | None = None
    portable: bool = False
    overlapping: bool = True
    ring: tuple[int, int] | None = None


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
    fresh_tokens: int | None = None,
    options: DecodeOptions | None = None,
) -> Tensor:
    """Check the operands and launch; `out`: contiguous [B, H, D]; `fresh_tokens`: see `overlapping_decode_attention`,
    None where nothing may be read early."""
    shape = check_decode_operands(query, kv_pages, page_table, kv_lens, scale, bits, window)
    if out is None:
        out = query.new_empty(query.shape)
    if shape.sequences == 0:
        return out
    options = options or DecodeOptions()
    with torch.cuda.device(query.device):
        if is_hopper(query.device.index) and not options.portable:
            fresh = -1 if fresh_tokens is None else fresh_tokens
            _run_hopper(query, kv_pages, page_table, kv_lens, out, scale, bits, window, fresh, shape, options)
        else:
            _run_portable(query, kv_pages, page_table, kv_lens, out, scale, bits, window, shape, options)
    return out


def _run_hopper(
    query: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    out: Tensor,
    scale: float,
    bits: int,
    window: int,
    fresh_tokens: int,
    shape: DecodeShape,
    options: DecodeOptions,
) -> None:
    device = query.device.index
    blocks = options.blocks or num_sms(device)
    slots = _slots.of(device) if blocks <= num_sms(device) else _make_slots(device, blocks)
    stats = slots[blocks * shape.columns * shape.head_dim :]
    kernel = load_kernel(hopper_decode_spec(shape.head_dim, bits, shape.columns, query.dtype, options.ring), device)
    tensors = (query, kv_pages, page_table, kv_lens, out, slots, stats)
    sizes = _sizes(query, kv_pages, page_table, window, shape)
    kernel.launch((blocks, 1, 1), (*tensors, *sizes, fresh_tokens, float(scale)), overlapping=options.overlapping)


def _run_portable(
    query: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    out: Tensor,
    scale: float,
    bits: int,
    window: int,
    shape: DecodeShape,
    options: DecodeOptions,
) -> None:
    device = query.device.index
    blocks = options.blocks or num_sms(device)
    sums = blocks * 2 * shape.columns * shape.head_dim
    workspace = query.new_empty(sums + 4 * blocks + blocks * 2 * shape.columns * 2, dtype=torch.float32)
    partial_sums, tails, partial_stats = workspace, workspace[sums:], workspace[sums + 4 * blocks :]
    decode = load_kernel(decode_spec(architecture(device), shape.head_dim, bits, shape.columns, query.dtype), device)
    combine = load_kernel(combine_spec(shape.head_dim, query.dtype), device)
    tensors = (query, kv_pages, page_table, kv_lens, out, partial_sums, partial_stats, tails)
    decode.launch((blocks, 1, 1), (*tensors, *_sizes(query, kv_pages, page_table, window, shape), float(scale)))
    combine.launch(
        (blocks, shape.queries_of_pass, 1),
        (partial_sums, partial_stats, tails, out, shape.columns, *_head_sizes(shape)),
    )


def _sizes(query: Tensor, kv_pages: Tensor, page_table: Tensor, window: int, shape: DecodeShape) -> tuple[int, ...]:
    pages = (page_table.shape[1], kv_pages.shape[0])
    return (shape.sequences, *pages, *_head_sizes(shape), query.stride(0), window)


def _head_sizes(shape: DecodeShape) -> tuple[int, int, int, int]:
    return shape.kv_heads, shape.queries_of_kv, shape.passes, shape.queries_of_pass


def _make_slots(device: int, blocks: int | None = None) -> Tensor:
    """For what blocks of Hopper's kernel leave each other: all bits set where nothing is."""
    size = (blocks or num_sms(device)) * COLUMNS[-1] * (HEAD_DIMS[-1] + 2)
    return torch.full((size,), -1, dtype=torch.int32, device=f"cuda:{device}")


_slots = StreamMemory(_make_slots)


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
