"""Where each byte of a packed linear goes: the order that omniserve's and SGLang's W4A8 kernels read.

A packed linear is a dict of tensors named as on disk:
    qweight    int8 [N, K/2]      32 x 32 tiles; the low nibble holds rows 0-15 of a tile, the high nibble rows 16-31
    s1_scales  float16 [N]
    s2_scales  int8 [K/128, N]    progressive only; channels of each 32 in the order 0, 8, 16, 24, 1, 9, ...
    s2_zeros   int8 [K/128, N]    progressive only; minus the level-1 offset, mod 256, in the order of s2_scales
    s1_szeros  float16 [N]        per channel only; plus zero * s1, which the kernel subtracts
    bias       float16 [N]        if any
N is a multiple of 32, K (padded) of 128.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qoq.formats.quantized_linear import CODE_MAX, S2_MAX, QuantizedLinear, S2Offsets, ZeroPoints
from qoq.recipes.schema import GROUP_SIZE, ZeroDomain

TILE = 32
PACKED_PARTS = ("qweight", "s1_scales", "s1_szeros", "s2_scales", "s2_zeros", "bias")
"""Every name a packed tensor can have; `packed_shapes` says which a linear has."""
CHANNEL_AXIS = {"qweight": 0, "s1_scales": 0, "s1_szeros": 0, "s2_scales": 1, "s2_zeros": 1, "bias": 0}
"""Along which axis of each packed tensor the output channels lie; those of each 32 are mixed, so cut between them."""


def padded_in_features(in_features: int) -> int:
    """in_features rounded up to a multiple of 128, as stored in both modes."""
    return -(-in_features // GROUP_SIZE) * GROUP_SIZE


def packed_shapes(
    out_features: int, in_features: int, *, progressive: bool, has_bias: bool
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of the tensors that `pack_linear` returns, in the order they are written."""
    n, k = out_features, padded_in_features(in_features)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "qweight": (torch.int8, (n, k // 2)),
        "s1_scales": (torch.float16, (n,)),
    }
    if progressive:
        shapes["s2_scales"] = (torch.int8, (k // GROUP_SIZE, n))
        shapes["s2_zeros"] = (torch.int8, (k // GROUP_SIZE, n))
    else:
        shapes["s1_szeros"] = (torch.float16, (n,))
    if has_bias:
        shapes["bias"] = (torch.float16, (n,))
    return shapes


def pack_qweight(codes: Tensor) -> Tensor:
    """Pack uint4 codes uint8 [N, K] into qweight int8 [N, K/2]. Row p of the result is not channel p.

    Channel n = 32 nt + 16 h + 8 b + r and input k = 32 kt + 16 c + 4 l + i land in byte
    512 (nt K/32 + kt) + 64 r + 16 l + 8 c + 4 b + i, in the low nibble for h = 0 and the high one for h = 1.
    Raises ValueError unless N and K are multiples of 32.
    """
    n, k = codes.shape
    if n % TILE or k % TILE:
        raise ValueError(f"codes are [{n}, {k}]; both must be multiples of {TILE}")
    #                    nt          h  b  r  kt         c  l  i
    parts = codes.view(n // TILE, 2, 2, 8, k // TILE, 2, 4, 4)
    tiles = parts.permute(0, 4, 3, 6, 5, 2, 7, 1)  # nt kt r l c b i h
    packed = tiles[..., 0] | (tiles[..., 1] << 4)
    return packed.reshape(n, k // 2).view(torch.int8)


def unpack_qweight(qweight: Tensor) -> Tensor:
    """Inverse of `pack_qweight`: int8 [N, K/2] to uint8 codes [N, K]."""
    n, half_k = qweight.shape
    k = half_k * 2
    if n % TILE or k % TILE:
        raise ValueError(f"qweight is [{n}, {half_k}]; N must be a multiple of {TILE} and K/2 of {TILE // 2}")
    packed = qweight.contiguous().view(torch.uint8).view(n // TILE, k // TILE, 8, 4, 2, 2, 4)  # nt kt r l c b i
    tiles = torch.stack((packed & 15, packed >> 4), dim=-1)  # .. h
    return tiles.permute(0, 7, 5, 2, 1, 4, 3, 6).reshape(n, k).contiguous()


def pack_s2(values: Tensor) -> Tensor:
    """Reorder level-2 scales or zeros [N, G] of one byte each into [G, N] int8: lane r reads r, r+8, r+16, r+24."""
    n, groups = values.shape
    lanes = values.view(torch.int8).view(n // TILE, 4, 8, groups)  # channel = 32 nt + 8 j + r
    return lanes.permute(3, 0, 2, 1).reshape(groups, n).contiguous()


def unpack_s2(packed: Tensor) -> Tensor:
    """Inverse of `pack_s2`: int8 [G, N] to uint8 [N, G]."""
    groups, n = packed.shape
    lanes = packed.contiguous().view(torch.uint8).view(groups, n // TILE, 8, 4)
    return lanes.permute(1, 3, 2, 0).reshape(n, groups).contiguous()


def pack_linear(linear: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of one linear as they are on disk (see the module's head)."""
    tensors = {"qweight": pack_qweight(linear.codes), "s1_scales": linear.s1_scales.contiguous()}
    if linear.s2_scales is not None:
        zeros = linear.zeros.values
        offsets = zeros * linear.s2_scales if isinstance(linear.zeros, ZeroPoints) else zeros  # uint8: at most 240
        tensors["s2_scales"] = pack_s2(linear.s2_scales)
        tensors["s2_zeros"] = pack_s2(-offsets)  # uint8 negation is the wrap mod 256 that the kernel's byte add undoes
    else:
        tensors["s1_szeros"] = linear.s1_szeros()
    if linear.bias is not None:
        tensors["bias"] = linear.bias.contiguous()
    return tensors


def unpack_linear(tensors: Mapping[str, Tensor], *, in_features: int, zero_domain: ZeroDomain) -> QuantizedLinear:
    """Rebuild a linear from its packed tensors.

    Raises ValueError when anything is outside what is legal on disk: dtypes and shapes as in `packed_shapes`, s2 in
    1..16, offset in 0..240, every reconstructed level-1 weight within int8, pre-scale zeros on the code grid.
    """
    _check_shapes(tensors, in_features)
    codes = unpack_qweight(tensors["qweight"])
    s1_scales = tensors["s1_scales"]
    zeros: ZeroPoints | S2Offsets
    if "s2_scales" in tensors:
        s2_scales = unpack_s2(tensors["s2_scales"])
        if not 1 <= int(s2_scales.min()) <= int(s2_scales.max()) <= S2_MAX:
            raise ValueError(f"s2_scales: values {int(s2_scales.min())}..{int(s2_scales.max())}, expected 1..{S2_MAX}")
        offsets = -unpack_s2(tensors["s2_zeros"])
        zeros = S2Offsets(offsets) if zero_domain == "post_scale" else ZeroPoints(_divide_exactly(offsets, s2_scales))
        return QuantizedLinear(codes, s1_scales, s2_scales, zeros, tensors.get("bias"), in_features)
    if zero_domain != "pre_scale":
        raise ValueError("per-channel weights are read with pre-scale zeros only")
    points = torch.round(tensors["s1_szeros"].float() / s1_scales.float())
    if not bool(((points >= 0) & (points <= CODE_MAX)).all()):  # false for NaN too
        raise ValueError(f"s1_szeros: not within 0..{CODE_MAX} times s1_scales")
    zeros = ZeroPoints(points.to(torch.uint8).unsqueeze(1))
    linear = QuantizedLinear(codes, s1_scales, None, zeros, tensors.get("bias"), in_features)
    if not torch.equal(linear.s1_szeros(), tensors["s1_szeros"]):
        raise ValueError("s1_szeros: not a whole zero point times s1_scales (post-scale zeros?)")
    return linear


def shard_rows(part: str, tensor: Tensor, start: int, stop: int) -> Tensor:
    """Output channels start..stop-1 of the packed tensor named `part`, a view: what packing those channels gives.

    Raises ValueError unless both are multiples of 32 within the tensor.
    """
    axis = CHANNEL_AXIS[part]
    _check_cut(f"{part}: channels", start, stop, tensor.shape[axis], TILE)
    return tensor.narrow(axis, start, stop - start)


def shard_columns(part: str, tensor: Tensor, start: int, stop: int) -> Tensor:
    """Inputs start..stop-1 of the packed tensor named `part`: what packing those inputs gives.

    A row of qweight holds pieces of 32 channels, so it is cut by tiles, not by columns. Tensors of one value a channel
    come back as they are. Raises ValueError unless both are multiples of 128 within the tensor.
    """
    if part in ("s2_scales", "s2_zeros"):
        _check_cut(f"{part}: inputs", start, stop, tensor.shape[0] * GROUP_SIZE, GROUP_SIZE)
        return tensor[start // GROUP_SIZE : stop // GROUP_SIZE]
    if part != "qweight":
        return tensor
    n, half_k = tensor.shape
    _check_cut(f"{part}: inputs", start, stop, half_k * 2, GROUP_SIZE)
    tiles = tensor.reshape(n // TILE, half_k * 2 // TILE, TILE * TILE // 2)
    return tiles[:, start // TILE : stop // TILE].reshape(n, (stop - start) // 2)


def _check_cut(what: str, start: int, stop: int, size: int, step: int) -> None:
    if start % step or stop % step or not 0 <= start < stop <= size:
        raise ValueError(f"{what} {start}..{stop} of {size} cannot be cut out, expected multiples of {step}")


def _check_shapes(tensors: Mapping[str, Tensor], in_features: int) -> None:
    if "qweight" not in tensors or tensors["qweight"].ndim != 2:
        raise ValueError("qweight: expected torch.int8 [N, K/2], got " + _describe(tensors.get("qweight")))
    expected = packed_shapes(
        int(tensors["qweight"].shape[0]),
        in_features,
        progressive="s2_scales" in tensors,
        has_bias="bias" in tensors,
    )
    for name, (dtype, shape) in expected.items():
        found = tensors.get(name)
        if found is None or found.dtype != dtype or tuple(found.shape) != shape:
            raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {_describe(found)}")


def _describe(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _divide_exactly(offsets: Tensor, s2_scales: Tensor) -> Tensor:
    points = offsets // s2_scales
    wrong = (points * s2_scales != offsets) | (points > CODE_MAX)
    if bool(wrong.any()):
        row, group = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"s2_zeros: channel {row}, group {group} holds offset {int(offsets[row, group])}, which is no code 0..15 "
            f"times s2 = {int(s2_scales[row, group])}; expected pre-scale zeros"
        )
    return points
