"""The paged KV cache as custom operators: writing keys and values into pages, and reading them back.

    qoq::append_kv       quantizes keys (after RoPE) and values of new tokens into their places in kv_pages
    qoq::rope_append_kv  the same after rotating queries and keys; returns the rotated queries, and keys and values as
                         the cache gives them back, which is what attention must see in every path
    qoq::kv_round_trip   keys or values as the cache gives them back, without a cache
    qoq::gather_kv       whole pages as contiguous 16-bit keys and values

Codes, scales and zeros are those of `formats.arithmetic.quantize_kv` on the CPU, bit for bit. (Of a zero that is 0 the
sign may differ where a head holds both 0 and -0; a head with a NaN or an infinity gets codes 0 and a NaN for scale and
zero.) Pages are uint8 [num_pages, num_kv_heads, page_bytes] in the order of `layouts`; other tensors hold float16 or
bfloat16. There is no paged path for 16 bits.

`slots` int64 [T] says where tokens go: page * 64 + place in the page. A negative slot is for a token that goes nowhere.
Two tokens of one call must not have the same slot. A slot, or a page id, beyond the pool stops the kernel: the next
CUDA call fails, and memory is left alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qoq.kernels.compiler import KernelSpec
from qoq.kernels.launch import load_kernel
from qoq.kernels.layouts import HEAD_DIMS, KV_BITS, PAGE_SIZE, check_page_shape, page_bytes

MAX_ROUND_TRIP_DIM = 256
"""The largest head_dim of `kv_round_trip`, which needs no page layout."""

_FORMATS = (torch.float16, torch.bfloat16)
_VECTOR = 8
_THREADS = 128
_LANES = (8, 16, 32)
_MAX_INDEX = 2**31 - 1024
"""Heads and blocks are counted in int32, with the last block's spare threads."""
_MAX_STRIDE = 2**31 - 1


def append_spec(head_dim: int, bits: int, dtype: torch.dtype, *, rope: bool) -> KernelSpec:
    """The kernel of `append_kv`, or of `rope_append_kv`."""
    defines = {"HEAD_DIM": head_dim, "BITS": bits, "IN_FORMAT": _FORMATS.index(dtype), "ROPE": int(rope)}
    return KernelSpec("sm80/kv_append.cu", "qoq_kv_append_sm80", tuple(defines.items()), _THREADS)


def round_trip_spec(head_dim: int, bits: int, dtype: torch.dtype) -> KernelSpec:
    """The kernel of `kv_round_trip`."""
    lanes = next(lanes for lanes in _LANES if head_dim <= lanes * _VECTOR)
    defines = {"LANES": lanes, "BITS": bits, "IN_FORMAT": _FORMATS.index(dtype)}
    return KernelSpec("sm80/kv_round_trip.cu", "qoq_kv_round_trip_sm80", tuple(defines.items()), _THREADS)


def gather_spec(head_dim: int, bits: int, dtype: torch.dtype) -> KernelSpec:
    """The kernel of `gather_kv`."""
    defines = {"HEAD_DIM": head_dim, "BITS": bits, "OUT_FORMAT": _FORMATS.index(dtype)}
    return KernelSpec("sm80/kv_gather.cu", "qoq_kv_gather_sm80", tuple(defines.items()), _THREADS)


def specs(architecture: str) -> list[KernelSpec]:  # noqa: ARG001  (every architecture gets the same)
    """All that can be asked for."""
    found = []
    for bits in KV_BITS:
        for dtype in _FORMATS:
            for head_dim in HEAD_DIMS:
                found += [append_spec(head_dim, bits, dtype, rope=rope) for rope in (False, True)]
                found.append(gather_spec(head_dim, bits, dtype))
            found += [round_trip_spec(lanes * _VECTOR, bits, dtype) for lanes in _LANES]
    return found


@torch.library.custom_op("qoq::append_kv", mutates_args=("kv_pages",), device_types="cuda")
def append_kv(key: Tensor, value: Tensor, kv_pages: Tensor, slots: Tensor, bits: int) -> None:
    """Write key and value [T, num_kv_heads, D] into kv_pages at `slots`; keys come after RoPE.

    The heads of a token are contiguous; tokens may be any multiple of 8 values apart, as in a fused buffer.
    """
    check_append(key, value, kv_pages, slots, bits)
    tokens, num_kv_heads, head_dim = key.shape
    if tokens == 0 or num_kv_heads == 0:
        return
    _launch(
        append_spec(head_dim, bits, key.dtype, rope=False),
        2 * tokens * num_kv_heads,
        head_dim,
        key,
        (
            *(None, key, value, None, None, None, slots, kv_pages, None, None, None),
            *(tokens, 0, num_kv_heads, 0, _token_stride(key), _token_stride(value), 0, kv_pages.shape[0]),
        ),
    )


@append_kv.register_fake
def _(key: Tensor, value: Tensor, kv_pages: Tensor, slots: Tensor, bits: int) -> None:  # noqa: ARG001
    return None


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate query [T, num_heads, D] and key, append key and value [T, num_kv_heads, D] to kv_pages at `slots`.

    cos, sin   float32 [max_positions, D/2]: row `position`, for dimensions d and d + D/2 (half-split RoPE). They are
               rounded to the dtype of query, and so is every step, as transformers' apply_rotary_pos_emb does
    positions  int32 [T]; one outside the tables makes the token's query and key NaN
    Returns query after RoPE, key after RoPE and the round trip, value after the round trip: contiguous, in their dtype,
    also of tokens that go nowhere.
    """
    check_append(key, value, kv_pages, slots, bits)
    _check_rope(query, key, cos, sin, positions)
    outputs = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    run_rope_append(query, key, value, cos, sin, positions, kv_pages, slots, bits, outputs)
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
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Launch `rope_append_kv` on operands that were checked, with given contiguous outputs."""
    tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    heads = tokens * (num_heads + 2 * num_kv_heads)
    if heads == 0:
        return
    _launch(
        append_spec(head_dim, bits, key.dtype, rope=True),
        heads,
        head_dim,
        key,
        (
            *(query, key, value, cos, sin, positions, slots, kv_pages, *out),
            *(tokens, num_heads, num_kv_heads, _token_stride(query), _token_stride(key), _token_stride(value)),
            *(cos.shape[0], kv_pages.shape[0]),
        ),
    )


@torch.library.custom_op("qoq::kv_round_trip", mutates_args=(), device_types="cuda")
def kv_round_trip(x: Tensor, bits: int) -> Tensor:
    """x [..., D], contiguous, as a cache of `bits` gives each head back: `formats.arithmetic.kv_round_trip`.

    D is a multiple of 8, at most 256.
    """
    check_round_trip(x, bits)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    run_round_trip(x, bits, out)
    return out


@kv_round_trip.register_fake
def _(x: Tensor, bits: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def run_round_trip(x: Tensor, bits: int, out: Tensor) -> None:
    """Launch `kv_round_trip` on an operand that was checked, with a given contiguous output."""
    head_dim = x.shape[-1]
    heads = x.numel() // head_dim
    if heads == 0:
        return
    spec = round_trip_spec(head_dim, bits, x.dtype)
    lanes = dict(spec.defines)["LANES"]
    with torch.cuda.device(x.device):
        load_kernel(spec, x.device.index).launch(
            (math.ceil(heads / (_THREADS // lanes)), 1, 1), (x, out, heads, head_dim)
        )


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


def check_append(key: Tensor, value: Tensor, kv_pages: Tensor, slots: Tensor, bits: int) -> None:
    """Raise ValueError for operands of `append_kv` that the kernel cannot take."""
    _check_heads("key", key, key.dtype, None, key.device)
    tokens, num_kv_heads, head_dim = key.shape
    check_page_shape(head_dim, bits)
    _check_heads("value", value, key.dtype, (tokens, num_kv_heads, head_dim), key.device)
    _check_pages(kv_pages, (num_kv_heads, page_bytes(head_dim, bits)), key.device)
    _check_vector("slots", slots, torch.int64, tokens, key.device)
    _check_count("tokens * heads", 2 * tokens * num_kv_heads)


def _check_rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    tokens, num_kv_heads, head_dim = key.shape
    if query.ndim != 3 or query.shape[0] != tokens or query.shape[2] != head_dim:
        raise ValueError(
            f"query: expected [T, num_heads, D] with T = {tokens} and D = {head_dim}, got {list(query.shape)}"
        )
    _check_heads("query", query, key.dtype, None, key.device)
    _check_count("tokens * heads", tokens * (query.shape[1] + 2 * num_kv_heads))
    _check_vector("positions", positions, torch.int32, tokens, key.device)
    for name, table in (("cos", cos), ("sin", sin)):
        shape = (cos.shape[0] if cos.ndim else 0, head_dim // 2)
        if table.dtype != torch.float32 or tuple(table.shape) != shape:
            raise ValueError(
                f"{name}: expected torch.float32 [max_positions, {head_dim // 2}], the same for cos and sin, "
                f"got {table.dtype} {list(table.shape)}"
            )
        _check_memory(name, table, key.device)


def round_trip_fits(head_dim: int) -> bool:
    """Whether `kv_round_trip` takes heads of this size."""
    return head_dim % _VECTOR == 0 and 0 < head_dim <= MAX_ROUND_TRIP_DIM


def check_round_trip(x: Tensor, bits: int) -> None:
    """Raise ValueError for operands of `kv_round_trip` that the kernel cannot take."""
    if bits not in KV_BITS:
        raise ValueError(f"bits is {bits}, expected 4 or 8")
    if x.dtype not in _FORMATS or x.ndim == 0:
        raise ValueError(f"x: expected torch.float16 or torch.bfloat16 [..., D], got {x.dtype} {list(x.shape)}")
    head_dim = x.shape[-1]
    if not round_trip_fits(head_dim):
        raise ValueError(f"x: D is {head_dim}, expected a multiple of {_VECTOR} up to {MAX_ROUND_TRIP_DIM}")
    _check_memory("x", x, x.device)
    _check_count("heads", x.numel() // head_dim)


def check_gather(kv_pages: Tensor, page_ids: Tensor, head_dim: int, bits: int, dtype: torch.dtype) -> None:
    """Raise ValueError for operands of `gather_kv` that the kernel cannot take."""
    check_page_shape(head_dim, bits)
    if dtype not in _FORMATS:
        raise ValueError(f"dtype: expected torch.float16 or torch.bfloat16, got {dtype}")
    num_kv_heads = kv_pages.shape[1] if kv_pages.ndim == 3 else 0
    _check_pages(kv_pages, (num_kv_heads, page_bytes(head_dim, bits)), kv_pages.device)
    if page_ids.ndim != 1:
        raise ValueError(f"page_ids: expected torch.int32 [P], got {page_ids.dtype} {list(page_ids.shape)}")
    _check_vector("page_ids", page_ids, torch.int32, page_ids.shape[0], kv_pages.device)
    _check_count("pages * heads", page_ids.shape[0] * num_kv_heads)


def _check_heads(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None, device: torch.device) -> None:
    """Heads of a token contiguous, tokens and the whole at multiples of 16 bytes; `shape` None: any of three axes."""
    if x.dtype not in _FORMATS or x.dtype != dtype or x.ndim != 3 or shape not in (None, tuple(x.shape)):
        wanted = "[T, heads, D]" if shape is None else str(list(shape))
        kind = str(dtype) if dtype in _FORMATS else "torch.float16 or torch.bfloat16"
        raise ValueError(f"{name}: expected {kind} {wanted}, got {x.dtype} {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected it on {device}, got {x.device}")
    heads, head_dim = x.shape[1:]
    stride = _token_stride(x)
    heads_lie_together = x.stride(2) == 1 and (heads <= 1 or x.stride(1) == head_dim)
    if not heads_lie_together or stride % _VECTOR or not 0 <= stride <= _MAX_STRIDE or x.data_ptr() % 16:
        raise ValueError(
            f"{name}: expected contiguous heads, and tokens that begin at multiples of 16 bytes, "
            f"got strides {list(x.stride())} (call .contiguous())"
        )


def _check_pages(kv_pages: Tensor, rest: tuple[int, int], device: torch.device) -> None:
    if kv_pages.dtype != torch.uint8 or tuple(kv_pages.shape[1:]) != rest:
        raise ValueError(
            f"kv_pages: expected torch.uint8 [num_pages, num_kv_heads, page bytes] with {list(rest)} at the end, "
            f"got {kv_pages.dtype} {list(kv_pages.shape)}"
        )
    _check_memory("kv_pages", kv_pages, device)
    _check_count("num_pages", kv_pages.shape[0])


def _check_vector(name: str, x: Tensor, dtype: torch.dtype, length: int, device: torch.device) -> None:
    if x.dtype != dtype or tuple(x.shape) != (length,):
        raise ValueError(f"{name}: expected {dtype} [{length}], got {x.dtype} {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected it on {device}, got {x.device}")
    if not x.is_contiguous():
        raise ValueError(f"{name}: expected contiguous memory, got strides {list(x.stride())} (call .contiguous())")


def _check_memory(name: str, x: Tensor, device: torch.device) -> None:
    """Contiguous, from a multiple of 16 bytes on."""
    if x.device != device:
        raise ValueError(f"{name}: expected it on {device}, got {x.device}")
    if not x.is_contiguous() or x.data_ptr() % 16:
        raise ValueError(
            f"{name}: expected contiguous memory that begins at a multiple of 16 bytes, "
            f"got strides {list(x.stride())} (call .contiguous() or .clone())"
        )


def _check_count(name: str, count: int) -> None:
    if count > _MAX_INDEX:
        raise ValueError(f"{name} is {count}, expected at most {_MAX_INDEX}: split the call")


def _token_stride(x: Tensor) -> int:
    """Values from a token to the next; a single token has none, whatever its tensor says."""
    return x.stride(0) if x.shape[0] > 1 else 0


def _gathered(kv_pages: Tensor, page_ids: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unwritten keys and values."""
    shape = (PAGE_SIZE * page_ids.shape[0], kv_pages.shape[1], head_dim)
    return kv_pages.new_empty(shape, dtype=dtype), kv_pages.new_empty(shape, dtype=dtype)


def _launch(
    spec: KernelSpec, heads: int, head_dim: int, on: Tensor, arguments: tuple[Tensor | int | None, ...]
) -> None:
    """Launch an append kernel with HEAD_DIM / 8 threads for each of `heads`, on the device of `on`."""
    blocks = math.ceil(heads / (_THREADS * _VECTOR // head_dim))
    with torch.cuda.device(on.device):
        load_kernel(spec, on.device.index).launch((blocks, 1, 1), arguments)
