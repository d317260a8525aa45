"""A quantized linear as a torch module: it holds the checkpoint's packed tensors and computes as the kernels do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from qoq.formats.arithmetic import IntegerWeight, linear_forward
from qoq.formats.packing import ZeroDomain, packed_shapes, unpack_linear
from qoq.formats.quantized_linear import QuantizedLinear
from qoq.recipes.errors import InputError


class QoQLinear(nn.Module):
    """y [..., N] = x [..., K] times packed uint4 weights, in x's dtype.

    The packed tensors are buffers named, shaped and typed as on disk (`qoq.formats.packing`); `bias` is None when there
    is none. Casts of the module (`.to(dtype)`, `.half()`, `.float()`, `.bfloat16()`) leave them alone, since a rounded
    scale is another weight; moves to a device move them. They start as zeros, which are refused when decoded: a module
    that was never loaded does not compute.

    The first forward decodes them into int8 [N, K], checks them, and keeps the result outside the state dict until the
    module is moved or loaded again.
    """

    qweight: Tensor
    s1_scales: Tensor
    s2_scales: Tensor
    s2_zeros: Tensor
    s1_szeros: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        progressive: bool,
        has_bias: bool,
        zero_domain: ZeroDomain = "pre_scale",
        act_bits: int = 8,
        name: str = "",
        device: torch.device | str | None = None,
    ) -> None:
        """An empty module; `in_features` is the true K, and `name` is what errors call it.

        Raises InputError when out_features is no multiple of 32, act_bits is neither 8 nor 16, or per-channel weights
        are said to have post-scale zeros.
        """
        super().__init__()
        self.name = name or "linear"
        if out_features % 32:
            raise InputError(
                f"{self.name}: out_features is {out_features}, expected a multiple of 32",
                remedy="leave it in 16 bit: name it in modules_to_not_convert",
            )
        if act_bits not in (8, 16):
            raise InputError(f"{self.name}: act_bits is {act_bits}, expected 8 or 16")
        if zero_domain != "pre_scale" and not progressive:
            raise InputError(f"{self.name}: per-channel weights have zero_domain pre_scale, got {zero_domain}")
        self.in_features = in_features
        self.out_features = out_features
        self.progressive = progressive
        self.zero_domain = zero_domain
        self.act_bits = act_bits
        shapes = packed_shapes(out_features, in_features, progressive=progressive, has_bias=has_bias)
        for buffer, (dtype, shape) in shapes.items():
            self.register_buffer(buffer, torch.zeros(shape, dtype=dtype, device=device))
        if not has_bias:
            self.register_buffer("bias", None)
        self._decoded: tuple[dict[str, Tensor], IntegerWeight] | None = None

    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by name, as `pack_linear` returns them."""
        return {name: buffer for name, buffer in self._buffers.items() if buffer is not None}

    def unpack(self) -> QuantizedLinear:
        """The logical layer, checked. Raises InputError, naming the module, when the packed tensors are not legal."""
        try:
            return unpack_linear(self.packed(), in_features=self.in_features, zero_domain=self.zero_domain)
        except ValueError as error:
            raise InputError(
                f"{self.name}: {error}",
                remedy="the tensors were not loaded, are damaged, or were not written by qoq",
            ) from error

    def integer_weight(self) -> IntegerWeight:
        """The weight decoded for multiplying, on the module's device; decoded once (raises as `unpack` does)."""
        packed = self.packed()
        if self._decoded is not None:
            source, weight = self._decoded
            if all(source[name] is tensor for name, tensor in packed.items()):
                return weight
        weight = IntegerWeight.decode(self.unpack(), self.qweight.device)
        self._decoded = (packed, weight)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        weight = self.integer_weight()
        # Under autocast the exact integer sums would be stored in 16 bits.
        with torch.autocast(x.device.type, enabled=False):
            return linear_forward(x, weight, act_bits=self.act_bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """An ordinary linear of the weights that the kernels multiply by, in `dtype` on the module's device."""
        weight = IntegerWeight.decode(self.unpack(), self.qweight.device)
        linear = nn.Linear(self.in_features, self.out_features, weight.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.dequantize().to(dtype))
        if weight.bias is not None:
            linear.bias = nn.Parameter(weight.bias.to(dtype))
        return linear.train(self.training)

    def extra_repr(self) -> str:
        grid = "g128" if self.progressive else "per-channel"
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, w4 {grid}, act_bits={self.act_bits}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Casts skip integer tensors, so the bytes are shown to `fn` as integers; what casts even those only moves them.
        self._decoded = None
        for name, buffer in self.packed().items():
            as_bytes = buffer.view(torch.uint8)
            moved = fn(as_bytes)
            if moved.dtype != torch.uint8:
                moved = as_bytes.to(moved.device)
            self._buffers[name] = moved.view(buffer.dtype)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._decoded = None
        wrong = [
            f"{prefix}{name}: expected {buffer.dtype}, got {state_dict[prefix + name].dtype}"
            for name, buffer in self.packed().items()
            if prefix + name in state_dict and state_dict[prefix + name].dtype != buffer.dtype
        ]
        error_msgs.extend(wrong)
        if not wrong:  # copying would round them
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoded": None}  # copies and pickles decode for themselves
