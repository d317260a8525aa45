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
SAME_CODES = 1e-5
"""Where all codes are the same, only the last places of float32 differ (3e-7); a single other code costs about 5e-3."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return {name: write_checkpoint(tmp_path_factory.mktemp(name), name, key_rotation="hadamard") for name in NAMES}


@pytest.fixture
def llama(checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    return checkpoints["llama"]


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))


def assert_same_but_for_flips(found: Tensor, expected: Tensor, effect: float) -> None:
    """Codes are the same, but for some that last places of float32 in norms and RoPE flip.

    A flipped code moves its token and those that attend to it: a quarter of the tokens must be as they were (without
    flips they differ by 5e-7), and all together within what a few flips do. Norms that are off by up to 16 times as
    much moved the logits by 0.15 of `effect`, what leaving out the rotation changes.
    """
    of_tokens = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(of_tokens.quantile(0.25)) < SAME_CODES
    assert error_of(found, expected) < 0.2 * effect


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_oracle(name: str, checkpoints: dict[str, Checkpoint], tokens: Tensor) -> None:
    model = load(checkpoints[name], dtype=torch.float64)
    assert model.config._attn_implementation == "qoq_kv4_hadamard"
    logits = logits_of(model, tokens)
    assert error_of(logits, checkpoints[name].expected(tokens, rotated=True)) < SAME_CODES
    assert error_of(logits, checkpoints[name].expected(tokens)) > 1e-2


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-2)])  # 2e-2: a few flips
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
        assert error_of(logits, logits_of(reference, part, past_key_values=rounded)) < SAME_CODES


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
        assert error_of(logits_of(model, tokens), llama.expected(tokens, kv_bits=bits, rotated=True)) < SAME_CODES
    plugin.set_kv_bits(model, 4, "none")
    assert error_of(logits_of(model, tokens), llama.expected(tokens)) < SAME_CODES
    plugin.set_kv_bits(model, 4)
    assert torch.equal(logits_of(model, tokens), four)
    with pytest.raises(InputError, match="key_rotation is 'random', expected 'none' or 'hadamard'"):
        plugin.set_kv_bits(model, 4, "random")  # type: ignore[arg-type]


def test_a_checkpoint_without_rotation_can_be_told_to(tmp_path: Path, tokens: Tensor) -> None:
    checkpoint = write_checkpoint(tmp_path, "llama")
    model = load(checkpoint, dtype=torch.float64)
    plugin.set_kv_bits(model, 4, "hadamard")
    assert error_of(logits_of(model, tokens), checkpoint.expected(tokens, rotated=True)) < SAME_CODES


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


def effect_of_rotation(model: Any, tokens: Tensor, rotated: Tensor) -> float:
    """How far logits without rotation are from those with it; the model keeps its own."""
    plugin.set_kv_bits(model, 4, "none")
    effect = error_of(logits_of(model, tokens), rotated)
    plugin.set_kv_bits(model, 4)
    return effect


@pytest.mark.parametrize("name", NAMES)
def test_flipped_codes_are_told_from_a_missing_rotation(
    name: str, checkpoints: dict[str, Checkpoint], tokens: Tensor
) -> None:
    """What the comparison of devices tolerates: norms that are off in the last places of float32."""
    model = load(checkpoints[name], dtype=torch.float64)
    expected = logits_of(model, tokens)
    effect = effect_of_rotation(model, tokens, expected)
    random = torch.Generator().manual_seed(0)

    def disturb(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return output * (1 + 2.0**-19 * (2 * torch.rand(output.shape, generator=random, dtype=output.dtype) - 1))

    for path, module in model.named_modules():
        if path.endswith("norm"):
            module.register_forward_hook(disturb)
    errors = []
    for _ in range(5):
        found = logits_of(model, tokens)
        assert_same_but_for_flips(found, expected, effect)
        errors.append(error_of(found, expected))
    assert max(errors) > 1e-3, "no code was flipped"
    plugin.set_kv_bits(model, 4, "none")
    with pytest.raises(AssertionError):
        assert_same_but_for_flips(logits_of(model, tokens), expected, effect)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("name", NAMES)
def test_cuda_agrees_with_the_cpu(name: str, checkpoints: dict[str, Checkpoint], tokens: Tensor) -> None:
    model = load(checkpoints[name], dtype=torch.float64)
    expected = logits_of(model, tokens)
    effect = effect_of_rotation(model, tokens, expected)
    found = logits_of(model.to("cuda"), tokens.cuda()).cpu()
    assert_same_but_for_flips(found, expected, effect)
    half = load(checkpoints[name], device_map="auto")
    on_kernels = logits_of(half, tokens.cuda()).cpu()
    # float16 between the linears flips codes of every token: 0.5 of the effect on the CPU, and 1.05 without rotation.
    assert error_of(on_kernels, expected) < 0.75 * effect
    plugin.set_backend(half, "reference")
    # The same numbers, but for the order of sums outside the kernels: a few flips at most.
    assert error_of(on_kernels, logits_of(half, tokens.cuda()).double().cpu()) < 0.2 * effect
    assert half.generate(tokens.cuda(), max_new_tokens=4, do_sample=False).shape == (2, 28)
