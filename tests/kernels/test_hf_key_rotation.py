"""Rotated keys in the transformers plug-in, against a cache that turns keys, rounds them and turns them back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig

import qoq.kernels.hf as plugin
from qoq.recipes.errors import InputError
from tests.kernels.hf_cases import (
    MODELS,
    SHARED,
    VOCABULARY,
    Checkpoint,
    RoundedCache,
    edit_quantization,
    error_of,
    load,
    logits_of,
    write_checkpoint,
)

NAMES = ("llama", "qwen3", "mistral")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return {name: write_checkpoint(tmp_path_factory.mktemp(name), name, key_rotation="hadamard") for name in NAMES}


@pytest.fixture
def llama(checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    return checkpoints["llama"]


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_oracle(name: str, checkpoints: dict[str, Checkpoint], tokens: Tensor) -> None:
    model = load(checkpoints[name], dtype=torch.float64)
    assert model.config._attn_implementation == "qoq_kv4_hadamard"
    logits = logits_of(model, tokens)
    assert error_of(logits, checkpoints[name].expected(tokens, rotated=True)) < 2e-3
    assert error_of(logits, checkpoints[name].expected(tokens)) > 1e-2


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_prefill_chunks_and_decode_agree(
    name: str, dtype: torch.dtype, tolerance: float, checkpoints: dict[str, Checkpoint], tokens: Tensor
) -> None:
    model = load(checkpoints[name], dtype=dtype)
    whole = logits_of(model, tokens)
    for steps in ([1] * 24, [10, 1, 1, 9, 3]):
        cache = DynamicCache(config=model.config)
        parts = [logits_of(model, part, past_key_values=cache) for part in tokens.split(steps, dim=1)]
        assert error_of(torch.cat(parts, dim=1), whole.double()) < tolerance


def test_decode_agrees_with_a_cache_that_stores_rounded_keys(llama: Checkpoint, tokens: Tensor) -> None:
    model, reference = load(llama, dtype=torch.float64), llama.reference()
    cache, rounded = DynamicCache(config=model.config), RoundedCache(llama.config, 4, rotated=True)
    for part in tokens.split([16, 1, 1, 6], dim=1):
        logits = logits_of(model, part, past_key_values=cache)
        assert error_of(logits, logits_of(reference, part, past_key_values=rounded)) < 2e-3


def test_generation_does_not_depend_on_the_cache(llama: Checkpoint, tokens: Tensor) -> None:
    model = load(llama, dtype=torch.float64)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    kept = model.generate(tokens[:1, :9], **options)
    assert kept.tolist() == model.generate(tokens[:1, :9], use_cache=False, **options).tolist()
    assert kept.tolist() == model.generate(tokens[:1, :9], cache_implementation="static", **options).tolist()


def test_bits_and_rotation_can_be_changed_after_loading(llama: Checkpoint, tokens: Tensor) -> None:
    model = load(llama, dtype=torch.float64)
    four = logits_of(model, tokens)
    for bits, name in ((8, "qoq_kv8_hadamard"), (16, "sdpa")):
        plugin.set_kv_bits(model, bits)
        assert model.config._attn_implementation == name
        assert error_of(logits_of(model, tokens), llama.expected(tokens, kv_bits=bits, rotated=True)) < 2e-3
    plugin.set_kv_bits(model, 4, "none")
    assert error_of(logits_of(model, tokens), llama.expected(tokens)) < 2e-3
    plugin.set_kv_bits(model, 4)
    assert torch.equal(logits_of(model, tokens), four)
    with pytest.raises(InputError, match="key_rotation is 'random', expected 'none' or 'hadamard'"):
        plugin.set_kv_bits(model, 4, "random")  # type: ignore[arg-type]


def test_a_checkpoint_without_rotation_can_be_told_to(tmp_path: Path, tokens: Tensor) -> None:
    checkpoint = write_checkpoint(tmp_path, "llama")
    model = load(checkpoint, dtype=torch.float64)
    plugin.set_kv_bits(model, 4, "hadamard")
    assert error_of(logits_of(model, tokens), checkpoint.expected(tokens, rotated=True)) < 2e-3


def test_sixteen_bits_rotate_nothing(tmp_path: Path, tokens: Tensor) -> None:
    checkpoint = write_checkpoint(tmp_path, "llama", kv_bits=16, act_bits=16, key_rotation="hadamard")
    model = load(checkpoint, dtype=torch.float32)
    assert model.config._attn_implementation == "sdpa"
    assert error_of(logits_of(model, tokens), checkpoint.expected(tokens, act_bits=16, kv_bits=16)) < 2e-6


def test_saved_and_dequantized_models(llama: Checkpoint, tokens: Tensor, tmp_path: Path) -> None:
    model = load(llama)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["key_rotation"] == "hadamard"
    assert torch.equal(logits_of(load(tmp_path), tokens), logits_of(model, tokens))
    dense = model.dequantize(dtype=torch.float32)
    assert dense.config._attn_implementation == "sdpa"
    assert error_of(logits_of(dense, tokens), llama.expected(tokens, act_bits=16, kv_bits=16)) < 2e-6


def test_another_attention_is_refused(llama: Checkpoint) -> None:
    with pytest.raises(InputError, match="attn_implementation is 'eager', but a 4-bit KV cache"):
        load(llama, attn_implementation="eager")


def test_heads_that_cannot_be_rotated_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "wide", (lambda: LlamaConfig(**{**SHARED, "head_dim": 96}), 128))
    write_checkpoint(tmp_path, "wide", key_rotation="hadamard")
    with pytest.raises(InputError, match="key_rotation is 'hadamard', but head_dim is 96, which is no power of two"):
        load(tmp_path)
    edit_quantization(tmp_path, key_rotation="none")
    load(tmp_path)
    edit_quantization(tmp_path, key_rotation="random")
    with pytest.raises(InputError, match=r"quantization_config: key_rotation is 'random'; .*'none', 'hadamard'"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_backends_rotate_alike(
    name: str,
    checkpoints: dict[str, Checkpoint],
    tokens: Tensor,
    cpu_operators: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With stand-ins for the kernels, which compute the same numbers: auto and kernels run them, the reference not."""
    monkeypatch.setattr("qoq.kernels.hf_attention.is_on_gpu", lambda x: True)
    monkeypatch.setattr("qoq.kernels.modules.is_on_gpu", lambda x: True)
    monkeypatch.setattr("qoq.kernels.ops.usable_device_problem", lambda: None)
    model = load(checkpoints[name], dtype=torch.float16)
    plugin.set_backend(model, "reference")
    expected = logits_of(model, tokens)
    assert cpu_operators.calls == []
    layers = model.config.num_hidden_layers
    for backend in ("auto", "kernels"):
        plugin.set_backend(model, backend)
        cpu_operators.calls.clear()
        assert torch.equal(logits_of(model, tokens), expected)
        assert cpu_operators.calls.count("kv_round_trip") == 2 * layers
        assert cpu_operators.calls.count("rotate_heads") == layers
    for operator in ("rotate_heads", "kv_round_trip"):
        cpu_operators.defects = {operator: lambda x: x.neg_()}
        assert error_of(logits_of(model, tokens), expected.double()) > 0.1, "its result is not used"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("name", NAMES)
def test_cuda_agrees_with_the_cpu(name: str, checkpoints: dict[str, Checkpoint], tokens: Tensor) -> None:
    expected = logits_of(load(checkpoints[name], dtype=torch.float64), tokens)
    model = load(checkpoints[name], dtype=torch.float64).to("cuda")
    assert error_of(logits_of(model, tokens.cuda()).cpu(), expected) < 2e-3
    half = load(checkpoints[name], device_map="auto")
    on_kernels = logits_of(half, tokens.cuda())
    assert error_of(on_kernels.cpu(), expected) < 0.1
    plugin.set_backend(half, "reference")
    assert error_of(on_kernels.cpu(), logits_of(half, tokens.cuda()).double().cpu()) < 2e-2
    assert half.generate(tokens.cuda(), max_new_tokens=4, do_sample=False).shape == (2, 28)
