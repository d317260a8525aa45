"""Each kind of bad input ends in one clear error: exit code, what is wrong and where, a remedy; nothing is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qoq_cli.model_location import tiny_folder

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model(copied: Any, small_model: Path) -> Path:
    """A small model that may be changed."""
    return copied(small_model)


@pytest.fixture
def refused(fails: Any, quick: tuple[object, ...], tmp_path: Path) -> Any:
    """refused(2, MODEL, OPTION...): the error of `qoq quantize`, which leaves nothing that looks complete."""

    def run(code: int, *args: object) -> str:
        output = tmp_path / "out"
        message = fails(code, "quantize", args[0], *quick, "-o", output, *args[1:])
        assert not list(tmp_path.rglob("qoq_manifest.json"))
        assert not list(output.glob("*.safetensors"))
        return message

    return run


def change_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps(config | changes))


def change_tensors(model: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(model / "model.safetensors") | {name.replace("__", "."): t for name, t in changes.items()}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})


def write_header(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


# ---- the model folder


def test_a_folder_that_is_not_there(refused: Any, tmp_path: Path) -> None:
    assert "no such folder" in refused(2, tmp_path / "nowhere" / "model")
    assert "did you mean" in refused(2, "tinny")
    (tmp_path / "model").mkdir()
    assert "config.json" in refused(2, tmp_path / "model")


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("config.json", "config.json"),
        ("model.safetensors", "safetensors"),
        ("tokenizer.json", "tokenizer"),
    ],
)
def test_a_half_written_folder(missing: str, named: str, model: Path, refused: Any) -> None:
    (model / missing).unlink()
    assert named in refused(2, model)


def test_a_folder_of_pickles(model: Path, refused: Any) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "pickle" in refused(2, model)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model_type": 3}', b"{}", b"[" * 99999])
def test_a_broken_configuration(content: bytes, model: Path, refused: Any) -> None:
    (model / "config.json").write_bytes(content)
    assert str(model) in refused(2, model)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": "1.0"}', b"\xff"])
def test_a_broken_tokenizer(content: bytes, model: Path, refused: Any) -> None:
    (model / "tokenizer.json").write_bytes(content)
    assert "tokenizer" in refused(2, model)


def test_a_tokenizer_of_another_model(model: Path, refused: Any) -> None:
    change_config(model, vocab_size=100)
    tensors = load_file(model / "model.safetensors")
    change_tensors(model, model__embed_tokens__weight=tensors["model.embed_tokens.weight"][:100].clone())
    assert "tokenizer and the model do not belong together" in refused(2, model)


# ---- weights


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_file(keep: int, model: Path, refused: Any) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors" in refused(2, model)


ENTRY = {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"{", None),
        (b"[]", None),
        (b"\xff" * 20, None),
        (b"{}", 2**63),
        (b"{}", 2**64 - 1),
        ({"a": ENTRY | {"data_offsets": [0, 2**62]}}, None),
        ({"a": ENTRY | {"data_offsets": [-4, 0]}}, None),
        ({"a": ENTRY | {"shape": [2**40, 2**40]}}, None),
        ({"a": ENTRY | {"shape": [-2]}}, None),
        ({"a": ENTRY | {"dtype": "Q4"}}, None),
        ({"a": ENTRY, "b": ENTRY}, None),
        ({"a": "x"}, None),
        ({"../../etc/passwd\n": ENTRY}, None),
        (b'{"a": {}, "a": {}}', None),
        (b'{"a": ' * 50_000, None),
    ],
    ids=range(15),
)
def test_a_hostile_header(header: Any, length: int | None, model: Path, refused: Any) -> None:
    write_header(model / "model.safetensors", header, b"\0" * 4, length)
    assert "model.safetensors" in refused(2, model)


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 3, None])
def test_an_index_that_points_outside(target: Any, model: Path, refused: Any, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {WEIGHT: target}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json" in refused(2, model)


def test_an_index_without_its_shards(model: Path, refused: Any) -> None:
    (model / "model.safetensors").unlink()
    index = {"weight_map": {WEIGHT: "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors" in refused(2, model)


def test_a_link_out_of_the_folder(model: Path, refused: Any, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (model / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert "leads out of" in refused(2, model)


def test_a_pipe_does_not_hang(model: Path, refused: Any) -> None:
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")
    assert "regular file" in refused(2, model)


def test_shapes_that_do_not_fit_are_listed_together(model: Path, refused: Any) -> None:
    change_tensors(
        model,
        model__layers__0__mlp__up_proj__weight=torch.zeros(3, 3).half(),
        model__layers__1__self_attn__q_proj__weight=torch.zeros(128).half(),
        model__norm__weight=None,
        model__layers__1__extra__weight=torch.zeros(1).half(),
    )
    message = refused(2, model)
    for part in ("layers.0.mlp.up_proj.weight", "[3, 3]", "[256, 128]", "layers.1.self_attn.q_proj.weight"):
        assert part in message
    assert "model.norm.weight: missing" in message
    assert "model.layers.1.extra.weight" in message


def test_integer_weights(model: Path, refused: Any) -> None:
    change_tensors(model, model__layers__1__mlp__up_proj__weight=torch.zeros(256, 128, dtype=torch.int8))
    assert WEIGHT in refused(2, model)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (WEIGHT, float("nan")),
        (WEIGHT, -float("inf")),
        ("model.embed_tokens.weight", float("inf")),
        ("model.norm.weight", float("nan")),
        ("model.layers.0.input_layernorm.weight", float("nan")),
    ],
)
def test_values_that_are_not_finite(name: str, value: float, model: Path, refused: Any) -> None:
    tensor = load_file(model / "model.safetensors")[name].clone()
    tensor.view(-1)[-1] = value
    change_tensors(model, **{name.replace(".", "__"): tensor})
    message = refused(2, model)
    assert name in message
    assert "NaN or infinite" in message


def test_activations_that_are_not_finite_name_the_block(model: Path, refused: Any) -> None:
    """Finite weights whose products overflow float32."""
    gain = torch.full((128,), 3e38, dtype=torch.float32)
    change_tensors(model, model__layers__1__input_layernorm__weight=gain)
    message = refused(2, model, "--dtype", "bfloat16", "--recipe", "rtn-g128")
    assert "block 1" in message or "layers.1" in message


def test_weights_that_do_not_fit_float16(model: Path, refused: Any) -> None:
    change_tensors(model, model__norm__weight=torch.full((128,), 1e6))
    message = refused(2, model, "--recipe", "rtn-g128")
    assert "model.norm.weight" in message
    assert "--dtype bfloat16" in message
    message = refused(2, model)  # rotation folds the gain into the head
    assert "lm_head.weight" in message
    assert "--dtype bfloat16" in message


# ---- what cannot be quantized


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "llama"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "llama"),
        ({"model_type": "from-the-future", "architectures": ["Future"]}, "from-the-future"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "short_factor": [1.0] * 32,
                    "long_factor": [1.0] * 32,
                }
            },
            "longrope",
        ),
        (
            {
                "partial_rotary_factor": 0.5,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            },
            "partial_rotary_factor",
        ),
        ({"head_dim": 80}, "head_dim is 80"),
        ({"head_dim": 32}, "head_dim is 32"),
        ({"num_attention_heads": 3}, "config"),
        ({"num_attention_heads": 0}, "configuration"),
        ({"num_key_value_heads": 0}, "head"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_hidden_layers": "two"}, "config"),
        ({"hidden_size": -128}, "hidden_size is -128"),
        ({"hidden_size": None}, "config"),
        ({"intermediate_size": 250}, "250"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"vocab_size": 10}, "embed_tokens"),
        ({"vocab_size": -10}, "vocab_size is -10"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else "",
)
def test_models_that_do_not_fit(changes: dict[str, Any], named: str, model: Path, refused: Any) -> None:
    change_config(model, **changes)
    assert named in refused(2, model)


def test_a_model_with_code_of_its_own_is_not_run(model: Path, refused: Any, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_bytes())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\n")
    assert "--trust-remote-code" in refused(2, model)
    assert not (tmp_path / "was run").exists()


def test_a_checkpoint_is_not_quantized_again(refused: Any, tiny_checkpoint: Path) -> None:
    message = refused(2, tiny_checkpoint)
    assert "already a qoq checkpoint" in message
    assert "16-bit model" in message


@pytest.mark.parametrize(
    "content",
    [b"", b"GGUF", b"GGUF" + b"\xff" * 60, b"not a gguf" * 100, b"GGUF\x03\0\0\0" + b"\0" * 8 + b"\xff" * 8],
    ids=range(5),
)
def test_garbage_that_ends_in_gguf(content: bytes, refused: Any, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    assert "model.gguf" in refused(2, tmp_path / "model.gguf")


# ---- calibration text


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b"\n\n \n", "is empty"),
        ("short.txt", b"Too short.", "the text has"),
        ("binary.txt", bytes(range(256)), "UTF-8"),
        ("broken.jsonl", b'{"text": "x"}\n{', "line 2"),
        ("column.jsonl", b'{"body": "x"}', "text"),
        ("broken.parquet", b"PAR1", "parquet"),
        ("book.pdf", b"%PDF", "expected a text"),
    ],
)
def test_text_that_cannot_be_used(name: str, content: bytes, named: str, small_model: Path, refused: Any) -> None:
    Path(name).write_bytes(content)
    message = refused(2, small_model, "--calib", name)
    assert name in message
    assert named in message


def test_text_that_is_not_there(small_model: Path, refused: Any) -> None:
    assert "builtin" in refused(2, small_model, "--calib", "nowhere.txt")


def test_named_sets_without_a_network(
    small_model: Path, tiny_checkpoint: Path, refused: Any, fails: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for message in (
        refused(3, small_model, "--calib", "pileval"),
        fails(3, "eval", tiny_checkpoint, "--ppl", "wikitext", "--limit", 1),
        fails(3, "eval", tiny_checkpoint, "--ppl", "c4", "--limit", 1),
    ):
        assert "FILE.txt" in message
        assert "--calib" in message or "--ppl" in message


# ---- the output folder


def test_an_output_that_holds_something_else(small_model: Path, refused: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("{}")
    (output / "data").mkdir()
    message = refused(2, small_model)
    assert "config.json, data" in message
    assert "nothing was changed" in message
    assert (output / "config.json").read_text() == "{}"
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "data"]


def test_an_output_that_is_the_model_itself(model: Path, fails: Any, quick: Any) -> None:
    before = sorted(path.name for path in model.iterdir())
    for extra in ((), ("--restart",)):
        assert "did not write" in fails(2, "quantize", model, *quick, "-o", model, *extra)
    assert sorted(path.name for path in model.iterdir()) == before


@pytest.mark.parametrize(
    "place", ["a file", "a file/below", "dangling", "circle", "x" * 300, "/proc/qoq/out", "/dev/null", "/dev/null/out"]
)
def test_an_output_that_cannot_be(place: str, small_model: Path, fails: Any, quick: Any, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    code = 3 if place.startswith("/proc") else 2
    message = fails(code, "quantize", small_model, *quick, "-o", place)
    assert place[:300] in message
    assert (tmp_path / "a file").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_an_output_that_may_not_be_written(
    code: int, small_model: Path, fails: Any, quick: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The permissions of a folder do not keep root out, so the system's answer is made up."""

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    message = fails(3, "quantize", small_model, *quick, "-o", "out")
    assert "not allowed to write" in message
    assert "--output" in message


def test_a_disk_that_is_too_small_is_noticed_before_the_work(
    small_model: Path, refused: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def posix_fallocate(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def quantize_block(*args: Any) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(os, "posix_fallocate", posix_fallocate)
    monkeypatch.setattr("qoq.calib.job.quantize_block_", quantize_block)
    message = refused(3, small_model)
    assert "no space left" in message
    assert str(tmp_path / "out") in message
    assert "free some space" in message


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 600 kB: less than the checkpoint, more than its first files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full(
    full_disk: Path, small_model: Path, quick: Any, qoq: Any, fails: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = full_disk / "out"
    assert "are free on this disk" in fails(3, "quantize", small_model, *quick, "-o", output)
    monkeypatch.setattr("qoq.formats.work_folder.WorkFolder.check_space", lambda *_: None)
    message = fails(3, "quantize", small_model, *quick, "-o", output)
    assert "no space left" in message
    assert not list(full_disk.rglob("qoq_manifest.json"))
    subprocess.run(["mount", "-o", "remount,size=64m", full_disk], check=True)
    assert qoq("quantize", small_model, *quick, "-o", output).code == 0
    assert qoq("verify", output).code == 0


# ---- options


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--recipe", "qoq-g12"), "qoq-g128"),
        (("--recipe", "nowhere.yaml"), "qoq-g128"),
        (("--kv-bits", 5), "4, 8 or 16"),
        (("--recipe", "qoq-g128-best", "--per-channel"), "post_scale needs groups"),
        (("--act-bits", 4), "8 or 16"),
        (("--dtype", "float8"), "float16"),
        (("--max-shard-size", "big"), "5GB"),
        (("--max-shard-size", "0"), "5GB"),
        (("--max-shard-size", "-5GB"), "5GB"),
        (("--max-shard-size", "nan"), "5GB"),
        (("--max-shard-size", "infGB"), "5GB"),
        (("--max-shard-size", ""), "5GB"),
        (("--include", "nothing-like-it"), "model.layers.0"),
        (("--ignore", "("), "regular expression"),
        (("--device", "tpu"), "cpu"),
        (("--device", "cuda:x"), "cpu"),
        (("--device", "meta"), "cpu"),
        (("--revision", "main"), "not on the hub"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_options_that_make_no_sense(options: tuple[Any, ...], named: str, small_model: Path, refused: Any) -> None:
    assert named in refused(2, small_model, *options)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", "kv_bits: 5", "nonsense: 1", "rounding: gptq-from-the-future", "\0"]
)
def test_a_recipe_file_that_makes_no_sense(content: str, small_model: Path, refused: Any) -> None:
    Path("mine.yaml").write_text(content)
    assert "mine.yaml" in refused(2, small_model, "--recipe", "mine.yaml")


@pytest.mark.parametrize("command", ["quantize", "eval", "generate", "verify"])
def test_a_gpu_that_is_not_there(command: str, tiny_checkpoint: Path, fails: Any, quick: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    args: dict[str, tuple[object, ...]] = {
        "quantize": ("tiny", *quick, "-o", "out"),
        "eval": (tiny_checkpoint, "--ppl", "builtin"),
        "generate": (tiny_checkpoint, "x"),
        "verify": (tiny_checkpoint, "--against", "tiny"),
    }
    message = fails(3, command, *args[command], "--device", "cuda")
    assert "--device cpu" in message
    assert "qoq doctor" in message
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("verify", "nowhere"), "nowhere"),
        (("inspect", "nowhere"), "nowhere"),
        (("eval", "nowhere"), "nowhere"),
        (("generate", "nowhere", "x"), "nowhere"),
        (("eval",), "no finished checkpoint"),
        (("verify", "TINY"), "qoq_manifest.json"),
        (("inspect", "TINY"), "qoq_manifest.json"),
        (("verify", "CKPT/config.json"), "config.json"),
        (("eval", "CKPT", "--kv-bits", "5"), "4, 8 or 16"),
        (("eval", "CKPT", "--act-bits", "4"), "8 or 16"),
        (("eval", "CKPT", "--seq-len", "99999", "--ppl", "builtin"), "positions"),
        (("eval", "CKPT", "--ppl", "nowhere.txt"), "nowhere.txt"),
        (("eval", "CKPT", "--baseline", "nowhere"), "nowhere"),
        (("eval", "CKPT", "--ppl", "short.txt"), "short.txt"),
        (("verify", "CKPT", "--against", "nowhere"), "nowhere"),
        (("verify", "CKPT", "--against", "CKPT"), "16-bit"),
        (("verify", "CKPT", "--against", "SMALL"), "not the shape"),
        (("recipes", "nowhere"), "nowhere"),
        (("quantize", ""), "model ''"),
        (("quantize", "mixtral-8x7b"), "not supported"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_other_commands(
    args: tuple[str, ...], named: str, tiny_checkpoint: Path, small_model: Path, fails: Any, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    places = {"CKPT": str(tiny_checkpoint), "TINY": str(tiny_folder()), "SMALL": str(small_model)}
    words = [
        f"{places[word.split('/')[0]]}{word[4:] if '/' in word else ''}" if word.split("/")[0] in places else word
        for word in args
    ]
    assert named in fails(2, *words)


def test_a_prompt_without_tokens(tiny_checkpoint: Path, copied: Any, fails: Any, qoq: Any) -> None:
    assert qoq("generate", tiny_checkpoint, "", "-n", 1).code == 0  # it begins with the token that begins every text
    folder = copied(tiny_checkpoint)
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    assert "prompt is empty" in fails(2, "generate", folder, "", "-n", 1)


def test_models_that_cut_text_differently_are_not_compared(
    tiny_checkpoint: Path, copied: Any, fails: Any, qoq: Any, tmp_path: Path
) -> None:
    other = copied(tiny_folder())
    tokenizer = json.loads((other / "tokenizer.json").read_bytes())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = fails(2, "eval", tiny_checkpoint, other, "--ppl", "builtin", "--limit", 1, "--seq-len", 64)
    assert "different tokens" in message


def test_running_out_of_memory(small_model: Path, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def quantize_block(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("qoq.calib.job.quantize_block_", quantize_block)
    assert "out of memory" in refused(3, small_model)


def test_errors_do_not_depend_on_the_terminal(small_model: Path, tmp_path: Path) -> None:
    """A real process: the message on stderr, no stack, stdout empty."""
    qoq = Path(sys.executable).with_name("qoq")
    result = subprocess.run(
        [qoq, "quantize", small_model, "--kv-bits", "5", "--json"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: --kv-bits 5")
    assert shutil.which("qoq") is None or "Traceback" not in result.stderr
