"""What a model is made of: sizes and RoPE from its configuration, memory by hand, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from qoq.formats.packing import pack_linear, unpack_linear
from qoq.kernels.random_weights import random_packed_linear
from qoq.kernels.runtime.attention import page_nbytes
from qoq.kernels.runtime.config import config_of_shape, read_config, runtime_config, stop_tokens
from qoq.kernels.runtime.engine import Engine
from qoq.kernels.runtime.memory import plan_memory, workspace_nbytes
from qoq.kernels.runtime.model import Options, RuntimeModel
from qoq.kernels.runtime.scheduler import Request
from qoq.kernels.runtime.scoring import RuntimeWindows, hidden_states
from qoq.kernels.runtime.weights import fuse_packed
from qoq.recipes.errors import EnvironmentProblem, InputError
from qoq.recipes.precisions import find_precision
from qoq.recipes.shapes import find_shape
from tests.kernels.hf_cases import SHARED, edit_config, load_tensors, save_tensors
from tests.kernels.runtime.runtime_cases import MODELS, Oracle, random_prompts, write_complete

LLAMA = find_shape("llama-3-8b")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_complete(tmp_path / "model", "llama")


def test_sizes_of_a_shape() -> None:
    config = config_of_shape(LLAMA, max_positions=2048).served_with(4)
    assert (config.qkv_features, config.max_positions, config.windows) == (6144, 2048, (0,) * 32)
    assert config.scale == pytest.approx(128**-0.5)
    angles = torch.arange(2048).double()[:, None] * 10000.0 ** -(torch.arange(64).double() / 64)
    torch.testing.assert_close(config.cos.double(), angles.cos(), rtol=0, atol=2e-4)  # angles are float32
    torch.testing.assert_close(config.sin.double(), angles.sin(), rtol=0, atol=2e-4)


def test_windows_of_layers() -> None:
    assert runtime_config(MODELS["mistral"][0](), where="").windows == (8, 8)
    assert runtime_config(MODELS["qwen2, windows"][0](), where="").windows == (0, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"head_dim": 32}, "head_dim 32, expected 64 or 128"),
        ({"hidden_act": "gelu"}, "activation 'gelu', expected 'silu'"),
        ({"num_key_value_heads": 3}, "2 heads do not share 3 KV heads evenly"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 32,
                    "long_factor": [1.0] * 32,
                }
            },
            "RoPE type 'longrope'",
        ),
    ],
)
def test_models_that_are_not_supported(folder: Path, change: dict[str, Any], message: str) -> None:
    edit_config(folder, lambda data: data.update(change))
    with pytest.raises(InputError, match=message):
        RuntimeModel.from_folder(folder, Options())


def test_pages_by_hand() -> None:
    """A page of Llama-3-8B: 32 layers of 8 KV heads, two sub-blocks of 4352 bytes each with 4 bits."""
    config = config_of_shape(LLAMA, max_positions=128)
    half = torch.float16
    assert page_nbytes(config.served_with(4), 64, half) == 32 * 8 * 2 * 4352
    assert page_nbytes(config.served_with(8), 64, half) == 32 * 8 * 2 * (2 * 32 * 128 + 256)
    assert page_nbytes(config.served_with(16), 2048, half) == 32 * 8 * 2 * 2048 * 128 * 2


def test_workspace_by_hand() -> None:
    config = config_of_shape(LLAMA, max_positions=128)
    values = 4 * 4096 + 2 * 6144 + 4096 + 3 * 14336
    activations = (8192 + 512) * (values * 2 + 14336 + 16 * 4096)
    found = workspace_nbytes(config, torch.float16, chunk_tokens=8192, max_batch=512)
    assert found == activations + 2 * (512 * 128256 * 2 + 64 * 128256 * 48) + (256 << 20)


def test_a_budget_by_hand() -> None:
    sizes = {"weights": 400, "workspace": 50, "reserve": 20, "page": 7, "page_size": 64}
    plan = plan_memory(budget=1000, most_pages=1000, **sizes)
    assert (plan.num_pages, plan.pages) == (530 // 7, 530 // 7 * 7)
    assert plan.weights + plan.workspace + plan.reserve + plan.pages <= plan.budget
    assert plan_memory(budget=1000, most_pages=3, **sizes).num_pages == 3
    with pytest.raises(EnvironmentProblem, match="do not hold the model"):
        plan_memory(budget=476, most_pages=3, **sizes)
    assert plan_memory(budget=477, most_pages=3, **sizes).num_pages == 1


def test_random_weights_of_a_shape() -> None:
    """For the reference they are decoded: a byte a weight, and 4 or 8 a channel; embedding and head are one."""
    shape = find_shape("smollm2-135m")
    model = RuntimeModel.from_shape(shape, find_precision("w4a8kv4-g128"), Options(max_tokens=64, max_batch=2))
    gemms = shape.layer_gemms().values()
    linears = shape.num_layers * sum(n * k + 4 * n for n, k in gemms)
    assert model.decoder.weights.nbytes == linears + 4 * shape.vocab_size * shape.hidden_size
    assert model.config.kv_bits == 4
    (found,) = Engine(model).generate([Request([5, 6, 7], 2)])
    assert len(found.tokens) == 2


def test_a_budget_of_bytes(folder: Path) -> None:
    whole = RuntimeModel.from_folder(folder, Options(max_batch=4)).memory
    fixed = whole.weights + whole.workspace
    some = RuntimeModel.from_folder(folder, Options(max_batch=4, memory_bytes=fixed + 3 * whole.page + 5))
    assert some.pool.num_pages == 3
    with pytest.raises(InputError, match="request 0: 190 tokens and 10 new ones do not fit the KV cache of 192 tokens"):
        Engine(some).generate([Request([1] * 190, 10)])
    with pytest.raises(EnvironmentProblem, match="do not hold the model"):
        RuntimeModel.from_folder(folder, Options(max_batch=4, memory_bytes=fixed))


def test_requests_longer_than_the_model(folder: Path) -> None:
    engine = Engine(RuntimeModel.from_folder(folder, Options(max_tokens=100)))
    with pytest.raises(InputError, match="request 1: 91 tokens and 10 new ones, but a sequence has at most 100"):
        engine.generate([Request([1] * 90, 10), Request([1] * 91, 10)])
    assert RuntimeModel.from_folder(folder, Options(max_tokens=1000)).longest == 256
    with pytest.raises(InputError, match="a window has 101 tokens, there is room for 100"):
        list(hidden_states(engine.model, [[1] * 101]))
    assert engine.model.pool.free == engine.model.pool.num_pages


@pytest.mark.parametrize("token", [-1, 96])
def test_tokens_that_the_model_does_not_have(folder: Path, token: int) -> None:
    model = RuntimeModel.from_folder(folder, Options())
    with pytest.raises(InputError, match=r"request 0: tokens .* but the model has 96"):
        Engine(model).generate([Request([5, token], 1)])
    with pytest.raises(InputError, match="tokens that the model's 96 do not hold"):
        list(hidden_states(model, [[5, token]]))


def test_a_run_that_breaks_off_gives_its_pages_back(folder: Path) -> None:
    engine = Engine(RuntimeModel.from_folder(folder, Options(max_batch=2)))

    def fail(index: int, token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([Request([1] * 90, 10)] * 3, on_token=fail)
    assert engine.model.pool.free == engine.model.pool.num_pages
    assert len(engine.generate([Request([1] * 90, 3)])[0].tokens) == 3


def test_options_that_make_no_sense() -> None:
    with pytest.raises(InputError, match="max_batch is 0, expected at least 1"):
        Options(max_batch=0)
    with pytest.raises(InputError, match="kv_bits is 5"):
        config_of_shape(LLAMA, max_positions=8).served_with(5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("incomplete", "qoq_manifest.json"),
        ("missing", r"model\.layers\.1\.mlp\.up_proj\.s1_scales is missing"),
        ("illegal", r"model\.layers\.0\.self_attn\.q_proj.*s2_scales: values 13..17"),
        ("shape", r"model\.norm\.weight: shape \[64\], the configuration says \[128\]"),
        ("sizes", r"mlp\.gate_proj"),
    ],
)
def test_damaged_checkpoints(folder: Path, damage: str, message: str) -> None:
    tensors = load_tensors(folder)
    match damage:
        case "incomplete":
            (folder / "qoq_manifest.json").unlink()
        case "missing":
            del tensors["model.layers.1.mlp.up_proj.s1_scales"]
        case "illegal":
            tensors["model.layers.0.self_attn.q_proj.s2_scales"].fill_(17)
        case "shape":
            tensors["model.norm.weight"] = tensors["model.norm.weight"][:64].clone()
        case "sizes":
            edit_config(folder, lambda data: data.update(intermediate_size=512))
    save_tensors(folder, tensors)
    with pytest.raises(InputError, match=message) as caught:
        RuntimeModel.from_folder(folder, Options())
    assert caught.value.remedy or damage == "missing"


@pytest.mark.parametrize("progressive", [True, False])
def test_linears_side_by_side(progressive: bool) -> None:
    """The fused linear is the linears one below the other; where one has a bias, the others have zeros."""
    random = torch.Generator().manual_seed(0)
    parts = [random_packed_linear(n, 200, progressive=progressive, generator=random) for n in (64, 32, 96)]
    parts[1]["bias"] = torch.ones(32, dtype=torch.float16)
    fused = unpack_linear(fuse_packed(parts), in_features=200, zero_domain="pre_scale")
    logical = [unpack_linear(part, in_features=200, zero_domain="pre_scale") for part in parts]
    assert torch.equal(fused.dequantize(), torch.cat([linear.dequantize() for linear in logical]))
    assert fused.bias is not None
    assert fused.bias.tolist() == [0.0] * 64 + [1.0] * 32 + [0.0] * 96
    assert set(pack_linear(fused)) == set(fuse_packed(parts))


def test_models_of_16_bits(tmp_path: Path) -> None:
    """A folder that is no checkpoint: the baseline."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SHARED, "eos_token_id": [3, 4]})).save_pretrained(tmp_path)
    prompts, oracle = random_prompts((5, 70)), Oracle(tmp_path)
    found = Engine(RuntimeModel.from_folder(tmp_path, Options())).generate([Request(prompt, 8) for prompt in prompts])
    assert [completion.tokens for completion in found] == [oracle.greedy(prompt, 8) for prompt in prompts]
    assert stop_tokens(tmp_path, read_config(tmp_path)) == {3, 4}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert stop_tokens(tmp_path, read_config(tmp_path)) == {9}


def test_logits_of_windows_as_evaluation_wants_them(folder: Path) -> None:
    windows, seen = torch.tensor(random_prompts([60] * 5)), []
    found = list(RuntimeWindows(folder, Options(kv_bits=8), on_windows=seen.append).logits(windows))
    oracle = Oracle(folder, 8)
    assert sum(seen) == 5
    for logits, window in zip(found, windows.tolist(), strict=True):
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, oracle.logits(window), rtol=1e-5, atol=1e-5)


def test_a_configuration_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the model's configuration"):
        read_config(tmp_path)
