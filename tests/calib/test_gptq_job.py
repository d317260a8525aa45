"""GPTQ within a run: what it is shown, what it gains, and what is said where it fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qoq.calib.corpus import Windows
from qoq.calib.job import run
from qoq.calib.plan import QuantizeRequest, make_plan, open_model
from qoq.calib.progress import Progress
from qoq.calib.round.gptq import Inputs, Moments, gptq
from qoq.calib.served import ServedModel, open_served
from qoq.calib.streaming import StreamedModel
from qoq.formats.quantized_linear import S2Offsets, ZeroPoints
from qoq.formats.work_folder import WORK_NAME
from qoq.recipes.errors import InputError
from qoq.recipes.schema import Calibration, Gptq, Recipe

MakeModel = Callable[..., Any]
Tokens = Callable[..., Tensor]
Run = Callable[..., tuple[dict[str, Any], ServedModel]]


@pytest.fixture
def quantize(tmp_path: Path) -> Run:
    """quantize(model, windows, **changes of the recipe): the manifest, and the checkpoint."""
    count = 0

    def make(
        model: Any, windows: Tensor, *, strict: bool = False, **changes: Any
    ) -> tuple[dict[str, Any], ServedModel]:
        nonlocal count
        count += 1
        settings = {"name": "test", "rounding": "gptq", "calibration": Calibration(samples=8, seq_len=48), **changes}
        output = tmp_path / f"checkpoint-{count}"
        plan = make_plan(QuantizeRequest(model.folder, "random", output, Recipe(**settings), strict=strict))
        text = Windows(windows, len(windows), "fingerprint", "random")
        result = run(plan, lambda: text, restart=False, tool_version="0.0.1", on_progress=lambda _: None)
        return result.manifest, open_served(output)

    return make


def fallbacks(manifest: dict[str, Any]) -> dict[str, str]:
    found = {}
    for record in manifest["blocks"]:
        for name, linear in record["linears"].items():
            if linear["fallback"] is not None:
                found[f"{record['block']}.{name}"] = linear["fallback"]
    return found


@pytest.mark.parametrize("group_size", [128, None], ids=["g128", "per-channel"])
def test_the_first_linears_are_rounded_for_what_enters_them(
    group_size: Any, quantize: Run, make_model: MakeModel, tokens: Tokens
) -> None:
    model, windows = make_model("llama"), tokens(8, 48)
    manifest, served = quantize(model, windows, group_size=group_size)
    assert fallbacks(manifest) == {}
    x = model.tensors["model.embed_tokens.weight"].half().double()[windows.flatten()]
    x = x / (x.square().mean(dim=1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    x = x * model.tensors["model.layers.0.input_layernorm.weight"].double()
    inputs = Inputs.of(Moments(x.t() @ x / len(x), len(x)), damping=0.01)
    for part in "qkv":
        name = f"model.layers.0.self_attn.{part}_proj"
        want = gptq(model.tensors[f"{name}.weight"].float(), None, group_size, inputs).linear
        found = served.checkpoint.linear(name, in_features=x.shape[1])
        assert float((found.codes != want.codes).float().mean()) < 0.01
        assert torch.equal(found.s1_scales, want.s1_scales)


def test_what_comes_after_attention_is_rounded_for_rotated_keys(
    quantize: Run, make_model: MakeModel, tokens: Tokens
) -> None:
    """In block 0, inputs of q, k and v are the same with and without; that of o is not."""
    model, windows = make_model("llama"), tokens(8, 48)
    plain, turned = (quantize(model, windows, key_rotation=rotation)[1] for rotation in ("none", "hadamard"))
    for part in "qkvo":
        name = f"model.layers.0.self_attn.{part}_proj"
        in_features = plain.quantized[name].in_features
        codes = [served.checkpoint.linear(name, in_features=in_features).codes for served in (plain, turned)]
        assert torch.equal(*codes) == (part != "o"), name


def test_blocks_lose_less_than_by_rounding_to_nearest(quantize: Run, make_model: MakeModel, tokens: Tokens) -> None:
    model, windows = make_model("llama"), tokens(8, 48)
    errors = {}
    for rounding in ("gptq", "rtn"):
        manifest, _ = quantize(model, windows, rounding=rounding)
        errors[rounding] = [record["output_error"] for record in manifest["blocks"]]
    assert all(mine < plain for mine, plain in zip(errors["gptq"], errors["rtn"], strict=True)), errors


def test_too_little_text_is_counted_and_named(quantize: Run, make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model("llama", intermediate_size=256)
    manifest, _ = quantize(model, tokens(4, 48))
    reason = "192 calibration tokens for 256 inputs"
    assert fallbacks(manifest) == {"0.mlp.down_proj": reason, "1.mlp.down_proj": reason}
    plain, _ = quantize(model, tokens(4, 48), rounding="rtn")
    assert fallbacks(plain) == {}


def test_strict_stops_and_names_the_linear(quantize: Run, make_model: MakeModel, tokens: Tokens) -> None:
    model = make_model("llama", intermediate_size=256)
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.down_proj: GPTQ failed: 192 calibration tokens"):
        quantize(model, tokens(4, 48), strict=True)


def test_linears_that_stay_in_16_bit_are_left_alone(quantize: Run, make_model: MakeModel, tokens: Tokens) -> None:
    """The first of those that share an input may be one of them."""
    model = make_model("llama")
    manifest, served = quantize(model, tokens(8, 48), ignore=("q_proj", "o_proj"))
    assert fallbacks(manifest) == {}
    assert "model.layers.0.self_attn.q_proj" not in served.quantized
    assert "model.layers.0.self_attn.k_proj" in served.quantized


EXACT = {"gptq": Gptq(target="exact", damping="auto")}


def test_towards_the_16_bit_model_later_blocks_make_up_for_earlier_ones(
    quantize: Run, make_model: MakeModel, tokens: Tokens
) -> None:
    """Hidden states after the last block, on the calibration text, against those of the 16-bit model."""
    model, windows = make_model("llama", num_hidden_layers=4), tokens(16, 64)
    skeleton, source = open_model(model.folder)
    exact = torch.stack(list(StreamedModel(skeleton, source, device=torch.device("cpu")).logits(windows)))
    distances = []
    for changes in ({}, EXACT):
        _, served = quantize(model, windows, calibration=Calibration(samples=16, seq_len=64), **changes)
        streamed = StreamedModel(
            served.skeleton,
            served.checkpoint.source,
            device=torch.device("cpu"),
            checkpoint=served.checkpoint,
            act_bits=8,
            kv_bits=4,
        )
        distances.append(float((torch.stack(list(streamed.logits(windows))) - exact).norm() / exact.norm()))
    assert distances[1] < 0.97 * distances[0], distances


def test_both_streams_are_kept_when_a_run_is_cut_off(make_model: MakeModel, tokens: Tokens, tmp_path: Path) -> None:
    model, windows = make_model("llama"), Windows(tokens(8, 48), 8, "fingerprint", "random")
    recipe = Recipe(name="test", rounding="gptq", calibration=Calibration(samples=8, seq_len=48), **EXACT)

    def again(folder: str, on_progress: Callable[[Progress], None] = lambda _: None) -> int:
        plan = make_plan(QuantizeRequest(model.folder, "random", tmp_path / folder, recipe))
        assert plan.streams == 2
        return run(plan, lambda: windows, restart=False, tool_version="0.0.1", on_progress=on_progress).resumed_at

    def stop(step: Progress) -> None:
        if step.message == "block 1: observing inputs":
            raise KeyboardInterrupt

    assert again("whole") == 0
    with pytest.raises(KeyboardInterrupt):
        again("parts", stop)
    states = np.load(next((tmp_path / "parts" / WORK_NAME).glob("hidden-*.npy")))
    assert states.shape[:3] == (2, 8, 48)
    assert 0 < np.abs(states[0] - states[1]).max(), "what is served differs from the 16-bit model"
    assert again("parts") == 1
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()


def test_zeros_between_codes_lose_less_and_are_marked(quantize: Run, make_model: MakeModel, tokens: Tokens) -> None:
    model, windows = make_model("llama"), tokens(8, 48)
    errors = {}
    for domain in ("pre_scale", "post_scale"):
        manifest, served = quantize(model, windows, grid="search", zero_domain=domain)
        assert served.checkpoint.quantization.zero_domain == domain
        decoded = {
            name: served.checkpoint.linear(name, in_features=linear.in_features)
            for name, linear in served.quantized.items()
        }
        changes = [linear.dequantize() - model.tensors[f"{name}.weight"].float() for name, linear in decoded.items()]
        errors[domain] = sum(float(change.norm()) for change in changes)
        kind = S2Offsets if domain == "post_scale" else ZeroPoints
        assert all(isinstance(linear.zeros, kind) for linear in decoded.values())
        assert fallbacks(manifest) == {}
    assert errors["post_scale"] < 0.99 * errors["pre_scale"]
