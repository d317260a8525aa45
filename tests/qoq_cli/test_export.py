"""`qoq export`: what is written loads elsewhere with the same weights; what cannot be written is told, all of it."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qoq.formats.checkpoint import open_checkpoint
from qoq.formats.manifest import EXPORT_NAME, MANIFEST_NAME


@pytest.fixture(scope="session")
def symmetric_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, qoq: Any, small_model: Path, quick: tuple[object, ...]
) -> Path:
    """`small_model` in symmetric groups."""
    folder = tmp_path_factory.mktemp("symmetric")
    recipe = folder / "sym.yaml"
    recipe.write_text("{symmetric: true, grid: search}")
    outcome = qoq("quantize", small_model, *quick, "--recipe", recipe, "-o", folder / "made", "--device", "cpu")
    assert outcome.code == 0, outcome.stderr
    return folder / "made"


def dequantized(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every quantized weight, float32, by the name that it has in an ordinary model."""
    opened = open_checkpoint(checkpoint)
    names = opened.quantized_linears()
    return {
        f"{name}.weight": opened.linear(
            name, in_features=2 * opened.source.info(f"{name}.qweight").shape[1]
        ).dequantize()
        for name in names
    }


def test_w4a8_loads_with_the_weights_of_the_checkpoint(qoq: Any, symmetric_checkpoint: Path, tmp_path: Path) -> None:
    outcome = qoq("export", symmetric_checkpoint, "--to", "vllm-w4a8", "-o", "out", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["output"] == "out"
    assert outcome.json["linears"] == 14
    assert 0 < outcome.json["error"] < 2**-11
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16)
    ours = dequantized(symmetric_checkpoint)
    with torch.no_grad():
        model(torch.arange(8).unsqueeze(0))  # the library decompresses weights at their first use
    loaded = dict(model.named_parameters())
    for name, weight in ours.items():
        # Scale and weight are rounded to float16.
        assert bool(((loaded[name].float() - weight).abs() <= weight.abs() * 2**-10 + 2**-24).all()), name


def test_the_exported_folder_says_what_it_is(qoq: Any, symmetric_checkpoint: Path, tmp_path: Path) -> None:
    assert qoq("export", symmetric_checkpoint, "--to", "vllm-w4a8", "-o", "out").code == 0
    out = tmp_path / "out"
    assert not (out / MANIFEST_NAME).exists()
    about = json.loads((out / EXPORT_NAME).read_bytes())
    assert about["format"] == "vllm-w4a8"
    assert about["checkpoint"]["digest"] == open_checkpoint(symmetric_checkpoint).manifest["digest"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "humming" in card
    assert "vLLM 0.26" in card
    config = json.loads((out / "config.json").read_bytes())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_shards_and_kept_tensors(qoq: Any, small_checkpoint: Path, tmp_path: Path) -> None:
    """Three shards in, two or more out; what is not quantized is copied bit for bit."""
    outcome = qoq("export", small_checkpoint, "--to", "vllm-w4a16", "-o", "out", "--max-shard-size", "900KB")
    assert outcome.code == 0, outcome.stderr
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    written = {name: tensor for file in files for name, tensor in load_file(tmp_path / "out" / file).items()}
    assert written.keys() == index["weight_map"].keys()
    source = open_checkpoint(small_checkpoint).source
    kept = [name for name in source.names() if name.endswith(("norm.weight", "embed_tokens.weight"))]
    assert kept
    assert all(torch.equal(written[name], source.load(name)) for name in kept)
    assert not any("qweight" in name for name in written)


@pytest.mark.parametrize("to", ["hf-dequantized", "sglang"])
def test_other_forms_hold_the_same_weights(qoq: Any, small_checkpoint: Path, tmp_path: Path, to: str) -> None:
    outcome = qoq("export", small_checkpoint, "--to", to, "-o", "out")
    assert outcome.code == 0, outcome.stderr
    written, ours = load_file(tmp_path / "out" / "model.safetensors"), open_checkpoint(small_checkpoint)
    if to == "sglang":
        assert all(torch.equal(written[name], ours.source.load(name)) for name in ours.source.names())
        config = json.loads((tmp_path / "out" / "config.json").read_bytes())
        assert config["quantization_config"] == {"quant_method": "qoq", "wbits": 4, "group_size": 128}
        return
    for name, weight in dequantized(small_checkpoint).items():
        assert torch.equal(written[name], weight.half()), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16)
    assert model.config.to_dict().get("quantization_config") is None


def test_every_problem_is_told_before_anything_is_written(
    qoq: Any, small_model: Path, quick: tuple[object, ...], tmp_path: Path
) -> None:
    recipe = tmp_path / "odd.yaml"
    recipe.write_text("{zero_domain: post_scale, key_rotation: hadamard, act_bits: 16}")
    options = ("--recipe", recipe, "--ignore", r".*layers\.0\..*k_proj", "-o", "odd", "--device", "cpu")
    assert qoq("quantize", small_model, *quick, *options).code == 0
    for to, expected in {
        "vllm-w4a8": ["key_rotation is hadamard", "layers.0.self_attn.k_proj: in 16 bit", "act_bits is 16", "qoq-sym"],
        "vllm-w4a16": ["key_rotation is hadamard", "layers.0.self_attn.k_proj: in 16 bit", "zero_domain is post_scale"],
        "omniserve": ["key_rotation", "norm gains", "left in 16 bit", "head_dim is 64", "tied embeddings"],
        "hf-dequantized": ["key_rotation is hadamard"],
    }.items():
        outcome = qoq("export", "odd", "--to", to)
        assert outcome.code == 2, to
        for words in expected:
            assert words in outcome.error, (to, words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd", "odd.yaml"]


@pytest.mark.parametrize("to", ["vllm-w4a8", "vllm-w4a16"])
def test_per_channel_weights_have_no_groups(
    fails: Callable[..., str], qoq: Any, small_model: Path, quick: Any, to: str
) -> None:
    assert qoq("quantize", small_model, *quick, "--per-channel", "-o", "chn", "--device", "cpu").code == 0
    assert "per channel" in fails(2, "export", "chn", "--to", to)


def test_bfloat16_rounds_scales_more_and_says_so(qoq: Any, small_model: Path, quick: tuple[object, ...]) -> None:
    options = ("--dtype", "bfloat16", "-o", "bf16", "--device", "cpu")
    assert qoq("quantize", small_model, *quick, *options).code == 0
    outcome = qoq("export", "bf16", "--to", "vllm-w4a16", "--json")
    assert outcome.code == 0, outcome.stderr
    assert 2**-11 < outcome.json["error"] < 2**-8
    assert "float16" in qoq("export", "bf16", "--to", "sglang").error


def test_a_damaged_checkpoint_leaves_nothing(
    fails: Callable[..., str], small_checkpoint: Path, copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = copied(small_checkpoint)
    shard = max(folder.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    for extra in ((), ("--dry-run",)):
        message = fails(2, "export", folder, "--to", "hf-dequantized", "-o", "out", *extra)
        assert shard.name in message
        assert "sha256" in message
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_an_export_that_breaks_off_leaves_nothing(
    qoq: Any, monkeypatch: pytest.MonkeyPatch, small_checkpoint: Path, tmp_path: Path
) -> None:
    from qoq.formats.exporters.dequantized import Dequantized

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Dequantized, "decode", interrupted)
    assert qoq("export", small_checkpoint, "--to", "hf-dequantized", "-o", "out").code == 130
    assert list(tmp_path.iterdir()) == []


def test_a_form_that_loses_weights_is_not_kept(
    qoq: Any, monkeypatch: pytest.MonkeyPatch, small_checkpoint: Path, tmp_path: Path
) -> None:
    from qoq.formats.exporters.dequantized import Dequantized

    monkeypatch.setattr(Dequantized, "decode", lambda _, tensors, __: tensors["weight"].float() * 1.02)
    outcome = qoq("export", small_checkpoint, "--to", "hf-dequantized", "-o", "out")
    assert outcome.code == 2
    assert "off by 2.00%" in outcome.error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_by_the_name_that_was_given(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch, small_checkpoint: Path, tmp_path: Path
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qoq.formats.writer.os.posix_fallocate", no_space)
    message = fails(3, "export", small_checkpoint, "--to", "hf-dequantized", "-o", "out")
    assert "out/model.safetensors: no space left" in message
    assert "--restart" not in message
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_no_checkpoint(qoq: Any, fails: Callable[..., str], small_checkpoint: Path) -> None:
    assert qoq("export", small_checkpoint, "--to", "sglang", "-o", "out").code == 0
    assert "the checkpoint that it was made from" in fails(2, "export", "out", "--to", "hf-dequantized")
    assert "the folder that `qoq quantize` wrote" in fails(2, "export", ".", "--to", "hf-dequantized")


def test_usage(qoq: Any, fails: Callable[..., str], small_checkpoint: Path, tmp_path: Path) -> None:
    listed = qoq("export", "--json")
    assert set(listed.json["formats"]) >= {"vllm-w4a8", "omniserve"}
    assert "vllm-w4a16" in qoq("export").stdout
    assert "vllm-w4a8" in fails(2, "export", small_checkpoint)
    assert "hf-dequantized" in fails(2, "export", small_checkpoint, "--to", "onnx")
    assert "missing" in fails(2, "export", "--to", "sglang")
    assert "no such folder" in fails(2, "export", "nowhere", "--to", "sglang")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert "not an empty folder" in fails(2, "export", small_checkpoint, "--to", "sglang", "-o", "full")
    assert (tmp_path / "full" / "mine").exists()
    inside = fails(2, "export", small_checkpoint, "--to", "sglang", "-o", small_checkpoint / "out")
    assert "lies in the checkpoint itself" in inside
    refused = fails(2, "export", small_checkpoint, "--to", "sglang", "-o", "full", "--dry-run")
    assert "not an empty folder" in refused
    dry = qoq("export", small_checkpoint, "--to", "sglang", "--dry-run", "--json")
    assert dry.code == 0
    assert dry.json["output"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
