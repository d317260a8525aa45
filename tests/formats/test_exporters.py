"""Exported linears hold the weights that the kernels multiply by, in the bytes that the reader's own library makes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from hypothesis import given
from hypothesis import strategies as st

from qoq.formats.exporters import EXPORTERS, find_exporter
from qoq.formats.exporters.compressed_tensors import VllmW4A8, VllmW4A16, pack_words, unpack_words
from qoq.formats.packing import pack_linear
from qoq.formats.quantized_linear import QuantizedLinear, ZeroPoints
from qoq.recipes.errors import InputError

# Only what configuration asks: no file is read.
CHECKPOINT: Any = SimpleNamespace(
    config={"model_type": "llama"}, quantization=SimpleNamespace(modules_to_not_convert=["lm_head"])
)


def scheme(exporter: VllmW4A8 | VllmW4A16) -> QuantizationScheme:
    """What the library understands of the configuration that is written."""
    written = exporter.config(CHECKPOINT)["quantization_config"]
    parsed = QuantizationConfig.model_validate(written)
    assert parsed.ignore == ["lm_head"]
    found: QuantizationScheme = parsed.config_groups["group_0"]
    return found


def symmetric(linear: QuantizedLinear) -> QuantizedLinear:
    """The same with zeros of 8, and scales that keep every code in int8."""
    assert linear.s2_scales is not None
    return QuantizedLinear(
        linear.codes,
        linear.s1_scales,
        linear.s2_scales,
        ZeroPoints(torch.full_like(linear.zeros.values, 8)),
        linear.bias,
        linear.in_features,
    )


@given(
    seed=st.integers(0, 2**32 - 1), n=st.sampled_from([32, 64, 96]), k=st.sampled_from([128, 384]), bias=st.booleans()
)
def test_packed_tensors_are_those_of_the_library(
    make_linear: Callable[..., QuantizedLinear], seed: int, n: int, k: int, bias: bool
) -> None:
    made = make_linear("pre_scale", n, k, seed, has_bias=bias)
    made = QuantizedLinear(
        made.codes, made.s1_scales.clamp(2**-14, 1000), made.s2_scales, made.zeros, made.bias, made.in_features
    )
    for exporter, linear in ((VllmW4A16(), made), (VllmW4A8(), symmetric(made))):
        stored = exporter.tensors(linear, torch.float16)
        signed = (linear.codes.to(torch.int16) - 8).to(torch.int8)
        assert torch.equal(stored["weight_packed"], pack_to_int32(signed, 4))
        zeros = (linear.zeros.values.to(torch.int16) - 8).to(torch.int8)
        if isinstance(exporter, VllmW4A16):
            assert torch.equal(stored["weight_zero_point"], pack_to_int32(zeros, 4, packed_dim=0))
        else:
            assert "weight_zero_point" not in stored
        assert ("bias" in stored) == bias
        # The library computes in the scale's type; in float32 nothing is rounded.
        exact = {name: tensor.float() if name == "weight_scale" else tensor for name, tensor in stored.items()}
        library = BaseCompressor.get_value_from_registry("pack-quantized").decompress(exact, scheme(exporter))
        decoded = exporter.decode(stored, k)
        assert torch.equal(library["weight"], decoded)
        weight = linear.dequantize()
        assert bool(((decoded - weight).abs() <= weight.abs() * 2**-11).all())


def test_what_is_written_fits_vllms_rules() -> None:
    """vLLM 0.26: CompressedTensorsConfig._is_wNaM_int and CompressedTensorsWNA8Int; _is_wNa16_group_channel."""
    for exporter in (VllmW4A8(), VllmW4A16()):
        found = scheme(exporter)
        weights = found.weights
        assert weights is not None
        assert exporter.config(CHECKPOINT)["quantization_config"]["format"] == found.format == "pack-quantized"
        assert (weights.num_bits, weights.type, weights.strategy, weights.group_size) == (4, "int", "group", 128)
        assert not weights.dynamic
        assert found.targets == ["Linear"]
        inputs = found.input_activations
        if isinstance(exporter, VllmW4A8):
            assert weights.symmetric
            assert inputs is not None
            assert (inputs.num_bits, inputs.type, inputs.strategy) == (8, "int", "token")
            assert inputs.symmetric
            assert inputs.dynamic
        else:
            assert not weights.symmetric
            assert inputs is None


@given(st.lists(st.lists(st.integers(0, 15), min_size=16, max_size=16), min_size=1, max_size=3))
def test_words_hold_eight_codes_the_first_lowest(rows: list[list[int]]) -> None:
    words = pack_words(torch.tensor(rows, dtype=torch.uint8))
    for row, packed in zip(rows, words.tolist(), strict=True):
        for i, word in enumerate(packed):
            assert word % 2**32 == sum(code << 4 * j for j, code in enumerate(row[8 * i : 8 * i + 8]))
    assert unpack_words(words).tolist() == rows


@pytest.mark.parametrize("mode", ["pre_scale", "post_scale", "per_channel"])
@pytest.mark.parametrize("name", ["omniserve", "sglang", "hf-dequantized"])
def test_decoding_what_is_stored_gives_the_weights(
    make_linear: Callable[..., QuantizedLinear], name: str, mode: str
) -> None:
    linear, exporter = make_linear(mode, 64, 256, 3, has_bias=True), find_exporter(name)
    stored = exporter.tensors(linear, torch.float32)
    assert torch.equal(exporter.decode(stored, 256), linear.dequantize())
    if name != "hf-dequantized":
        packed = pack_linear(linear)
        assert stored.keys() == packed.keys()
        assert all(torch.equal(stored[part], packed[part]) for part in packed)


def test_an_unknown_format_is_told_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"--to gguf.*\n.*vllm-w4a8"):
        find_exporter("gguf")
    assert set(EXPORTERS) == {"vllm-w4a8", "vllm-w4a16", "omniserve", "sglang", "hf-dequantized"}
