"""The register-level oracle against the logical definition, on legal weights and on bytes that no one may write."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qoq.formats.packing import pack_linear, pack_qweight, pack_s2
from qoq.formats.quantized_linear import QuantizedLinear, S2Offsets, ZeroPoints
from qoq.kernels import oracles
from qoq.kernels.oracles import emulate_packed_codes, emulate_packed_level1, gemm_oracle

SEEDS = st.integers(0, 2**32 - 1)


def integers(low: int, high: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Uniform in low..high, inclusive, int64."""
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


def clamped_codes(offsets: Tensor, s2: Tensor, n: int, k: int, seed: int) -> Tensor:
    """Codes that decode into int8 for the level-1 offsets and scales [N, G]; many at the borders of what is legal."""
    lowest = torch.clamp(-((128 - offsets) // s2), min=0).repeat_interleave(128, dim=1)
    highest = torch.clamp((127 + offsets) // s2, max=15).repeat_interleave(128, dim=1)
    return torch.minimum(torch.maximum(integers(0, 15, (n, k), seed), lowest), highest)


def emulate(packed: dict[str, Tensor]) -> Tensor:
    return emulate_packed_level1(packed["qweight"], packed["s2_scales"], packed["s2_zeros"])


def pack_raw(codes: Tensor, s2: Tensor, offsets: Tensor) -> dict[str, Tensor]:
    """Packed tensors with none of the checks of QuantizedLinear."""
    return {
        "qweight": pack_qweight(codes.to(torch.uint8)),
        "s2_scales": pack_s2((s2 % 256).to(torch.uint8)),
        "s2_zeros": pack_s2((-offsets % 256).to(torch.uint8)),
    }


# ---- legal weights


@settings(deadline=None, max_examples=40)
@given(st.booleans(), st.integers(1, 4), st.integers(1, 3), SEEDS)
def test_legal_weights_decode_to_level1(post_scale: bool, row_tiles: int, groups: int, seed: int) -> None:
    n, k = 32 * row_tiles, 128 * groups
    s2 = integers(1, 16, (n, groups), seed)
    zeros = integers(0, 15, (n, groups), seed + 1)
    if post_scale:
        zeros = torch.minimum(integers(0, 240, (n, groups), seed + 1), 15 * s2 + 128)
    offsets = zeros if post_scale else zeros * s2
    linear = QuantizedLinear(
        codes=clamped_codes(offsets, s2, n, k, seed + 2).to(torch.uint8),
        s1_scales=torch.ones(n, dtype=torch.float16),
        s2_scales=s2.to(torch.uint8),
        zeros=(S2Offsets if post_scale else ZeroPoints)(zeros.to(torch.uint8)),
        bias=None,
        in_features=k,
    )
    decoded = emulate(pack_linear(linear))
    assert decoded.dtype == torch.int8
    assert torch.equal(decoded.to(torch.int16), linear.level1())


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 5), SEEDS)
def test_codes_decode_to_codes(row_tiles: int, column_tiles: int, seed: int) -> None:
    codes = integers(0, 15, (32 * row_tiles, 32 * column_tiles), seed).to(torch.uint8)
    assert torch.equal(emulate_packed_codes(pack_qweight(codes)), codes)


def test_every_code_scale_and_offset_that_fits_int8() -> None:
    """All 16 codes x 16 scales x 241 offsets, legal ones equal and the others wrapped, one offset a channel."""
    offsets = torch.arange(256).clamp(max=240).unsqueeze(1)
    for s2 in range(1, 17):
        codes = torch.arange(128) % 16
        true = codes * s2 - offsets
        packed = pack_raw(codes.expand(256, 128), torch.full((256, 1), s2), offsets)
        decoded = emulate(packed).long()
        assert torch.equal(decoded, (true + 128) % 256 - 128)
        fits = (true >= -128) & (true <= 127)
        assert torch.equal(decoded[fits], true[fits])


def test_stripes_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack_raw(integers(0, 15, (160, 256), 0), integers(1, 16, (160, 2), 1), integers(0, 240, (160, 2), 2))
    acts = integers(-127, 127, (3, 256), 3).to(torch.int8)
    whole, codes = emulate(packed), emulate_packed_codes(packed["qweight"])
    y = gemm_oracle(acts, torch.ones(3), torch.zeros(3), whole, torch.ones(160))
    monkeypatch.setattr(oracles, "_STRIPE_CODES", 64 * 256)  # 64, 64 and 32 rows
    assert torch.equal(emulate(packed), whole)
    assert torch.equal(emulate_packed_codes(packed["qweight"]), codes)
    assert torch.equal(gemm_oracle(acts, torch.ones(3), torch.zeros(3), whole, torch.ones(160)), y)


def test_strided_tensors_decode_like_contiguous_ones() -> None:
    packed = pack_raw(integers(0, 15, (64, 256), 0), integers(1, 16, (64, 2), 1), integers(0, 120, (64, 2), 2))
    strided = {name: tensor.t().contiguous().t() for name, tensor in packed.items()}
    assert torch.equal(emulate(strided), emulate(packed))


# ---- illegal bytes


def test_a_weight_past_int8_wraps() -> None:
    codes = torch.full((32, 128), 7)
    codes[3, 77] = 15  # 15 * 16 - 7 * 16 = 128
    decoded = emulate(pack_raw(codes, torch.full((32, 1), 16), torch.full((32, 1), 112)))
    assert int(decoded[3, 77]) == -128
    decoded[3, 77] = 0
    assert not decoded.any()


def test_a_product_past_a_byte_carries_into_its_neighbour() -> None:
    """15 * 18 = 270: the code keeps 14 and the next input of the same word, whose own weight is legal, gains one."""
    codes = torch.zeros(32, 128, dtype=torch.long)
    codes[5, 41] = 15
    decoded = emulate(pack_raw(codes, torch.full((32, 1), 18), torch.zeros(32, 1, dtype=torch.long)))
    assert decoded.nonzero().tolist() == [[5, 41], [5, 42]]
    assert (int(decoded[5, 41]), int(decoded[5, 42])) == (14, 1)


def test_a_carry_out_of_the_last_byte_is_lost() -> None:
    codes = torch.zeros(32, 128, dtype=torch.long)
    codes[20, 43] = 15
    decoded = emulate(pack_raw(codes, torch.full((32, 1), 255), torch.zeros(32, 1, dtype=torch.long)))
    assert decoded.nonzero().tolist() == [[20, 43]]
    assert int(decoded[20, 43]) == 15 * 255 % 256 - 256


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 255), SEEDS)
def test_any_bytes_decode_as_32_bit_registers_do(largest_s2: int, seed: int) -> None:
    """Word by word in Python integers: four neighbouring inputs, one multiply mod 2**32, four byte additions."""
    codes = integers(0, 15, (32, 128), seed)
    s2 = integers(1, largest_s2, (32, 1), seed + 1)
    offsets = integers(0, 255, (32, 1), seed + 2)
    decoded = emulate(pack_raw(codes, s2, offsets))
    for row in range(0, 32, 5):
        scale, zero = int(s2[row]), -int(offsets[row]) % 256
        for column in range(0, 128, 4):
            word = int.from_bytes(bytes(codes[row, column : column + 4].tolist()), "little")
            product = (word * scale % 2**32).to_bytes(4, "little")
            expected = [((byte + zero) % 256 + 128) % 256 - 128 for byte in product]
            assert decoded[row, column : column + 4].tolist() == expected


# ---- refusals


@pytest.mark.parametrize(
    ("qweight", "message"),
    [
        (
            torch.zeros(32, 64, dtype=torch.uint8),
            r"qweight: expected torch.int8 \[N, K/2\], got torch.uint8 \[32, 64\]",
        ),
        (torch.zeros(2048, dtype=torch.int8), r"qweight: expected torch.int8 \[N, K/2\], got torch.int8 \[2048\]"),
        (torch.zeros(40, 64, dtype=torch.int8), "N and K must be multiples of 32, got N = 40, K = 128"),
        (torch.zeros(32, 24, dtype=torch.int8), "N and K must be multiples of 32, got N = 32, K = 48"),
    ],
)
def test_other_qweights_are_refused(qweight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        emulate_packed_codes(qweight)


@pytest.mark.parametrize("shape", [(1, 32), (32, 2), (2, 64)])
@pytest.mark.parametrize("wrong", ["s2_scales", "s2_zeros"])
def test_other_level2_shapes_are_refused(shape: tuple[int, int], wrong: str) -> None:
    level2 = {name: torch.ones(2, 32, dtype=torch.int8) for name in ("s2_scales", "s2_zeros")}
    level2[wrong] = torch.ones(shape, dtype=torch.int8)
    with pytest.raises(ValueError, match=rf"{wrong}: expected torch.int8 \[K/128, N\] = \[2, 32\], got torch.int8"):
        emulate_packed_level1(torch.zeros(32, 128, dtype=torch.int8), **level2)


def test_partial_groups_are_refused() -> None:
    level2 = torch.ones(1, 32, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"\[K/128, N\] = \[1.5, 32\]"):
        emulate_packed_level1(torch.zeros(32, 96, dtype=torch.int8), level2, level2)


# ---- the product


def test_the_product_by_hand() -> None:
    acts = torch.tensor([[1, -2, 3], [0, 0, 127]], dtype=torch.int8)
    weight = torch.tensor([[4, 5, 6], [-128, 127, 0]], dtype=torch.int8)
    scales, sums = torch.tensor([0.5, 2.0]), torch.tensor([2, 127], dtype=torch.int32)
    s1, szeros, bias = (
        torch.tensor([1.0, 0.25]).half(),
        torch.tensor([3.0, 1.0]).half(),
        torch.tensor([10.0, -1.0]).half(),
    )
    plain = gemm_oracle(acts, scales, sums, weight, s1)
    assert plain.dtype == torch.float64
    assert plain.tolist() == [[6.0, -47.75], [1524.0, 0.0]]
    assert gemm_oracle(acts, scales, sums, weight, s1, szeros).tolist() == [[3.0, -48.75], [762.0, -254.0]]
    assert gemm_oracle(acts, scales, sums, weight, s1, szeros, bias).tolist() == [[13.0, -49.75], [772.0, -255.0]]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64])
@pytest.mark.parametrize("k", [1, 5000, 140_000])
def test_the_largest_sums_are_exact(k: int, dtype: torch.dtype) -> None:
    """140,000 inputs pass 2**31: the sum is then made in int64."""
    acts, weight = torch.full((2, k), -127, dtype=torch.int8), torch.full((3, k), -128, dtype=dtype)
    ones = torch.ones(3)
    assert gemm_oracle(acts, ones[:2], ones[:2], weight, ones).tolist() == [[127.0 * 128 * k] * 3] * 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", torch.ones(4, 9, dtype=torch.int8), r"weight: expected shape \[4, 8\], got \[4, 9\]"),
        ("act_scales", torch.ones(2, 1), r"act_scales: expected shape \[2\], got \[2, 1\]"),
        ("act_sums", torch.ones(4), r"act_sums: expected shape \[2\], got \[4\]"),
        ("s1_scales", torch.ones(2), r"s1_scales: expected shape \[4\], got \[2\]"),
        ("s1_szeros", torch.ones(1), r"s1_szeros: expected shape \[4\], got \[1\]"),
        ("bias", torch.ones(4, 1), r"bias: expected shape \[4\], got \[4, 1\]"),
        ("act_codes", torch.ones(2, 8), "expected int8 act_codes and an integer weight, got torch.float32"),
        ("weight", torch.ones(4, 8), "expected int8 act_codes and an integer weight, got torch.int8 and torch.float32"),
    ],
)
def test_fields_that_do_not_fit_are_refused(name: str, value: Tensor, message: str) -> None:
    fields = {
        "act_codes": torch.ones(2, 8, dtype=torch.int8),
        "act_scales": torch.ones(2),
        "act_sums": torch.full((2,), 8, dtype=torch.int32),
        "weight": torch.ones(4, 8, dtype=torch.int8),
        "s1_scales": torch.ones(4),
        "s1_szeros": torch.ones(4),
        "bias": torch.ones(4),
    }
    gemm_oracle(**fields)
    with pytest.raises(ValueError, match=message):
        gemm_oracle(**(fields | {name: value}))
