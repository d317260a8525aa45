"""Whole runs on random models: what is in the checkpoint, against independent folding, rounding and propagation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qoq.calib.against import compare
from qoq.calib.corpus import Windows
from qoq.calib.job import RunResult, run
from qoq.calib.perplexity import score_models
from qoq.calib.plan import Plan, QuantizeRequest, make_plan, open_model
from qoq.calib.progress import Progress
from qoq.calib.served import ServedModel, open_served
from qoq.calib.streaming import StreamedModel
from qoq.formats.manifest import canonical_digest, manifest_problems, read_manifest
from qoq.formats.packing import padded_in_features
from qoq.recipes.errors import InputError
from qoq.recipes.schema import Calibration, Recipe, SmoothAttention

MakeModel = Callable[..., Any]
Tokens = Callable[..., Tensor]
CPU = torch.device("cpu")
WIDE = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 320}  # both are padded
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
ALPHAS = (0.5, 1.0)


@dataclass(frozen=True)
class Quantized:
    """A finished run, and all that went into it."""

    model: Any
    plan: Plan
    result: RunResult
    windows: Tensor
    progress: list[Progress]

    @property
    def output(self) -> Path:
        return self.plan.request.output

    def open(self) -> ServedModel:
        return open_served(self.output)

    def stored(self) -> dict[str, Tensor]:
        source = self.open().checkpoint.source
        return {name: source.load(name) for name in source.names()}


Quantize = Callable[..., Quantized]


@pytest.fixture
def quantize(make_model: MakeModel, tokens: Tokens, tmp_path: Path) -> Quantize:
    """quantize(family or model, recipe=..., windows=..., kept_dtype=..., **config of the model)"""
    count = 0

    def make(
        family: Any,
        *,
        recipe: Recipe | None = None,
        windows: Tensor | None = None,
        kept_dtype: Any = "float16",
        max_shard_bytes: int = 10**9,
        **config: Any,
    ) -> Quantized:
        nonlocal count
        count += 1
        model = make_model(family, **config) if isinstance(family, str) else family
        seen = tokens(3, 16) if windows is None else windows
        request = QuantizeRequest(
            model=model.folder,
            model_name="random",
            output=tmp_path / f"checkpoint-{count}",
            recipe=recipe or recipe_of(),
            kept_dtype=kept_dtype,
            max_shard_bytes=max_shard_bytes,
        )
        plan, progress = make_plan(request), list[Progress]()
        result = run(
            plan,
            lambda: Windows(seen, len(seen), "fingerprint", "random"),
            restart=False,
            tool_version="0.0.1",
            on_progress=progress.append,
        )
        return Quantized(model, plan, result, seen, progress)

    return make


def recipe_of(**changes: Any) -> Recipe:
    """Smoothing, g128, and calibration of a size that the windows here have."""
    settings: dict[str, Any] = {
        "name": "test",
        "smooth_attention": SmoothAttention(alphas=ALPHAS),
        "calibration": Calibration(samples=3, seq_len=16),
        **changes,
    }
    return Recipe(**settings)


def in_float64(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def relative(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def folded_independently(case: Quantized, reference: Any, index: int, entering: list[Any]) -> dict[str, Tensor]:
    """Block `index` in float32 with lambda folded in, from the numpy decoder's keys and queries on `entering`.

    The alpha of each head is taken from the manifest: that the search picks the right one is tested elsewhere.
    """
    config, prefix = case.model.config, f"model.layers.{index}."
    tensors = {name: t.float() for name, t in case.model.tensors.items() if name.startswith(prefix)}
    alphas = case.result.manifest["blocks"][index]["smooth_alphas"]
    if alphas is None:
        return tensors
    kv_heads, size = int(config.num_key_value_heads), int(config.head_dim)
    share = int(config.num_attention_heads) // kv_heads
    keys, queries = np.zeros((kv_heads, size)), np.zeros((kv_heads, size))
    for x in entering:
        decoder = reference(config, in_float64(case.model.tensors))
        decoder.block(index, x)
        for head in range(kv_heads):
            keys[head] = np.maximum(keys[head], np.abs(decoder.keys[index][head]).max(axis=0))
            for query in decoder.queries[index][head * share : (head + 1) * share]:
                queries[head] = np.maximum(queries[head], np.abs(query).max(axis=0))
    half = size // 2
    for ranges in (keys, queries):
        ranges[:, :half] = ranges[:, half:] = np.maximum(ranges[:, :half], ranges[:, half:])
    if config.model_type == "qwen3":
        keys[:], queries[:] = keys.max(axis=0), queries.max(axis=0)
    spec = case.plan.request.recipe.smooth_attention
    assert spec is not None
    lambdas = []
    for k, q, a in zip(keys, queries, alphas, strict=True):
        factor = k**a / q ** (1 - a if spec.mode == "search" else spec.beta)
        # A power of two brings the largest key and the largest query of the head together.
        lambdas.append(factor * 2.0 ** np.round(np.log2((k / factor).max() / (q * factor).max()) / 2))
    factors = torch.from_numpy(np.stack(lambdas))
    attention = prefix + "self_attn."
    if config.model_type == "qwen3":
        tensors[attention + "k_norm.weight"] = (tensors[attention + "k_norm.weight"] / factors[0]).float()
        tensors[attention + "q_norm.weight"] = (tensors[attention + "q_norm.weight"] * factors[0]).float()
        return tensors
    for part, rows in (("k", 1 / factors.flatten()), ("q", factors.repeat_interleave(share, 0).flatten())):
        for kind in ("weight", "bias"):
            name = f"{attention}{part}_proj.{kind}"
            if name in tensors:
                columns = rows.unsqueeze(1) if kind == "weight" else rows
                tensors[name] = (tensors[name].double() * columns).float()
    return tensors


def served_decoder(case: Quantized, reference: Any) -> Any:
    """The numpy decoder of what is stored: decoded weights, int8 activations, the 4-bit cache."""
    opened, stored = case.open(), case.stored()
    config = opened.checkpoint.quantization
    tensors, served = {}, {}
    for name, tensor in stored.items():
        owner = name.rsplit(".", 1)[0]
        if owner not in opened.quantized:
            tensors[name] = tensor.double().numpy()
    for name, linear in opened.quantized.items():
        decoded = opened.checkpoint.linear(name, in_features=linear.in_features)
        bias = None if decoded.bias is None else decoded.bias.double().numpy()
        served[name] = (decoded.dequantize().double().numpy(), bias)
    assert config.act_bits == 8
    cache = {"kv_bits": config.kv_bits, "key_rotation": config.key_rotation}
    return reference(case.model.config, tensors, **cache, served=served)


def embedded(case: Quantized, dtype: torch.dtype = torch.float16) -> list[Any]:
    table = case.model.tensors["model.embed_tokens.weight"].to(dtype).double().numpy()
    return [table[window] for window in case.windows.numpy()]


# ---- what the checkpoint holds


CASES = {
    "llama": ("llama", WIDE, {}),
    "llama-rotated-keys": ("llama", GROUPED, {"key_rotation": "hadamard"}),
    "llama-grouped-per-channel": ("llama", GROUPED, {"group_size": None}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, {}),
    "mistral": ("mistral", {**GROUPED, "sliding_window": 5}, {}),
    "qwen2": ("qwen2", {**GROUPED, "tie_word_embeddings": True}, {}),
    "qwen2-per-channel": ("qwen2", WIDE, {"group_size": None}),
    "qwen3": ("qwen3", GROUPED, {}),
    "unsmoothed": ("llama", {}, {"smooth_attention": None}),
    "fixed": ("llama", {}, {"smooth_attention": SmoothAttention(mode="fixed", alpha=0.5, beta=0.5)}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_holds_what_it_should(name: str, quantize: Quantize, oracle: Any, reference: Any) -> None:
    """Fold, round and propagate independently, and find the same codes, gains, biases and errors."""
    family, config, changes = CASES[name]
    case = quantize(family, recipe=recipe_of(**changes), **config)
    opened, stored = case.open(), case.stored()
    served, progressive = served_decoder(case, reference), case.plan.request.recipe.group_size is not None
    hidden = embedded(case)
    for index in range(2):
        prefix = f"model.layers.{index}."
        want = folded_independently(case, reference, index, hidden)
        record = case.result.manifest["blocks"][index]
        assert record["block"] == index
        # float32 and float64 round some 4-bit keys and values of block 0 apart, and with them move ranges in block 1
        near = 2e-3 if index == 0 else 2e-2
        for role in served_roles():
            linear = opened.checkpoint.linear(prefix + role, in_features=opened.quantized[prefix + role].in_features)
            weight = want[f"{prefix}{role}.weight"]
            rounded = oracle(weight.double().numpy(), progressive=progressive)
            if case.plan.request.recipe.smooth_attention is None or role[-6:] not in ("q_proj", "k_proj"):
                np.testing.assert_array_equal(linear.codes.numpy(), rounded.codes)
                np.testing.assert_array_equal(linear.s1_scales.numpy(), rounded.s1)
            else:  # lambda is float32 in one and float64 in the other: a code or a row's zero at a tie may differ
                assert float((linear.codes.numpy() != rounded.codes).mean()) < 5 * near
                np.testing.assert_allclose(linear.s1_scales.float().numpy(), rounded.s1.astype(float), rtol=near)
            decoded = rounded.dequantize(weight.shape[1])
            assert relative(linear.dequantize(), decoded) < 5 * near
            assert record["linears"][role]["weight_error"] == pytest.approx(relative(decoded, weight), rel=1e-2)
            assert record["linears"][role]["level1_absmax"] == int(linear.level1().abs().max())
            bias = want.get(f"{prefix}{role}.bias")
            assert (linear.bias is None) == (bias is None)
            if bias is not None:
                np.testing.assert_allclose(linear.bias.float().numpy(), bias.numpy(), rtol=near)
        for part in want:
            if "norm" in part:
                np.testing.assert_allclose(stored[part].float().numpy(), want[part].numpy(), rtol=near)
                assert stored[part].dtype == torch.float16
        # the recorded error is that of the quantized block against the float one, on what really entered it
        exact = reference(case.model.config, in_float64(case.model.tensors))
        leaving = [served.block(index, x) for x in hidden]
        error = relative(np.stack(leaving), np.stack([exact.block(index, x) for x in hidden]))
        assert 1e-3 < error < 0.5
        assert record["output_error"] == pytest.approx(error, rel=0.02)
        hidden = leaving
    for outside in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        if outside in case.model.tensors:
            assert torch.equal(stored[outside], case.model.tensors[outside])
        else:
            assert outside not in stored


def served_roles() -> tuple[str, ...]:
    attention = tuple(f"self_attn.{part}_proj" for part in "qkvo")
    return (*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.mark.parametrize("key_rotation", ["none", "hadamard"])
def test_later_blocks_see_what_the_quantized_ones_give(key_rotation: str, quantize: Quantize, reference: Any) -> None:
    """Lambda of block 1 is that of the served block 0's output, and not of the float block 0's."""
    fixed = SmoothAttention(mode="fixed", alpha=1.0, beta=0.0)
    case = quantize("llama", recipe=recipe_of(smooth_attention=fixed, key_rotation=key_rotation))
    served = served_decoder(case, reference)
    exact = reference(case.model.config, in_float64(case.model.tensors))
    name = "model.layers.1.self_attn.q_proj"
    linear = case.open().checkpoint.linear(name, in_features=128)
    got = linear.s1_scales.double().numpy()

    def expected(decoder: Any) -> Any:
        weight = folded_independently(case, reference, 1, [decoder.block(0, x) for x in embedded(case)])
        return weight[f"{name}.weight"].abs().amax(dim=1).double().numpy() / 119

    np.testing.assert_allclose(got, expected(served), rtol=1.5e-3)
    assert float(np.abs(got / expected(exact) - 1).max()) > 1e-2


def test_the_smoothed_block_is_served_as_well_as_the_plain_one(quantize: Quantize, make_model: MakeModel) -> None:
    """Keys with outliers that the queries undo: smoothing takes the cache's error away."""
    model = make_model("llama", **GROUPED)
    for head in range(2):
        for channel in (3, 35):
            for index in range(2):
                attention = f"model.layers.{index}.self_attn."
                model.tensors[f"{attention}k_proj.weight"][head * 64 + channel] *= 30
                for query in (2 * head, 2 * head + 1):
                    model.tensors[f"{attention}q_proj.weight"][query * 64 + channel] /= 30
    model.save()
    plain = quantize(model, recipe=recipe_of(smooth_attention=None))
    smooth = quantize(model)
    for index in range(2):
        errors = [case.result.manifest["blocks"][index]["output_error"] for case in (plain, smooth)]
        assert errors[1] < 0.8 * errors[0]


# ---- files


def test_the_manifest(quantize: Quantize) -> None:
    case = quantize("qwen3", max_shard_bytes=50_000)
    manifest = read_manifest(case.output)
    assert manifest["digest"] == canonical_digest(manifest)
    assert manifest_problems(case.output, manifest) == ([], [])
    recipe = case.plan.request.recipe.model_dump(mode="json")
    recipe["calibration"]["dataset"] = "random"  # the text by its name: a path would tell where it lay
    assert manifest["recipe"] == recipe
    assert manifest["calibration"]["windows"] == 3
    assert manifest["calibration"]["seq_len"] == 16
    assert manifest["source"]["sha256"].keys() == {"model.safetensors", "config.json"}
    assert len(manifest["blocks"]) == 2
    files = {path.name for path in case.output.iterdir()}
    assert files == {*manifest["files"], "qoq_manifest.json"}
    assert len(case.plan.shards) > 2
    assert "model.safetensors.index.json" in files
    assert not list(case.output.rglob("*.tmp"))
    assert set(case.stored()) == {name for shard in case.plan.shards for name in shard.tensors}
    json.dumps(manifest, allow_nan=False)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_configuration(family: str, quantize: Quantize) -> None:
    case = quantize(family, tie_word_embeddings=True)
    written = json.loads((case.output / "config.json").read_text())
    source = json.loads((case.model.folder / "config.json").read_text())
    own = {"quantization_config", "dtype", "torch_dtype", "architectures", "tie_word_embeddings"}
    assert {k: v for k, v in written.items() if k not in own} == {k: v for k, v in source.items() if k not in own}
    assert written["quantization_config"] == case.plan.config.to_dict()
    assert written["dtype"] == written["torch_dtype"] == "float16"
    assert written["tie_word_embeddings"] is True
    assert json.loads((case.output / "quant_config.json").read_text()) == {"wbits": 4, "group_size": 128}


def test_bfloat16_is_kept(quantize: Quantize) -> None:
    case = quantize("llama", dtype=torch.bfloat16, kept_dtype="bfloat16", recipe=recipe_of(ignore=("o_proj",)))
    stored = case.stored()
    for name, tensor in stored.items():
        part = name.rsplit(".", 1)[1]
        packed = part in ("qweight", "s2_scales", "s2_zeros")
        assert tensor.dtype == (torch.int8 if packed else torch.float16 if part == "s1_scales" else torch.bfloat16)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.o_proj.weight"):
        assert torch.equal(stored[name], case.model.tensors[name])


@pytest.mark.parametrize(("kept_dtype", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_what_is_kept_is_rounded_once(kept_dtype: str, dtype: torch.dtype, quantize: Quantize) -> None:
    recipe = recipe_of(ignore=("gate_proj",), smooth_attention=None)
    case = quantize("llama", dtype=torch.float32, kept_dtype=kept_dtype, recipe=recipe)
    stored = case.stored()
    kept = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    kept += ["model.layers.1.mlp.gate_proj.weight", "model.layers.0.input_layernorm.weight"]
    for name in kept:
        assert torch.equal(stored[name], case.model.tensors[name].to(dtype))


def test_a_value_that_does_not_fit_is_named(quantize: Quantize, make_model: MakeModel) -> None:
    model = make_model("llama", dtype=torch.float32)
    model.tensors["lm_head.weight"][3, 4] = 1e5
    model.save()
    with pytest.raises(InputError, match=r"lm_head\.weight: 100000 does not fit torch\.float16"):
        quantize(model)
    assert quantize(model, kept_dtype="bfloat16").result.manifest


def test_a_bias_that_does_not_fit_is_named(quantize: Quantize, make_model: MakeModel) -> None:
    model = make_model("qwen2", dtype=torch.float32)
    model.tensors["model.layers.1.self_attn.v_proj.bias"][3] = 1e5
    model.save()
    with pytest.raises(InputError, match=r"model\.layers\.1\.self_attn\.v_proj: .*bias"):
        quantize(model)


def test_a_weight_that_is_not_finite_is_named(quantize: Quantize, make_model: MakeModel) -> None:
    model = make_model("llama")
    model.tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    model.save()
    with pytest.raises(InputError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        quantize(model)


def test_activations_that_are_not_finite_are_named(quantize: Quantize, make_model: MakeModel) -> None:
    model = make_model("llama", dtype=torch.float32)
    for part in ("gate", "up"):
        model.tensors[f"model.layers.0.mlp.{part}_proj.weight"] *= 1e6
    model.tensors["model.layers.0.post_attention_layernorm.weight"] *= 1e16
    model.save()
    with pytest.raises(InputError, match="block 0: NaN or infinite activations"):
        quantize(model, kept_dtype="bfloat16", recipe=recipe_of(smooth_attention=None))


# ---- what is left in 16 bit


def test_ignored_linears_stay_as_they_were(quantize: Quantize) -> None:
    case = quantize("llama", recipe=recipe_of(ignore=(r"layers\.0\.", "v_proj")))
    stored, opened = case.stored(), case.open()
    assert len(opened.quantized) == 6
    for role in served_roles():
        if role != "self_attn.v_proj":
            assert f"model.layers.1.{role}.qweight" in opened.checkpoint.source.names()
        if role not in ("self_attn.q_proj", "self_attn.k_proj"):
            name = f"model.layers.0.{role}.weight"
            assert torch.equal(stored[name], case.model.tensors[name])
    # q and k of block 0 carry lambda: keys are cached in 4 bits whatever the weights are
    name = "model.layers.0.self_attn.k_proj.weight"
    assert not torch.equal(stored[name], case.model.tensors[name])
    assert case.result.manifest["blocks"][0]["linears"] == {}
    assert case.result.manifest["blocks"][0]["output_error"] > 0


def test_all_weights_in_16_bit(quantize: Quantize, tokens: Tokens, reference: Any) -> None:
    """W16A16KV4: only the cache is quantized, and the checkpoint opens and evaluates."""
    case = quantize("llama", recipe=recipe_of(ignore=(".*",), act_bits=16, smooth_attention=None))
    assert case.result.manifest["totals"]["bits_per_weight"] is None
    opened, stored = case.open(), case.stored()
    assert not opened.quantized
    assert stored.keys() == case.model.tensors.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in case.model.tensors.items())
    windows = tokens(2, 16, seed=9)
    logits = torch.stack(list(streamed(opened).logits(windows)))
    want = reference(case.model.config, in_float64(case.model.tensors), kv_bits=4).logits(windows)
    assert relative(logits, want) < 2e-3
    score = score_models({"m": streamed(opened).logits}, windows)["m"]
    assert 1 < score.perplexity < 1e6


def streamed(opened: ServedModel, **changes: Any) -> StreamedModel:
    config = opened.checkpoint.quantization
    bits = {"act_bits": config.act_bits, "kv_bits": config.kv_bits, **changes}
    return StreamedModel(opened.skeleton, opened.checkpoint.source, device=CPU, checkpoint=opened.checkpoint, **bits)


# ---- serving it again


@pytest.mark.parametrize("name", ["llama", "llama-rotated-keys", "qwen2-per-channel", "mistral", "qwen3", "llama-tied"])
def test_a_checkpoint_is_served_as_it_is_stored(name: str, quantize: Quantize, tokens: Tokens, reference: Any) -> None:
    family, config, changes = CASES[name]
    case = quantize(family, recipe=recipe_of(**changes), **config)
    windows = tokens(2, 16, seed=5)
    got = torch.stack(list(streamed(case.open()).logits(windows)))
    want = served_decoder(case, reference).logits(windows)
    with torch.no_grad():
        exact = case.model.full()(windows, use_cache=False).logits
    effect = relative(got, exact)
    assert 1e-2 < effect < 1
    assert relative(got, want) < 0.05 * effect


def test_a_checkpoint_against_its_model(quantize: Quantize, reference: Any, tokens: Tokens) -> None:
    case = quantize("qwen2", **GROUPED)
    skeleton, source = open_model(case.model.folder)
    windows = tokens(2, 16, seed=7)
    done: list[int] = []
    found = list(compare(case.open(), skeleton, source, windows, reordered=False, device=CPU, on_block=done.append))
    assert done == [0, 1]
    exact = reference(case.model.config, in_float64(case.model.tensors))
    served = served_decoder(case, reference)
    table = case.model.tensors["model.embed_tokens.weight"].double().numpy()
    hidden = [table[window] for window in windows.numpy()]
    for index, block in enumerate(found):
        leaving = [exact.block(index, x) for x in hidden]
        error = relative(np.stack([served.block(index, x) for x in hidden]), np.stack(leaving))
        assert block.output_error == pytest.approx(error, rel=0.02)
        hidden = leaving
        for role in served_roles():
            name = f"model.layers.{index}.{role}"
            recorded = case.result.manifest["blocks"][index]["linears"][role]["weight_error"]
            # lambda moves whole rows, which the comparison must see through
            assert block.weight_errors[name] == pytest.approx(recorded, rel=0.1)


def test_a_checkpoint_against_another_model(quantize: Quantize, make_model: MakeModel, tokens: Tokens) -> None:
    case = quantize("llama")
    skeleton, source = open_model(make_model("llama", intermediate_size=128).folder)
    with pytest.raises(InputError, match="not the shape"):
        next(compare(case.open(), skeleton, source, tokens(1, 16), reordered=False, device=CPU, on_block=print))


def test_recorded_output_errors_of_linears(quantize: Quantize, reference: Any) -> None:
    """Of each linear: its served output against the float weight on the same, served, input."""
    case = quantize("llama", windows=torch.arange(40)[None] % 96)
    served = served_decoder(case, reference)
    want = {}
    linear = served.linear
    exact = folded_independently(case, reference, 0, embedded(case))

    def measure(name: str, x: Any) -> Any:
        out = linear(name, x)
        want.setdefault(name, relative(out, x @ exact[f"{name}.weight"].double().numpy().T))
        return out

    served.linear = measure
    served.block(0, embedded(case)[0])
    assert len(want) == 7
    for name, error in want.items():
        record = case.result.manifest["blocks"][0]["linears"][name.removeprefix("model.layers.0.")]
        assert record["output_error"] == pytest.approx(error, rel=0.02)


# ---- how it goes


def test_progress_only_grows_and_ends(quantize: Quantize) -> None:
    for smooth in (None, SmoothAttention(mode="fixed"), SmoothAttention()):
        case = quantize("llama", recipe=recipe_of(smooth_attention=smooth))
        done = [step.done for step in case.progress]
        assert done == sorted(done)
        assert done[0] == 0
        assert done[-1] == 2
        assert {step.total for step in case.progress} == {2}
        assert 1.0 in done
        assert any(0 < step < 1 for step in done)
        assert case.progress[-1].message == "writing the manifest"


def test_two_runs_give_the_same_bytes(quantize: Quantize, make_model: MakeModel) -> None:
    model = make_model("qwen2", **WIDE)
    one, two = quantize(model), quantize(model)
    for path in one.output.iterdir():
        if path.name != "qoq_manifest.json":
            assert path.read_bytes() == (two.output / path.name).read_bytes(), path.name
    own = {"run", "digest"}
    manifests = [{k: v for k, v in case.result.manifest.items() if k not in own} for case in (one, two)]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("stop_at", ["block 0: done", "block 1: rounding mlp.gate_proj"])
def test_an_interrupted_run_ends_with_the_same_files(
    stop_at: str, quantize: Quantize, make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model("llama")
    whole = quantize(model)
    request = QuantizeRequest(model.folder, "random", tmp_path / "other", whole.plan.request.recipe)
    plan = make_plan(request)

    def again(on_progress: Callable[[Progress], None]) -> RunResult:
        windows = Windows(whole.windows, 3, "fingerprint", "random")
        return run(plan, lambda: windows, restart=False, tool_version="0.0.1", on_progress=on_progress)

    def stop(step: Progress) -> None:
        if step.message == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        again(stop)
    assert not (request.output / "qoq_manifest.json").exists()
    assert again(lambda _: None).resumed_at == 1
    for path in whole.output.iterdir():
        if path.name != "qoq_manifest.json":
            assert path.read_bytes() == (request.output / path.name).read_bytes(), path.name


def test_the_source_is_left_alone(quantize: Quantize, make_model: MakeModel) -> None:
    model = make_model("llama", dtype=torch.float32)
    before = {path.name: path.read_bytes() for path in model.folder.iterdir()}
    quantize(model)
    assert {path.name: path.read_bytes() for path in model.folder.iterdir()} == before


def test_batches_do_not_show_in_the_result(quantize: Quantize, make_model: MakeModel, tokens: Tokens) -> None:
    """More windows than one batch holds: 3 of 1024 tokens, two at a time."""
    model = make_model("llama", max_position_embeddings=2048)
    case = quantize(model, windows=tokens(3, 1024))
    assert len([step for step in case.progress if step.message == "block 0: advancing"]) == 2
    opened = case.open()
    for name, linear in opened.quantized.items():
        decoded = opened.checkpoint.linear(name, in_features=linear.in_features)
        assert decoded.codes.shape[1] == padded_in_features(linear.in_features)
    for record in case.result.manifest["blocks"]:
        assert 1e-3 < record["output_error"] < 0.5


def test_blocks_see_the_embedding_as_it_is_stored(quantize: Quantize, make_model: MakeModel) -> None:
    """Rounding the table before the run changes nothing: its values enter the first block rounded."""
    name = "model.embed_tokens.weight"
    plain, rounded = make_model("llama", dtype=torch.float32), make_model("llama", dtype=torch.float32)
    rounded.tensors[name] = plain.tensors[name].to(torch.bfloat16).float()
    rounded.save()
    one, two = (quantize(model, kept_dtype="bfloat16") for model in (plain, rounded))
    assert one.result.manifest["blocks"] == two.result.manifest["blocks"]
    assert (one.output / "model.safetensors").read_bytes() == (two.output / "model.safetensors").read_bytes()
