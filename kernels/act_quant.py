"""Per-token int8 activations as custom operators, plain and fused with what makes the values.

    qoq::quantize_activation     of x: the input of o_proj
    qoq::silu_mul_quantize       of silu(gate) * up: the input of down_proj
    qoq::rms_norm_quantize       of RMSNorm(x): the input of a block's first linears
    qoq::add_rms_norm_quantize   the same after a residual is added, and the sum for the next residual

Each returns act_codes int8 [M, K_pad] (K padded with zeros to a multiple of 128), act_scales float32 [M] and act_sums
int32 [M], bit for bit what `formats.arithmetic.quantize_activation` gives on the CPU for the values quantized. With
`tiled` the same codes come in the order that Hopper's products read (`qoq.kernels.tiles`), those of tokens that fill
the last eight unwritten. A NaN or an infinity among the values makes the token's scale NaN or infinite, with codes 0,
so that every output of the token is NaN.

The values are rounded to x's dtype at each step, as transformers' modules round: silu(gate) before the product,
x / sqrt(mean(x^2) + eps) before the weight, the residual sum before its norm. Sums of squares are float32 in an order
that depends on K alone: a token's result depends neither on M nor on the run, nor on how threads share its row. That
order is not PyTorch's, nor are the approximations of exp and 1 / sqrt: now and then a normalized value, or a silu,
differs from PyTorch's in its last place.

From Hopper on, launches overlap: a kernel starts while the one before ends, and waits for it before it reads or writes
anything of its operands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qoq.formats.packing import padded_in_features
from qoq.kernels.compiler import KernelSpec
from qoq.kernels.launch import is_hopper, load_kernel, may_overlap
from qoq.kernels.tiles import activation_tiles_shape

MAX_K = 53248
"""The longest row: beyond, it would not fit the registers of a block."""
MAX_NORM_K = 16384
"""The same with RMSNorm, whose weights take registers too."""
OPERATIONS = ("plain", "silu_mul", "rms_norm", "add_rms_norm")
"""By the number that the kernel's OPERATION has."""

_IN_FORMATS = (torch.float16, torch.bfloat16)
_VECTOR = 8
_ROWS_A_BLOCK = 4
_MAX_STRIDE = 2**31 - 1
_VECTORS = ((2048, 2), (4096, 4), (6656, 8))
"""Rows of up to so many vectors of 8 values take a block whose threads hold so many each, in registers."""
_FEW_ROWS_VECTORS = ((512, 1), *_VECTORS)
"""The same on Hopper for few rows: whose time is that of one thread, not of the memory."""
_MANY_ROWS_VECTORS = ((2048, 4), (6656, 8))
_MANY_ROWS_NORM_VECTORS = ((2048, 4),)
"""The same on Hopper for many rows: more bytes asked for at once take more of the memory's bandwidth."""
_WARP_VECTORS = ((32, 1), (128, 4))
"""Shorter rows take one warp, several rows a block."""
_SPLITS = ((4, 2048, 8, 1), (32, 2048, 4, 2))
"""On Hopper, rows longer than _SPLIT_FROM vectors: up to so many rows of up to so many vectors take so many blocks of a
cluster each, whose threads hold so many vectors: one multiprocessor would take too long."""
_SPLIT_FROM = 1024
_FEW_ROWS = 383
_TURNS = ((8192, 8192, 4), (1024, MAX_K, 2))
"""From so many rows on of up to so many values, a block does so many one after the other and then writes tiles of them.
"""
_BOARD_BYTES = 3 * (64 * 4 + 16)
"""What the warps of a row tell each other (`BoardMemory` of the kernel)."""
_STAGED_BYTES = 114688
"""That so many codes of a block may take: two blocks share a multiprocessor."""

Quantized = tuple[Tensor, Tensor, Tensor]
"""act_codes, act_scales, act_sums."""


@dataclass(frozen=True)
class RowShape:
    """How threads share rows: `vectors` of 8 values a thread, `warps` a row in each of `blocks`; a block does `rows` at
    once or `turns` one after the other."""

    vectors: int
    warps: int
    rows: int = 1
    blocks: int = 1
    turns: int = 1

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps * self.rows

    def grid(self, m: int) -> int:
        """Blocks for M rows."""
        return math.ceil(m / (self.rows * self.turns)) * self.blocks


@cache
def row_shape(operation: str, k: int, *, rows: int, tiled: bool, hopper: bool) -> RowShape:
    """The shape for so many rows of K values. Results do not depend on it."""
    k_pad = padded_in_features(k)
    vectors_of_row = k_pad // _VECTOR
    for limit, vectors in _WARP_VECTORS:
        if vectors_of_row <= limit:
            return RowShape(vectors, warps=1, rows=_ROWS_A_BLOCK)

    def of(vectors: int, blocks: int = 1, turns: int = 1) -> RowShape:
        return RowShape(vectors, math.ceil(vectors_of_row / (32 * vectors * blocks)), blocks=blocks, turns=turns)

    def fitting(table: tuple[tuple[int, int], ...]) -> int:
        return next(vectors for limit, vectors in table if vectors_of_row <= limit)

    if not hopper:
        return of(fitting(_VECTORS))
    is_norm = operation.endswith("rms_norm")
    if not is_norm and vectors_of_row > _SPLIT_FROM:
        for most_rows, longest, blocks, vectors in _SPLITS:
            if rows <= most_rows and vectors_of_row <= longest:
                return of(vectors, blocks)
    if rows <= _FEW_ROWS:
        return of(fitting(_FEW_ROWS_VECTORS))
    turns = next(
        (
            turns
            for least, longest, turns in _TURNS
            if tiled and rows >= least and k <= longest and turns * k_pad <= _STAGED_BYTES
        ),
        1,
    )
    return of(fitting(_MANY_ROWS_NORM_VECTORS if is_norm else _MANY_ROWS_VECTORS), turns=turns)


def spec(
    operation: str,
    dtype: torch.dtype,
    shape: RowShape,
    k: int,
    *,
    store_values: bool = False,
    tiled: bool = False,
) -> KernelSpec:
    """The instantiation for inputs of `dtype`; with `store_values`, for tests, it also writes what it quantizes."""
    defines = {
        "OPERATION": OPERATIONS.index(operation),
        "IN_FORMAT": _IN_FORMATS.index(dtype),
        "VECTORS": shape.vectors,
        "WARP_ROWS": int(shape.rows > 1),
        "SPLIT": shape.blocks,
        "TURNS": shape.turns,
        "STORE_VALUES": int(store_values),
        "TILED": int(tiled),
    }
    shared = 0 if shape.rows > 1 else _BOARD_BYTES
    if shape.turns > 1:
        shared += shape.turns * padded_in_features(k)
    return KernelSpec("sm80/act_quant.cu", "qoq_act_quant_sm80", tuple(defines.items()), shape.threads, shared)


def specs(architecture: str) -> list[KernelSpec]:
    """All that can be asked for, each with its largest block: a smaller one is a launch of the same compiled kernel."""
    hopper = architecture == "sm_90"
    limits = {limit for table in (_WARP_VECTORS, _FEW_ROWS_VECTORS, _MANY_ROWS_VECTORS) for limit, _ in table}
    limits |= {limit for _, limit, _, _ in _SPLITS} | {
        min(_STAGED_BYTES // turns, longest) // _VECTOR for _, longest, turns in _TURNS
    }
    numbers = [1, _FEW_ROWS + 1, *(most + n for most, *_ in _SPLITS for n in (0, 1)), *(least for least, *_ in _TURNS)]
    largest: dict[tuple[tuple[str, int], ...], KernelSpec] = {}
    for operation in OPERATIONS:
        for dtype in _IN_FORMATS:
            for tiled in (False, True) if hopper else (False,):
                for k in sorted(_VECTOR * limit for limit in limits if _VECTOR * limit <= max_k(operation)):
                    for rows in numbers:
                        shape = row_shape(operation, k, rows=rows, tiled=tiled, hopper=hopper)
                        found = spec(operation, dtype, shape, k, tiled=tiled)
                        if found.defines not in largest or largest[found.defines].threads < found.threads:
                            largest[found.defines] = found
    return list(largest.values())


def max_k(operation: str) -> int:
    """The longest row of `operation`."""
    return MAX_NORM_K if operation.endswith("rms_norm") else MAX_K


@torch.library.custom_op("qoq::quantize_activation", mutates_args=(), device_types="cuda")
def quantize_activation(x: Tensor, tiled: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and sums of x [M, K], float16 or bfloat16, K a multiple of 8."""
    return run_quantizer("plain", x, tiled=tiled)[:3]


@torch.library.custom_op("qoq::silu_mul_quantize", mutates_args=(), device_types="cuda")
def silu_mul_quantize(gate_up: Tensor, tiled: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and sums of silu(gate) * up; gate_up [M, 2 K] holds gate in its first K columns, up in its last."""
    return run_quantizer("silu_mul", gate_up, tiled=tiled)[:3]


@torch.library.custom_op("qoq::rms_norm_quantize", mutates_args=(), device_types="cuda")
def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, tiled: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and sums of RMSNorm(x) [M, K], with weight [K] in x's dtype."""
    return run_quantizer("rms_norm", x, weight=weight, eps=eps, tiled=tiled)[:3]


@torch.library.custom_op("qoq::add_rms_norm_quantize", mutates_args=(), device_types="cuda")
def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, tiled: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales and sums of RMSNorm(x + residual), and the sum itself [M, K] in x's dtype."""
    codes, scales, sums, added = run_quantizer(
        "add_rms_norm", x, residual=residual, weight=weight, eps=eps, tiled=tiled
    )
    if added is None:
        raise RuntimeError("add_rms_norm makes a sum")
    return codes, scales, sums, added


@quantize_activation.register_fake
def _(x: Tensor, tiled: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, x.shape[1], tiled=tiled)


@silu_mul_quantize.register_fake
def _(gate_up: Tensor, tiled: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(gate_up, gate_up.shape[1] // 2, tiled=tiled)


@rms_norm_quantize.register_fake
def _(x: Tensor, weight: Tensor, eps: float, tiled: bool = False) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    return _outputs(x, x.shape[1], tiled=tiled)


@add_rms_norm_quantize.register_fake
def _(
    x: Tensor,
    residual: Tensor,  # noqa: ARG001
    weight: Tensor,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    tiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*_outputs(x, x.shape[1], tiled=tiled), x.new_empty(x.shape[0], x.shape[1]))


def run_quantizer(
    operation: str,
    x: Tensor,
    *,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 0.0,
    values: Tensor | None = None,
    out: Quantized | None = None,
    tiled: bool = False,
    shape: RowShape | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Check the operands and launch one of OPERATIONS. The fourth result is the sum with the residual, if there is one.

    values  for tests: [M, K] in x's dtype, receives what is quantized
    out     for tests: where to write, else new tensors
    tiled   codes in the order of Hopper's products; those of tokens that fill the last eight are not written
    shape   for tests: how threads share rows
    Raises ValueError, before any launch, for operands that the kernel cannot take.
    """
    k = check_operands(operation, x, residual=residual, weight=weight, eps=eps)
    m, device = x.shape[0], x.device.index
    codes, scales, sums = _outputs(x, k, tiled=tiled) if out is None else out
    added = None if residual is None else x.new_empty(m, k)
    if m == 0:
        return codes, scales, sums, added
    shape = shape or row_shape(operation, k, rows=m, tiled=tiled, hopper=is_hopper(device))
    kernel = load_kernel(spec(operation, x.dtype, shape, k, store_values=values is not None, tiled=tiled), device)
    with torch.cuda.device(device):
        kernel.launch(
            (shape.grid(m), 1, 1),
            (
                x,
                residual,
                weight,
                codes,
                scales,
                sums,
                added,
                values,
                m,
                k,
                padded_in_features(k),
                _row_stride(x),
                0 if residual is None else _row_stride(residual),
                float(eps),
            ),
            overlapping=may_overlap(device),
        )
    return codes, scales, sums, added


def check_operands(
    operation: str,
    x: Tensor,
    *,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 0.0,
) -> int:
    """The K of `operation` on x. Raises ValueError for operands that the kernel cannot take."""
    name, form, parts = ("gate_up", "[M, 2 K]", 2) if operation == "silu_mul" else ("x", "[M, K]", 1)
    if x.dtype not in _IN_FORMATS or x.ndim != len(("M", "K")) or x.shape[1] % parts:
        expected = f"torch.float16 or torch.bfloat16 {form}"
        raise ValueError(f"{name}: expected {expected}, got {x.dtype} {list(x.shape)}")
    k = x.shape[1] // parts
    if k % _VECTOR or not 0 < k <= max_k(operation):
        raise ValueError(f"{name}: K is {k}, expected a multiple of {_VECTOR} from {_VECTOR} to {max_k(operation)}")
    _check_rows(name, x, x.dtype, x.device, tuple(x.shape))
    if residual is not None:
        _check_rows("residual", residual, x.dtype, x.device, (x.shape[0], k))
    if weight is not None:
        _check_rows("weight", weight, x.dtype, x.device, (k,))
        if not (math.isfinite(eps) and eps >= 0):
            raise ValueError(f"eps: expected a number from 0 on, got {eps}")
    return k


def _check_rows(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...]) -> None:
    """The last axis is contiguous, and every row begins at a multiple of 16 bytes."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected it on {device}, got {tensor.device}")
    stride = _row_stride(tensor)
    if tensor.stride(-1) != 1 or stride % _VECTOR or stride > _MAX_STRIDE or tensor.data_ptr() % 16:
        raise ValueError(
            f"{name}: expected contiguous rows that begin at multiples of 16 bytes, "
            f"got strides {list(tensor.stride())} (call .contiguous())"
        )


def _row_stride(tensor: Tensor) -> int:
    """Values from a row to the next; a single row has none, whatever its tensor says."""
    return tensor.stride(0) if tensor.ndim > 1 and tensor.shape[0] > 1 else 0


def _outputs(x: Tensor, k: int, *, tiled: bool = False) -> Quantized:
    """Unwritten act_codes, act_scales and act_sums for the rows of x."""
    m, k_pad = x.shape[0], padded_in_features(k)
    return (
        x.new_empty(activation_tiles_shape(m, k_pad) if tiled else (m, k_pad), dtype=torch.int8),
        x.new_empty((m,), dtype=torch.float32),
        x.new_empty((m,), dtype=torch.int32),
    )
