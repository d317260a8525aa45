"""The vLLM plug-in as vLLM meets it: found by its entry point, configured by a checkpoint, and models that are loaded
and run by vLLM's own classes, on one process and on several."""

from __future__ import annotations

import json
import logging
import pydoc
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from qoq.formats.quantization_config import QuantizationConfig
from qoq.recipes.errors import InputError
from tests.kernels.hf_cases import (
    MODELS,
    SHARED,
    edit_quantization,
    error_of,
    load_tensors,
    save_tensors,
    write_checkpoint,
)
from tests.kernels.vllm_cases import BACKEND, layers, on_rank, plugin_config, qkv_layer, quantization
from tests.kernels.vllm_rank import POOL, TOKENS

ROOT = Path(__file__).parents[2]
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 512}
"""So that four GPUs get 128 inputs of o_proj and down_proj each; they share two KV heads."""


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(MODELS, "wide", (lambda: LlamaConfig(**{**SHARED, **WIDE}), 128))
    return "wide"


def run_ranks(folder: Path, size: int, *cache: str) -> tuple[torch.Tensor | None, str]:
    """Logits [L, vocabulary] of a checkpoint on `size` processes, None when one failed; and what rank 0 said.

    cache: a cache type that is asked for
    """
    script = str(ROOT / "tests" / "kernels" / "vllm_rank.py")
    common = [str(size), str(folder.parent / "rendezvous"), str(folder.parent / "logits")]
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(folder), str(rank), *common, *cache],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    output, *_ = [process.communicate(timeout=250)[0] for process in ranks]
    if any(process.returncode for process in ranks):
        return None, output
    return load_file(folder.parent / "logits")["logits"], output


# ---- registration


def test_the_entry_point_registers_and_touches_no_gpu() -> None:
    probe = """
import json, sys, torch
from vllm.plugins import load_general_plugins
load_general_plugins()
heavy = [name for name in ("vllm.model_executor.layers.linear", "qoq.kernels.ops", "cupy") if name in sys.modules]
from qoq.kernels.vllm.plugin import register
register()
register()
from vllm.model_executor.layers.quantization import get_quantization_config
print(json.dumps([heavy, torch.cuda.is_initialized(), get_quantization_config("qoq").__module__]))
"""
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd="/")
    assert json.loads(result.stdout.splitlines()[-1]) == [[], False, "qoq.kernels.vllm.config"]


def test_another_method_of_our_name_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from qoq.kernels.vllm import interface
    from qoq.kernels.vllm.plugin import register

    monkeypatch.setitem(interface.methods._CUSTOMIZED_METHOD_TO_QUANT_CONFIG, "qoq", SimpleNamespace)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    register()
    assert interface.known_method("qoq") is SimpleNamespace
    assert "another quantization method 'qoq'" in caplog.text


def test_an_unknown_vllm_is_told_of_and_not_stopped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from qoq.kernels.vllm import interface
    from qoq.kernels.vllm.plugin import register

    monkeypatch.delattr(interface.methods, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    register()
    assert "this version of vLLM is not supported" in caplog.text


# ---- configuration


def test_what_the_configuration_tells_vllm() -> None:
    config = plugin_config.QoQConfig.from_config(QuantizationConfig(128).to_dict())
    assert config.get_name() == "qoq"
    assert set(config.get_supported_act_dtypes()) == {torch.float16, torch.bfloat16}
    assert config.get_min_capability() == 80
    assert "group_size=128" in repr(config)  # part of vLLM's key for compiled code


def test_what_is_not_served_is_refused() -> None:
    with pytest.raises(InputError, match="act_bits is 16; the vLLM plug-in serves 8"):
        quantization(act_bits=16)


def test_a_key_that_is_not_understood_is_named() -> None:
    with pytest.raises(InputError, match="group_size is 64"):
        plugin_config.QoQConfig.from_config({**QuantizationConfig(128).to_dict(), "group_size": 64})


def test_linears_in_16_bit_are_vllms_own() -> None:
    block = "model.layers.0.self_attn"
    config = quantization(modules_to_not_convert=tuple(f"{block}.{name}_proj" for name in "qkv"))
    with on_rank(0, 1):
        assert type(qkv_layer(config, 128, 4, 2).quant_method) is layers.UnquantizedLinearMethod
        other = layers.RowParallelLinear(128, 64, quant_config=config, prefix=f"{block}.o_proj")
    assert type(other.quant_method).__module__ == "qoq.kernels.vllm.linear"


def test_names_are_mapped_to_those_of_the_model_in_vllm() -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    config = quantization(modules_to_not_convert=("model.layers.0.mlp.down_proj", "lm_head"))
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert config.checkpoint.modules_to_not_convert == ("language_model.model.layers.0.mlp.down_proj", "lm_head")


def test_a_fused_linear_with_one_part_in_16_bit_is_refused() -> None:
    config = quantization(modules_to_not_convert=("model.layers.0.self_attn.k_proj",))
    with on_rank(0, 1), pytest.raises(InputError, match=r"qkv_proj: vLLM fuses .* only .*k_proj is left in 16 bit"):
        qkv_layer(config, 128, 4, 2)


def test_embeddings_are_vllms_own() -> None:
    assert quantization().get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None


@pytest.mark.parametrize(
    ("kv_bits", "backend", "warnings"),
    [
        (4, "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend", 1),
        (16, "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend", 0),
        (4, BACKEND, 0),
    ],
)
def test_a_cache_that_is_not_ours_is_told(
    kv_bits: int, backend: str, warnings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    log = SimpleNamespace(warning_once=lambda text, *values: said.append(text % values))
    monkeypatch.setattr(plugin_config, "logger", log)
    attention = torch.nn.Module()
    attention.kv_cache_dtype, attention.kv_cache_torch_dtype = "auto", torch.bfloat16
    attention.attn_backend, attention.impl = pydoc.locate(backend), SimpleNamespace(memory_fits=True)
    quantization(kv_bits=kv_bits).get_quant_method(attention, "model.layers.0.self_attn.attn")
    assert len(said) == warnings
    assert all("vLLM's own, in bfloat16, not qoq's 4-bit cache" in line for line in said)


# ---- whole models


# float16 between the linears flips a code of an activation here and there, and then one of the cache; the same with
# another cache, or without rotation, is three times as far off. Several ranks each scale their own part of a token at
# o_proj and down_proj.
CLOSE = 0.1


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        *((name, {}) for name in MODELS),
        ("llama", {"kv_bits": 8}),
        ("qwen3", {"key_rotation": "hadamard"}),
    ],
)
def test_a_model_of_each_family_computes_what_it_should(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", name, **keys)
    logits, output = run_ranks(checkpoint.folder, 1)
    assert logits is not None, output
    bits, rotation = keys.get("kv_bits", 4), keys.get("key_rotation", "none")
    expected = checkpoint.expected(torch.tensor([TOKENS]), kv_bits=bits, rotated=rotation == "hadamard")[0]
    assert error_of(logits, expected) < CLOSE
    told = f"qoq: KV cache of {bits} bits, key rotation {rotation}: {POOL} pages of 64 tokens ({64 * POOL} tokens)"
    assert output.count(told) == 1
    assert "vLLM's own" not in output


@pytest.mark.parametrize("size", [2, 4])
def test_a_model_on_several_ranks_computes_what_it_should(size: int, wide: str, tmp_path: Path) -> None:
    kept = tuple(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up"))
    checkpoint = write_checkpoint(tmp_path / "model", wide, modules_to_not_convert=("lm_head", *kept))
    logits, output = run_ranks(checkpoint.folder, size)
    assert logits is not None, output
    assert error_of(logits, checkpoint.expected(torch.tensor([TOKENS]))[0]) < CLOSE
    assert "with 1 KV heads of 64 on each GPU" in output


@pytest.mark.parametrize(("kv_bits", "cache", "told"), [(16, "auto", 0), (4, "float16", 1)])
def test_a_model_with_a_cache_of_vllms_own(kv_bits: int, cache: str, told: int, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama", kv_bits=kv_bits, key_rotation="hadamard")
    logits, output = run_ranks(checkpoint.folder, 1, cache)
    assert logits is not None, output
    assert error_of(logits, checkpoint.expected(torch.tensor([TOKENS]), kv_bits=16)[0]) < CLOSE
    assert output.count("the KV cache is vLLM's own, in float16, not qoq's 4-bit cache") == told


def test_more_ranks_than_a_linear_can_be_cut_for_are_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama")
    logits, output = run_ranks(checkpoint.folder, 2)
    assert logits is None
    assert "model.layers.0.self_attn.o_proj: this linear cannot be served on 2 GPUs" in output
    assert "each GPU gets 64 of 128 inputs, expected a multiple of 128" in output


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama")
    tensors = load_tensors(checkpoint.folder)
    del tensors["model.layers.1.mlp.up_proj.qweight"]
    save_tensors(checkpoint.folder, tensors)
    logits, output = run_ranks(checkpoint.folder, 1)
    assert logits is None
    assert "model.layers.1.mlp.gate_up_proj.qweight: parts [1] of 2" in output


def test_a_checkpoint_that_is_not_served_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama")
    edit_quantization(checkpoint.folder, act_bits=16)
    logits, output = run_ranks(checkpoint.folder, 1)
    assert logits is None
    assert "act_bits is 16; the vLLM plug-in serves 8" in output
