"""The paged KV cache as custom operators: writing keys and values into pages, and reading them back.

    qoq::append_kv       quantizes keys (after RoPE) and values of new tokens into their places in kv_pages
    qoq::rope_append_kv  the same after RoPE of queries and keys; returns the queries, and keys and values as the cache
                         gives them back, which is what attention must see in every path
    qoq::rope_append     the same, but returns the queries alone
    qoq::kv_round_trip   keys or values as the cache gives them back, without a cache
    qoq::rotate_heads    queries (after RoPE) for keys that are kept rotated
    qoq::gather_kv       whole pages as contiguous 16-bit keys and values

Codes, scales and zeros are those of `formats.arithmetic.quantize_kv` on the CPU, bit for bit. (Of a zero that is 0 the
sign may differ where a head holds both 0 and -0; a head with a NaN or an infinity gets codes 0 and a NaN for scale and
zero.) Pages are uint8 [num_pages, num_kv_heads, page_bytes] in the order of `layouts`; other tensors hold float16 or
bfloat16. There is no paged path for 16 bits.

With key_rotation "hadamard", keys after RoPE are rotated before they are quantized: `formats.arithmetic.rotate_heads`,
bit for bit. They stay so in the cache and in what is returned or gathered, and attention needs queries rotated like
them: rope_append_kv and rope_append return such, rotate_heads makes them.

`slots` int64 [T] says where tokens go: page * 64 + place in the page. A negative slot is for a token that goes nowhere.
Two tokens of one call must not have the same slot. A slot, or a page id, beyond the pool stops the kernel: the next
CUDA call fails, and memory is left alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qoq.kernels.compiler import KernelSpec
from qoq.kernels.kv_operands import (
    FORMATS,
    KEY_ROTATIONS,
    LANES,
    VECTOR,
    check_append,
    check_gather,
    check_rope,
    check_rotate,
    check_round_trip,
    token_stride,
)
from qoq.kernels.launch import load_kernel, may_overlap
from qoq.kernels.layouts import HEAD_DIMS, KV_BITS, PAGE_SIZE

_THREADS = 128
MANY_TOKENS, _ROUNDS = 256, 4
"""From so many tokens on, a warp that appends has so many rounds of heads, all of which it asks for at once."""


def append_spec(
    head_dim: int, bits: int, dtype: torch.dtype, *, rope: bool, rounds: int = 1, key_rotation: str = "none"
) -> KernelSpec:
    """The kernel of `append_kv`, or with `rope` of the other two; rounds: of heads that a warp does in turn."""
    defines = {
        "HEAD_DIM": head_dim,
        "BITS": bits,
        "IN_FORMAT": FORMATS.index(dtype),
        "ROPE": int(rope),
        "ROTATE": int(key_rotation != "none"),
        "ROUNDS": rounds,
    }
    return KernelSpec("sm80/kv_append.cu", "qoq_kv_append_sm80", tuple(defines.items()), _THREADS)


def round_trip_spec(head_dim: int, bits: int, dtype: torch.dtype, key_rotation: str = "none") -> KernelSpec:
    """The kernel of `kv_round_trip`."""
    defines = {
        "LANES": _lanes(head_dim),
        "BITS": bits,
        "IN_FORMAT": FORMATS.index(dtype),
        "ROTATE": int(key_rotation != "none"),
    }
    return KernelSpec("sm80/kv_round_trip.cu", "qoq_kv_round_trip_sm80", tuple(defines.items()), _THREADS)


def rotate_spec(head_dim: int, dtype: torch.dtype) -> KernelSpec:
    """The kernel of `rotate_heads`."""
    defines = {"LANES": _lanes(head_dim), "IN_FORMAT": FORMATS.index(dtype)}
    return KernelSpec("sm80/rotate_heads.cu", "qoq_rotate_heads_sm80", tuple(defines.items()), _THREADS)


def gather_spec(head_dim: int, bits: int, dtype: torch.dtype) -> KernelSpec:
    """The kernel of `gather_kv`."""
    defines = {"HEAD_DIM": head_dim, "BITS": bits, "OUT_FORMAT": FORMATS.index(dtype)}
    return KernelSpec("sm80/kv_gather.cu", "qoq_kv_gather_sm80", tuple(defines.items()), _THREADS)


def specs(architecture: str) -> list[KernelSpec]:  # noqa: ARG001  (every architecture gets the same)
    """All that can be asked for."""
    found = []
    for bits in KV_BITS:
        for dtype in FORMATS:
            for head_dim in HEAD_DIMS:
                found += [
                    append_spec(head_dim, bits, dtype, rope=rope, rounds=rounds, key_rotation=rotation)
                    for rope in (False, True)
                    for rounds in (1, _ROUNDS)
                    for rotation in KEY_ROTATIONS
                ]
                found.append(gather_spec(head_dim, bits, dtype))
            found += [
                round_trip_spec(lanes * VECTOR, bits, dtype, rotation) for lanes in LANES for rotation in KEY_ROTATIONS
            ]
    return found + [rotate_spec(lanes * VECTOR, dtype) for lanes in LANES for dtype in FORMATS]


@torch.library.custom_op("qoq::append_kv", mutates_args=("kv_pages",), device_types="cuda")
def append_kv(
    key: Tensor, value: Tensor, kv_pages: Tensor, slots: Tensor, bits: int, key_rotation: str = "none"
) -> None:
    """Write key and value [T, num_kv_heads, D] into kv_pages at `slots`; keys come after RoPE.

    With key_rotation "hadamard" keys are rotated here, before they are quantized.

    The heads of a token are contiguous; tokens may be any multiple of 8 values apart, as in a fused buffer.
    """
    check_append(key, value, kv_pages, slots, bits, key_rotation)
    run_append(key, value, kv_pages, slots, bits, key_rotation)


@append_kv.register_fake
def _(
    key: Tensor,  # noqa: ARG001
    value: Tensor,  # noqa: ARG001
    kv_pages: Tensor,  # noqa: ARG001
    slots: Tensor,  # noqa: ARG001
    bits: int,  # noqa: ARG001
    key_rotation: str = "none",  # noqa: ARG001
) -> None:
    return None


def run_append(
    key: Tensor, value: Tensor, kv_pages: Tensor, slots: Tensor, bits: int, key_rotation: str = "none"
) -> None:
    """Launch `append_kv` on operands that were checked."""
    tokens, num_kv_heads, head_dim = key.shape
    if tokens == 0 or num_kv_heads == 0:
        return
    _launch_append(
        append_spec(head_dim, bits, key.dtype, rope=False, rounds=_rounds(tokens), key_rotation=key_rotation),
        tokens,
        2 * num_kv_heads,
        key,
        (
            *(None, key, value, None, None, None, slots, kv_pages, None, None, None),
            *(tokens, 0, num_kv_heads, 0, token_stride(key), token_stride(value), 0, kv_pages.shape[0], 0),
        ),
    )


@torch.library.custom_op("qoq::rope_append_kv", mutates_args=("kv_pages",), device_types="cuda")
def rope_append_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    kv_pages: Tensor,
    slots: Tensor,
    bits: int,
    key_rotation: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    """RoPE of query [T, num_heads, D] and key; append key and value [T, num_kv_heads, D] to kv_pages at `slots`.

    cos, sin   float32 [max_positions, D/2]: row `position`, for dimensions d and d + D/2 (half-split RoPE). They are
               rounded to the dtype of query, and so is every step, as transformers' apply_rotary_pos_emb does
    positions  int32 [T]; one outside the tables makes the token's query and key NaN
    Returns query after RoPE, key after RoPE and the round trip, value after the round trip: contiguous, in their dtype,
    also of tokens that go nowhere. With key_rotation "hadamard" query and key are rotated after RoPE.
    """
    check_append(key, value, kv_pages, slots, bits, key_rotation)
    check_rope(query, key, cos, sin, positions)
    outputs = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    run_rope_append(query, key, value, cos, sin, positions, kv_pages, slots, bits, outputs, key_rotation)
    return outputs


@rope_append_kv.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,  # noqa: ARG001
    sin: Tensor,  # noqa: ARG001
    positions: Tensor,  # noqa: ARG001
    kv_pages: Tensor,  # noqa: ARG001
    slots: Tensor,  # noqa: ARG001
    bits: int,  # noqa: ARG001
    key_rotation: str = "none",  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def run_rope_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    kv_pages: Tensor,
    slots: Tensor,
    bits: int,
    out: tuple[Tensor, Tensor | None, Tensor | None],
    key_rotation: str = "none",
    *,
    settled: bool = False,
) -> None:
    """Launch `rope_append_kv` on operands that were checked; contiguous outputs, or None for what nobody wants.

    settled   see `rope_append`
    """
    tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    heads = num_heads + 2 * num_kv_heads
    if tokens == 0 or heads == 0:
        return
    _launch_append(
        append_spec(head_dim, bits, key.dtype, rope=True, rounds=_rounds(tokens), key_rotation=key_rotation),
        tokens,
        heads,
        key,
        (
            *(query, key, value, cos, sin, positions, slots, kv_pages, *out),
            *(tokens, num_heads, num_kv_heads, token_stride(query), token_stride(key), token_stride(value)),
            *(cos.shape[0], kv_pages.shape[0], int(settled)),
        ),
    )


@torch.library.custom_op("qoq::rope_append", mutates_args=("kv_pages",), device_types="cuda")
def rope_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    kv_pages: Tensor,
    slots: Tensor,
    bits: int,
    key_rotation: str = "none",
    settled: bool = False,
) -> Tensor:
    """`rope_append_kv` that returns query alone: for attention that reads keys and values from the pages.

    settled   positions and slots were written before the last kernel that was launched the ordinary way (every one but
              qoq's own that overlap): Hopper's may read them while kernels enqueued before it still run
    """
    check_append(key, value, kv_pages, slots, bits, key_rotation)
    check_rope(query, key, cos, sin, positions)
    turned = query.new_empty(query.shape)
    outputs = (turned, None, None)
    run_rope_append(
        query, key, value, cos, sin, positions, kv_pages, slots, bits, outputs, key_rotation, settled=settled
    )
    return turned


rope_append.register_fake(lambda query, *_: query.new_empty(query.shape))


@torch.library.custom_op("qoq::kv_round_trip", mutates_args=(), device_types="cuda")
def kv_round_trip(x: Tensor, bits: int, key_rotation: str = "none") -> Tensor:
    """x [..., D], contiguous, as a cache of `bits` gives each head back: `formats.arithmetic.kv_round_trip`.

    D is a multiple of 8, at most 256; with a key_rotation (for keys, rotated first) 64, 128 or 256.
    """
    check_round_trip(x, bits, key_rotation)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    run_round_trip(x, bits, out, key_rotation)
    return out


@kv_round_trip.register_fake
def _(x: Tensor, bits: int, key_rotation: str = "none") -> Tensor:  # noqa: ARG001
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def run_round_trip(x: Tensor, bits: int, out: Tensor, key_rotation: str = "none") -> None:
    """Launch `kv_round_trip` on an operand that was checked, with a given contiguous output."""
    head_dim = x.shape[-1]
    heads = x.numel() // head_dim
    if heads:
        spec = round_trip_spec(head_dim, bits, x.dtype, key_rotation)
        _launch(spec, heads, _lanes(head_dim), x, (x, out, heads, head_dim))


@torch.library.custom_op("qoq::rotate_heads", mutates_args=(), device_types="cuda")
def rotate_heads(x: Tensor) -> Tensor:
    """x [..., D], contiguous, times the Hadamard matrix over sqrt(D): `formats.arithmetic.rotate_heads`.

    D is 64, 128 or 256.
    """
    check_rotate(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    run_rotate(x, out)
    return out


@rotate_heads.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def run_rotate(x: Tensor, out: Tensor) -> None:
    """Launch `rotate_heads` on an operand that was checked, with a given contiguous output."""
    head_dim = x.shape[-1]
    heads = x.numel() // head_dim
    if heads:
        _launch(rotate_spec(head_dim, x.dtype), heads, _lanes(head_dim), x, (x, out, heads))


@torch.library.custom_op("qoq::gather_kv", mutates_args=(), device_types="cuda")
def gather_kv(
    kv_pages: Tensor, page_ids: Tensor, head_dim: int, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [64 * P, num_kv_heads, D] in `dtype` of the pages page_ids int32 [P], in their order.

    Every place of a page is decoded: what lies in places that no token was written to is of no use.
    """
    check_gather(kv_pages, page_ids, head_dim, bits, dtype)
    out = _gathered(kv_pages, page_ids, head_dim, dtype)
    run_gather(kv_pages, page_ids, head_dim, bits, out)
    return out


@gather_kv.register_fake
def _(
    kv_pages: Tensor,
    page_ids: Tensor,
    head_dim: int,
    bits: int,  # noqa: ARG001
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _gathered(kv_pages, page_ids, head_dim, dtype)


def run_gather(kv_pages: Tensor, page_ids: Tensor, head_dim: int, bits: int, out: tuple[Tensor, Tensor]) -> None:
    """Launch `gather_kv` on operands that were checked, with given contiguous outputs."""
    key, value = out
    num_pages, num_kv_heads = kv_pages.shape[:2]
    blocks = page_ids.shape[0] * num_kv_heads
    if blocks == 0:
        return
    device = kv_pages.device
    with torch.cuda.device(device):
        load_kernel(gather_spec(head_dim, bits, key.dtype), device.index).launch(
            (blocks, 1, 1), (kv_pages, page_ids, key, value, num_kv_heads, num_pages)
        )


def _gathered(kv_pages: Tensor, page_ids: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unwritten keys and values."""
    shape = (PAGE_SIZE * page_ids.shape[0], kv_pages.shape[1], head_dim)
    return kv_pages.new_empty(shape, dtype=dtype), kv_pages.new_empty(shape, dtype=dtype)


def _lanes(head_dim: int) -> int:
    """Threads for each head of `kv_round_trip` and `rotate_heads`."""
    return next(lanes for lanes in LANES if head_dim <= lanes * VECTOR)


def _rounds(tokens: int) -> int:
    return _ROUNDS if tokens >= MANY_TOKENS else 1


def _launch_append(
    spec: KernelSpec, tokens: int, heads: int, on: Tensor, arguments: tuple[Tensor | int | None, ...]
) -> None:
    """`heads` of each token. The kernel waits by itself for the one before, and may start while that ends."""
    defines = dict(spec.defines)
    heads_of_warp = 32 * VECTOR // defines["HEAD_DIM"] * defines["ROUNDS"]
    blocks = math.ceil(tokens * math.ceil(heads / heads_of_warp) / (_THREADS // 32))
    device = on.device.index
    with torch.cuda.device(on.device):
        load_kernel(spec, device).launch((blocks, 1, 1), arguments, overlapping=may_overlap(device))


def _launch(spec: KernelSpec, heads: int, lanes: int, on: Tensor, arguments: tuple[Tensor | int | None, ...]) -> None:
    """Launch a kernel with `lanes` threads for each of `heads`, on the device of `on`."""
    blocks = math.ceil(heads / (_THREADS // lanes))
    with torch.cuda.device(on.device):
        load_kernel(spec, on.device.index).launch((blocks, 1, 1), arguments)
