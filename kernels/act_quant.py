"""Per-token int8 activations as custom operators, plain and fused with what makes the values.

    qoq::quantize_activation     of x: the input of o_proj
    qoq::silu_mul_quantize       of silu(gate) * up: the input of down_proj
    qoq::rms_norm_quantize       of RMSNorm(x): the input of a block's first linears
    qoq::add_rms_norm_quantize   the same after a residual is added, and the sum for the next residual
    qoq::quantize_activation_tiled   of x, codes in the order of Hopper's products (`qoq.kernels.tiles`)

Each of the others returns act_codes int8 [M, K_pad] (K padded with zeros to a multiple of 128), act_scales float32 [M]
and act_sums int32 [M], bit for bit what `formats.arithmetic.quantize_activation` gives on the CPU for the values
quantized. A NaN or an infinity among them makes the token's scale NaN or infinite, with codes 0, so that every output
of the token is NaN.

The values are rounded to x's dtype at each step, as transformers' modules round: silu(gate) before the product,
x / sqrt(mean(x^2) + eps) before the weight, the residual sum before its norm. Sums of squares are float32 in an order
that depends on K alone: a token's result depends neither on M nor on the run. That order is not PyTorch's, nor is the
approximation of exp: now and then a normalized value, or a silu, differs from PyTorch's in its last place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qoq.formats.packing import padded_in_features
from qoq.kernels.compiler import KernelSpec
from qoq.kernels.launch import load_kernel
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
_WARP_VECTORS = ((32, 1), (128, 4))
"""Shorter rows take one warp, several rows a block."""

Quantized = tuple[Tensor, Tensor, Tensor]
"""act_codes, act_scales, act_sums."""


@dataclass(frozen=True)
class RowShape:
    """How the threads of a block share rows: `vectors` of 8 values a thread, `rows` a block, `warps` a row."""

    vectors: int
    warps: int
    rows: int

    @property
    def threads(self) -> int:
        return 32 * self.warps * self.rows


@cache
def row_shape(k: int) -> RowShape:
    """The shape for rows of K values. It depends on K alone, and so does the order of sums."""
    vectors_of_row = padded_in_features(k) // _VECTOR
    for limit, vectors in _WARP_VECTORS:
        if vectors_of_row <= limit:
            return RowShape(vectors, warps=1, rows=_ROWS_A_BLOCK)
    vectors = next(vectors for limit, vectors in _VECTORS if vectors_of_row <= limit)
    return RowShape(vectors, warps=math.ceil(vectors_of_row / (32 * vectors)), rows=1)


def spec(
    operation: str, dtype: torch.dtype, shape: RowShape, *, store_values: bool = False, tiled: bool = False
) -> KernelSpec:
    """The instantiation for inputs of `dtype`; with `store_values`, for tests, it also writes what it quantizes."""
    defines = {
        "OPERATION": OPERATIONS.index(operation),
        "IN_FORMAT": _IN_FORMATS.index(dtype),
        "VECTORS": shape.vectors,
        "WARP_ROWS": int(shape.rows > 1),
        "STORE_VALUES": int(store_values),
        "TILED": int(tiled),
    }
    return KernelSpec("sm80/act_quant.cu", "qoq_act_quant_sm80", tuple(defines.items()), shape.threads)


def specs(architecture: str) -> list[KernelSpec]:
    """All that can be asked for, each with its largest block: a smaller one is a launch of the same compiled kernel."""
    largest = [row_shape(_VECTOR * limit) for limit, _ in _WARP_VECTORS + _VECTORS]
    orders = [(operation, False) for operation in OPERATIONS]
    if architecture == "sm_90":
        orders.append(("plain", True))
    return [
        spec(operation, dtype, shape, tiled=tiled)
        for operation, tiled in orders
        for dtype in _IN_FORMATS
        for shape in largest
        if 32 * _VECTOR * shape.vectors * shape.warps <= max_k(operation)
    ]


def max_k(operation: str) -> int:
    """The longest row of `operation`."""
    return MAX_NORM_K if operation.endswith("rms_norm") else MAX_K


@torch.library.custom_op("qoq::quantize_activation", mutates_args=(), device_types="cuda")
def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and sums of x [M, K], float16 or bfloat16, K a multiple of 8."""
    return run_quantizer("plain", x)[:3]


@torch.library.custom_op("qoq::quantize_activation_tiled", mutates_args=(), device_types="cuda")
def quantize_activation_tiled(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 as `tiles.tile_activations` has them, scales and sums of x [M, K], as `quantize_activation`."""
    return run_quantizer("plain", x, tiled=True)[:3]


@torch.library.custom_op("qoq::silu_mul_quantize", mutates_args=(), device_types="cuda")
def silu_mul_quantize(gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and sums of silu(gate) * up; gate_up [M, 2 K] holds gate in its first K columns, up in its last."""
    return run_quantizer("silu_mul", gate_up)[:3]


@torch.library.custom_op("qoq::rms_norm_quantize", mutates_args=(), device_types="cuda")
def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and sums of RMSNorm(x) [M, K], with weight [K] in x's dtype."""
    return run_quantizer("rms_norm", x, weight=weight, eps=eps)[:3]


@torch.library.custom_op("qoq::add_rms_norm_quantize", mutates_args=(), device_types="cuda")
def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales and sums of RMSNorm(x + residual), and the sum itself [M, K] in x's dtype."""
    codes, scales, sums, added = run_quantizer("add_rms_norm", x, residual=residual, weight=weight, eps=eps)
    if added is None:
        raise RuntimeError("add_rms_norm makes a sum")
    return codes, scales, sums, added


@quantize_activation.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, x.shape[1])


@quantize_activation_tiled.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, x.shape[1], tiled=True)


@silu_mul_quantize.register_fake
def _(gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(gate_up, gate_up.shape[1] // 2)


@rms_norm_quantize.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    return _outputs(x, x.shape[1])


@add_rms_norm_quantize.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: ARG001
    return (*_outputs(x, x.shape[1]), x.new_empty(x.shape[0], x.shape[1]))


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Check the operands and launch one of OPERATIONS. The fourth result is the sum with the residual, if there is one.

    values  for tests: [M, K] in x's dtype, receives what is quantized
    out     for tests: where to write, else new tensors
    tiled   codes in the order of Hopper's products; those of tokens that fill the last eight are not written
    Raises ValueError, before any launch, for operands that the kernel cannot take.
    """
    k = check_operands(operation, x, residual=residual, weight=weight, eps=eps)
    m, device = x.shape[0], x.device.index
    codes, scales, sums = _outputs(x, k, tiled=tiled) if out is None else out
    added = None if residual is None else x.new_empty(m, k)
    if m == 0:
        return codes, scales, sums, added
    shape = row_shape(k)
    kernel = load_kernel(spec(operation, x.dtype, shape, store_values=values is not None, tiled=tiled), device)
    with torch.cuda.device(device):
        kernel.launch(
            (math.ceil(m / shape.rows), 1, 1),
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
