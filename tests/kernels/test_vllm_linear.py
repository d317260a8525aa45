"""Linears of the vLLM plug-in at TP 1, 2 and 4: each rank holds the weights, decoded whole and then sliced, that it
should, and multiplies by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qoq.formats.arithmetic import IntegerWeight, linear_forward
from qoq.formats.packing import pack_linear, unpack_linear
from qoq.formats.quantized_linear import QuantizedLinear
from qoq.recipes.errors import EnvironmentProblem, InputError
from tests.kernels.vllm_cases import (
    HEAD_DIM,
    MODES,
    Mode,
    down_layer,
    gate_up_layer,
    layers,
    load,
    load_tensor,
    on_rank,
    qkv_layer,
    quantization,
    random_linear,
)

RANKS = [(rank, size) for size in (1, 2, 4) for rank in range(size)]
HEADS, KV_HEADS = 8, 2
"""At TP 4 there are more ranks than KV heads: each head is on two of them."""
DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def small_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qoq.kernels.vllm.linear._CHECKED_ROWS", 96)


@pytest.fixture(params=["reference", "packed", "tiles"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to compute, on stand-ins for the kernels."""
    if request.param != "reference":
        request.getfixturevalue("cpu_operators")
        monkeypatch.setattr("qoq.kernels.vllm.linear.is_on_gpu", lambda _: True)
        monkeypatch.setattr("qoq.kernels.vllm.linear.wants_tiles", lambda _: request.param == "tiles")
        monkeypatch.setattr("qoq.kernels.ops.usable_device_problem", lambda: None)
    return str(request.param)


def inputs(k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(5, k, generator=torch.Generator().manual_seed(3)).to(dtype)


def held(layer: Any) -> Tensor:
    """The weight that a layer holds, decoded."""
    method = layer.quant_method
    packed = {name: p.data for name, p in layer.named_parameters() if name not in ("bias", "kernel_bias")}
    zero_domain = method.config.zero_domain
    return unpack_linear(packed, in_features=layer.input_size_per_partition, zero_domain=zero_domain).dequantize()


def product(x: Tensor, linear: QuantizedLinear, *, columns: slice = slice(None), bias: bool = True) -> Tensor:
    """y of the whole linear, or of some of its inputs, from its decoded integers."""
    whole = IntegerWeight.decode(linear)
    values = whole.values[:, columns].contiguous()
    weight = IntegerWeight(values, whole.s1_scales, whole.s1_szeros, whole.bias if bias else None)
    return linear_forward(x[:, columns], weight, act_bits=8)


def half_product(x: Tensor, linear: QuantizedLinear) -> Tensor:
    """What rank 1 of 2 makes of its half of the inputs."""
    return product(torch.cat([x, x], dim=1), linear, columns=slice(x.shape[1], None), bias=False)


def head_rows(heads: range) -> Tensor:
    return torch.cat([torch.arange(HEAD_DIM * head, HEAD_DIM * (head + 1)) for head in heads])


def qkv_rows(rank: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows of q_proj, k_proj and v_proj a rank holds: its heads, and the KV heads that these attend to."""
    heads = range(rank * HEADS // size, (rank + 1) * HEADS // size)
    group = HEADS // KV_HEADS
    kv = head_rows(range(heads[0] // group, heads[-1] // group + 1))
    return head_rows(heads), kv, kv


# ---- shards


@pytest.mark.parametrize(("rank", "size"), RANKS)
@pytest.mark.parametrize("mode", MODES)
def test_qkv_holds_the_heads_of_its_rank(mode: Mode, rank: int, size: int) -> None:
    parts = [random_linear(mode, HEAD_DIM * heads, 192, seed) for seed, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))]
    with on_rank(rank, size):
        layer = load(qkv_layer(quantization(mode), 192, HEADS, KV_HEADS, bias=False), zip("qkv", parts, strict=True))
    rows = qkv_rows(rank, size)
    expected = [part.dequantize()[index] for part, index in zip(parts, rows, strict=True)]
    assert torch.equal(held(layer), torch.cat(expected))


@pytest.mark.parametrize(("rank", "size"), RANKS)
@pytest.mark.parametrize("mode", MODES)
def test_gate_up_holds_the_channels_of_its_rank(mode: Mode, rank: int, size: int) -> None:
    gate, up = (random_linear(mode, 384, 128, seed) for seed in (1, 2))
    with on_rank(rank, size):
        layer = load(gate_up_layer(quantization(mode), 128, 384, bias=False), enumerate((gate, up)))
    rows = slice(rank * 384 // size, (rank + 1) * 384 // size)
    assert torch.equal(held(layer), torch.cat([gate.dequantize()[rows], up.dequantize()[rows]]))


@pytest.mark.parametrize(("rank", "size"), RANKS)
@pytest.mark.parametrize("mode", MODES)
def test_down_holds_the_inputs_of_its_rank(mode: Mode, rank: int, size: int) -> None:
    linear = random_linear(mode, 96, 1024, 7)
    with on_rank(rank, size):
        layer = load(down_layer(quantization(mode), 1024, 96), [(None, linear)])
    columns = slice(rank * 1024 // size, (rank + 1) * 1024 // size)
    assert torch.equal(held(layer), linear.dequantize()[:, columns])


def test_a_linear_fused_on_disk_is_taken_apart() -> None:
    gate, up = (random_linear("pre_scale", 128, 128, seed) for seed in (1, 2))
    fused = {part: torch.cat([a, b], dim=1 if part.startswith("s2") else 0) for part, a, b in _paired(gate, up)}
    with on_rank(1, 2):
        layer = gate_up_layer(quantization(), 128, 128, bias=False)
        for part, tensor in fused.items():
            load_tensor(layer, part, tensor, None)
        layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(held(layer), torch.cat([gate.dequantize()[64:], up.dequantize()[64:]]))


def _paired(a: QuantizedLinear, b: QuantizedLinear) -> list[tuple[str, Tensor, Tensor]]:
    other = pack_linear(b)
    return [(part, tensor, other[part]) for part, tensor in pack_linear(a).items()]


def test_a_replicated_linear_holds_everything() -> None:
    linear = random_linear("pre_scale", 64, 128, 7, has_bias=True)
    with on_rank(1, 2):
        layer = layers.ReplicatedLinear(128, 64, quant_config=quantization(), prefix="model.layers.0.proj")
        load(layer, [(None, linear)])
    x = inputs(128, torch.float32)
    assert torch.equal(layer(x)[0], product(x, linear))


# ---- products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_qkv_computes_the_channels_of_its_rank(mode: Mode, size: int, dtype: torch.dtype, backend: str) -> None:
    parts = [
        random_linear(mode, HEAD_DIM * heads, 192, seed, has_bias=True)
        for seed, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))
    ]
    x = inputs(192, dtype)
    whole = [product(x, part) for part in parts]
    for rank in range(size):
        with on_rank(rank, size):
            layer = qkv_layer(quantization(mode), 192, HEADS, KV_HEADS, params_dtype=dtype)
            load(layer, zip("qkv", parts, strict=True))
        assert layer.quant_method.backend == backend
        y, _ = layer(x)
        expected = torch.cat([y[:, rows] for y, rows in zip(whole, qkv_rows(rank, size), strict=True)], dim=1)
        assert y.dtype == dtype
        assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_summands_of_down_add_up(mode: Mode, size: int, dtype: torch.dtype, backend: str) -> None:
    linear = random_linear(mode, 96, 1024, 7, has_bias=True)
    x = inputs(1024, dtype)
    total = torch.zeros(5, 96, dtype=torch.float64)
    for rank in range(size):
        with on_rank(rank, size):
            layer = down_layer(quantization(mode), 1024, 96, bias=True, skip_bias_add=True, params_dtype=dtype)
            load(layer, [(None, linear)])
        columns = slice(rank * 1024 // size, (rank + 1) * 1024 // size)
        y, bias = layer(x[:, columns])
        assert linear.bias is not None
        assert torch.equal(bias, linear.bias.to(dtype))
        assert torch.equal(y, product(x, linear, columns=columns, bias=False))
        total += y.double()
    exact = x.double() @ linear.dequantize().double().t()
    # Half a step of an activation is 1/254 of the largest in its row; a summand is rounded to the dtype.
    assert float((total - exact).norm() / exact.norm()) < 0.02


def test_inputs_of_three_axes_and_of_no_rows(backend: str) -> None:
    linear = random_linear("pre_scale", 96, 128, 7)
    with on_rank(0, 1):
        layer = load(down_layer(quantization(), 128, 96), [(None, linear)])
    x = inputs(128, torch.float16)[:4]
    assert torch.equal(layer(x.view(2, 2, 128))[0], product(x, linear).view(2, 2, 96))
    assert layer(x[:0])[0].shape == (0, 96)


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_layer_is_one_graph(mode: Mode, backend: str) -> None:
    linear = random_linear(mode, 96, 256, 7, has_bias=True)
    with on_rank(0, 1):
        layer = load(down_layer(quantization(mode), 256, 96, bias=True, reduce_results=True), [(None, linear)])
        compiled: Callable[[Tensor], Any] = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (3, 5):
            x = inputs(256, torch.float16)[:rows]
            assert torch.equal(compiled(x)[0], product(x, linear))


# ---- what is refused, by name


@pytest.mark.parametrize(
    ("build", "size", "problem"),
    [
        (lambda c: gate_up_layer(c, 128, 192), 4, r"gate_up_proj: .* 4 GPUs.*\n.*gets 48, 48 output channels.* 32"),
        (lambda c: down_layer(c, 1088, 96), 2, r"down_proj: .* 2 GPUs.*\n.*gets 544 of 1088 inputs.* 128"),
        (lambda c: down_layer(c, 100, 96), 1, r"down_proj: .*\n.*100 inputs, expected a multiple of 8"),
        (lambda c: down_layer(c, 65536, 96), 1, r"down_proj: .*\n.*65536 inputs, .* up to 53248"),
        (lambda c: down_layer(c, 128, 80), 1, r"down_proj: .*\n.*gets 80 output channels"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(build: Callable[[Any], Any], size: int, problem: str) -> None:
    with on_rank(0, size), pytest.raises(InputError, match=problem):
        build(quantization())


def test_inputs_that_need_padding_are_served_on_one_gpu() -> None:
    linear = random_linear("per_channel", 96, 1088, 7)
    with on_rank(0, 1):
        layer = load(down_layer(quantization("per_channel"), 1088, 96), [(None, linear)])
    assert torch.equal(held(layer), linear.dequantize())


@pytest.mark.parametrize(
    ("part", "change", "problem"),
    [
        ("qweight", lambda t: t[:, :64], r"down_proj.qweight: expected torch.int8 \[96, 512\], got .* \[96, 64\]"),
        ("qweight", lambda t: t.to(torch.int32), r"down_proj.qweight: expected torch.int8 .*, got torch.int32"),
        ("s2_scales", lambda t: t.t(), r"down_proj.s2_scales: expected torch.int8 \[8, 96\], got .* \[96, 8\]"),
        ("s1_scales", lambda t: t.float(), r"down_proj.s1_scales: expected torch.float16"),
    ],
)
def test_a_tensor_of_another_shape_or_dtype_is_refused(
    part: str, change: Callable[[Tensor], Tensor], problem: str
) -> None:
    tensors = pack_linear(random_linear("pre_scale", 96, 1024, 7))
    with on_rank(0, 2), pytest.raises(InputError, match=problem):
        load_tensor(down_layer(quantization(), 1024, 96), part, change(tensors[part]), None)


def test_tensors_that_never_came_are_named() -> None:
    q, k = (random_linear("pre_scale", HEAD_DIM * heads, 128, 1) for heads in (HEADS, KV_HEADS))
    with on_rank(0, 2):
        layer = qkv_layer(quantization(), 128, HEADS, KV_HEADS, bias=False)
        with pytest.raises(InputError, match=r"missing .*\n.*qkv_proj.qweight: parts \[2\] of 3"):
            load(layer, [("q", q), ("k", k)])


@pytest.mark.parametrize("spoilt", [0, 17, -128])
def test_illegal_bytes_are_refused_before_any_kernel_runs(spoilt: int, backend: str) -> None:
    tensors = pack_linear(random_linear("pre_scale", 224, 1024, 7))
    tensors["s2_scales"][7, 200] = spoilt
    with on_rank(1, 2):
        layer = down_layer(quantization(), 1024, 224)
        for part, tensor in tensors.items():
            load_tensor(layer, part, tensor, None)
        with pytest.raises(InputError, match=r"model.layers.0.mlp.down_proj: s2_scales: values"):
            layer.quant_method.process_weights_after_loading(layer)


def test_a_bias_that_float16_cannot_hold_is_refused(cpu_operators: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qoq.kernels.vllm.linear.is_on_gpu", lambda _: True)
    monkeypatch.setattr("qoq.kernels.ops.usable_device_problem", lambda: None)
    with on_rank(0, 1):
        layer = down_layer(quantization(), 128, 96, bias=True, skip_bias_add=True, params_dtype=torch.bfloat16)
        torch.nn.init.constant_(layer.bias, 65504)  # rounds to 65536
        tensors = pack_linear(random_linear("pre_scale", 96, 128, 7))
        for part, tensor in tensors.items():
            load_tensor(layer, part, tensor, None)
        with pytest.raises(InputError, match=r"down_proj.bias leaves float16"):
            layer.quant_method.process_weights_after_loading(layer)


def test_a_gpu_without_kernels_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qoq.kernels.vllm.linear.is_on_gpu", lambda _: True)
    monkeypatch.setattr("qoq.kernels.ops.usable_device_problem", lambda: "no compiler")
    with on_rank(0, 1), pytest.raises(EnvironmentProblem, match="down_proj: the kernels cannot run: no compiler"):
        load(down_layer(quantization(), 128, 96), [(None, random_linear("pre_scale", 96, 128, 7))])


def test_a_layer_that_was_never_loaded_does_not_compute() -> None:
    with on_rank(0, 1):
        layer = down_layer(quantization(), 128, 96)
    with pytest.raises(InputError, match="down_proj: used before its weights were loaded"):
        layer(inputs(128, torch.float16))


# ---- random weights, for benchmarks


@pytest.mark.parametrize("mode", ["pre_scale", "per_channel"])
def test_dummy_weights_are_legal(mode: Mode, backend: str) -> None:
    with on_rank(1, 2, load_format="dummy"):
        layer = down_layer(quantization(mode), 1024, 96)
        for parameter in layer.parameters():  # as vLLM's loader does, which leaves integers alone
            if parameter.is_floating_point():
                torch.nn.init.uniform_(parameter, -1e-3, 1e-3)
        layer.quant_method.process_weights_after_loading(layer)
    y, _ = layer(inputs(512, torch.float16))
    assert bool(torch.isfinite(y).all())
    assert float(y.float().std()) > 0


# ---- new weights for a layer that runs


@pytest.mark.parametrize("mode", MODES)
def test_reloading_brings_new_weights_into_the_same_memory(mode: Mode, backend: str) -> None:
    from vllm.model_executor.model_loader import reload

    first, second = (random_linear(mode, 96, 1024, seed, has_bias=True) for seed in (7, 8))
    x = inputs(512, torch.bfloat16)
    keys: dict[str, Any] = {"bias": True, "skip_bias_add": True, "params_dtype": torch.bfloat16}
    with on_rank(1, 2), torch.device("cpu"):
        model = torch.nn.Sequential(down_layer(quantization(mode), 1024, 96, **keys))
        reload.record_metadata_for_reloading(model)
        layer = load(model[0], [(None, first)])
        addresses = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
        reload.initialize_layerwise_reload(model)
        for part, tensor in pack_linear(second).items():
            load_tensor(layer, part, tensor, None)
        reload.finalize_layerwise_reload(model, None)
    y, bias = layer(x)
    assert torch.equal(y, half_product(x, second))
    assert second.bias is not None
    assert torch.equal(bias, second.bias.bfloat16())
    assert {name: parameter.data_ptr() for name, parameter in layer.named_parameters()} == addresses
