"""Plans: what is refused, all at once and by name, and what is promised of a run before any work."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from qoq.calib.finish import checkpoint_totals
from qoq.calib.plan import Plan, QuantizeRequest, make_plan, open_model, output_tensors
from qoq.calib.skeleton import build_skeleton, load_config
from qoq.formats.packing import padded_in_features
from qoq.recipes.errors import InputError
from qoq.recipes.families import all_families, family_of
from qoq.recipes.schema import Calibration, Recipe, SmoothAttention

MakeModel = Callable[..., Any]
UP = "model.layers.1.mlp.up_proj"


def plan_of(model: Any, **request: Any) -> Plan:
    recipe = request.pop("recipe", Recipe(name="test"))
    output = model.folder.parent / "output"
    return make_plan(QuantizeRequest(model=model.folder, model_name="random", output=output, recipe=recipe, **request))


def refused(model: Any, **request: Any) -> str:
    with pytest.raises(InputError) as caught:
        plan_of(model, **request)
    return str(caught.value)


def edit_config(model: Any, **changes: Any) -> None:
    """Change keys of config.json; None takes one out."""
    path = model.folder / "config.json"
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# ---- what does not fit


def test_every_problem_of_the_tensors_is_reported_together(make_model: MakeModel) -> None:
    model = make_model("llama")
    del model.tensors["model.layers.0.self_attn.k_proj.weight"]
    del model.tensors["model.norm.weight"]
    model.tensors[f"{UP}.weight"] = torch.zeros(256, 64, dtype=torch.float16)
    model.tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(128, 256, dtype=torch.int8)
    model.tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(128, dtype=torch.float16)
    model.tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(256, 128, dtype=torch.float16)
    model.save()
    message = refused(model)
    assert str(model.folder) in message
    assert "(6):" in message
    for line in (
        "model.layers.0.self_attn.k_proj.weight: missing",
        "model.norm.weight: missing",
        f"{UP}.weight: shape [256, 64], the configuration says [256, 128]",
        "model.layers.1.mlp.down_proj.weight: torch.int8, expected floating point",
        "model.layers.0.self_attn.q_proj.bias: the configuration does not know it",
        "model.layers.2.mlp.up_proj.weight: the configuration does not know it",
    ):
        assert f"  - {line}" in message


def test_every_problem_of_the_configuration_is_reported_together(make_model: MakeModel) -> None:
    model = make_model("llama")
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    rope |= {"short_factor": [1.0] * 16, "long_factor": [1.0] * 16, "factor": 2.0}
    rope |= {"original_max_position_embeddings": 256}
    edit_config(model, head_dim=32, hidden_act="gelu", rope_parameters=rope)
    message = refused(model)
    assert "(4):" in message
    assert "RoPE type 'longrope' is not supported (supported: default, linear, dynamic, llama3, yarn)" in message
    assert "partial_rotary_factor 0.5 is not supported" in message
    assert "head_dim is 32, expected 64 or 128" in message
    assert "activation 'gelu' is not supported" in message


@pytest.mark.parametrize("head_dim", [16, 80, 96, 256])
def test_head_sizes(head_dim: int, make_model: MakeModel) -> None:
    assert f"head_dim is {head_dim}, expected 64 or 128" in refused(make_model("llama", head_dim=head_dim))


def test_a_head_size_that_follows_from_others(make_model: MakeModel) -> None:
    model = make_model("llama")
    edit_config(model, head_dim=None)
    skeleton, _ = open_model(model.folder)
    assert skeleton.head_dim == 64
    assert plan_of(model).quantized


def test_kv_heads_that_are_not_given(make_model: MakeModel) -> None:
    model = make_model("llama", num_key_value_heads=None)
    edit_config(model, num_key_value_heads=None)
    skeleton, _ = open_model(model.folder)
    assert (skeleton.num_heads, skeleton.num_kv_heads) == (2, 2)


def test_heads_that_do_not_share_evenly(make_model: MakeModel) -> None:
    model = make_model("llama", num_attention_heads=4, hidden_size=256)
    edit_config(model, num_key_value_heads=3)
    assert "4 attention heads do not share 3 KV heads evenly" in refused(model)


def test_output_sizes(make_model: MakeModel) -> None:
    message = refused(make_model("llama", intermediate_size=200))
    assert "(2):" in message
    for part in ("gate", "up"):
        assert f"model.layers.0.mlp.{part}_proj: 200 output features, expected a multiple of 32" in message


def test_an_unknown_family_is_refused_with_those_that_are_known(make_model: MakeModel) -> None:
    model = make_model("llama")
    edit_config(model, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    message = refused(model)
    assert "model_type 'gpt2' with architectures ['GPT2LMHeadModel'] is not supported" in message
    for family in all_families():
        assert f"{family.model_type} ({family.architecture})" in message


def test_another_head_on_a_known_family_is_refused(make_model: MakeModel) -> None:
    model = make_model("llama")
    edit_config(model, architectures=["LlamaForSequenceClassification"])
    assert "LlamaForSequenceClassification" in refused(model)


def test_a_model_type_that_nobody_knows(make_model: MakeModel) -> None:
    model = make_model("llama")
    edit_config(model, model_type="no-such-model")
    assert "config" in refused(model)


@pytest.mark.parametrize("method", ["qoq", "gptq", "bitsandbytes"])
def test_a_quantized_model_is_refused(method: str, make_model: MakeModel) -> None:
    model = make_model("llama")
    edit_config(model, quantization_config={"quant_method": method, "bits": 4})
    message = refused(model)
    assert "already" in message
    assert method in message
    assert "16-bit model it was made from" in message


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        open_model(tmp_path)


def test_tensors_outside_the_blocks_are_left_out_with_a_warning(make_model: MakeModel) -> None:
    model = make_model("llama")
    model.tensors["visual.patch.weight"] = torch.zeros(4, dtype=torch.float16)
    model.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(32)
    model.save()
    plan = plan_of(model)
    assert plan.warnings == ("tensor visual.patch.weight is not part of the model and is left out",)
    assert "visual.patch.weight" not in {name for shard in plan.shards for name in shard.tensors}


def test_a_tied_head_is_not_a_tensor_of_its_own(make_model: MakeModel) -> None:
    tied = plan_of(make_model("qwen2", tie_word_embeddings=True))
    own = plan_of(make_model("qwen2"))
    assert "lm_head.weight" not in {name for shard in tied.shards for name in shard.tensors}
    assert "lm_head.weight" in {name for shard in own.shards for name in shard.tensors}


def test_integer_and_8_bit_embeddings(make_model: MakeModel) -> None:
    model = make_model("llama")
    model.tensors["model.embed_tokens.weight"] = torch.zeros(96, 128, dtype=torch.int32)
    model.save()
    assert "model.embed_tokens.weight: torch.int32, expected floating point" in refused(model)


# ---- which linears


def names_of(plan: Plan) -> set[str]:
    return set(plan.quantized)


def test_all_linears_of_all_blocks_are_quantized(make_model: MakeModel) -> None:
    roles = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    roles += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        plan = plan_of(make_model(family, num_hidden_layers=3))
        assert names_of(plan) == {f"model.layers.{i}.{role}" for i in range(3) for role in roles}
        assert plan.config.modules_to_not_convert == ("lm_head",)


@pytest.mark.parametrize(
    ("include", "ignore", "want"),
    [
        ((), (r"down_proj",), 12),
        ((), (r"layers\.0\.",), 7),
        ((), (r"layers\.0\.", r"k_proj$"), 6),
        ((r"mlp",), (), 6),
        ((r"mlp",), (r"up_proj",), 4),
        ((r"q_proj", r"k_proj"), (r"layers\.1",), 2),
        ((), (r".*",), 0),
    ],
)
def test_patterns(include: tuple[str, ...], ignore: tuple[str, ...], want: int, make_model: MakeModel) -> None:
    plan = plan_of(make_model("llama"), recipe=Recipe(name="test", include=include, ignore=ignore))
    assert len(plan.quantized) == want
    kept = set(plan.config.modules_to_not_convert)
    assert kept == {"lm_head"} | (set(plan.skeleton.all_linears()) - names_of(plan))
    names = {name for shard in plan.shards for name in shard.tensors}
    for name in plan.skeleton.all_linears():
        assert (f"{name}.weight" in names) == (name in kept)
        assert (f"{name}.qweight" in names) == (name not in kept)


@pytest.mark.parametrize("key", ["include", "ignore"])
def test_a_pattern_without_a_match_is_refused(key: str, make_model: MakeModel) -> None:
    message = refused(make_model("llama"), recipe=Recipe(name="test", **{key: ("no_such_proj",)}))
    assert f"--{key} 'no_such_proj' matches no linear" in message
    assert "model.layers.0.self_attn.q_proj" in message


# ---- what is written


@pytest.mark.parametrize("group_size", [128, None], ids=["g128", "per-channel"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_output_tensors(family: str, group_size: int | None, make_model: MakeModel) -> None:
    plan = plan_of(
        make_model(family, intermediate_size=320, hidden_size=192, num_attention_heads=3),
        recipe=Recipe(name="test", group_size=group_size),
        kept_dtype="bfloat16",
    )
    tensors = output_tensors(plan.skeleton, plan.quantized, progressive=group_size is not None, dtype=torch.bfloat16)
    planned = {name: info for shard in plan.shards for name, info in shard.tensors.items()}
    assert planned == tensors
    want: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, tensor in plan.skeleton.model.state_dict().items():
        owner, part = name.rsplit(".", 1)
        if owner not in plan.quantized:
            want[name] = (torch.bfloat16, tuple(tensor.shape))
        elif part == "bias":
            want[name] = (torch.float16, tuple(tensor.shape))
        else:
            n, k = tensor.shape
            k = math.ceil(k / 128) * 128
            want[f"{owner}.qweight"] = (torch.int8, (n, k // 2))
            want[f"{owner}.s1_scales"] = (torch.float16, (n,))
            if group_size is None:
                want[f"{owner}.s1_szeros"] = (torch.float16, (n,))
            else:
                want[f"{owner}.s2_scales"] = want[f"{owner}.s2_zeros"] = (torch.int8, (k // 128, n))
    assert {name: (info.dtype, info.shape) for name, info in tensors.items()} == want


def test_the_table_of_padding(make_model: MakeModel) -> None:
    plan = plan_of(make_model("llama", hidden_size=192, num_attention_heads=3, intermediate_size=256))
    # o_proj reads 3 * 64 channels, down_proj 256
    want = {
        name: 192
        for name in plan.quantized
        if name.rsplit(".", 1)[1] in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
    }
    assert plan.config.padded == want
    assert plan_of(make_model("llama")).config.padded == {}
    ignored = plan_of(
        make_model("llama", hidden_size=192, num_attention_heads=3), recipe=Recipe(name="t", ignore=("self_attn",))
    )
    assert {name.split(".")[3] for name in ignored.config.padded} == {"mlp"}


@pytest.mark.parametrize("group_size", [128, None], ids=["g128", "per-channel"])
@pytest.mark.parametrize("hidden", [128, 192])
def test_bits_per_weight(hidden: int, group_size: int | None, make_model: MakeModel) -> None:
    model = make_model("llama", hidden_size=hidden, num_attention_heads=hidden // 64, intermediate_size=320)
    plan = plan_of(model, recipe=Recipe(name="test", group_size=group_size))
    bits = weights = 0.0
    for linear in plan.quantized.values():
        n, k = linear.weight.shape
        padded = padded_in_features(k)
        groups = padded // 128 if group_size else 0
        # codes; two bytes of level 2 a group; s1, and per channel its zero term
        bits += n * (4 * padded + 16 * groups + 16 + (0 if group_size else 16))
        weights += n * k
    totals = checkpoint_totals(plan)
    assert totals["bits_per_weight"] == pytest.approx(bits / weights, abs=1e-4)
    assert totals["quantized_weights"] == weights
    assert totals["quantized_linears"] == 14
    assert totals["model_bytes_16bit"] == sum(tensor.numel() for tensor in model.tensors.values()) * 2


def test_bits_per_weight_of_no_weights(make_model: MakeModel) -> None:
    plan = plan_of(make_model("llama", tie_word_embeddings=True), recipe=Recipe(name="test", ignore=(".*",)))
    totals = checkpoint_totals(plan)
    assert totals["bits_per_weight"] is None
    assert totals["quantized_linears"] == 0
    header = sum(len(shard.header) for shard in plan.shards)
    assert totals["checkpoint_bytes"] - header == totals["model_bytes_16bit"]


# ---- shards


@pytest.mark.parametrize("limit", [1, 10_000, 24_576, 24_577, 100_000, 10**9])
def test_shards(limit: int, make_model: MakeModel) -> None:
    plan = plan_of(make_model("qwen2"), max_shard_bytes=limit)
    tensors = output_tensors(plan.skeleton, plan.quantized, progressive=True, dtype=torch.float16)
    placed = [name for shard in plan.shards for name in shard.tensors]
    assert sorted(placed) == sorted(tensors)
    sizes = [sum(info.nbytes for info in shard.tensors.values()) for shard in plan.shards]
    for shard, size in zip(plan.shards, sizes, strict=True):
        assert size <= limit or len(shard.tensors) == 1
    order = {name: i for i, name in enumerate(tensors)}
    firsts = [min(order[name] for name in shard.tensors) for shard in plan.shards]
    assert firsts == sorted(firsts)
    for (shard, size), follower in zip(zip(plan.shards, sizes, strict=True), plan.shards[1:], strict=False):
        first = min(follower.tensors, key=order.__getitem__)
        assert size + tensors[first].nbytes > limit, shard.name  # none is cut sooner than it must be
    if limit == 1:
        assert len(plan.shards) == len(tensors)
    if limit == 10**9:
        assert [shard.name for shard in plan.shards] == ["model.safetensors"]
    assert plan.estimate.checkpoint == sum(shard.nbytes for shard in plan.shards)


# ---- estimates and fingerprints


def test_a_plan_touches_nothing(make_model: MakeModel) -> None:
    model = make_model("qwen3")
    root = model.folder.parent

    def everything() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}

    before = everything()
    model.folder.chmod(0o555)
    try:
        plan = plan_of(model)
    finally:
        model.folder.chmod(0o755)
    assert everything() == before
    assert not plan.request.output.exists()
    assert all(parameter.is_meta for parameter in plan.skeleton.model.parameters())


def test_no_tensor_is_read(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")

    def load(*_: Any) -> None:
        raise AssertionError("a plan reads headers only")

    monkeypatch.setattr("qoq.formats.safetensors_file.SafetensorsFile.load", load)
    assert plan_of(model).quantized


def test_estimates_follow_from_sizes(make_model: MakeModel) -> None:
    recipe = Recipe(name="test", calibration=Calibration(samples=8, seq_len=32))
    two = plan_of(make_model("llama"), recipe=recipe).estimate
    four = plan_of(make_model("llama", num_hidden_layers=4), recipe=recipe).estimate
    weights = 128 * 128 * 2 + 64 * 128 * 2 + 3 * 256 * 128
    assert two.block == four.block == weights * 4
    assert two.hidden == 8 * 32 * 128 * 4
    assert two.memory == four.memory  # whatever the depth
    assert four.operations == 2 * two.operations
    assert four.checkpoint > two.checkpoint
    assert two.disk == two.checkpoint + two.state
    smooth = plan_of(make_model("llama"), recipe=recipe.model_copy(update={"smooth_attention": SmoothAttention()}))
    assert smooth.estimate.operations > two.operations
    nothing = plan_of(make_model("llama"), recipe=recipe.model_copy(update={"ignore": (".*",)}))
    assert nothing.estimate.memory >= two.hidden


def test_a_fingerprint_is_of_everything_that_decides_the_result(make_model: MakeModel) -> None:
    model = make_model("llama")
    hashes = {"model.safetensors": "abc"}
    base = plan_of(model).fingerprint("text", hashes, "1")
    assert plan_of(model).fingerprint("text", hashes, "1") == base
    assert plan_of(model, revision="main").fingerprint("text", hashes, "1") == base
    others = [
        plan_of(model).fingerprint("other text", hashes, "1"),
        plan_of(model).fingerprint("text", hashes, "2"),
        plan_of(model).fingerprint("text", {"model.safetensors": "abd"}, "1"),
        plan_of(model, kept_dtype="bfloat16").fingerprint("text", hashes, "1"),
        plan_of(model, max_shard_bytes=1000).fingerprint("text", hashes, "1"),
        plan_of(model, recipe=Recipe(name="test", group_size=None)).fingerprint("text", hashes, "1"),
        plan_of(model, recipe=Recipe(name="test", ignore=("q_proj",))).fingerprint("text", hashes, "1"),
        plan_of(model, recipe=Recipe(name="test", smooth_attention=SmoothAttention())).fingerprint("text", hashes, "1"),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_the_folder_a_model_lies_in_is_no_part_of_the_fingerprint(make_model: MakeModel) -> None:
    one, two = make_model("llama"), make_model("llama")
    assert one.folder != two.folder
    assert plan_of(one).fingerprint("text", {}, "1") == plan_of(two).fingerprint("text", {}, "1")


# ---- the skeleton


def test_a_config_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": 5}')
    with pytest.raises(InputError):
        load_config(tmp_path)


def test_a_skeleton_leaves_the_configuration_alone() -> None:
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_attention_heads=2, num_hidden_layers=1, vocab_size=32
    )
    before = config.to_dict()
    skeleton = build_skeleton(config, where="here")
    assert config.to_dict() == before
    skeleton.block(0).self_attn.config.hidden_size = 7
    assert skeleton.config.hidden_size == 128


def test_bfloat16_and_float32_sources(make_model: MakeModel) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        model = make_model("llama", dtype=dtype)
        plan = plan_of(model)
        assert plan.source.info(f"{UP}.weight").dtype == dtype


@pytest.mark.parametrize(("kv_bits", "key_rotation"), [(4, "hadamard"), (8, "hadamard"), (16, "none")])
def test_keys_of_a_16_bit_cache_are_not_rotated(kv_bits: Any, key_rotation: str, make_model: MakeModel) -> None:
    """So any runtime can serve it."""
    recipe = Recipe(name="test", kv_bits=kv_bits, key_rotation="hadamard")
    assert plan_of(make_model("llama"), recipe=recipe).config.key_rotation == key_rotation


def test_shards_of_the_source_are_joined(make_model: MakeModel) -> None:
    model = make_model("llama")
    names = sorted(model.tensors)
    (model.folder / "model.safetensors").unlink()
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: model.tensors[name] for name in part}, model.folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (model.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert plan_of(model).quantized


def test_families_are_told_apart_by_type_and_architecture() -> None:
    for family in all_families():
        assert family_of(family.model_type) is family
        assert family_of(family.model_type, (family.architecture,)) is family
        with pytest.raises(InputError):
            family_of(family.model_type, ("Other",))
    with pytest.raises(InputError):
        family_of(None)
