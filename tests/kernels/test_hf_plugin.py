"""The transformers plug-in against an independent model: integer oracles for the linears, a cache that stores rounded
keys and values for attention."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
)

import qoq.kernels.hf as plugin
from qoq.formats.quantization_config import QuantizationConfig
from qoq.kernels.modules import QoQLinear
from qoq.recipes.errors import InputError
from tests.kernels.hf_cases import (
    MODELS,
    VOCABULARY,
    Checkpoint,
    RoundedCache,
    edit_config,
    edit_quantization,
    error_of,
    load,
    load_tensors,
    logits_of,
    save_tensors,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return {name: write_checkpoint(tmp_path_factory.mktemp(name), name) for name in MODELS}


@pytest.fixture
def llama(checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    return checkpoints["llama"]


@pytest.fixture
def own_copy(tmp_path: Path) -> Checkpoint:
    """A checkpoint that the test may damage."""
    return write_checkpoint(tmp_path / "copy", "llama")


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))


# ---- numbers


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_oracle(name: str, checkpoints: dict[str, Checkpoint], tokens: Tensor) -> None:
    checkpoint = checkpoints[name]
    model, info = load(checkpoint, dtype=torch.float64, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert sum(isinstance(module, QoQLinear) for module in model.modules()) == 14
    assert type(model.lm_head) is nn.Linear
    logits = logits_of(model, tokens)
    # A float32 product that rounds otherwise than the oracle's float64 one may move an 8- or 4-bit code now and then;
    # a forgotten rounding moves all of them.
    assert error_of(logits, checkpoint.expected(tokens)) < 2e-3
    assert error_of(logits, checkpoint.expected(tokens, kv_bits=16)) > 2e-2
    assert error_of(logits, checkpoint.expected(tokens, act_bits=16)) > 4e-3


@pytest.mark.parametrize("name", MODELS)
def test_weights_alone_agree_to_float32(name: str, tmp_path: Path, tokens: Tensor) -> None:
    checkpoint = write_checkpoint(tmp_path, name, act_bits=16, kv_bits=16)
    model = load(checkpoint, dtype=torch.float32)
    assert model.config._attn_implementation == "sdpa"
    assert error_of(logits_of(model, tokens), checkpoint.expected(tokens, act_bits=16, kv_bits=16)) < 2e-6


def test_kv8_is_honoured(tmp_path: Path, tokens: Tensor) -> None:
    checkpoint = write_checkpoint(tmp_path, "qwen3", kv_bits=8)
    model = load(checkpoint, dtype=torch.float64)
    assert model.config._attn_implementation == "qoq_kv8"
    logits = logits_of(model, tokens)
    assert error_of(logits, checkpoint.expected(tokens, kv_bits=8)) < 1e-3
    assert error_of(logits, checkpoint.expected(tokens, kv_bits=4)) > 2e-2


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize(
    ("dtype", "act_bits", "tolerance"),
    # In float32 the two orders of summing differ in the last bit, which may move a code.
    [(torch.float64, 8, 1e-9), (torch.float32, 8, 2e-3), (torch.float32, 16, 2e-3)],
)
def test_prefill_chunks_and_decode_agree(
    name: str,
    dtype: torch.dtype,
    act_bits: int,
    tolerance: float,
    checkpoints: dict[str, Checkpoint],
    tokens: Tensor,
) -> None:
    model = load(checkpoints[name], dtype=dtype)
    plugin.set_act_bits(model, act_bits)
    whole = logits_of(model, tokens)
    for steps in ([1] * 24, [10, 1, 1, 9, 3]):
        cache = DynamicCache(config=model.config)
        parts = [logits_of(model, part, past_key_values=cache) for part in tokens.split(steps, dim=1)]
        assert error_of(torch.cat(parts, dim=1), whole.double()) < tolerance


def test_decode_agrees_with_a_cache_that_stores_rounded_keys_and_values(llama: Checkpoint, tokens: Tensor) -> None:
    model, reference = load(llama, dtype=torch.float64), llama.reference()
    cache, rounded = DynamicCache(config=model.config), RoundedCache(llama.config, 4)
    for part in tokens.split([16, 1, 1, 6], dim=1):
        logits = logits_of(model, part, past_key_values=cache)
        assert error_of(logits, logits_of(reference, part, past_key_values=rounded)) < 2e-3


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generate_with_left_padding(name: str, checkpoints: dict[str, Checkpoint], tokens: Tensor) -> None:
    model = load(checkpoints[name], dtype=torch.float64)
    short, long = tokens[0, :7], tokens[1, :15]
    batch = torch.stack([nn.functional.pad(short, (8, 0)), long])
    mask = torch.stack([torch.arange(15) >= 8, torch.ones(15, dtype=torch.bool)]).long()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(batch, attention_mask=mask, **options)
    for row, prompt in enumerate((short, long)):
        alone = model.generate(prompt[None], **options)
        assert together[row, 15:].tolist() == alone[0, len(prompt) :].tolist()
    static = model.generate(long[None], cache_implementation="static", **options)
    assert static[0].tolist() == together[1].tolist()


# ---- types and devices


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32])
def test_dtype_leaves_the_packed_tensors_alone(dtype: torch.dtype | None, own_copy: Checkpoint, tokens: Tensor) -> None:
    tensors = load_tensors(own_copy.folder)
    model = load(own_copy) if dtype is None else load(own_copy, dtype=dtype)
    assert model.dtype == (dtype or torch.float16)
    logits = logits_of(model, tokens)
    assert logits.dtype == model.dtype
    assert error_of(logits, own_copy.expected(tokens)) < 0.2
    model.to(torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.bfloat16
    packed = {key: tensor for key, tensor in model.state_dict().items() if ".layers." in key and "norm" not in key}
    assert len(packed) == 14 * 4
    assert all(tensor.dtype == tensors[key].dtype for key, tensor in packed.items())
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in packed.items())


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(device_map: str | dict[str, str], llama: Checkpoint, tokens: Tensor) -> None:
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("auto would choose the GPU")
    expected = logits_of(load(llama, dtype=torch.float32), tokens)
    assert torch.equal(logits_of(load(llama, dtype=torch.float32, device_map=device_map), tokens), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("name", MODELS)
def test_cuda_agrees_with_the_cpu(name: str, checkpoints: dict[str, Checkpoint], tokens: Tensor) -> None:
    expected = logits_of(load(checkpoints[name], dtype=torch.float64), tokens)
    for model in (
        load(checkpoints[name], dtype=torch.float64, device_map="cuda"),
        load(checkpoints[name], dtype=torch.float64).to("cuda"),
    ):
        assert error_of(logits_of(model, tokens.cuda()).cpu(), expected) < 2e-3
    half = load(checkpoints[name], device_map="auto")
    assert error_of(logits_of(half, tokens.cuda()).cpu(), expected) < 0.1
    assert half.generate(tokens.cuda(), max_new_tokens=4, do_sample=False).shape == (2, 28)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_blocks_offloaded_to_the_cpu(offload_buffers: bool, llama: Checkpoint, tokens: Tensor) -> None:
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": "cpu"}
    device_map = {**places, "model.norm": 0, "lm_head": 0}
    model = load(llama, dtype=torch.float64, device_map=device_map, offload_buffers=offload_buffers)
    expected = llama.expected(tokens)
    for _ in range(2):
        assert error_of(logits_of(model, tokens.cuda()).cpu(), expected) < 2e-3


def test_base_model_loads_too(llama: Checkpoint, tokens: Tensor) -> None:
    base = AutoModel.from_pretrained(llama.folder, dtype=torch.float32)
    model = load(llama, dtype=torch.float32)
    assert base.layers[1].mlp.down_proj.name == "model.layers.1.mlp.down_proj"
    assert base.config._attn_implementation == "qoq_kv4"
    with torch.no_grad():
        hidden = base.to(torch.float32)(tokens).last_hidden_state
        assert torch.equal(model.lm_head(hidden), model(tokens).logits)


# ---- writing


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_save_and_reload_is_bit_equal(
    name: str, checkpoints: dict[str, Checkpoint], tokens: Tensor, tmp_path: Path
) -> None:
    model = load(checkpoints[name])
    model.save_pretrained(tmp_path)
    before, after = load_tensors(checkpoints[name].folder), load_tensors(tmp_path)
    assert before.keys() == after.keys()
    assert all(tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]) for key, tensor in before.items())
    configs = [json.loads((folder / "config.json").read_text()) for folder in (checkpoints[name].folder, tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(logits_of(load(tmp_path), tokens), logits_of(model, tokens))


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_dequantize_gives_a_plain_model(
    dtype: torch.dtype | None, llama: Checkpoint, tokens: Tensor, tmp_path: Path
) -> None:
    model = load(llama).dequantize(dtype=dtype)
    assert not any(isinstance(module, QoQLinear) for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype or torch.float16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"
    expected = llama.expected(tokens, act_bits=16, kv_bits=16)
    assert error_of(logits_of(model, tokens), expected) < (1e-2 if dtype is None else 2e-6)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits_of(load(tmp_path), tokens), logits_of(model, tokens))


# ---- what the config says


def test_config_keeps_every_key() -> None:
    data = {**QuantizationConfig(group_size=128, kv_bits=8, padded={"a.b": 192}).to_dict(), "made_by": {"x": [1]}}
    config = plugin.QoQConfig.from_dict(data)
    assert config.to_dict() == data
    assert json.loads(config.to_json_string()) == data
    assert config.parsed() == QuantizationConfig.from_dict(data)
    brief = plugin.QoQConfig(wbits=4, group_size=-1)
    assert brief.to_dict() == QuantizationConfig(group_size=None).to_dict()


@pytest.mark.parametrize(
    ("key", "value"),
    [("wbits", 3), ("group_size", 64), ("kv_bits", 5), ("act_bits", 4), ("zero_domain", "none"), ("format_version", 9)],
)
def test_wrong_config_is_refused_by_key(key: str, value: object, own_copy: Checkpoint) -> None:
    edit_quantization(own_copy.folder, **{key: value})
    with pytest.raises(InputError, match=f"quantization_config: {key} is {value!r}"):
        load(own_copy)


def test_padding_must_be_that_of_the_model(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, "qwen3")
    edit_quantization(tmp_path, padded={"model.layers.0.mlp.down_proj": 321})
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj: in_features is 320, but `padded` says 321"):
        load(checkpoint)


def test_kept_modules_are_matched_by_their_whole_path(tmp_path: Path, tokens: Tensor) -> None:
    kept = ("lm_head", "model.layers.1.mlp.down_proj")
    checkpoint = write_checkpoint(tmp_path, "llama", modules_to_not_convert=kept)
    model = load(checkpoint, dtype=torch.float64)
    assert type(model.model.layers[1].mlp.down_proj) is nn.Linear
    assert sum(isinstance(module, QoQLinear) for module in model.modules()) == 13
    assert error_of(logits_of(model, tokens), checkpoint.expected(tokens)) < 2e-3
    edit_quantization(tmp_path, modules_to_not_convert=["lm_head", "down_proj", "model.layers.1.mlp"])
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj\.qweight is missing \(a 16-bit weight is there"):
        load(checkpoint)


def test_unknown_family_is_refused(own_copy: Checkpoint) -> None:
    edit_config(own_copy.folder, lambda data: data.update(model_type="gemma", architectures=["GemmaForCausalLM"]))
    with pytest.raises(InputError, match="model_type 'gemma'"):
        load(own_copy)


# ---- what the files hold


@pytest.mark.parametrize(
    "missing",
    [
        "model.layers.1.self_attn.k_proj.s2_scales",
        "model.layers.0.mlp.up_proj.qweight",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_missing_tensor_is_refused_by_name(missing: str, own_copy: Checkpoint) -> None:
    tensors = load_tensors(own_copy.folder)
    del tensors[missing]
    save_tensors(own_copy.folder, tensors)
    with pytest.raises(InputError, match=missing.replace(".", r"\.") + " is missing"):
        load(own_copy)


@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("s1_scales", lambda t: t.float(), r"expected F16 \[128\], got F32 \[128\]"),
        ("qweight", lambda t: t.view(torch.uint8), r"expected I8 \[128, 64\], got U8 \[128, 64\]"),
        ("qweight", lambda t: t[:64], r"expected I8 \[128, 64\], got I8 \[64, 64\]"),
    ],
)
def test_wrong_tensor_is_refused_by_name(
    leaf: str, change: Callable[[Tensor], Tensor], message: str, own_copy: Checkpoint
) -> None:
    name = f"model.layers.0.self_attn.q_proj.{leaf}"
    tensors = load_tensors(own_copy.folder)
    save_tensors(own_copy.folder, {**tensors, name: change(tensors[name])})
    with pytest.raises(InputError, match=f"{name}: {message}"):
        load(own_copy, ignore_mismatched_sizes=True)


def test_bias_without_a_place_is_refused(own_copy: Checkpoint) -> None:
    name = "model.layers.0.self_attn.o_proj.bias"
    save_tensors(own_copy.folder, {**load_tensors(own_copy.folder), name: torch.ones(128).half()})
    with pytest.raises(InputError, match=f"{name} is there, but has no place in the model"):
        load(own_copy)


def test_wrong_group_size_is_refused(own_copy: Checkpoint) -> None:
    edit_quantization(own_copy.folder, group_size=-1)
    with pytest.raises(InputError, match=r"q_proj\.s1_szeros is missing"):
        load(own_copy)


def test_illegal_bytes_are_refused_by_module(own_copy: Checkpoint, tokens: Tensor) -> None:
    tensors = load_tensors(own_copy.folder)
    tensors["model.layers.1.mlp.gate_proj.s2_scales"][0, 0] = 17
    save_tensors(own_copy.folder, tensors)
    model = load(own_copy)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.gate_proj: s2_scales"):
        model(tokens)


def test_state_dict_instead_of_files(llama: Checkpoint, tokens: Tensor) -> None:
    state, config = load_tensors(llama.folder), load(llama).config

    def from_state(tensors: dict[str, Tensor]) -> Any:
        kind = type(load(llama))
        return kind.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32)

    assert torch.equal(logits_of(from_state(state), tokens), logits_of(load(llama, dtype=torch.float32), tokens))
    del state["model.layers.1.self_attn.k_proj.s2_scales"]
    with pytest.raises(InputError, match=r"model\.layers\.1\.self_attn\.k_proj\.s2_scales is missing"):
        from_state(state)


# ---- attention


def test_another_attention_is_refused_rather_than_losing_kv4(llama: Checkpoint) -> None:
    assert load(llama).config._attn_implementation == "qoq_kv4"
    assert load(llama, attn_implementation="sdpa").config._attn_implementation == "qoq_kv4"
    with pytest.raises(InputError, match="attn_implementation is 'eager', but a 4-bit KV cache"):
        load(llama, attn_implementation="eager")


def test_attention_is_free_without_kv_quantization(own_copy: Checkpoint) -> None:
    edit_quantization(own_copy.folder, kv_bits=16)
    assert load(own_copy, attn_implementation="eager").config._attn_implementation == "eager"


def test_kv_and_act_bits_can_be_changed_after_loading(llama: Checkpoint, tokens: Tensor) -> None:
    model = load(llama, dtype=torch.float64)
    four = logits_of(model, tokens)
    for bits in (8, 16):
        plugin.set_kv_bits(model, bits)
        assert error_of(logits_of(model, tokens), llama.expected(tokens, kv_bits=bits)) < 2e-3
    plugin.set_act_bits(model, 16)
    assert error_of(logits_of(model, tokens), llama.expected(tokens, act_bits=16, kv_bits=16)) < 2e-6
    plugin.set_kv_bits(model, 4)
    plugin.set_act_bits(model, 8)
    assert torch.equal(logits_of(model, tokens), four)
    for change in (plugin.set_kv_bits, plugin.set_act_bits):
        with pytest.raises(InputError, match="is 3, expected"):
            change(model, 3)
    assert model.config.quantization_config.kv_bits == 4


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_backend_is_chosen_for_linears_and_cache(
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
    for backend in ("auto", "kernels"):
        plugin.set_backend(model, backend)
        cpu_operators.calls.clear()
        assert torch.equal(logits_of(model, tokens), expected)
        layers = model.config.num_hidden_layers
        assert cpu_operators.calls.count("w4a8_gemm") == 7 * layers
        assert cpu_operators.calls.count("kv_round_trip") == 2 * layers
        assert "rotate_heads" not in cpu_operators.calls
    plugin.set_kv_bits(model, 16)
    cpu_operators.calls.clear()
    logits_of(model, tokens)
    assert "kv_round_trip" not in cpu_operators.calls
    with pytest.raises(InputError, match="backend is 'cuda'"):
        plugin.set_backend(model, "cuda")  # type: ignore[arg-type]


def test_continuous_batching_is_refused(llama: Checkpoint) -> None:
    model = load(llama, dtype=torch.float32)
    assert not model._supports_flash_attn, "it would change to flash attention, which knows no KV quantization"
    with pytest.raises(ValueError, match="qoq_kv4"):
        model.generate_batch([[5, 6, 7]])


# ---- registration


def test_nothing_is_quantized_while_loading(tmp_path: Path) -> None:
    config = MODELS["llama"][0]()
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    wish = plugin.QoQConfig(**QuantizationConfig(group_size=128).to_dict())
    with pytest.raises(InputError, match="not quantized, and qoq does not quantize while loading"):
        load(tmp_path, quantization_config=wish)


def test_import_again_is_harmless(llama: Checkpoint, tokens: Tensor) -> None:
    before = logits_of(load(llama), tokens)
    importlib.reload(plugin)
    importlib.reload(plugin)
    assert torch.equal(logits_of(load(llama), tokens), before)


def test_nothing_is_registered_without_the_import() -> None:
    script = """
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.quantizers import auto
import qoq.kernels.modules

def held():
    attention = [ALL_MASK_ATTENTION_FUNCTIONS, ALL_ATTENTION_FUNCTIONS]
    tables = [*attention, auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING]
    return [sum(name.startswith("qoq") for name in table) for table in tables]

before = held()
import qoq.kernels.hf
print(before, held())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == "[0, 0, 0, 0] [4, 4, 1, 1]"
