"""The command line run in-process, and models small enough to be quantized in each test."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qoq_cli.app import app
from qoq_cli.model_location import builtin_text, tiny_folder


@dataclass(frozen=True)
class Outcome:
    """What one command did: its streams, its exit code, and stdout as JSON where it is JSON."""

    args: tuple[str, ...]
    stdout: str
    stderr: str
    code: int
    json: Any

    @property
    def error(self) -> str:
        """The error message on one line, so that tests can look for words in it."""
        return " ".join(self.stderr[self.stderr.find("error:") :].split())


Qoq = Callable[..., Outcome]


def _qoq(*args: object, traceback: bool = False) -> Outcome:
    """Run `qoq ARGS`; with `traceback`, whatever is raised comes through."""
    words = tuple(str(arg) for arg in args) + (("--traceback",) if traceback else ())
    result = CliRunner().invoke(app, words, catch_exceptions=False, prog_name="qoq")
    try:
        parsed = json.loads(result.stdout)
    except ValueError:
        parsed = None
    return Outcome(words, result.stdout, result.stderr, result.exit_code, parsed)


@pytest.fixture(scope="session")
def qoq() -> Qoq:
    """qoq("verify", folder, "--json"): the outcome of one command."""
    return _qoq


@pytest.fixture(scope="session")
def fails() -> Callable[..., str]:
    """fails(2, "quantize", ...): the one error message of a command that must end with that code, and no stack."""

    def run(code: int, *args: object) -> str:
        outcome = _qoq(*args)
        assert outcome.code == code, f"{outcome.args}: exit {outcome.code}\n{outcome.stdout}\n{outcome.stderr}"
        assert outcome.stderr.count("error:") == 1, outcome.stderr
        assert "Traceback" not in outcome.stderr
        assert "not an error qoq expects" not in outcome.stderr
        assert "\n  -> " in outcome.stderr, f"no remedy: {outcome.stderr}"
        return outcome.error

    return run


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """make_model(folder, blocks=2, **config): a random Llama in a new folder, with tiny's tokenizer."""
    return _make_model


def _make_model(folder: Path, *, blocks: int = 2, **changes: Any) -> Path:
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(blocks)
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": 4096,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=blocks, **(sizes | changes))).to(torch.float16)
    folder.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_folder() / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .txt file of some thousand tokens."""
    path = tmp_path_factory.mktemp("text") / "some text.txt"
    path.write_text(builtin_text("calibration").read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks; do not change it."""
    return _make_model(tmp_path_factory.mktemp("small") / "small")


@pytest.fixture(scope="session")
def quick(text_file: Path) -> tuple[object, ...]:
    """Options that make `qoq quantize` quick on a small model."""
    return ("--calib", text_file, "--samples", 2, "--seq-len", 32, "--quiet")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny`, quantized once for all tests; do not change it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    outcome = _qoq("quantize", "tiny", "--samples", 2, "--seq-len", 64, "-o", folder, "--device", "cpu")
    assert outcome.code == 0, outcome.stderr
    return folder


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory, small_model: Path, quick: tuple[object, ...]) -> Path:
    """`small_model`, quantized once, in three shards; do not change it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "small"
    outcome = _qoq("quantize", small_model, *quick, "--max-shard-size", "700KB", "-o", folder, "--device", "cpu")
    assert outcome.code == 0, outcome.stderr
    return folder


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """copied(folder): a copy that may be changed."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"copy of {folder.name}"))

    return copy


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, Any]]:
    """contents(folder): what must be equal between two runs of one plan: every file's hash, and the manifest."""

    def read(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.is_dir():
                found[name] = "folder"
            elif name == "qoq_manifest.json":
                manifest = json.loads(path.read_bytes())
                found[name] = {key: value for key, value in manifest.items() if key not in ("run", "digest")}
            else:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    return read


@pytest.fixture(scope="session")
def repair() -> Callable[[Path], None]:
    """repair(folder): give a tampered checkpoint the hashes and the digest that fit it, as an attacker would."""
    from qoq.formats.manifest import describe_files, read_manifest, write_manifest

    def mend(folder: Path) -> None:
        manifest = read_manifest(folder)
        manifest["files"] = describe_files(folder, list(manifest["files"]))
        manifest.pop("digest", None)
        write_manifest(folder, manifest)

    return mend


@pytest.fixture(autouse=True)
def _away_from_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands run in an empty folder and without a network."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
