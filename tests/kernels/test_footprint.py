"""Bytes of a served model, against numbers worked out by hand and tensors that the formats really make."""

from __future__ import annotations

import pytest
import torch

from qoq.formats.packing import packed_shapes
from qoq.kernels.bench import GEMM_VARIANTS, gemm_bytes
from qoq.kernels.footprint import (
    RESERVED_BYTES,
    activation_bytes,
    kv_token_bytes,
    largest_batch,
    linear_bytes,
    memory_split,
    weight_bytes,
)
from qoq.recipes.precisions import find_precision
from qoq.recipes.shapes import find_shape, model_shapes

LLAMA = find_shape("llama-3-8b")
LAYER_WEIGHTS = 4096 * (6144 + 4096 + 28672) + 14336 * 4096
KV4 = find_precision("w4a8kv4-g128")


def test_llama_3_8b_by_hand() -> None:
    assert kv_token_bytes(LLAMA, 4) == 32 * 2 * 8 * 68
    assert kv_token_bytes(LLAMA, 8) == 32 * 2 * 8 * 132
    assert kv_token_bytes(LLAMA, 16) == 131072
    vocabulary = 2 * 128256 * 4096 * 2
    assert weight_bytes(LLAMA, "fp16") == 2 * 32 * LAYER_WEIGHTS + vocabulary == 16_059_990_016
    channels = 6144 + 4096 + 28672 + 4096
    g128 = LAYER_WEIGHTS // 2 + 2 * LAYER_WEIGHTS // 128 + 2 * channels
    assert weight_bytes(LLAMA, "g128") == 32 * g128 + vocabulary
    assert activation_bytes(LLAMA) == 2 * (2 * 4096 + 6144 + 3 * 14336)


def test_tied_embeddings_are_counted_once() -> None:
    shape = find_shape("llama-3.2-1b")
    blocks = shape.num_layers * sum(linear_bytes("fp16", n, k) for n, k in shape.layer_gemms().values())
    assert weight_bytes(shape, "fp16") - blocks == 2 * shape.vocab_size * shape.hidden_size


@pytest.mark.parametrize("progressive", [True, False])
@pytest.mark.parametrize("name", ["llama-3-8b", "smollm2-135m"])
def test_linears_have_the_bytes_of_the_packed_tensors(name: str, progressive: bool) -> None:
    for n, k in find_shape(name).layer_gemms().values():
        packed = packed_shapes(n, k, progressive=progressive, has_bias=False)
        on_disk = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in packed.values())
        assert linear_bytes("g128" if progressive else "per_channel", n, k) == on_disk


def test_bench_counts_the_same_weights() -> None:
    kinds = {"w4a8-g128": "g128", "w4a8-chn": "per_channel", "w8a8": "int8", "fp16": "fp16", "fp8": "fp8"}
    for variant, weights in kinds.items():
        assert variant in GEMM_VARIANTS
        assert gemm_bytes(variant, 0, 4096, 14336) == linear_bytes(weights, 4096, 14336)  # type: ignore[arg-type]


def test_a_batch_fills_the_memory_and_one_more_does_not_fit() -> None:
    memory = 46068 << 20
    options = {"tokens": 1536, "workspace": 2.0}
    for precision in map(find_precision, ("w4a8kv4-g128", "w8a8kv8", "fp16")):
        batch = largest_batch(LLAMA, precision, memory, prompt_len=1024, chunk_tokens=8192, limit=100_000, **options)
        assert batch > 100
        for sequences, fits in ((batch, True), (batch + 1, False)):
            split = memory_split(LLAMA, precision, memory, sequences=sequences, prompt_tokens=8192, **options)
            assert (split.left >= 0) == fits
            assert split.kv_cache == sequences * 1536 * kv_token_bytes(LLAMA, precision.kv_bits)
            assert split.weights + split.kv_cache + split.activations + RESERVED_BYTES + split.left == memory


def test_whole_pages_are_taken() -> None:
    def cache(tokens: int) -> int:
        return memory_split(LLAMA, KV4, 1 << 40, sequences=3, tokens=tokens, prompt_tokens=1, workspace=1.0).kv_cache

    assert cache(65) == cache(128) == 2 * cache(64)


def test_what_does_not_fit_is_no_batch() -> None:
    for name in ("llama-2-70b", "qwen1.5-72b"):
        assert (
            largest_batch(
                find_shape(name),
                find_precision("fp16"),
                46068 << 20,
                tokens=1536,
                prompt_len=1024,
                workspace=2.0,
                chunk_tokens=None,
                limit=512,
            )
            == 0
        )


@pytest.mark.parametrize("shape", model_shapes().values(), ids=lambda shape: shape.name)
def test_fewer_bits_are_fewer_bytes(shape: object) -> None:
    weights = [weight_bytes(shape, kind) for kind in ("per_channel", "g128", "int4_fp16", "int8", "fp16")]  # type: ignore[arg-type]
    assert weights == sorted(weights)
    caches = [kv_token_bytes(shape, bits) for bits in (4, 8, 16)]  # type: ignore[arg-type]
    assert caches == sorted(caches)
