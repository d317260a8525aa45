"""The packed order, against index formulas applied one value at a time, and its inverses."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from qoq.formats.packing import (
    pack_linear,
    pack_qweight,
    pack_s2,
    packed_shapes,
    padded_in_features,
    shard_columns,
    shard_rows,
    unpack_linear,
    unpack_qweight,
    unpack_s2,
)
from qoq.formats.quantized_linear import QuantizedLinear, S2Offsets, ZeroPoints

MakeLinear = Callable[..., QuantizedLinear]
GOLDEN = Path(__file__).parents[1] / "golden"
FORMULAS = runpy.run_path(str(GOLDEN / "make_packed_linear.py"))
"""The slow oracle: standard library only, one value at a time."""
CASES = json.loads((GOLDEN / "packed_linear.json").read_text(encoding="utf-8"))
MODES = ("pre_scale", "post_scale", "per_channel")

SEEDS = st.integers(0, 2**32 - 1)
TILES = st.integers(1, 3)


def random_bytes(shape: tuple[int, ...], seed: int, below: int = 256) -> torch.Tensor:
    return torch.randint(0, below, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def as_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes that safetensors puts on disk, in little-endian order whatever the machine."""
    blob = save({"x": tensor})
    return blob[8 + int.from_bytes(blob[:8], "little") :]


def zero_domain_of(mode: str) -> str:
    return "post_scale" if mode == "post_scale" else "pre_scale"


def assert_same_linear(a: QuantizedLinear, b: QuantizedLinear) -> None:
    for field in fields(QuantizedLinear):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, ZeroPoints | S2Offsets):
            assert type(left) is type(right)
            left, right = left.values, right.values
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype, field.name
            assert torch.equal(left, right), field.name
        else:
            assert left == right, field.name


# ---- one value at a time


@settings(deadline=None, max_examples=8)
@given(TILES, TILES, SEEDS)
def test_qweight_is_where_the_formula_says(row_tiles: int, column_tiles: int, seed: int) -> None:
    codes = random_bytes((32 * row_tiles, 32 * column_tiles), seed, below=16)
    assert as_bytes(pack_qweight(codes)) == FORMULAS["pack_qweight"](codes.tolist())


@settings(deadline=None, max_examples=20)
@given(TILES, st.integers(1, 5), SEEDS)
def test_s2_is_where_the_formula_says(row_tiles: int, groups: int, seed: int) -> None:
    values = random_bytes((32 * row_tiles, groups), seed)
    assert as_bytes(pack_s2(values)) == FORMULAS["pack_s2"](values.tolist())


def test_the_order_of_s2_begins_as_documented() -> None:
    channels = torch.arange(64, dtype=torch.uint8).unsqueeze(1)
    assert pack_s2(channels)[0, :9].tolist() == [0, 8, 16, 24, 1, 9, 17, 25, 2]
    assert pack_s2(channels)[0, 32:36].tolist() == [32, 40, 48, 56]


def test_every_byte_of_qweight_comes_from_where_the_inverse_formula_says() -> None:
    n, k = 64, 96
    codes = random_bytes((n, k), 3, below=16)
    packed = as_bytes(pack_qweight(codes))
    for offset, byte in enumerate(packed):
        tile = offset >> 9
        row = tile // (k // 32) * 32 + 8 * (offset >> 2 & 1) + (offset >> 6 & 7)
        column = tile % (k // 32) * 32 + 16 * (offset >> 3 & 1) + 4 * (offset >> 4 & 3) + (offset & 3)
        assert (byte & 15, byte >> 4) == (int(codes[row, column]), int(codes[row + 16, column]))


# ---- inverses


@settings(deadline=None, max_examples=25)
@given(TILES, TILES, SEEDS)
def test_qweight_round_trips_from_both_sides(row_tiles: int, column_tiles: int, seed: int) -> None:
    n, k = 32 * row_tiles, 32 * column_tiles
    codes = random_bytes((n, k), seed, below=16)
    assert torch.equal(unpack_qweight(pack_qweight(codes)), codes)
    packed = random_bytes((n, k // 2), seed).view(torch.int8)
    assert torch.equal(pack_qweight(unpack_qweight(packed)), packed)


@settings(deadline=None, max_examples=25)
@given(TILES, st.integers(1, 5), SEEDS)
def test_s2_round_trips_from_both_sides(row_tiles: int, groups: int, seed: int) -> None:
    values = random_bytes((32 * row_tiles, groups), seed)
    assert torch.equal(unpack_s2(pack_s2(values)), values)
    packed = random_bytes((groups, 32 * row_tiles), seed).view(torch.int8)
    assert torch.equal(pack_s2(unpack_s2(packed)), packed)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(MODES), TILES, st.integers(1, 400), st.booleans(), SEEDS)
def test_linears_round_trip(
    make_linear: MakeLinear, mode: str, row_tiles: int, in_features: int, has_bias: bool, seed: int
) -> None:
    linear = make_linear(mode, 32 * row_tiles, in_features, seed, has_bias=has_bias)
    tensors = pack_linear(linear)
    expected = packed_shapes(32 * row_tiles, in_features, progressive=mode != "per_channel", has_bias=has_bias)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == expected
    assert list(tensors) == list(expected)
    read = load(save(tensors))
    assert_same_linear(unpack_linear(read, in_features=in_features, zero_domain=zero_domain_of(mode)), linear)


@pytest.mark.parametrize("mode", MODES)
def test_strided_fields_pack_like_contiguous_ones_and_can_be_saved(make_linear: MakeLinear, mode: str) -> None:
    linear = make_linear(mode, 64, 256, 5, has_bias=True)
    strided = QuantizedLinear(
        codes=linear.codes.t().contiguous().t(),
        s1_scales=torch.stack((linear.s1_scales, linear.s1_scales), dim=1)[:, 0],
        s2_scales=None if linear.s2_scales is None else linear.s2_scales.t().contiguous().t(),
        zeros=type(linear.zeros)(linear.zeros.values.t().contiguous().t()),
        bias=torch.stack((linear.bias, linear.bias), dim=1)[:, 0],
        in_features=256,
    )
    assert save(pack_linear(strided)) == save(pack_linear(linear))
    assert torch.equal(strided.dequantize(), linear.dequantize())


def test_packing_leaves_its_input_alone(make_linear: MakeLinear) -> None:
    linear, untouched = make_linear("post_scale", 32, 128, 9), make_linear("post_scale", 32, 128, 9)
    pack_linear(linear)
    assert_same_linear(linear, untouched)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(MODES), st.integers(1, 2), st.integers(1, 2), SEEDS)
def test_channels_are_sliced_and_joined_in_32s(
    make_linear: MakeLinear, mode: str, above: int, below: int, seed: int
) -> None:
    cut = 32 * above
    whole = pack_linear(make_linear(mode, cut + 32 * below, 200, seed, has_bias=True))
    linear = unpack_linear(whole, in_features=200, zero_domain=zero_domain_of(mode))
    for rows in (slice(0, cut), slice(cut, None)):
        part = QuantizedLinear(
            codes=linear.codes[rows],
            s1_scales=linear.s1_scales[rows],
            s2_scales=None if linear.s2_scales is None else linear.s2_scales[rows],
            zeros=type(linear.zeros)(linear.zeros.values[rows]),
            bias=None if linear.bias is None else linear.bias[rows],
            in_features=200,
        )
        for name, tensor in pack_linear(part).items():
            axis_n_last = name in ("s2_scales", "s2_zeros")
            assert torch.equal(tensor, whole[name][:, rows] if axis_n_last else whole[name][rows]), name


def test_columns_of_qweight_are_not_slices_of_in_features() -> None:
    codes = random_bytes((64, 256), 1, below=16)
    assert not torch.equal(pack_qweight(codes)[:, :64], pack_qweight(codes[:, :128]))


def test_in_features_are_padded_to_groups() -> None:
    assert [padded_in_features(k) for k in (1, 127, 128, 129, 11008)] == [128, 128, 128, 256, 11008]


# ---- golden bytes


def golden_linear(case: dict[str, Any]) -> QuantizedLinear:
    logical = case["logical"]

    def halves(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8).view(torch.float16)

    def matrix(rows: list[str]) -> torch.Tensor:
        return torch.tensor([list(bytes.fromhex(row)) for row in rows], dtype=torch.uint8)

    zeros = matrix(logical["zeros"])
    return QuantizedLinear(
        codes=torch.tensor([[int(digit, 16) for digit in row] for row in logical["codes"]], dtype=torch.uint8),
        s1_scales=halves(logical["s1_scales"]),
        s2_scales=matrix(logical["s2_scales"]) if "s2_scales" in logical else None,
        zeros=S2Offsets(zeros) if case["mode"] == "post_scale" else ZeroPoints(zeros),
        bias=halves(logical["bias"]) if "bias" in logical else None,
        in_features=logical["in_features"],
    )


@pytest.mark.parametrize("name", MODES)
def test_golden_linears_pack_bit_for_bit(name: str) -> None:
    packed = pack_linear(golden_linear(CASES[name]))
    assert {part: as_bytes(tensor).hex() for part, tensor in packed.items()} == CASES[name]["packed"]


def test_the_golden_file_is_what_its_script_writes() -> None:
    assert FORMULAS["make"]() == CASES


# ---- what is not legal on disk


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(("pre_scale", "post_scale")), st.integers(1, 30), st.integers(0, 255), SEEDS)
def test_random_bytes_are_refused_or_mean_exactly_themselves(mode: str, scales: int, zeros: int, seed: int) -> None:
    tensors = {
        "qweight": random_bytes((32, 64), seed).view(torch.int8),
        "s1_scales": torch.ones(32, dtype=torch.float16),
        "s2_scales": random_bytes((1, 32), seed, below=scales).view(torch.int8) + 1,
        "s2_zeros": -random_bytes((1, 32), seed + 1, below=zeros + 1).view(torch.int8),
    }
    try:
        linear = unpack_linear(tensors, in_features=128, zero_domain=mode)
    except ValueError:
        return
    assert linear.level1().abs().max() <= 128
    again = pack_linear(linear)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("qweight", None, r"qweight: expected torch.int8 \[N, K/2\], got nothing"),
        ("qweight", torch.zeros(4096, dtype=torch.int8), r"qweight: expected .*, got torch.int8 \[4096\]"),
        ("qweight", torch.zeros(32, 128, dtype=torch.uint8), r"qweight: expected torch.int8 \[32, 128\], got torch.u"),
        ("qweight", torch.zeros(32, 64, dtype=torch.int8), r"qweight: expected torch.int8 \[32, 128\], got .*64\]"),
        ("s1_scales", None, "s1_scales: expected .* got nothing"),
        ("s1_scales", torch.ones(32), r"s1_scales: expected torch.float16 \[32\], got torch.float32 \[32\]"),
        ("s1_scales", torch.zeros(32, dtype=torch.float16), r"s1_scales\[0\] = 0.0, expected a finite number > 0"),
        ("s2_scales", torch.ones(2, 32), "s2_scales: expected torch.int8"),
        (
            "s2_scales",
            torch.ones(3, 32, dtype=torch.int8),
            r"expected torch.int8 \[2, 32\], got .*\[3, 32\]",
        ),
        ("s2_scales", torch.zeros(2, 32, dtype=torch.int8), r"s2_scales: values 0..0, expected 1..16"),
        ("s2_scales", torch.full((2, 32), 17, dtype=torch.int8), r"s2_scales: values 17..17, expected 1..16"),
        ("s2_scales", torch.full((2, 32), -1, dtype=torch.int8), r"s2_scales: values 255..255, expected 1..16"),
        ("s2_zeros", None, "s2_zeros: expected .* got nothing"),
        (
            "s2_zeros",
            torch.full((2, 32), -13, dtype=torch.int8),
            "group 0 holds offset 13, which is no code 0..15",
        ),
        (
            "s2_zeros",
            torch.full((2, 32), 12, dtype=torch.int8),
            "group 0 holds offset 244, which is no code 0..15",
        ),
        ("bias", torch.full((32,), torch.nan, dtype=torch.float16), "bias holds a NaN or an infinity"),
    ],
)
def test_illegal_progressive_tensors_are_refused_by_name(part: str, value: torch.Tensor | None, message: str) -> None:
    tensors = {
        "qweight": torch.zeros(32, 128, dtype=torch.int8),
        "s1_scales": torch.ones(32, dtype=torch.float16),
        "s2_scales": torch.full((2, 32), 4, dtype=torch.int8),
        "s2_zeros": torch.full((2, 32), -28, dtype=torch.int8),
    }
    unpack_linear(tensors, in_features=256, zero_domain="pre_scale")
    broken = {name: tensor for name, tensor in (tensors | {part: value}).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        unpack_linear(broken, in_features=256, zero_domain="pre_scale")


def test_post_scale_offsets_past_240_are_refused() -> None:
    tensors = {
        "qweight": torch.full((32, 64), -1, dtype=torch.int8),
        "s1_scales": torch.ones(32, dtype=torch.float16),
        "s2_scales": torch.full((1, 32), 16, dtype=torch.int8),
        "s2_zeros": torch.full((1, 32), 16, dtype=torch.int8),  # 240
    }
    assert int(unpack_linear(tensors, in_features=128, zero_domain="post_scale").zeros.values.max()) == 240
    tensors["s2_zeros"] = torch.full((1, 32), 15, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"s2_offsets: values 241..241, expected 0..240"):
        unpack_linear(tensors, in_features=128, zero_domain="post_scale")


@pytest.mark.parametrize(
    ("szero", "zero_domain", "message"),
    [
        (16.0, "pre_scale", "s1_szeros: not within 0..15 times s1_scales"),
        (-1.0, "pre_scale", "s1_szeros: not within"),
        (torch.nan, "pre_scale", "s1_szeros: not within"),
        (7.25, "pre_scale", "s1_szeros: not a whole zero point times s1_scales"),
        (7.0, "post_scale", "per-channel weights are read with pre-scale zeros only"),
    ],
)
def test_illegal_per_channel_zeros_are_refused(szero: float, zero_domain: str, message: str) -> None:
    tensors = {
        "qweight": torch.zeros(32, 64, dtype=torch.int8),
        "s1_scales": torch.ones(32, dtype=torch.float16),
        "s1_szeros": torch.full((32,), szero, dtype=torch.float16),
    }
    with pytest.raises(ValueError, match=message):
        unpack_linear(tensors, in_features=128, zero_domain=zero_domain)


@pytest.mark.parametrize("shape", [(16, 128), (32, 24), (48, 64)])
def test_partial_tiles_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="both must be multiples of 32"):
        pack_qweight(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match="must be a multiple of 32"):
        unpack_qweight(torch.zeros(shape[0], shape[1] // 2, dtype=torch.int8))


def test_a_linear_with_a_partial_tile_of_channels_cannot_be_packed(make_linear: MakeLinear) -> None:
    with pytest.raises(ValueError, match=r"codes are \[40, 128\]; both must be multiples of 32"):
        pack_linear(make_linear("pre_scale", 40, 128, 0))


# ---- shards, against the weights cut after they were decoded


def decoded(tensors: dict[str, torch.Tensor], in_features: int, mode: str) -> torch.Tensor:
    return unpack_linear(tensors, in_features=in_features, zero_domain=zero_domain_of(mode)).dequantize()


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(MODES), st.integers(1, 4), st.integers(1, 3), SEEDS, st.data())
def test_a_shard_of_channels_decodes_to_those_channels(
    make_linear: MakeLinear, mode: str, stripes: int, groups: int, seed: int, data: st.DataObject
) -> None:
    linear = make_linear(mode, 32 * stripes, 128 * groups - 8, seed, has_bias=True)
    start = data.draw(st.integers(0, stripes - 1))
    stop = data.draw(st.integers(start + 1, stripes))
    rows = slice(32 * start, 32 * stop)
    shard = {part: shard_rows(part, tensor, rows.start, rows.stop) for part, tensor in pack_linear(linear).items()}
    assert torch.equal(decoded(shard, linear.in_features, mode), linear.dequantize()[rows])
    assert linear.bias is not None
    assert torch.equal(shard["bias"], linear.bias[rows])


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(MODES), st.integers(1, 2), st.integers(1, 5), SEEDS, st.data())
def test_a_shard_of_inputs_decodes_to_those_inputs(
    make_linear: MakeLinear, mode: str, stripes: int, groups: int, seed: int, data: st.DataObject
) -> None:
    linear = make_linear(mode, 32 * stripes, 128 * groups, seed)
    start = data.draw(st.integers(0, groups - 1))
    stop = data.draw(st.integers(start + 1, groups))
    columns = slice(128 * start, 128 * stop)
    shard = {
        part: shard_columns(part, tensor, columns.start, columns.stop) for part, tensor in pack_linear(linear).items()
    }
    assert torch.equal(decoded(shard, 128 * (stop - start), mode), linear.dequantize()[:, columns])


def test_slicing_columns_of_qweight_is_not_cutting_inputs(make_linear: MakeLinear) -> None:
    qweight = pack_linear(make_linear("pre_scale", 64, 256, 5))["qweight"]
    assert not torch.equal(qweight[:, :64], shard_columns("qweight", qweight, 0, 128))


@pytest.mark.parametrize(("start", "stop"), [(16, 64), (0, 48), (32, 32), (32, 96), (-32, 32)])
def test_channels_are_cut_at_multiples_of_32(make_linear: MakeLinear, start: int, stop: int) -> None:
    for part, tensor in pack_linear(make_linear("pre_scale", 64, 128, 0)).items():
        with pytest.raises(ValueError, match=f"{part}: channels {start}..{stop} of 64 .* multiples of 32"):
            shard_rows(part, tensor, start, stop)


@pytest.mark.parametrize(("start", "stop"), [(64, 256), (0, 160), (128, 128), (128, 384), (-128, 128)])
@pytest.mark.parametrize("part", ["qweight", "s2_scales", "s2_zeros"])
def test_inputs_are_cut_at_multiples_of_128(make_linear: MakeLinear, part: str, start: int, stop: int) -> None:
    tensor = pack_linear(make_linear("pre_scale", 64, 256, 0))[part]
    with pytest.raises(ValueError, match=f"{part}: inputs {start}..{stop} of 256 .* multiples of 128"):
        shard_columns(part, tensor, start, stop)
