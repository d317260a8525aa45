"""Smoothing and reordering down_proj's inputs: the block computes the same, and outliers cost less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qoq.calib.corpus import Windows
from qoq.calib.job import run
from qoq.calib.metrics import relative_error
from qoq.calib.mlp_transforms import InputObserver, choose_smoothing, reorder, smooth, smoothing_scale
from qoq.calib.moments import input_of
from qoq.calib.plan import QuantizeRequest, make_plan, open_model
from qoq.calib.streaming import BlockRunner, build_block, embed, load_block_tensors
from qoq.recipes.errors import InputError
from qoq.recipes.schema import Calibration, OutputSmoothing, Recipe

MakeModel = Callable[..., Any]
Tokens = Callable[..., Tensor]
CPU = torch.device("cpu")
DOWN = "mlp.down_proj"
FAMILIES = {
    "llama": ("llama", {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 320}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
}


class Setting:
    """Block 0 of a random model, and hidden states that enter it."""

    def __init__(self, folder: Path, windows: Tensor) -> None:
        self.skeleton, source = open_model(folder)
        self.family = self.skeleton.family
        self.tensors = load_block_tensors(source, self.skeleton, 0, CPU)
        self.hidden = embed(source, self.skeleton, windows)
        self._runner = BlockRunner(self.skeleton, windows.shape[1], CPU)

    def output(self, tensors: dict[str, Tensor]) -> Tensor:
        return self._runner(0, build_block(self.skeleton, 0, tensors), self.hidden)

    def observed(self, tensors: dict[str, Tensor], limit: int = 10**6) -> InputObserver:
        block = build_block(self.skeleton, 0, tensors)
        observer = InputObserver(limit)
        observer.add(input_of(block, DOWN, lambda: self._runner(0, block, self.hidden)))
        return observer


@pytest.fixture(params=FAMILIES)
def setting(request: pytest.FixtureRequest, make_model: MakeModel, tokens: Tokens) -> Setting:
    family, config = FAMILIES[request.param]
    return Setting(make_model(family, **config).folder, tokens(4, 32))


@pytest.fixture
def llama(make_model: MakeModel, tokens: Tokens) -> Setting:
    return Setting(make_model("llama").folder, tokens(4, 32))


def with_outliers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same function with six inputs of down_proj 100 times as large."""
    changed = dict(tensors)
    factors = torch.ones(tensors[f"{DOWN}.weight"].shape[1])
    factors[[3, 50, 77, 130, 131, 200]] = 100
    changed["mlp.up_proj.weight"] = tensors["mlp.up_proj.weight"] * factors.unsqueeze(1)
    changed[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"] / factors
    return changed


# ---- observation


def test_inputs_are_observed_up_to_the_limit() -> None:
    linear = nn.Sequential(nn.Linear(4, 2))
    observer = InputObserver(5)
    batches = [torch.randn(2, 3, 4), -10 * torch.randn(1, 3, 4).abs()]
    for batch in batches:
        observer.add(input_of(linear, "0", lambda batch=batch: linear(batch)))
    rows = torch.cat([batch.flatten(0, 1) for batch in batches])
    assert torch.equal(observer.absmax, rows.abs().amax(0))
    assert torch.equal(observer.rows, rows[:5])
    assert not linear[0]._forward_pre_hooks


def test_nothing_observed_is_an_error() -> None:
    with pytest.raises(ValueError, match="no input"):
        _ = InputObserver(5).absmax


# ---- lambda


def test_lambda() -> None:
    inputs, weight = torch.tensor([4.0, 1.0, 0.25]), torch.tensor([[1.0, -2.0, 0.5], [-8.0, 1.0, 0.1]])
    scale = smoothing_scale(inputs, weight, 0.5, 0.25)
    want = torch.tensor([2.0, 1.0, 0.5]) / torch.tensor([8.0, 2.0, 0.5]) ** 0.25
    torch.testing.assert_close(scale, want / want.log().mean().exp())
    assert float(scale.log().mean()) == pytest.approx(0, abs=1e-6)


def test_inputs_that_are_not_used_get_one() -> None:
    weight = torch.tensor([[1.0, 0.0, 2.0]])
    scale = smoothing_scale(torch.tensor([0.0, 1.0, 3.0]), weight, 0.5, 0.5)
    assert scale.tolist()[:2] == [1.0, 1.0]
    assert smoothing_scale(torch.zeros(3), torch.zeros(1, 3), 0.5, 0.5).tolist() == [1.0] * 3


# ---- what blocks compute


def test_smoothing_and_reorder_preserve_the_block(setting: Setting) -> None:
    exact = setting.output(setting.tensors)
    observed = setting.observed(setting.tensors)
    scale = smoothing_scale(observed.absmax, setting.tensors[f"{DOWN}.weight"], 0.5, 0.5)
    assert float(scale.max() / scale.min()) > 1.5
    smoothed = smooth(setting.tensors, scale, setting.family)
    assert relative_error(setting.output(smoothed), exact) < 1e-5
    torch.testing.assert_close(setting.observed(smoothed).absmax, observed.absmax / scale)
    order = torch.argsort(observed.absmax / scale)
    ordered = reorder(smoothed, order, setting.family)
    assert relative_error(setting.output(ordered), exact) < 1e-5
    absmax = setting.observed(ordered).absmax
    assert bool((absmax[1:] >= absmax[:-1] * (1 - 1e-5)).all())
    changed = {name for name, tensor in ordered.items() if not torch.equal(tensor, setting.tensors[name])}
    parts = ("weight", "bias") if "mlp.up_proj.bias" in setting.tensors else ("weight",)
    assert changed == {f"mlp.{name}.{p}" for name in ("gate_proj", "up_proj") for p in parts} | {f"{DOWN}.weight"}


@pytest.mark.parametrize("group_size", [128, None], ids=["g128", "per-channel"])
def test_the_search_undoes_what_was_injected(group_size: Any, llama: Setting) -> None:
    spec, errors = OutputSmoothing(), list[float]()
    for tensors in (llama.tensors, with_outliers(llama.tensors)):
        observed, weight = llama.observed(tensors), tensors[f"{DOWN}.weight"]
        scale, alpha = choose_smoothing(spec, observed, weight, group_size, 8)
        rows, exact = observed.rows, observed.rows @ weight.t()
        both = (torch.ones_like(scale), scale)
        errors += [served_error(rows / used, weight * used, exact, group_size) for used in both]
    plain, smoothed_plain, injected, smoothed_injected = errors
    assert smoothed_plain <= plain
    assert injected > 2 * plain
    assert alpha is not None
    assert smoothed_injected < 1.1 * smoothed_plain


def served_error(rows: Tensor, weight: Tensor, exact: Tensor, group_size: Any) -> float:
    """As test code sees it: int8 rows, codes of the weight to nearest, in float64."""
    from qoq.calib.round.rtn import round_to_nearest

    scale = rows.abs().amax(1, keepdim=True) / 127
    served = (rows / scale).round() * scale
    decoded = round_to_nearest(weight, None, group_size).dequantize()
    return relative_error(served.double() @ decoded.double().t(), exact.double())


def test_fixed_strengths_are_used_as_they_are(llama: Setting) -> None:
    observed, weight = llama.observed(llama.tensors), llama.tensors[f"{DOWN}.weight"]
    spec = OutputSmoothing(mode="fixed", alpha=0.15, beta=0.85)
    scale, alpha = choose_smoothing(spec, observed, weight, 128, 8)
    assert alpha == 0.15
    assert torch.equal(scale, smoothing_scale(observed.absmax, weight, 0.15, 0.85))


# ---- runs


@pytest.fixture
def quantize(tmp_path: Path, tokens: Tokens) -> Callable[..., dict[str, Any]]:
    count = 0

    def make(model: Any, **changes: Any) -> dict[str, Any]:
        nonlocal count
        count += 1
        recipe = Recipe(name="test", calibration=Calibration(samples=4, seq_len=32), **changes)
        plan = make_plan(QuantizeRequest(model.folder, "random", tmp_path / f"out-{count}", recipe))
        text = Windows(tokens(4, 32), 4, "fingerprint", "random")
        return run(plan, lambda: text, restart=False, tool_version="0.0.1", on_progress=lambda _: None).manifest

    return make


def test_runs_with_outliers_lose_little(quantize: Callable[..., dict[str, Any]], make_model: MakeModel) -> None:
    model = make_model("llama")
    for index in range(2):
        prefix = f"model.layers.{index}."
        block = {name.removeprefix(prefix): t for name, t in model.tensors.items() if name.startswith(prefix)}
        model.tensors.update({prefix + name: t.half() for name, t in with_outliers(block).items()})
    model.save()
    errors = {}
    for name, changes in {
        "none": {},
        "both": {"smooth_output": OutputSmoothing(), "reorder": "absmax"},
        "reorder": {"reorder": "absmax"},
    }.items():
        manifest = quantize(model, **changes)
        errors[name] = [record["linears"][DOWN]["output_error"] for record in manifest["blocks"]]
        alphas = [record["output_alpha"] for record in manifest["blocks"]]
        assert all((alpha is not None) == (name == "both") for alpha in alphas)
    assert all(mine < 0.6 * plain for mine, plain in zip(errors["both"], errors["none"], strict=True)), errors
    assert errors["reorder"] == pytest.approx(errors["none"], rel=0.1), "outliers are sorted, and still outliers"


def test_inputs_that_are_not_finite_are_named(quantize: Callable[..., dict[str, Any]], make_model: MakeModel) -> None:
    model = make_model("llama", dtype=torch.float32)
    for name in ("gate_proj", "up_proj"):
        model.tensors[f"model.layers.0.mlp.{name}.weight"] *= 1e30
    model.save()
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.down_proj: NaN or infinite inputs"):
        quantize(model, reorder="absmax")
