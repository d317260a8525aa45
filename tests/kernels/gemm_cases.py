"""Random GEMMs with their exact results, for the tests on a GPU and for those that emulate one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qoq.formats.arithmetic import IntegerWeight
from qoq.formats.packing import pack_linear
from qoq.formats.quantized_linear import QuantizedLinear, S2Offsets, ZeroPoints
from qoq.kernels.dispatch import GemmChoice
from qoq.kernels.gemm import run_gemm
from qoq.kernels.gemm_sm90 import run_gemm_sm90
from qoq.kernels.gemm_tiles import WeightFormat
from qoq.kernels.tiles import tile_activations, tile_int8_weights, tile_weights


class Case:
    """Random operands on the CPU, the exact sums, and the output that `linear_forward` defines; runs on `device`."""

    def __init__(
        self, weights: WeightFormat, m: int, n: int, k: int, seed: int, *, bias: bool = True, device: str = "cuda"
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high + 1, shape, generator=generator)

        self.weights, self.m, self.n, self._device = weights, m, n, device
        s1 = (10 ** (torch.rand(n, generator=generator) * 5 - 5)).to(torch.float16)
        s1[0] = 6e-8  # the smallest float16
        bias_values = torch.randn(n, generator=generator).to(torch.float16) if bias else None
        acts = integers(-127, 127, m, k)
        acts[0] = 127
        acts[m // 2] = 0  # a token of zeros
        acts[-1] = -127
        self.codes = acts.to(torch.int8)
        self.scales = 10 ** (torch.rand(m, generator=generator) * 8 - 6)
        self.scales[m // 2] = 1
        self.sums = acts.sum(1).to(torch.int32)
        if weights == "int8":
            values = integers(-128, 127, n, k)
            self.operands: dict[str, Tensor] = {"weight": values.to(torch.int8), "s1_scales": s1}
            if bias_values is not None:
                self.operands["bias"] = bias_values
            self.level1 = values
            self.decoded = IntegerWeight(values.to(torch.int8), s1.float(), None, None)
        else:
            linear = random_linear(weights, n, k, s1, bias_values, integers)
            self.linear = linear
            self.operands = pack_linear(linear)
            self.level1 = linear.level1().long() if weights == "g128" else linear.codes.long()
            self.decoded = IntegerWeight.decode(linear)

    def acc(self) -> Tensor:
        codes, level1 = (matrix.to(self._device).double() for matrix in (self.codes, self.level1))
        return (codes @ level1.t()).to(torch.int32).cpu()  # below 2**53, in whatever order

    def out(self, dtype: torch.dtype) -> Tensor:
        """As `linear_forward`, but from the given codes and scales."""
        weight = self.decoded
        y = self.acc().float() * (self.scales.unsqueeze(1) * weight.s1_scales)
        if weight.s1_szeros is not None:
            y = y - (self.scales * self.sums.float()).unsqueeze(1) * weight.s1_szeros
        y = y.to(dtype)
        bias = self.operands.get("bias")
        return y if bias is None else y + bias.float().to(dtype)

    def expected(self, dtype: torch.dtype) -> Tensor:
        return self.acc() if dtype == torch.int32 else self.out(dtype)

    def run(self, dtype: torch.dtype, choice: GemmChoice | None = None) -> Tensor:
        on_device = {name: tensor.to(self._device) for name, tensor in self.operands.items()}
        out = torch.empty(self.m + 2, self.n, dtype=dtype, device=self._device)
        out.view(torch.uint8).fill_(0x7F)
        result = run_gemm(
            self.weights,
            self.codes.to(self._device),
            self.scales.to(self._device),
            self.sums.to(self._device),
            on_device["weight"] if self.weights == "int8" else on_device["qweight"],
            on_device["s1_scales"],
            on_device.get("s2_scales"),
            on_device.get("s2_zeros"),
            on_device.get("s1_szeros"),
            None if dtype == torch.int32 else on_device.get("bias"),
            self.n,
            dtype,
            choice=choice,
            out=out[1:-1],
        )
        for border in (out[0], out[-1]):
            assert bool((border.view(torch.uint8) == 0x7F).all()), "wrote outside the output"
        return result.cpu()


def run_on_hopper(case: Case, dtype: torch.dtype, choice: GemmChoice | None = None) -> Tensor:
    """Hopper's kernel on the operands of `case`, which are laid out for it; nothing outside the output is written."""
    operands = {name: tensor.cuda() for name, tensor in case.operands.items()}
    is_int8 = case.weights == "int8"
    weight_tiles = tile_int8_weights(operands["weight"]) if is_int8 else tile_weights(operands)
    act_tiles = tile_activations(case.codes.cuda())
    out = torch.empty(case.m + 2, case.n, dtype=dtype, device="cuda")
    out.view(torch.uint8).fill_(0x7F)
    torch.cuda.synchronize()  # weights are read ahead of what was enqueued
    result = run_gemm_sm90(
        case.weights,
        act_tiles,
        case.scales.cuda(),
        None if is_int8 else case.sums.cuda(),
        weight_tiles,
        operands["s1_scales"],
        operands.get("s1_szeros"),
        None if dtype == torch.int32 else operands.get("bias"),
        dtype,
        choice=choice,
        out=out[1:-1],
    )
    for border in (out[0], out[-1]):
        assert bool((border.view(torch.uint8) == 0x7F).all()), "wrote outside the output"
    return result.cpu()


def random_linear(
    weights: WeightFormat, n: int, k: int, s1: Tensor, bias: Tensor | None, integers: Callable[..., Tensor]
) -> QuantizedLinear:
    """Random legal weights; on the progressive grid, groups at both edges of int8 among them."""
    if weights == "per_channel":
        codes = integers(0, 15, n, k).to(torch.uint8)
        return QuantizedLinear(codes, s1, None, ZeroPoints(integers(0, 15, n, 1).to(torch.uint8)), bias, k)
    groups = k // 128
    s2 = integers(1, 16, n, groups)
    offsets = torch.minimum(integers(0, 240, n, groups), 15 * s2 + 128)
    wide, wide_offsets = s2.repeat_interleave(128, 1), offsets.repeat_interleave(128, 1)
    lowest = torch.clamp(-((128 - wide_offsets) // wide), min=0)
    highest = torch.clamp((127 + wide_offsets) // wide, max=15)
    codes = torch.minimum(torch.maximum(integers(0, 15, n, k), lowest), highest)
    codes[:, 0::128], codes[:, 1::128] = lowest[:, 0::128], highest[:, 1::128]
    return QuantizedLinear(codes.to(torch.uint8), s1, s2.to(torch.uint8), S2Offsets(offsets.to(torch.uint8)), bias, k)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Bit for bit, with the coordinate of the first difference."""
    same = (found == expected) | (torch.isnan(found.float()) & torch.isnan(expected.float()))
    if not bool(same.all()):
        m, n = (int(i) for i in (~same).nonzero()[0])
        wrong = int((~same).sum())
        raise AssertionError(
            f"{wrong} of {same.numel()} differ, first at [{m}, {n}]: {found[m, n]} instead of {expected[m, n]}"
        )
