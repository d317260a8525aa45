"""QoQLinear: what it computes, what it refuses, and that nothing rounds its packed tensors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qoq.formats.arithmetic import IntegerWeight, linear_forward
from qoq.formats.packing import pack_linear, packed_shapes
from qoq.formats.quantized_linear import QuantizedLinear, S2Offsets, ZeroPoints
from qoq.kernels.modules import QoQLinear
from qoq.recipes.errors import EnvironmentProblem, InputError

N, K = 64, 192


def random_linear(
    *, progressive: bool, has_bias: bool, post_scale: bool = False, seed: int = 0, in_features: int = K
) -> QuantizedLinear:
    """Random legal codes [N, 128-multiple]; the padding decodes to zero."""
    random = torch.Generator().manual_seed(seed)
    padded = -(-in_features // 128) * 128
    groups = padded // 128 if progressive else 1

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=random).to(torch.uint8)

    s2_scales = integers(1, 8, N, groups) if progressive else None  # code * 8 - zero * 8 stays in [-120, 120]
    points = integers(0, 15, N, groups)
    codes = integers(0, 15, N, padded)
    codes[:, in_features:] = points[:, -1:]
    scales = (torch.rand(N, generator=random) * 0.01 + 0.001).half()
    bias = torch.randn(N, generator=random).half() if has_bias else None
    zeros: ZeroPoints | S2Offsets = ZeroPoints(points)
    if post_scale and s2_scales is not None:
        zeros = S2Offsets(points * s2_scales)
    return QuantizedLinear(codes, scales, s2_scales, zeros, bias, in_features)


def module_of(linear: QuantizedLinear, *, act_bits: int = 8, name: str = "layers.0.mlp.up_proj") -> QoQLinear:
    module = QoQLinear(
        linear.in_features,
        linear.out_features,
        progressive=linear.is_progressive,
        has_bias=linear.bias is not None,
        zero_domain="post_scale" if isinstance(linear.zeros, S2Offsets) else "pre_scale",
        act_bits=act_bits,
        name=name,
    )
    module.load_state_dict(pack_linear(linear))
    return module


def oracle(linear: QuantizedLinear, x: Tensor, *, act_bits: int) -> Tensor:
    """float64 [M, N] from the logical fields alone."""
    s1 = linear.s1_scales.double()
    zeros = linear.zeros.values.long()
    codes = linear.codes.long()
    shift = torch.zeros(N, dtype=torch.float64)
    if linear.s2_scales is not None:
        s2 = linear.s2_scales.long().repeat_interleave(128, dim=1)
        zeros = zeros.repeat_interleave(128, dim=1)
        integers = codes * s2 - (zeros * s2 if isinstance(linear.zeros, ZeroPoints) else zeros)
    else:
        integers = codes
        shift = (zeros[:, 0].float() * linear.s1_scales.float()).half().double()
    integers = integers[:, : linear.in_features]
    if act_bits == 16:
        y = x.double() @ (integers.double() * s1[:, None] - shift[:, None]).t()
    else:
        scales = (x.float().abs().amax(dim=1, keepdim=True) / 127).float()
        acts = torch.round(x.float() / scales).long()
        y = scales.double() * (s1 * (acts @ integers.t()).double() - shift * acts.sum(dim=1, keepdim=True).double())
    return y if linear.bias is None else y + linear.bias.double()


CASES = [(True, True, False), (True, False, False), (True, True, True), (False, True, False), (False, False, False)]


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize(("progressive", "has_bias", "post_scale"), CASES)
@pytest.mark.parametrize("in_features", [128, 192, 1152])
def test_forward_agrees_with_the_integer_oracle(
    progressive: bool, has_bias: bool, post_scale: bool, act_bits: int, in_features: int
) -> None:
    linear = random_linear(
        progressive=progressive, has_bias=has_bias, post_scale=post_scale, in_features=in_features, seed=in_features
    )
    x = torch.randn(7, in_features, generator=torch.Generator().manual_seed(1))
    y = module_of(linear, act_bits=act_bits)(x)
    expected = oracle(linear, x, act_bits=act_bits)
    assert y.dtype == torch.float32
    assert float((y.double() - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_forward_is_the_arithmetic_of_formats_in_any_dtype_and_shape(dtype: torch.dtype) -> None:
    linear = random_linear(progressive=True, has_bias=True)
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = module_of(linear)(x)
    assert y.shape == (2, 3, N)
    assert torch.equal(y, linear_forward(x, IntegerWeight.decode(linear), act_bits=8))


@pytest.mark.parametrize("progressive", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_buffers_are_those_of_the_packed_format(progressive: bool, has_bias: bool) -> None:
    linear = random_linear(progressive=progressive, has_bias=has_bias)
    module = module_of(linear)
    state = module.state_dict()
    shapes = packed_shapes(N, K, progressive=progressive, has_bias=has_bias)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == shapes
    module(torch.ones(1, K))
    assert list(module.state_dict()) == list(shapes), "the decoded weight must stay out of the state dict"
    assert not list(module.parameters())
    assert (module.bias is not None) == has_bias


CASTS: list[tuple[str, Callable[[nn.Module], nn.Module]]] = [
    ("to float32", lambda m: m.to(torch.float32)),
    ("to bfloat16", lambda m: m.to(torch.bfloat16)),
    ("to device and dtype", lambda m: m.to("cpu", torch.bfloat16)),
    ("to float64", lambda m: m.double()),
    ("half", lambda m: m.half()),
    ("float", lambda m: m.float()),
    ("bfloat16", lambda m: m.bfloat16()),
    ("type", lambda m: m.type(torch.float64)),
    ("share_memory", lambda m: m.share_memory()),
    ("deepcopy", copy.deepcopy),
    ("pickle", lambda m: pickle.loads(pickle.dumps(m))),  # noqa: S301  (our own bytes)
]


@pytest.mark.parametrize("cast", [pytest.param(cast, id=name) for name, cast in CASTS])
@pytest.mark.parametrize("progressive", [True, False])
def test_no_cast_touches_the_packed_tensors(cast: Callable[[nn.Module], nn.Module], progressive: bool) -> None:
    linear = random_linear(progressive=progressive, has_bias=True)
    packed = pack_linear(linear)
    module = module_of(linear)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1))
    before = module(x)
    after = cast(nn.Sequential(module))
    inner = after[0]  # type: ignore[index]
    assert {name: tensor.dtype for name, tensor in inner.packed().items()} == {
        name: tensor.dtype for name, tensor in packed.items()
    }
    assert all(torch.equal(inner.packed()[name], tensor) for name, tensor in packed.items())
    assert torch.equal(after(x), before)


def test_meta_module_can_be_emptied_onto_a_device() -> None:
    linear = random_linear(progressive=True, has_bias=True)
    module = QoQLinear(K, N, progressive=True, has_bias=True, device="meta").to(torch.float32).to_empty(device="cpu")
    module.load_state_dict(pack_linear(linear))
    assert torch.equal(module(torch.ones(1, K)), module_of(linear)(torch.ones(1, K)))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_again_drops_the_decoded_weight(assign: bool) -> None:
    first, second = (random_linear(progressive=True, has_bias=False, seed=seed) for seed in (0, 1))
    module, x = module_of(first), torch.ones(1, K)
    before = module(x)
    assert module.integer_weight() is module.integer_weight(), "decoded once"
    module.load_state_dict(pack_linear(second), assign=assign)
    assert not torch.equal(module(x), before)
    assert torch.equal(module(x), module_of(second)(x))


def test_replaced_buffers_drop_the_decoded_weight() -> None:
    first, second = (random_linear(progressive=True, has_bias=False, seed=seed) for seed in (0, 1))
    module, x = module_of(first), torch.ones(1, K)
    module(x)
    for name, tensor in pack_linear(second).items():
        setattr(module, name, tensor)
    assert torch.equal(module(x), module_of(second)(x))


def test_state_dict_of_another_dtype_is_refused() -> None:
    module = module_of(random_linear(progressive=True, has_bias=False))
    state = {**module.state_dict(), "s1_scales": module.s1_scales.float()}
    with pytest.raises(RuntimeError, match=r"s1_scales: expected torch.float16, got torch.float32"):
        module.load_state_dict(state)


def test_module_that_was_not_loaded_does_not_compute() -> None:
    module = QoQLinear(K, N, progressive=True, has_bias=False, name="model.layers.3.mlp.up_proj")
    with pytest.raises(InputError, match=r"model\.layers\.3\.mlp\.up_proj: s2_scales: values 0\.\.0, expected 1\.\.16"):
        module(torch.ones(1, K))


def test_illegal_bytes_are_refused_by_name() -> None:
    module = module_of(random_linear(progressive=True, has_bias=False))
    module.s2_scales[1, 5] = 17
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj: s2_scales"):
        module(torch.ones(1, K))


def test_impossible_layers_are_refused() -> None:
    with pytest.raises(InputError, match=r"head: out_features is 40, expected a multiple of 32"):
        QoQLinear(K, 40, progressive=True, has_bias=False, name="head")
    with pytest.raises(InputError, match="act_bits is 4"):
        QoQLinear(K, N, progressive=True, has_bias=False, act_bits=4)
    with pytest.raises(InputError, match="zero_domain pre_scale, got post_scale"):
        QoQLinear(K, N, progressive=False, has_bias=False, zero_domain="post_scale")


def test_autocast_leaves_the_integer_sums_exact() -> None:
    module = module_of(random_linear(progressive=True, has_bias=True, in_features=1152))
    x = torch.randn(3, 1152, generator=torch.Generator().manual_seed(1))
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), expected)


@pytest.mark.parametrize(("progressive", "has_bias", "post_scale"), CASES)
def test_dequantize_gives_an_ordinary_linear(progressive: bool, has_bias: bool, post_scale: bool) -> None:
    linear = random_linear(progressive=progressive, has_bias=has_bias, post_scale=post_scale)
    plain = module_of(linear).dequantize()
    assert type(plain) is nn.Linear
    assert (plain.in_features, plain.out_features, plain.bias is not None) == (K, N, has_bias)
    assert torch.equal(plain.weight, linear.dequantize())
    assert module_of(linear).dequantize(torch.bfloat16).weight.dtype == torch.bfloat16


def test_repr_says_what_it_is() -> None:
    module = module_of(random_linear(progressive=True, has_bias=False))
    assert repr(module) == "QoQLinear(192, 64, bias=False, w4 g128, act_bits=8)"


# ---- with the kernels, whose operators have stand-ins on the CPU


@pytest.fixture
def kernels(cpu_operators: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("qoq.kernels.modules.is_on_gpu", lambda x: True)
    monkeypatch.setattr("qoq.kernels.ops.usable_device_problem", lambda: None)
    return cpu_operators


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("progressive", "has_bias", "post_scale"), CASES)
def test_kernels_get_the_packed_tensors(
    kernels: Any, progressive: bool, has_bias: bool, post_scale: bool, dtype: torch.dtype
) -> None:
    linear = random_linear(progressive=progressive, has_bias=has_bias, post_scale=post_scale)
    module = module_of(linear)
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = module(x.transpose(0, 1))
    assert kernels.calls == ["quantize_activation", "w4a8_gemm"]
    assert y.dtype == dtype
    assert torch.equal(y, linear_forward(x, IntegerWeight.decode(linear), act_bits=8).transpose(0, 1))
    assert module._decoded is None, "the int8 copy must not take memory beside the packed tensors"


def test_no_tokens_are_no_problem(kernels: Any) -> None:
    assert module_of(random_linear(progressive=True, has_bias=True))(torch.ones(0, K).half()).shape == (0, N)


@pytest.mark.parametrize("edit", ["at first", "in place", "another tensor", "loaded", "moved"])
def test_illegal_bytes_never_reach_a_kernel(kernels: Any, edit: str) -> None:
    linear = random_linear(progressive=True, has_bias=False)
    module, x = module_of(linear), torch.ones(1, K).half()
    if edit != "at first":
        module(x)
        module(x)
        kernels.calls.clear()
    illegal = module.s2_scales.clone()
    illegal[1, 5] = 17
    match edit:
        case "at first" | "in place":
            module.s2_scales[1, 5] = 17
        case "another tensor":
            module.s2_scales = illegal
        case "loaded":
            module.load_state_dict({**module.state_dict(), "s2_scales": illegal})
        case "moved":
            module.to_empty(device="cpu")
            module._buffers["s2_scales"] = illegal
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj: s2_scales: values"):
        module(x)
    assert kernels.calls == []


def test_bytes_are_checked_once(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = module_of(random_linear(progressive=True, has_bias=False)), torch.ones(1, K).half()
    module(x)
    monkeypatch.setattr(module, "unpack", lambda: pytest.fail("decoded again"))
    module(x)


def test_tensors_made_in_inference_mode_can_be_run(kernels: Any) -> None:
    with torch.inference_mode():
        module = module_of(random_linear(progressive=True, has_bias=False))
        assert module(torch.ones(1, K).half()).shape == (1, N)
        assert module(torch.ones(1, K).half()).shape == (1, N)


def test_what_the_kernels_cannot_take_goes_to_the_reference(kernels: Any) -> None:
    linear = random_linear(progressive=True, has_bias=True)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1))
    assert torch.equal(module_of(linear)(x), linear_forward(x, IntegerWeight.decode(linear), act_bits=8))
    module_of(linear, act_bits=16)(x.half())
    odd = random_linear(progressive=True, has_bias=False, in_features=132)
    module_of(odd)(x[:, :132].half())
    assert kernels.calls == []


def test_backend_is_as_chosen(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = random_linear(progressive=True, has_bias=True)
    module, x = module_of(linear), torch.randn(3, K, generator=torch.Generator().manual_seed(1)).half()
    module.backend = "reference"
    expected = module(x)
    assert kernels.calls == []
    module.backend = "kernels"
    assert torch.equal(module(x), expected)
    assert kernels.calls == ["quantize_activation", "w4a8_gemm"]
    with pytest.raises(InputError, match=r"up_proj: the kernels cannot run: the input is torch\.float32"):
        module(x.float())
    module.act_bits = 16
    with pytest.raises(InputError, match="act_bits is 16"):
        module(x)
    with pytest.raises(InputError, match="backend is 'cuda', expected one of auto, reference, kernels"):
        module.backend = "cuda"  # type: ignore[assignment]


def test_without_kernels_auto_falls_back_and_kernels_raise(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qoq.kernels.ops.usable_device_problem", lambda: "CuPy is not usable")
    module, x = module_of(random_linear(progressive=True, has_bias=True)), torch.ones(1, K).half()
    assert module(x).shape == module(x).shape == (1, N)
    module.backend = "kernels"
    with pytest.raises(EnvironmentProblem, match="CuPy is not usable"):
        module(x)
    assert kernels.calls == []


def test_compiled_into_one_graph_after_the_first_call(kernels: Any) -> None:
    linear = random_linear(progressive=True, has_bias=True)
    module, x = module_of(linear), torch.randn(3, K, generator=torch.Generator().manual_seed(1)).half()
    module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), linear_forward(x, IntegerWeight.decode(linear), act_bits=8))


def test_copies_keep_the_backend(kernels: Any) -> None:
    module = module_of(random_linear(progressive=True, has_bias=True))
    module.backend = "reference"
    assert copy.deepcopy(module).backend == "reference"


# ---- Hopper: re-packed weights instead of the buffers


@pytest.fixture
def hopper(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("qoq.kernels.modules.wants_tiles", lambda weight: True)
    return kernels


def after_state_dict(module: QoQLinear) -> QoQLinear:
    module.state_dict()
    return module


USES: dict[str, Callable[[QoQLinear], Any]] = {
    "again": lambda module: module,
    "saved": after_state_dict,
    "cast": QoQLinear.float,
    "copied": copy.deepcopy,
    "pickled": lambda module: pickle.loads(pickle.dumps(module)),  # noqa: S301
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("progressive", "has_bias", "post_scale"), CASES)
def test_hopper_gets_its_tiles_and_gives_the_buffers_back(
    hopper: Any, progressive: bool, has_bias: bool, post_scale: bool, use: str
) -> None:
    linear = random_linear(progressive=progressive, has_bias=has_bias, post_scale=post_scale)
    module, x = module_of(linear), torch.randn(5, K, generator=torch.Generator().manual_seed(1)).half()
    expected = linear_forward(x, IntegerWeight.decode(linear), act_bits=8)
    assert torch.equal(module(x), expected)
    module = USES[use](module)
    assert torch.equal(module(x), expected)
    assert hopper.calls[-1] == "w4a8_gemm_sm90"
    assert module.qweight is None, "kept twice"
    assert module._buffers.get("s2_scales") is None
    module.backend = "reference"
    assert torch.equal(module(x), expected)
    for name, tensor in pack_linear(linear).items():
        assert torch.equal(module.packed()[name], tensor), name


def test_weights_are_tiled_once(hopper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = module_of(random_linear(progressive=True, has_bias=True)), torch.ones(1, K).half()
    module(x)
    monkeypatch.setattr("qoq.kernels.modules.tile_weights", lambda packed: pytest.fail("again"))
    module(x)


@pytest.mark.parametrize("edit", ["another tensor", "loaded"])
def test_illegal_bytes_never_reach_hoppers_kernel(hopper: Any, edit: str) -> None:
    module, x = module_of(random_linear(progressive=True, has_bias=False)), torch.ones(1, K).half()
    illegal = module.s2_scales.clone()
    illegal[1, 5] = 17
    module(x)
    hopper.calls.clear()
    if edit == "loaded":
        module.load_state_dict({**module.state_dict(), "s2_scales": illegal})
    else:
        module.s2_scales = illegal
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj: s2_scales: values"):
        module(x)
    assert hopper.calls == []


def test_hoppers_call_compiles_into_one_graph(hopper: Any) -> None:
    linear = random_linear(progressive=True, has_bias=True)
    module, x = module_of(linear), torch.randn(3, K, generator=torch.Generator().manual_seed(1)).half()
    module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), linear_forward(x, IntegerWeight.decode(linear), act_bits=8))
