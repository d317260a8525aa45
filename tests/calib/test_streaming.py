"""Block-by-block evaluation against transformers' own forward, and against a numpy decoder where it is quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qoq.calib import streaming
from qoq.calib.plan import open_model
from qoq.calib.round.rtn import round_to_nearest
from qoq.calib.skeleton import Skeleton
from qoq.calib.streaming import BlockRunner, StreamedModel, build_block, embed, load_block_tensors
from qoq.formats.arithmetic import IntegerWeight
from qoq.formats.sources import TensorSource
from qoq.recipes.errors import InputError

MakeModel = Callable[..., Any]
Tokens = Callable[..., Tensor]
CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-tied-bfloat16": ("llama", {"tie_word_embeddings": True, "dtype": torch.bfloat16}),
    "llama-float32": ("llama", {"dtype": torch.float32}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "llama-yarn-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "llama-dynamic-rope": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
            "max_position_embeddings": 16,
        },
    ),
    "llama-multi-head": ("llama", {"num_key_value_heads": None}),
    "llama-grouped": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}),
    "llama-head-128": ("llama", {"head_dim": 128}),
    "llama-padded": ("llama", {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 320}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-short-window": ("mistral", {"sliding_window": 7}),
    "mistral-window-of-length": ("mistral", {"sliding_window": 37}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window-in-block-1": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-wide-heads": ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}),
    "qwen3-alternating-windows": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}
QUANTIZED = ("llama", "llama3-rope", "llama-grouped", "mistral-short-window", "qwen2-window-in-block-1", "qwen3")


def opened(model: Any) -> tuple[Skeleton, TensorSource]:
    return open_model(model.folder)


def logits_of(model: Any, windows: Tensor, **kwargs: Any) -> Tensor:
    skeleton, source = opened(model)
    return torch.stack(list(StreamedModel(skeleton, source, device=CPU, **kwargs).logits(windows)))


def relative(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def in_float64(model: Any) -> dict[str, Any]:
    return {name: tensor.double().numpy() for name, tensor in model.tensors.items()}


# ---- 16 bit


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_transformers(name: str, make_model: MakeModel, tokens: Tokens) -> None:
    family, overrides = VARIANTS[name]
    model = make_model(family, **overrides)
    windows = tokens(3, 37)
    with torch.no_grad():
        want = model.full()(windows, use_cache=False).logits
    got = logits_of(model, windows)
    assert got.dtype == torch.float32
    assert relative(got, want) < 2e-5


def test_the_variants_differ(make_model: MakeModel, tokens: Tokens) -> None:
    """What the comparison above would not notice if transformers and qoq both ignored it."""
    windows = tokens(1, 37)
    plain = logits_of(make_model("mistral", sliding_window=None), windows)
    assert relative(logits_of(make_model("mistral", sliding_window=7), windows), plain) > 1e-2
    assert relative(logits_of(make_model("mistral", sliding_window=37), windows), plain) == 0
    scaled = logits_of(make_model("llama", rope_parameters=LLAMA3), windows)
    assert relative(scaled, logits_of(make_model("llama"), windows)) > 1e-2


def test_a_window_setting_that_the_family_ignores_is_ignored(make_model: MakeModel, tokens: Tokens) -> None:
    """Llama has no sliding windows, whatever its config.json says."""
    windows = tokens(1, 37)
    model = make_model("llama", sliding_window=5, layer_types=["sliding_attention", "full_attention"])
    assert model.config.sliding_window == 5
    with torch.no_grad():
        want = model.full()(windows, use_cache=False).logits
    assert relative(logits_of(model, windows), want) < 2e-5


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_reference_equals_transformers(family: str, make_model: MakeModel, tokens: Tokens, reference: Any) -> None:
    """The numpy decoder that the quantized cases below are held to is itself right."""
    overrides: dict[str, Any] = {"rope_parameters": LLAMA3} if family == "llama" else {}
    if family == "mistral":
        overrides = {"sliding_window": 7}
    model = make_model(family, **overrides)
    windows = tokens(1, 21)
    with torch.no_grad():
        want = model.full(torch.float64)(windows, use_cache=False).logits
    # transformers keeps the rotary tables in float32
    assert relative(reference(model.config, in_float64(model)).logits(windows), want) < 1e-6


@pytest.mark.parametrize(("count", "length"), [(1, 2), (1, 40), (5, 40), (7, 700), (2, 2100)])
def test_batches_do_not_show(count: int, length: int, make_model: MakeModel, tokens: Tokens) -> None:
    """Each window gives the same logits alone as it does among others, in a full batch or in a ragged last one."""
    model = make_model("mistral", sliding_window=11, num_hidden_layers=1, max_position_embeddings=4096)
    windows = tokens(count, length)
    skeleton, source = opened(model)
    runner = BlockRunner(skeleton, length, CPU)
    assert runner.batch == max(1, 2048 // length)
    together = StreamedModel(skeleton, source, device=CPU).logits(windows)
    for window, got in zip(windows, together, strict=True):
        (alone,) = StreamedModel(skeleton, source, device=CPU).logits(window[None])
        assert relative(got, alone) < 1e-5


def test_several_passes_give_what_one_gives(
    make_model: MakeModel, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    windows = tokens(5, 16)
    seen: list[int] = []
    want = logits_of(model, windows)
    monkeypatch.setattr(streaming, "_PASS_BYTES", 2 * 16 * 128 * 4)
    got = logits_of(model, windows, on_block=seen.append)
    assert torch.equal(got, want)
    assert seen == [0, 1] * 3


def test_batches_cover_every_row_once(make_model: MakeModel) -> None:
    skeleton, _ = opened(make_model("llama"))
    runner = BlockRunner(skeleton, 300, CPU)  # six windows a batch
    hidden = torch.arange(20.0)[:, None, None].expand(20, 300, 4)
    slices = list(runner.batches(hidden))
    assert torch.equal(torch.cat([batch for _, batch in slices]), hidden)
    assert all(one.stop == two.start for (one, _), (two, _) in pairwise(slices))


def test_leaves_windows_and_weights_alone(make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model("qwen3", dtype=torch.float32)
    windows = tokens(2, 16)
    before = windows.clone()
    skeleton, source = opened(model)
    streamed = StreamedModel(skeleton, source, device=CPU, kv_bits=4)
    first, second = list(streamed.logits(windows)), list(streamed.logits(windows))
    assert torch.equal(windows, before)
    assert torch.equal(torch.stack(first), torch.stack(second))
    for name, tensor in model.tensors.items():
        assert torch.equal(source.load(name), tensor), name


def test_logits_that_are_not_read_to_the_end_leave_no_trace(make_model: MakeModel, tokens: Tokens) -> None:
    skeleton, source = opened(make_model("llama"))
    with torch.enable_grad():
        streams = [StreamedModel(skeleton, source, device=CPU).logits(tokens(2, 8)) for _ in range(2)]
        for pair in zip(*streams, strict=True):
            assert torch.is_grad_enabled()
            assert not any(logits.requires_grad for logits in pair)
        assert torch.is_grad_enabled()
        half_read: Iterator[Tensor] = StreamedModel(skeleton, source, device=CPU).logits(tokens(2, 8))
        next(half_read)
        assert torch.is_grad_enabled()


# ---- quantized


@pytest.mark.parametrize(("kv_bits", "key_rotation"), [(4, "none"), (8, "none"), (4, "hadamard")])
@pytest.mark.parametrize("name", [*QUANTIZED, "llama-head-128"])
def test_the_quantized_cache_equals_the_reference(
    name: str, kv_bits: int, key_rotation: Any, make_model: MakeModel, tokens: Tokens, reference: Any
) -> None:
    family, overrides = VARIANTS[name]
    model = make_model(family, **overrides)
    windows = tokens(1, 21)
    exact = logits_of(model, windows)
    cache = {"kv_bits": kv_bits, "key_rotation": key_rotation}
    got = logits_of(model, windows, **cache)
    want = reference(model.config, in_float64(model), **cache).logits(windows)
    effect = relative(got, exact)
    assert effect > (1e-2 if kv_bits == 4 else 1e-3)
    assert relative(got, want) < 0.05 * effect
    if key_rotation != "none":  # not the same codes as without
        assert relative(got, logits_of(model, windows, kv_bits=kv_bits)) > 0.2 * effect


def test_a_cache_of_16_bits_rotates_nothing(make_model: MakeModel, tokens: Tokens) -> None:
    model, windows = make_model("llama"), tokens(1, 21)
    assert torch.equal(logits_of(model, windows, key_rotation="hadamard"), logits_of(model, windows))


@pytest.mark.parametrize("group_size", [128, None], ids=["g128", "per-channel"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_served_block_equals_the_reference(
    name: str, group_size: int | None, make_model: MakeModel, tokens: Tokens, reference: Any
) -> None:
    """W4A8KV4: packed weights, int8 activations and the 4-bit cache together."""
    family, overrides = VARIANTS[name]
    model = make_model(family, **overrides)
    skeleton, source = opened(model)
    windows = tokens(1, 21)
    hidden = embed(source, skeleton, windows)
    tensors = load_block_tensors(source, skeleton, 1, CPU)
    quantized, served = {}, {}
    for role in skeleton.family.roles.values():
        bias = tensors.get(f"{role}.bias")
        linear = round_to_nearest(tensors[f"{role}.weight"], bias, group_size)
        quantized[role] = IntegerWeight.decode(linear)
        stored = None if linear.bias is None else linear.bias.double().numpy()
        served[f"model.layers.1.{role}"] = (linear.dequantize().double().numpy(), stored)
    runner = BlockRunner(skeleton, 21, CPU)
    block = build_block(skeleton, 1, tensors, quantized=quantized, act_bits=8, kv_bits=4)
    got = runner(1, block, hidden)[0]
    exact = runner(1, build_block(skeleton, 1, tensors), hidden)[0]
    entering = hidden[0].double().numpy()
    want = reference(model.config, in_float64(model), kv_bits=4, served=served).block(1, entering)
    effect = relative(got, exact)
    assert effect > 1e-2
    assert relative(got, want) < 0.05 * effect
    # 16-bit activations: the same weights, exactly multiplied
    block = build_block(skeleton, 1, tensors, quantized=quantized, act_bits=16, kv_bits=16)
    decoded = {**tensors, **{f"{role}.weight": weight.dequantize() for role, weight in quantized.items()}}
    plain = runner(1, build_block(skeleton, 1, decoded), hidden)[0]
    assert relative(runner(1, block, hidden)[0], plain) < (1e-3 if skeleton.config.model_type == "qwen2" else 1e-5)


def test_build_block_shares_nothing_it_could_change(make_model: MakeModel, tokens: Tokens) -> None:
    skeleton, source = opened(make_model("qwen2"))
    tensors = load_block_tensors(source, skeleton, 0, CPU)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    hidden = embed(source, skeleton, tokens(2, 16))
    entering = hidden.clone()
    one = build_block(skeleton, 0, tensors, kv_bits=4)
    two = build_block(skeleton, 0, tensors)
    runner = BlockRunner(skeleton, 16, CPU)
    outputs = [runner(0, block, hidden) for block in (one, two, one)]
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(hidden, entering)
    assert all(torch.equal(tensors[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in one.parameters())
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


# ---- embedding


def test_embedding_may_be_rounded(make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model("llama", dtype=torch.float32)
    skeleton, source = opened(model)
    windows = tokens(3, 8)
    table = model.tensors["model.embed_tokens.weight"]
    for dtype in (None, torch.float16, torch.bfloat16):
        want = (table if dtype is None else table.to(dtype).float())[windows]
        got = embed(source, skeleton, windows, dtype)
        assert got.dtype == torch.float32
        assert torch.equal(got, want)
        got.zero_()  # the states are the caller's own
    assert torch.equal(source.load("model.embed_tokens.weight"), table)


def test_a_token_out_of_the_vocabulary_is_refused(make_model: MakeModel, tokens: Tokens) -> None:
    skeleton, source = opened(make_model("llama"))
    windows = tokens(2, 8)
    windows[1, 3] = 96
    with pytest.raises(InputError, match="token 96, the model knows 96"):
        embed(source, skeleton, windows)
    with pytest.raises(InputError, match="token 96, the model knows 96"):
        next(StreamedModel(skeleton, source, device=CPU).logits(windows))


# ---- damage


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(name: str, value: float, make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model("llama")
    model.tensors[name].view(-1)[5] = value
    model.save()
    with pytest.raises(InputError, match=f"tensor {name} holds 1 NaN or infinite"):
        logits_of(model, tokens(1, 8))


def test_an_embedding_that_is_not_finite_is_named(make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model("llama")
    model.tensors["model.embed_tokens.weight"][:, 3] = float("nan")
    model.save()
    with pytest.raises(InputError, match=r"model\.embed_tokens\.weight"):
        logits_of(model, tokens(1, 8))


def test_activations_that_are_not_finite_are_named_by_block(make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model("llama", dtype=torch.float32)
    for part in ("gate", "up", "down"):
        model.tensors[f"model.layers.1.mlp.{part}_proj.weight"] *= 1e15
    model.save()
    with pytest.raises(InputError, match="block 1 gives NaN or infinite activations"):
        logits_of(model, tokens(1, 8))
