"""Rotation: Hadamard matrices, and models that compute the same in the other basis."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qoq.calib import hadamard, rotation
from qoq.calib.corpus import Windows
from qoq.calib.hadamard import base_matrix, rotate, split_order
from qoq.calib.job import run
from qoq.calib.plan import QuantizeRequest, make_plan, open_model
from qoq.calib.rotation import rotated
from qoq.calib.served import open_served
from qoq.recipes.errors import InputError
from qoq.recipes.schema import Calibration, Recipe, SmoothAttention

MakeModel = Callable[..., Any]
ORDERS = [4, 8, 12, 20, 24, 28, 36, 44, 52, 60, 68, 76, 84, 100, 108, 140, 180]
SIZES = [576, 640, 896, 1536, 2048, 2304, 2560, 3072, 3584, 4096, 5120, 6144, 6656, 7168, 8192]
"""Hidden sizes of models that people use."""


# ---- Hadamard matrices


@pytest.mark.parametrize("k", ORDERS)
def test_base_matrices_are_hadamard(k: int) -> None:
    matrix = np.array(base_matrix(k))
    assert set(matrix.flatten().tolist()) == {1, -1}
    np.testing.assert_array_equal(matrix @ matrix.T, k * np.eye(k))


@pytest.mark.parametrize("n", SIZES)
def test_sizes_of_models_have_one(n: int) -> None:
    k, power = split_order(n)
    assert k * power == n
    assert k <= 60
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(rotate(x).square().sum(1), x.square().sum(1))
    first = rotate(torch.eye(n, dtype=torch.float64)[:4])
    torch.testing.assert_close(first.abs(), torch.full((4, n), n**-0.5, dtype=torch.float64))


@given(n=st.sampled_from([1, 2, 12, 64, 96, 144, 576]), rows=st.integers(1, 5), seed=st.integers(0, 1000))
def test_rotating_is_a_product_with_an_orthogonal_matrix(n: int, rows: int, seed: int) -> None:
    x = torch.randn(2, rows, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    k, power = split_order(n)
    sylvester = np.array([[1.0]])
    while len(sylvester) < power:
        sylvester = np.kron(np.array([[1, 1], [1, -1]]), sylvester)
    matrix = np.kron(np.array(base_matrix(k)), sylvester) / n**0.5
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=1e-12)
    np.testing.assert_allclose(rotate(x).numpy(), x.numpy() @ matrix, atol=1e-12)


@pytest.mark.parametrize("n", [0, 3, 6, 92, 116])
def test_other_orders_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"order {n}"):
        split_order(n)


# ---- models


CASES = {
    "llama": ("llama", {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 320}),
    "llama-tied-biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-groups-128": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2-tied": ("qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 4}),
}


def tensors_of(source: Any) -> dict[str, Tensor]:
    return {name: source.load(name) for name in source.names()}


@pytest.mark.parametrize("name", CASES)
def test_the_rotated_model_computes_the_same(
    name: str, make_model: MakeModel, tokens: Callable[..., Tensor], reference: Any
) -> None:
    family, config = CASES[name]
    model = make_model(family, **config)
    skeleton, source = rotated(*open_model(model.folder))
    assert not skeleton.is_tied
    found = tensors_of(source)
    assert found.keys() == skeleton.tensor_shapes().keys()
    for tensor, shape in skeleton.tensor_shapes().items():
        info = source.info(tensor)
        assert (info.shape, info.dtype) == (shape, torch.float32) == (found[tensor].shape, found[tensor].dtype)
    as_float64 = [{k: t.double().numpy() for k, t in of.items()} for of in (model.tensors, found)]
    windows = tokens(2, 11)
    want, got = (reference(model.config, of).logits(windows) for of in as_float64)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
    assert (source.location, source.files()) == (model.folder, open_model(model.folder)[1].files())


def test_gains_are_one_and_no_tensor_is_as_it_was(make_model: MakeModel) -> None:
    model = make_model("qwen3", num_attention_heads=4, num_key_value_heads=4)
    _, source = rotated(*open_model(model.folder))
    for name, tensor in tensors_of(source).items():
        if "layernorm" in name or name == "model.norm.weight":
            assert bool((tensor == 1).all()), name
        elif "q_norm" in name or "k_norm" in name:
            assert torch.equal(tensor, model.tensors[name]), "norms of heads stay"
        else:
            assert float((tensor - model.tensors[name].float()).norm()) > 0.1 * float(tensor.norm()), name


def test_outlier_channels_disappear(make_model: MakeModel) -> None:
    model = make_model("llama")
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"):
        axis = 1 if "embed" in name else 0
        model.tensors[name].select(axis, 5).mul_(50)
    model.save()
    _, source = rotated(*open_model(model.folder))
    for name, axis in (("model.embed_tokens.weight", 0), ("model.layers.0.self_attn.o_proj.weight", 1)):
        sizes = [of.float().square().mean(dim=axis).sqrt() for of in (model.tensors[name], source.load(name))]
        before, after = (float(size.max() / size.median()) for size in sizes)
        assert before > 20
        assert after < 2


def test_large_tables_are_rotated_in_parts(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    _, source = rotated(*open_model(model.folder))
    whole = source.load("model.embed_tokens.weight"), source.load("lm_head.weight")
    monkeypatch.setattr(rotation, "_TABLE_ROWS", 7)
    for before, name in zip(whole, ("model.embed_tokens.weight", "lm_head.weight"), strict=True):
        assert torch.equal(source.load(name), before)


def test_a_size_without_a_matrix_is_refused(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    monkeypatch.setattr(hadamard, "_field_for", lambda k: None)
    skeleton, source = open_model(model.folder)
    rotated(skeleton, source)  # 128 is a power of two
    other = make_model("llama", hidden_size=192, num_attention_heads=3)
    with pytest.raises(InputError, match="cannot be rotated: no Hadamard matrix of order 192"):
        rotated(*open_model(other.folder))


# ---- runs


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_writes_a_model_of_the_same_kind(
    tied: bool, make_model: MakeModel, tokens: Callable[..., Tensor], tmp_path: Path
) -> None:
    model = make_model("llama", tie_word_embeddings=tied)
    recipe = Recipe(
        name="test",
        rotation="hadamard",
        smooth_attention=SmoothAttention(alphas=(0.5, 1.0)),
        calibration=Calibration(samples=3, seq_len=16),
    )
    plan = make_plan(QuantizeRequest(model.folder, "random", tmp_path / "out", recipe))
    text = Windows(tokens(3, 16), 3, "fingerprint", "random")
    manifest = run(plan, lambda: text, restart=False, tool_version="0.0.1", on_progress=lambda _: None).manifest
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["norms_folded"] is True
    assert manifest["totals"]["model_bytes_16bit"] == 2 * sum(t.numel() for t in model.tensors.values())
    served = open_served(tmp_path / "out")
    _, source = rotated(*open_model(model.folder))
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(served.checkpoint.source.load(name), source.load(name).half())
    assert all(record["output_error"] < 0.5 for record in manifest["blocks"])
