"""A checkpoint that was changed after it was written: `verify` names what is off, `eval` refuses what is unsafe."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qoq.formats.packing import pack_s2, unpack_qweight, unpack_s2

MANIFEST = "qoq_manifest.json"
LINEAR = "model.layers.1.mlp.down_proj"
EVAL = ("--ppl", "builtin", "--limit", 1, "--seq-len", 32)


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def shard_of(folder: Path, tensor: str) -> Path:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if tensor in file.keys():  # noqa: SIM118  (not a dict)
                return path
    raise AssertionError(tensor)


def edit(folder: Path, tensor: str, change: Callable[[Tensor], Tensor]) -> None:
    """Rewrite one tensor of a checkpoint."""
    path = shard_of(folder, tensor)
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    tensors[tensor] = change(tensors[tensor])
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "quant_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "header",
        "data",
    ],
)
@pytest.mark.parametrize("seed", range(2))
def test_one_flipped_bit_is_found_and_its_file_named(
    name: str, seed: int, tiny_checkpoint: Path, copied: Any, fails: Any
) -> None:
    folder = copied(tiny_checkpoint)
    draw = random.Random(f"{name} {seed}")
    path = folder / ("model.safetensors" if name in ("header", "data") else name)
    size = path.stat().st_size
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little") if path.suffix == ".safetensors" else 0
    at = draw.randrange(header) if name == "header" else draw.randrange(header, size)
    flip(path, at, draw.randrange(8))
    assert path.name in fails(1, "verify", folder)


def test_every_file_of_a_checkpoint_is_guarded(small_checkpoint: Path, copied: Any, fails: Any, qoq: Any) -> None:
    """Nothing lies in the folder whose last byte could change unseen; the model card alone is only warned about."""
    folder = copied(small_checkpoint)
    assert len(list(folder.glob("*.safetensors"))) > 1
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        # A manifest's last bytes are "}\n": the digest is of its meaning, so change a letter instead.
        path.write_bytes(original.replace(b"sha", b"shb", 1) if path.name == MANIFEST else original + b"\n")
        if path.name == "README.md":
            assert qoq("verify", folder).code == 0
        else:
            assert path.name in fails(1, "verify", folder)
        path.write_bytes(original)
    assert qoq("verify", folder).code == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_flipped_bit_of_the_configuration_is_one_clear_error(
    small_checkpoint: Path, copied: Any, fails: Any, repair: Any, qoq: Any
) -> None:
    """Also with repaired hashes: whatever the configuration then says, no command ends in a stack."""
    folder = copied(small_checkpoint)
    path = folder / "config.json"
    original = path.read_bytes()
    draw = random.Random(0)
    for at in range(len(original)):
        flip(path, at, draw.randrange(8))
        assert "config.json" in fails(1, "verify", folder)
        repair(folder)
        outcome = qoq("verify", folder)
        assert outcome.code in (0, 1), outcome.stderr
        assert "not an error qoq expects" not in outcome.stderr, f"byte {at}: {outcome.stderr}"
        path.write_bytes(original)
        repair(folder)


def test_an_edited_model_card_is_a_warning(tiny_checkpoint: Path, copied: Any, qoq: Any) -> None:
    folder = copied(tiny_checkpoint)
    (folder / "README.md").write_text("# My model\n")
    outcome = qoq("verify", folder)
    assert outcome.code == 0
    assert "warning: README.md" in outcome.stderr
    (folder / "README.md").unlink()
    report = qoq("verify", folder, "--json")
    assert report.code == 0
    assert report.json["ok"] is True
    assert report.json["warnings"] == ["README.md: missing"]


def _prettier_error(manifest: Any) -> None:
    manifest["blocks"][0]["output_error"] = 0.0001


def _other_hash(manifest: Any) -> None:
    manifest["files"]["config.json"]["sha256"] = "0" * 64


def _other_recipe(manifest: Any) -> None:
    manifest["recipe"]["kv_bits"] = 16


def _no_digest(manifest: Any) -> None:
    del manifest["digest"]


def _file_left_out(manifest: Any) -> None:
    del manifest["files"]["model.safetensors"]


def _nan(manifest: Any) -> None:
    manifest["blocks"][0]["output_error"] = float("nan")


@pytest.mark.parametrize("change", [_prettier_error, _other_hash, _other_recipe, _no_digest, _file_left_out, _nan])
def test_an_edited_manifest_is_found(change: Any, tiny_checkpoint: Path, copied: Any, fails: Any) -> None:
    folder = copied(tiny_checkpoint)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True))
    assert MANIFEST in fails(1, "verify", folder)


def test_a_manifest_written_in_another_way_is_the_same(tiny_checkpoint: Path, copied: Any, qoq: Any) -> None:
    """The digest is of the content: indentation and the order of keys do not matter."""
    folder = copied(tiny_checkpoint)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_text(json.dumps(dict(reversed(manifest.items()))))
    assert qoq("verify", folder).code == 0


def test_a_left_out_file_stays_noticed_with_a_repaired_digest(
    tiny_checkpoint: Path, copied: Any, fails: Any, repair: Any
) -> None:
    """A manifest that lists fewer files would leave the others unguarded."""
    for name in ("config.json", "model.safetensors", "quant_config.json", "tokenizer.json"):
        folder = copied(tiny_checkpoint)
        manifest = json.loads((folder / MANIFEST).read_bytes())
        del manifest["files"][name]
        (folder / MANIFEST).write_text(json.dumps(manifest))
        repair(folder)
        assert f"{name}: not listed" in fails(1, "verify", folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "value", ["[]", "null", '{"files": []}', '{"files": {}, "blocks": 3}', "{", "", "\xff", "[" * 9999]
)
@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_manifest_of_another_shape_is_refused(
    value: str, command: str, tiny_checkpoint: Path, copied: Any, fails: Any
) -> None:
    folder = copied(tiny_checkpoint)
    (folder / MANIFEST).write_bytes(value.encode("latin-1"))
    assert MANIFEST in fails(2, command, folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "quant_config.json"])
def test_a_missing_file(name: str, tiny_checkpoint: Path, copied: Any, fails: Any) -> None:
    folder = copied(tiny_checkpoint)
    (folder / name).unlink()
    assert f"{name}: missing" in fails(1, "verify", folder)
    if name in ("model.safetensors", "config.json", "tokenizer.json"):
        fails(2, "eval", folder, *EVAL)
        fails(2, "generate", folder, "In", "-n", 1)


def test_a_missing_shard_and_an_extra_one(small_checkpoint: Path, copied: Any, fails: Any) -> None:
    folder = copied(small_checkpoint)
    shard = min(folder.glob("*.safetensors"))
    (folder / "model-extra.safetensors").write_bytes(shard.read_bytes())
    assert "model-extra.safetensors: not listed" in fails(1, "verify", folder)
    (folder / "model-extra.safetensors").unlink()
    shard.unlink()
    assert f"{shard.name}: missing" in fails(1, "verify", folder)


def test_a_cut_file(tiny_checkpoint: Path, copied: Any, fails: Any) -> None:
    folder = copied(tiny_checkpoint)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    message = fails(1, "verify", folder)
    assert "model.safetensors" in message
    assert "1000 bytes are missing" in message
    assert "1000 bytes are missing" in fails(2, "eval", folder, *EVAL)


# ---- with the hashes repaired, so that only the numbers tell


def _leave_int8(folder: Path) -> str:
    """Move one group's offset by whole steps until its largest or smallest code leaves int8."""
    name = f"{LINEAR}.s2_zeros"
    codes = unpack_qweight(load_file(shard_of(folder, f"{LINEAR}.qweight"))[f"{LINEAR}.qweight"])
    scales = unpack_s2(load_file(shard_of(folder, f"{LINEAR}.s2_scales"))[f"{LINEAR}.s2_scales"])

    def change(zeros: Tensor) -> Tensor:
        logical = unpack_s2(zeros)
        offsets = (-logical.to(torch.int16)) & 255
        row, group = (int(i) for i in (scales >= 12).nonzero()[0])
        low = int(codes[row, group * 128 : group * 128 + 128].min())
        s2 = int(scales[row, group])
        wanted = 15 * s2 if low * s2 - 15 * s2 < -128 else 0
        high = int(codes[row, group * 128 : group * 128 + 128].max())
        assert low * s2 - wanted < -128 or high * s2 - wanted > 127
        offsets[row, group] = wanted
        return pack_s2((-offsets & 255).to(torch.uint8))

    edit(folder, name, change)
    return LINEAR


def _scale_17(folder: Path) -> str:
    def change(scales: Tensor) -> Tensor:
        scales[0, 0] = 17
        return scales

    edit(folder, f"{LINEAR}.s2_scales", change)
    return LINEAR


def _scale_0(folder: Path) -> str:
    edit(folder, f"{LINEAR}.s2_scales", torch.zeros_like)
    return LINEAR


def _scale_negative(folder: Path) -> str:
    edit(folder, f"{LINEAR}.s2_scales", lambda scales: -scales)
    return LINEAR


def _offset_between_codes(folder: Path) -> str:
    scales = load_file(shard_of(folder, f"{LINEAR}.s2_scales"))[f"{LINEAR}.s2_scales"]

    def change(zeros: Tensor) -> Tensor:
        at = tuple(int(i) for i in (scales > 1).nonzero()[0])
        zeros[at] -= 1
        return zeros

    edit(folder, f"{LINEAR}.s2_zeros", change)
    return LINEAR


def _s1(value: float) -> Callable[[Path], str]:
    def tamper(folder: Path) -> str:
        def change(scales: Tensor) -> Tensor:
            scales[5] = value
            return scales

        edit(folder, f"{LINEAR}.s1_scales", change)
        return LINEAR

    return tamper


def _kept(value: float) -> Callable[[Path], str]:
    def tamper(folder: Path) -> str:
        def change(norm: Tensor) -> Tensor:
            norm[7] = value
            return norm

        edit(folder, "model.layers.0.input_layernorm.weight", change)
        return "model.layers.0.input_layernorm.weight"

    return tamper


def _another_shape(folder: Path) -> str:
    edit(folder, f"{LINEAR}.s1_scales", lambda scales: scales[:-1].clone())
    return f"{LINEAR}.s1_scales"


def _another_type(folder: Path) -> str:
    edit(folder, f"{LINEAR}.s1_scales", lambda scales: scales.float())
    return f"{LINEAR}.s1_scales"


TAMPERINGS = {
    "level-1 weight leaves int8": _leave_int8,
    "s2 = 17": _scale_17,
    "s2 = 0": _scale_0,
    "s2 < 0": _scale_negative,
    "offset no multiple of s2": _offset_between_codes,
    "s1 is NaN": _s1(float("nan")),
    "s1 is infinite": _s1(float("inf")),
    "s1 is zero": _s1(0.0),
    "s1 is negative": _s1(-0.01),
    "norm gain is NaN": _kept(float("nan")),
    "shape": _another_shape,
    "type": _another_type,
}


@pytest.mark.parametrize("tamper", TAMPERINGS.values(), ids=TAMPERINGS.keys())
def test_wrong_numbers_with_repaired_hashes(
    tamper: Callable[[Path], str], tiny_checkpoint: Path, copied: Any, fails: Any, repair: Any
) -> None:
    folder = copied(tiny_checkpoint)
    name = tamper(folder)
    repair(folder)
    assert name in fails(1, "verify", folder)
    assert name in fails(2, "eval", folder, *EVAL)


@pytest.mark.parametrize("what", ["level-1 weight leaves int8", "s2 = 17", "s1 is NaN"])
def test_generate_refuses_them_too(what: str, tiny_checkpoint: Path, copied: Any, fails: Any, repair: Any) -> None:
    folder = copied(tiny_checkpoint)
    name = TAMPERINGS[what](folder)
    repair(folder)
    assert name in fails(2, "generate", folder, "In", "-n", 1)


def test_several_problems_are_told_together(tiny_checkpoint: Path, copied: Any, qoq: Any, repair: Any) -> None:
    folder = copied(tiny_checkpoint)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.3.self_attn.k_proj"):
        edit(folder, f"{name}.s1_scales", lambda scales: scales * float("nan"))
    repair(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    outcome = qoq("verify", folder, "--json")
    assert outcome.code == 1
    assert outcome.json["ok"] is False
    assert len(outcome.json["problems"]) == 3
    assert "3 problem(s)" in outcome.error
    for name in ("model.layers.0.mlp.up_proj", "model.layers.3.self_attn.k_proj", "tokenizer_config.json"):
        assert name in outcome.error


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zero_domain", "both"),
        ("group_size", 64),
        ("wbits", 8),
        ("format_version", 99),
        ("key_rotation", "random"),
        ("padded", {"model.layers.0.mlp.up_proj": 200}),
        ("modules_to_not_convert", ["lm_head", "model.layers.0.mlp.up_proj"]),
    ],
)
def test_a_configuration_that_does_not_fit_the_tensors(
    key: str, value: Any, tiny_checkpoint: Path, copied: Any, fails: Any, repair: Any
) -> None:
    folder = copied(tiny_checkpoint)
    config = json.loads((folder / "config.json").read_bytes())
    config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    repair(folder)
    fails(1, "verify", folder)
    fails(2, "eval", folder, *EVAL)
