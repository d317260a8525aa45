"""Tuning: gradients against differences, losses against those of the checkpoint, and what it must not break."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from qoq.calib.block_tuning import TunedLinear
from qoq.calib.corpus import Windows
from qoq.calib.job import run
from qoq.calib.metrics import relative_error
from qoq.calib.plan import QuantizeRequest, make_plan, open_model
from qoq.calib.progress import Progress
from qoq.calib.round.rtn import round_to_nearest
from qoq.calib.served import open_served
from qoq.calib.streaming import BlockRunner, StreamedModel, embed
from qoq.formats.arithmetic import IntegerWeight, linear_forward
from qoq.recipes.schema import Calibration, Gptq, Recipe, Tuning

MakeModel = Callable[..., Any]
Tokens = Callable[..., Tensor]
CPU = torch.device("cpu")
TUNING = Tuning(steps=20, code_rate=0.02, scale_rate=0.01)
GRIDS = pytest.mark.parametrize(
    ("group_size", "zero_domain"),
    [(128, "pre_scale"), (128, "post_scale"), (None, "pre_scale")],
    ids=["g128", "post-scale", "per-channel"],
)


def some_linear(group_size: Any, zero_domain: Any, *, k: int = 200, seed: int = 0) -> tuple[Tensor, Any]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(32, k, generator=generator) * torch.rand(32, 1, generator=generator)
    bias = torch.randn(32, generator=generator)
    return weight, round_to_nearest(weight, bias, group_size, zero_domain=zero_domain)


@GRIDS
def test_it_starts_as_the_rounded_linear(group_size: Any, zero_domain: Any) -> None:
    weight, linear = some_linear(group_size, zero_domain)
    tuned = TunedLinear(linear, weight, act_bits=8)
    decoded = tuned.weight().detach()[:, : linear.in_features]
    assert torch.allclose(decoded, linear.dequantize(), rtol=0, atol=2e-3 * float(linear.s1_scales.max()))
    again = tuned.rounded()
    assert torch.equal(again.codes, linear.codes)
    assert torch.equal(again.s1_scales, linear.s1_scales)
    x = torch.randn(3, 5, linear.in_features)
    for bits in (8, 16):
        served = linear_forward(x, IntegerWeight.decode(linear), act_bits=bits)
        assert (
            relative_error(TunedLinear(linear, weight, bits)(x).detach(), served) < 1e-3
        )  # zeros are not float16 here


@GRIDS
def test_gradients_are_those_of_one_code_more_and_of_a_larger_scale(group_size: Any, zero_domain: Any) -> None:
    weight, linear = some_linear(group_size, zero_domain)
    tuned = TunedLinear(linear, weight, act_bits=8)
    with torch.no_grad():
        tuned.positions.copy_(tuned.positions.clamp(2, 13))
    direction = torch.randn_like(tuned.weight())
    (tuned.weight() * direction).sum().backward()
    before = tuned.weight().detach()
    with torch.no_grad():
        tuned.positions += 1
    by_one = (tuned.weight().detach() - before) * direction
    assert tuned.positions.grad is not None
    within = by_one != 0  # at the edge of the protective range a code cannot grow
    assert float(within.float().mean()) > 0.9
    assert torch.allclose(tuned.positions.grad.flatten(1)[within], by_one[within], rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        tuned.positions -= 1
        tuned.log_scale += 1e-3
    by_scale = ((tuned.weight().detach() - before) * direction).sum(dim=1) / 1e-3
    assert tuned.log_scale.grad is not None
    assert torch.allclose(tuned.log_scale.grad, by_scale, rtol=5e-3, atol=1e-2)


@GRIDS
@given(seed=st.integers(0, 1000), far=st.sampled_from([0.3, 20.0]), log_scale=st.sampled_from([-40.0, -0.1, 0.1, 40.0]))
def test_wherever_it_goes_it_stays_legal(
    group_size: Any, zero_domain: Any, seed: int, far: float, log_scale: float
) -> None:
    """`QuantizedLinear` refuses weights beyond int8, scales of zero, and zeros beyond float16."""
    weight, linear = some_linear(group_size, zero_domain, k=128, seed=seed)
    tuned = TunedLinear(linear, weight, act_bits=8)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        tuned.positions += far * torch.randn(tuned.positions.shape, generator=generator)
        tuned.log_scale += min(log_scale, 8.0 if group_size is None else log_scale)
    assert tuned.rounded().codes.shape == linear.codes.shape


def recipe(tuning: Tuning | None = TUNING, **changes: Any) -> Recipe:
    settings = {"rounding": "gptq", "gptq": Gptq(target="exact", damping="auto"), "tuning": tuning}
    return Recipe(name="test", calibration=Calibration(samples=16, seq_len=64), **{**settings, **changes})


def quantize(
    model: Any,
    windows: Tensor,
    output: Path,
    recipe: Recipe,
    on_progress: Callable[[Progress], None] = lambda _: None,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    plan = make_plan(QuantizeRequest(model.folder, "random", output, recipe, device=device))
    text = Windows(windows, len(windows), "fingerprint", "random")
    result = run(plan, lambda: text, restart=False, tool_version="0.0.1", on_progress=on_progress)
    records: list[dict[str, Any]] = result.manifest["blocks"]
    return records


@pytest.mark.parametrize("group_size", [128, None], ids=["g128", "per-channel"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_loss_that_is_reported_is_that_of_the_checkpoint(
    family: str, group_size: Any, make_model: MakeModel, tokens: Tokens, tmp_path: Path
) -> None:
    """Of the second block; the first stays in 16 bit, so that it gets the same inputs with tuning and without."""
    model, windows = make_model(family), tokens(16, 64)
    losses, records = [], []
    for name, tuning in (("plain", None), ("tuned", TUNING)):
        changes = {"group_size": group_size, "ignore": (r"layers\.0\.",)}
        changes |= {"key_rotation": "hadamard"} if family == "llama" else {}
        records = quantize(model, windows, tmp_path / name, recipe(tuning, **changes))
        served = open_served(tmp_path / name)
        quantized = StreamedModel(
            served.skeleton,
            served.checkpoint.source,
            device=CPU,
            checkpoint=served.checkpoint,
            act_bits=8,
            kv_bits=4,
        )
        exact = StreamedModel(*open_model(model.folder), device=CPU)
        runner = BlockRunner(served.skeleton, 64, CPU)
        leaving = embed(served.checkpoint.source, served.skeleton, windows)
        wanted = leaving
        for index in range(2):
            leaving = runner(index, quantized.block(index), leaving)
            wanted = runner(index, exact.block(index), wanted)
        errors = (leaving - wanted).square().sum(dim=-1)
        losses.append(float((errors / wanted.square().sum(dim=-1)).mean()))
    assert records[0]["tuned_loss"] is None
    assert records[1]["tuned_loss"] < 0.9
    assert losses[1] / losses[0] == pytest.approx(records[1]["tuned_loss"], rel=0.01)


def test_a_block_that_does_not_gain_is_left_as_it_was(make_model: MakeModel, tokens: Tokens, tmp_path: Path) -> None:
    model, windows = make_model("llama"), tokens(16, 64)
    assert [record["tuned_loss"] for record in quantize(model, windows, tmp_path / "plain", recipe(None))] == [None] * 2
    wild = recipe(Tuning(steps=2, code_rate=1.0, scale_rate=0.1))
    assert [record["tuned_loss"] for record in quantize(model, windows, tmp_path / "wild", wild)] == [1.0] * 2
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "wild" / path.name).read_bytes()


def test_linears_that_stay_in_16_bit_and_blocks_without_any_are_passed_over(
    make_model: MakeModel, tokens: Tokens, tmp_path: Path
) -> None:
    partly = recipe(ignore=("q_proj", r"layers\.0\."))
    records = quantize(make_model("llama"), tokens(16, 64), tmp_path / "partly", partly)
    assert records[0]["tuned_loss"] is None
    assert records[1]["tuned_loss"] < 1


def test_cut_off_within_a_tuning_it_ends_with_the_same_files(
    make_model: MakeModel, tokens: Tokens, tmp_path: Path
) -> None:
    model, windows = make_model("llama"), tokens(16, 64)

    def stop(step: Progress) -> None:
        if step.message == "block 1: tuning":
            raise KeyboardInterrupt

    quantize(model, windows, tmp_path / "whole", recipe())
    with pytest.raises(KeyboardInterrupt):
        quantize(model, windows, tmp_path / "parts", recipe(), stop)
    quantize(model, windows, tmp_path / "parts", recipe())
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()


@pytest.mark.parametrize("changes", [{"rounding": "rtn"}, {"gptq": Gptq()}])
def test_it_needs_the_hidden_states_of_the_16_bit_model(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="tuning needs rounding gptq with the target exact"):
        recipe(**changes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_on_a_gpu_it_is_the_same_from_run_to_run(make_model: MakeModel, tokens: Tokens, tmp_path: Path) -> None:
    """With all that is done there before: rotation, observing passes in TF32, int8 products."""
    model, windows = make_model("qwen2", num_hidden_layers=4), tokens(16, 64)
    whole = recipe(rotation="hadamard", align_keys="mean", grid="search", zero_domain="post_scale")
    first = quantize(model, windows, tmp_path / "first", whole, device="cuda")
    quantize(model, windows, tmp_path / "second", whole, device="cuda")
    for path in (tmp_path / "first").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    on_cpu = quantize(model, windows, tmp_path / "cpu", whole)
    for mine, other in zip(first, on_cpu, strict=True):
        assert mine["output_error"] == pytest.approx(other["output_error"], rel=0.15)
