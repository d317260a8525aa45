"""A quantized linear as a torch module: it holds the checkpoint's packed tensors, and computes with the CUDA kernels
where it can, with the reference arithmetic elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from qoq.formats.arithmetic import IntegerWeight, linear_forward
from qoq.formats.packing import packed_shapes, unpack_linear
from qoq.formats.quantized_linear import QuantizedLinear
from qoq.kernels.launch import is_hopper
from qoq.kernels.tiles import tile_weights, untile_weights
from qoq.recipes.errors import EnvironmentProblem, InputError
from qoq.recipes.schema import ZeroDomain

Backend = Literal["auto", "reference", "kernels"]
"""auto: kernels where they can run. kernels: an error where they cannot."""
_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
_TILED = ("qweight", "s2_scales", "s2_zeros")
IN_FEATURES_STEP = 8
"""The activation quantizer reads 16 bytes at a time; other in_features stay with the reference."""


class QoQLinear(nn.Module):
    """y [..., N] = x [..., K] times packed uint4 weights, in x's dtype.

    The packed tensors are buffers named, shaped and typed as on disk (`qoq.formats.packing`); `bias` is None when there
    is none. Casts of the module (`.to(dtype)`, `.half()`, `.float()`, `.bfloat16()`) leave them alone, since a rounded
    scale is another weight; moves to a device move them. They start as zeros, which are refused when decoded: a module
    that was never loaded does not compute.

    On a CUDA device, 16-bit inputs go through the kernels, which read the packed tensors as they are. On Hopper their
    first forward re-packs the weights in place of `qweight`, `s2_scales` and `s2_zeros`, which are None from then on;
    whatever asks for them (`packed`, `state_dict`, a move) brings them back, and the next forward re-packs. Elsewhere
    (on a CPU, in float32, with act_bits 16, or as `backend` says) the reference arithmetic computes the same numbers.

    The first forward checks the packed tensors, before any kernel starts: a value that leaves a byte would corrupt
    results unnoticed. The reference also keeps them decoded, int8 [N, K], outside the state dict. Both are done again
    when the module is moved, loaded or edited. (A module compiled by torch.compile does not see edits.)
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
        self._backend: Backend = "auto"
        shapes = packed_shapes(out_features, in_features, progressive=progressive, has_bias=has_bias)
        for buffer, (dtype, shape) in shapes.items():
            self.register_buffer(buffer, torch.zeros(shape, dtype=dtype, device=device))
        if not has_bias:
            self.register_buffer("bias", None)
        self._decoded: tuple[dict[str, Tensor], IntegerWeight] | None = None
        self._checked: list[tuple[Tensor, int]] | None = None  # what was found fit for the kernels, and its version
        self._kernels_run = False
        self._tiles: Tensor | None = None  # the weights as Hopper's kernels read them, instead of the buffers

    @property
    def backend(self) -> Backend:
        """What computes: see `Backend`. Raises InputError when set to anything else."""
        return self._backend

    @backend.setter
    def backend(self, backend: Backend) -> None:
        if backend not in get_args(Backend):
            raise InputError(f"backend is {backend!r}, expected one of {', '.join(get_args(Backend))}")
        self._backend = backend
        self._forget()

    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by name, as `pack_linear` returns them."""
        self._untile()
        return self._held()

    def _held(self) -> dict[str, Tensor]:
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
        if self._runs_kernels(x):
            return self._kernel_forward(x)
        weight = self.integer_weight()
        # Under autocast the exact integer sums would be stored in 16 bits.
        with torch.autocast(x.device.type, enabled=False):
            return linear_forward(x, weight, act_bits=self.act_bits)

    def _runs_kernels(self, x: Tensor) -> bool:
        """Whether x goes through the kernels. Raises when they were asked for and cannot run."""
        if self._backend == "reference":
            return False
        problem = self._misfit(x)
        if problem is None:
            if self._checked is None or not (torch.compiler.is_compiling() or self._is_as_checked()):
                self._prepare_kernels()
            return self._kernels_run
        if self._backend == "kernels":
            raise InputError(f"{self.name}: the kernels cannot run: {problem}", remedy="use the reference backend")
        return False

    def _misfit(self, x: Tensor) -> str | None:
        """Why the kernels cannot take x, apart from whether this machine has them."""
        if not is_on_gpu(x):
            return f"the input is on {x.device}, expected a CUDA device"
        if x.dtype not in _KERNEL_DTYPES:
            return f"the input is {x.dtype}, expected float16 or bfloat16"
        if self.act_bits != 8:
            return f"act_bits is {self.act_bits}, expected 8"
        if self.in_features % IN_FEATURES_STEP or x.shape[-1] != self.in_features:
            return f"{x.shape[-1]} in_features, expected {self.in_features} and a multiple of {IN_FEATURES_STEP}"
        return None

    def _is_as_checked(self) -> bool:
        packed, checked = self._held().values(), self._checked or []
        return len(packed) == len(checked) and all(
            tensor is known and _version(tensor) == version
            for tensor, (known, version) in zip(packed, checked, strict=True)
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _prepare_kernels(self) -> None:
        """Before the first launch: are there kernels, and are the bytes such that they compute what is meant?"""
        from qoq.kernels.ops import usable_device_problem

        problem = usable_device_problem()
        if problem is not None and self._backend == "kernels":
            raise EnvironmentProblem(f"the kernels cannot run: {problem}", remedy="`qoq doctor` says what is missing")
        self._forget()
        self._kernels_run = problem is None
        if self._kernels_run:
            self.unpack()
            if wants_tiles(self.qweight):
                self._tile()
        self._checked = [(tensor, _version(tensor)) for tensor in self._held().values()]

    def _tile(self) -> None:
        """Weights in the order of Hopper's kernels take the place of the buffers that they are made of."""
        tiles = tile_weights(self.packed())
        if tiles.is_cuda:  # the kernels read weights ahead of what was enqueued
            torch.cuda.current_stream(tiles.device).synchronize()
        self._tiles = tiles
        for name in _TILED:
            if name in self._buffers:
                self._buffers[name] = None

    def _untile(self) -> None:
        """The buffers again, as they were."""
        if self._tiles is None:
            return
        for name, tensor in untile_weights(self._tiles, self.out_features).items():
            if self._buffers[name] is None:  # else it was replaced meanwhile
                self._buffers[name] = tensor
        self._tiles = self._checked = None

    def _kernel_forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).contiguous()
        if self._tiles is not None:
            y: Tensor = torch.ops.qoq.w4a8_gemm_sm90(
                *torch.ops.qoq.quantize_activation(rows, tiled=True),
                self._tiles,
                self.s1_scales,
                None if self.progressive else self.s1_szeros,
                self.bias,
                x.dtype,
            )
            return y.view(*x.shape[:-1], self.out_features)
        act_codes, act_scales, act_sums = torch.ops.qoq.quantize_activation(rows)
        progressive = self.progressive
        y = torch.ops.qoq.w4a8_gemm(
            act_codes,
            act_scales,
            act_sums,
            self.qweight,
            self.s1_scales,
            self.s2_scales if progressive else None,
            self.s2_zeros if progressive else None,
            None if progressive else self.s1_szeros,
            self.bias,
            x.dtype,
        )
        return y.view(*x.shape[:-1], self.out_features)

    def _forget(self) -> None:
        """Nothing is known any more of the packed tensors."""
        self._decoded = None
        self._checked = None

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
        self._forget()
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
        self._untile()
        self._forget()
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

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._untile()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __getstate__(self) -> dict[str, Any]:
        self._untile()
        return {**self.__dict__, "_decoded": None, "_checked": None}  # copies and pickles decode for themselves


def is_on_gpu(x: Tensor) -> bool:
    """Apart, so that tests may pretend."""
    return x.is_cuda


def wants_tiles(weight: Tensor) -> bool:
    """Whether the kernels of the weight's device are Hopper's own; apart as well."""
    return weight.is_cuda and is_hopper(weight.device.index)


def _version(tensor: Tensor) -> int:
    """A number that changes when the tensor is edited in place; tensors made in inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version
