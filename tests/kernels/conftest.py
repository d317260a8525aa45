"""Stand-ins for the CUDA operators on the CPU, so that what calls them is tested without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from qoq.formats import arithmetic
from qoq.kernels.oracles import emulate_packed_codes, emulate_packed_level1
from qoq.kernels.tiles import tile_activations, untile_activations, untile_weights


class Operators:
    """Calls that were made, by name, and what spoils a result in place (a defect to be found)."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.defects: dict[str, Callable[[Tensor], object]] = {}

    def _finish(self, name: str, result: Tensor) -> Tensor:
        self.calls.append(name)
        if name in self.defects:
            self.defects[name](result)
        return result

    def quantize_activation(self, x: Tensor, tiled: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        assert x.is_contiguous()
        act = arithmetic.quantize_activation(x)
        codes = self._finish("quantize_activation", pad(act.codes, (0, -x.shape[1] % 128)))
        return tile_activations(codes) if tiled else codes, act.scales, act.sums

    def kv_round_trip(self, x: Tensor, bits: int, key_rotation: Any = "none") -> Tensor:
        assert x.is_contiguous()
        turned = arithmetic.rotate_heads(x, key_rotation)
        return self._finish("kv_round_trip", arithmetic.kv_round_trip(turned, bits))

    def rotate_heads(self, x: Tensor) -> Tensor:
        assert x.is_contiguous()
        return self._finish("rotate_heads", arithmetic.rotate_heads(x, "hadamard"))

    def w4a8_gemm_int32(
        self, act_codes: Tensor, act_sums: Tensor, qweight: Tensor, s2_scales: Tensor | None, s2_zeros: Tensor | None
    ) -> Tensor:
        return self._finish("w4a8_gemm_int32", _sums(act_codes, qweight, s2_scales, s2_zeros))

    def w4a8_gemm(
        self,
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
        y = _sums(act_codes, qweight, s2_scales, s2_zeros).float() * (act_scales[:, None] * s1_scales.float())
        if s1_szeros is not None:
            y = y - (act_scales * act_sums.float())[:, None] * s1_szeros.float()
        y = y.to(out_dtype)
        return self._finish("w4a8_gemm", y if bias is None else y + bias.to(out_dtype))

    def w4a8_gemm_sm90(
        self,
        act_tiles: Tensor,
        act_scales: Tensor,
        act_sums: Tensor,
        weight_tiles: Tensor,
        s1_scales: Tensor,
        s1_szeros: Tensor | None,
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        codes = untile_activations(act_tiles, act_scales.shape[0])
        packed = untile_weights(weight_tiles, s1_scales.shape[0])
        s2 = (packed.get("s2_scales"), packed.get("s2_zeros"))
        rest = (s1_szeros, bias, out_dtype)
        return self._finish(
            "w4a8_gemm_sm90", self.w4a8_gemm(codes, act_scales, act_sums, packed["qweight"], s1_scales, *s2, *rest)
        )


def _sums(act_codes: Tensor, qweight: Tensor, s2_scales: Tensor | None, s2_zeros: Tensor | None) -> Tensor:
    if s2_scales is not None and s2_zeros is not None:
        weight = emulate_packed_level1(qweight, s2_scales, s2_zeros)
    else:
        weight = emulate_packed_codes(qweight)
    return (act_codes.double() @ weight.double().t()).to(torch.int32)


@pytest.fixture
def cpu_operators() -> Iterator[Operators]:
    import qoq.kernels.ops  # noqa: F401  (declares the operators)

    operators = Operators()
    with torch.library._scoped_library("qoq", "IMPL") as library:
        for name in (
            "quantize_activation",
            "w4a8_gemm",
            "w4a8_gemm_int32",
            "w4a8_gemm_sm90",
            "kv_round_trip",
            "rotate_heads",
        ):
            library.impl(name, getattr(operators, name), "CPU")
        yield operators
