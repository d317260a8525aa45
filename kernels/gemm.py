"""The GEMMs of quantized linears as custom operators, on packed weights in the checkpoint's own order.

    qoq::w4a8_gemm         y [M, N] of int8 activations and 4-bit weights, progressive or per channel
    qoq::w4a8_gemm_int32   its sums, before any scale
    qoq::w8a8_gemm         y of int8 activations and int8 weights: the baseline that W4A8 is measured against
    qoq::w8a8_gemm_int32   its sums

Weights must have been checked once (`formats.packing.unpack_linear`): a value that leaves int8 would wrap unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qoq.kernels.dispatch import GemmChoice, choose_gemm
from qoq.kernels.gemm_tiles import WORKSPACE_SUMS_PER_SM, DecodeTile, OutFormat, SplitTile, WeightFormat
from qoq.kernels.launch import architecture, load_kernel, num_sms
from qoq.kernels.workspace import StreamMemory
from qoq.recipes.schema import GROUP_SIZE

_OUT_FORMATS: dict[torch.dtype, OutFormat] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int32: "int32",
}
_MAX_K = 65536
"""255 * 127 * K stays within int32."""
_MAX_OPERAND_BYTES = 1 << 32
"""The kernel's offsets within an operand have 32 bits."""
_COUNTERS_PER_SM = 2 * 32
"""Two for each block that an SM can hold (CUDA programming guide, "Technical Specifications")."""


@torch.library.custom_op("qoq::w4a8_gemm", mutates_args=(), device_types="cuda")
def w4a8_gemm(
    act_codes: Tensor,
    act_scales: Tensor,
    act_sums: Tensor,
    qweight: Tensor,
    s1_scales: Tensor,
    s2_scales: Tensor | None,
    s2_zeros: Tensor | None,
    s1_szeros: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y [M, N] in `out_dtype` (float16 or bfloat16), as `formats.arithmetic.linear_forward` defines it.

    act_codes  int8 [M, K], K padded to a multiple of 128;  act_scales float32 [M];  act_sums int32 [M]
    qweight    int8 [N, K/2], s1_scales float16 [N], bias float16 [N] or None, packed as on disk (`formats.packing`)
    g128       s2_scales and s2_zeros int8 [K/128, N];   per channel: s1_szeros float16 [N]

    Raises ValueError when a tensor's shape, dtype, device or layout is another.
    """
    n, k = _packed_shape(act_codes, qweight)
    m, device = act_codes.shape[0], act_codes.device
    weights = _check_scales(s2_scales, s2_zeros, s1_szeros, n, k, device)
    check_tensor("act_scales", act_scales, torch.float32, (m,), device)
    check_tensor("act_sums", act_sums, torch.int32, (m,), device)
    check_tensor("s1_scales", s1_scales, torch.float16, (n,), device)
    if bias is not None:
        check_tensor("bias", bias, torch.float16, (n,), device)
    _check_out(out_dtype)
    return run_gemm(
        weights, act_codes, act_scales, act_sums, qweight, s1_scales, s2_scales, s2_zeros, s1_szeros, bias, n, out_dtype
    )


@torch.library.custom_op("qoq::w4a8_gemm_int32", mutates_args=(), device_types="cuda")
def w4a8_gemm_int32(
    act_codes: Tensor, act_sums: Tensor, qweight: Tensor, s2_scales: Tensor | None, s2_zeros: Tensor | None
) -> Tensor:
    """Sums int32 [M, N]: act_codes times level-1 weights (with s2), or times raw codes 0..15 (without)."""
    n, k = _packed_shape(act_codes, qweight)
    check_tensor("act_sums", act_sums, torch.int32, (act_codes.shape[0],), act_codes.device)
    weights: WeightFormat = "per_channel"
    if s2_scales is not None or s2_zeros is not None:
        weights = _check_scales(s2_scales, s2_zeros, None, n, k, act_codes.device)
    return run_gemm(weights, act_codes, None, act_sums, qweight, None, s2_scales, s2_zeros, None, None, n, torch.int32)


@torch.library.custom_op("qoq::w8a8_gemm", mutates_args=(), device_types="cuda")
def w8a8_gemm(
    act_codes: Tensor,
    act_scales: Tensor,
    weight: Tensor,
    s1_scales: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y [M, N] = s1_scales * act_scales * (act_codes @ weight.T) (+ bias): int8 [M, K], int8 [N, K], K % 128 == 0."""
    n = _int8_shape(act_codes, weight)
    device = act_codes.device
    check_tensor("act_scales", act_scales, torch.float32, (act_codes.shape[0],), device)
    check_tensor("s1_scales", s1_scales, torch.float16, (n,), device)
    if bias is not None:
        check_tensor("bias", bias, torch.float16, (n,), device)
    _check_out(out_dtype)
    return run_gemm("int8", act_codes, act_scales, None, weight, s1_scales, None, None, None, bias, n, out_dtype)


@torch.library.custom_op("qoq::w8a8_gemm_int32", mutates_args=(), device_types="cuda")
def w8a8_gemm_int32(act_codes: Tensor, weight: Tensor) -> Tensor:
    """Sums int32 [M, N] of int8 [M, K] and int8 [N, K], K a multiple of 128."""
    n = _int8_shape(act_codes, weight)
    return run_gemm("int8", act_codes, None, None, weight, None, None, None, None, None, n, torch.int32)


def _fake_output(act_codes: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    return act_codes.new_empty((act_codes.shape[0], weight.shape[0]), dtype=out_dtype)


w4a8_gemm.register_fake(lambda codes, _scales, _sums, qweight, *rest: _fake_output(codes, qweight, rest[-1]))
w4a8_gemm_int32.register_fake(lambda codes, _sums, qweight, *_rest: _fake_output(codes, qweight, torch.int32))
w8a8_gemm.register_fake(lambda codes, _scales, weight, *rest: _fake_output(codes, weight, rest[-1]))
w8a8_gemm_int32.register_fake(lambda codes, weight: _fake_output(codes, weight, torch.int32))


def run_gemm(
    weights: WeightFormat,
    act_codes: Tensor,
    act_scales: Tensor | None,
    act_sums: Tensor | None,
    weight: Tensor,
    s1_scales: Tensor | None,
    s2_scales: Tensor | None,
    s2_zeros: Tensor | None,
    s1_szeros: Tensor | None,
    bias: Tensor | None,
    n: int,
    out_dtype: torch.dtype,
    *,
    choice: GemmChoice | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Launch one GEMM on checked operands. `choice` and `out` are for tuning and for tests."""
    m, k = act_codes.shape
    device = act_codes.device.index
    if out is None:
        out = torch.empty((m, n), dtype=out_dtype, device=act_codes.device)
    if m == 0:
        return out
    arch = architecture(device)
    choice = choice or choose_gemm(arch, weights, m, n, k)
    launch_gemm(
        choice,
        arch,
        weights,
        (weight, act_codes, s2_scales, s2_zeros, act_scales, act_sums, s1_scales, s1_szeros, bias),
        k,
        out,
    )
    return out


def launch_gemm(
    choice: GemmChoice,
    kernels: str,
    weights: WeightFormat,
    operands: Sequence[Tensor | None],
    k: int,
    out: Tensor,
    *,
    overlapping: bool = False,
) -> None:
    """Launch `choice` of the kernels for architecture `kernels` on operands in the order of their parameters."""
    (m, n), device = out.shape, out.device.index
    kernel = load_kernel(choice.tile.spec(kernels, weights, output_format(out.dtype)), device)
    with torch.cuda.device(device):
        if isinstance(choice.tile, DecodeTile | SplitTile):
            grid = (choice.tile.cluster * -(-n // choice.tile.block_n), -(-m // choice.tile.block_m), 1)
            kernel.launch(grid, (*operands, out, m, n, k), overlapping=overlapping)
            return
        share = choice.share(kernels, weights, m, n, k, num_sms(device))
        counters, sums = workspace(device)
        kernel.launch(
            (share.blocks, 1, 1),
            (*operands, out, sums, counters, m, n, k, share.whole, share.units_each, share.longer),
            overlapping=overlapping,
        )


def workspace(device: int) -> tuple[Tensor, Tensor]:
    """Counters and sums of tiles that blocks share, zero between launches; `device` is the current one."""
    return _workspaces.of(device)


def _make_workspace(device: int) -> tuple[Tensor, Tensor]:
    sizes = [num_sms(device) * each for each in (_COUNTERS_PER_SM, WORKSPACE_SUMS_PER_SM)]
    counters, sums = torch.zeros(sum(sizes), dtype=torch.int32, device=f"cuda:{device}").split(sizes)
    return counters, sums


_workspaces = StreamMemory(_make_workspace)


def _packed_shape(act_codes: Tensor, qweight: Tensor) -> tuple[int, int]:
    n = _check_matrices(act_codes, "qweight", qweight, codes_per_byte=2)
    return n, act_codes.shape[1]


def _int8_shape(act_codes: Tensor, weight: Tensor) -> int:
    return _check_matrices(act_codes, "weight", weight, codes_per_byte=1)


def _check_matrices(act_codes: Tensor, name: str, weight: Tensor, *, codes_per_byte: int) -> int:
    """The N of a product. Raises ValueError for operands that do not fit each other or the kernels."""
    for what, tensor in (("act_codes", act_codes), (name, weight)):
        if tensor.ndim != 2:
            raise ValueError(f"{what}: expected two axes, got {list(tensor.shape)}")
    n, k = weight.shape[0], codes_per_byte * weight.shape[1]
    device = act_codes.device
    check_tensor("act_codes", act_codes, torch.int8, (act_codes.shape[0], k), device)
    check_tensor(name, weight, torch.int8, tuple(weight.shape), device)
    if n % 32 or n == 0:
        raise ValueError(f"{name}: N is {n}, expected a multiple of 32")
    if k % GROUP_SIZE or not 0 < k <= _MAX_K:
        raise ValueError(f"act_codes: K is {k}, expected a multiple of {GROUP_SIZE} up to {_MAX_K} (pad with zeros)")
    if max(act_codes.numel(), weight.numel()) >= _MAX_OPERAND_BYTES:
        raise ValueError(f"act_codes and {name} must be below 4 GiB each: split M or N")
    return n


def _check_scales(
    s2_scales: Tensor | None,
    s2_zeros: Tensor | None,
    s1_szeros: Tensor | None,
    n: int,
    k: int,
    device: torch.device,
) -> WeightFormat:
    if s2_scales is not None and s2_zeros is not None and s1_szeros is None:
        check_tensor("s2_scales", s2_scales, torch.int8, (k // GROUP_SIZE, n), device)
        check_tensor("s2_zeros", s2_zeros, torch.int8, (k // GROUP_SIZE, n), device)
        return "g128"
    if s2_scales is None and s2_zeros is None and s1_szeros is not None:
        check_tensor("s1_szeros", s1_szeros, torch.float16, (n,), device)
        return "per_channel"
    raise ValueError("expected s2_scales and s2_zeros (g128), or s1_szeros alone (per channel)")


def output_format(dtype: torch.dtype) -> OutFormat:
    """The kernels' name for an output of `dtype`. Raises ValueError for any but float16, bfloat16 and int32."""
    if dtype not in _OUT_FORMATS:
        raise ValueError(f"out_dtype is {dtype}, expected one of {', '.join(map(str, _OUT_FORMATS))}")
    return _OUT_FORMATS[dtype]


def _check_out(out_dtype: torch.dtype) -> None:
    if out_dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"out_dtype is {out_dtype}, expected torch.float16 or torch.bfloat16")


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise ValueError, naming the tensor, unless it is contiguous, aligned and as said."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected it on {device}, got {tensor.device}")
    if not tensor.is_contiguous() or tensor.data_ptr() % 16:
        raise ValueError(f"{name}: expected a contiguous tensor that begins at a multiple of 16 bytes")
