"""Stand-ins for the CUDA operators on the CPU, so that what calls them is tested without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from qoq.formats import arithmetic
from qoq.kernels.attention import check_decode_operands
from qoq.kernels.attention_oracles import decode_attention_oracle
from qoq.kernels.kv_operands import check_append, check_rope
from qoq.kernels.kv_oracles import append_oracle, dequantize_kv_oracle, quantize_kv_oracle, rope_oracle
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

    def rms_norm_quantize(
        self, x: Tensor, weight: Tensor, eps: float, tiled: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert x.dtype == weight.dtype == torch.float16
        normalized = torch.nn.functional.rms_norm(x, (x.shape[1],), None, eps) * weight
        self.calls.append("rms_norm_quantize")
        return self.quantize_activation(normalized, tiled)

    def add_rms_norm_quantize(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, tiled: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        added = x + residual
        return *self.rms_norm_quantize(added, weight, eps, tiled), added

    def silu_mul_quantize(self, gate_up: Tensor, tiled: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        gate, up = gate_up.chunk(2, dim=1)
        self.calls.append("silu_mul_quantize")
        return self.quantize_activation(torch.nn.functional.silu(gate) * up, tiled)

    def append_kv(
        self, key: Tensor, value: Tensor, kv_pages: Tensor, slots: Tensor, bits: int, key_rotation: Any = "none"
    ) -> None:
        check_append(key, value, kv_pages, slots, bits, key_rotation)
        kv_pages.copy_(append_oracle(kv_pages, arithmetic.rotate_heads(key, key_rotation), value, slots, bits))
        self.calls.append("append_kv")

    def rope_append_kv(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        kv_pages: Tensor,
        slots: Tensor,
        bits: int,
        key_rotation: Any = "none",
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_append(key, value, kv_pages, slots, bits, key_rotation)
        check_rope(query, key, cos, sin, positions)
        query, key = (arithmetic.rotate_heads(rope_oracle(x, cos, sin, positions), key_rotation) for x in (query, key))
        kv_pages.copy_(append_oracle(kv_pages, key, value, slots, bits))
        self.calls.append("rope_append_kv")
        key, value = (dequantize_kv_oracle(quantize_kv_oracle(x, bits), x.dtype) for x in (key, value))
        return query, key, value

    def rope_append(self, query: Tensor, *rest: Any) -> Tensor:
        *operands, settled = rest
        assert settled
        turned = self.rope_append_kv(query, *operands)[0]
        self.calls[-1] = "rope_append"
        return turned

    def overlapping_decode_attention(
        self,
        query: Tensor,
        kv_pages: Tensor,
        page_table: Tensor,
        kv_lens: Tensor,
        scale: float,
        bits: int,
        window: int,
        fresh_tokens: int,
    ) -> Tensor:
        check_decode_operands(query, kv_pages, page_table, kv_lens, scale, bits, window)
        assert fresh_tokens == 1
        found = decode_attention_oracle(query, kv_pages, page_table, kv_lens, scale, bits, window)
        return self._finish("overlapping_decode_attention", found.to(query.dtype))

    def w8a8_gemm(
        self,
        act_codes: Tensor,
        act_scales: Tensor,
        weight: Tensor,
        s1_scales: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        y = (act_codes.double() @ weight.double().t()) * (act_scales[:, None] * s1_scales.float()).double()
        y = y.to(out_dtype)
        return self._finish("w8a8_gemm", y if bias is None else y + bias.to(out_dtype))

    def w8a8_gemm_sm90(
        self,
        act_tiles: Tensor,
        act_scales: Tensor,
        weight_tiles: Tensor,
        s1_scales: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        pairs, groups = weight_tiles.shape[:2]
        pieces = weight_tiles.view(torch.int8).view(pairs, groups, 2, 8, 8, 8, 16).permute(0, 2, 3, 5, 1, 4, 6)
        weight = pieces.reshape(128 * pairs, -1)[: s1_scales.shape[0]]
        codes = untile_activations(act_tiles, act_scales.shape[0])
        return self._finish("w8a8_gemm_sm90", self.w8a8_gemm(codes, act_scales, weight, s1_scales, bias, out_dtype))

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


_NAMES = (
    "quantize_activation",
    "rms_norm_quantize",
    "add_rms_norm_quantize",
    "silu_mul_quantize",
    "append_kv",
    "rope_append_kv",
    "rope_append",
    "overlapping_decode_attention",
    "w8a8_gemm",
    "w8a8_gemm_sm90",
    "w4a8_gemm",
    "w4a8_gemm_int32",
    "w4a8_gemm_sm90",
    "kv_round_trip",
    "rotate_heads",
)


@contextmanager
def operators_on_cpu() -> Iterator[Operators]:
    import qoq.kernels.ops  # noqa: F401  (declares the operators)

    operators = Operators()
    with torch.library._scoped_library("qoq", "IMPL") as library:
        for name in _NAMES:
            library.impl(name, getattr(operators, name), "CPU")
        yield operators


@pytest.fixture
def cpu_operators() -> Iterator[Operators]:
    with operators_on_cpu() as operators:
        yield operators
