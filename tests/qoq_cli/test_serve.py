"""`qoq serve`: what is checked before vLLM is started, and how it is; vLLM itself is replaced."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qoq_cli.commands import serve


class Started(Exception):
    """The process has become another."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """With a GPU, vLLM and the plug-in; what is compiled and started is recorded."""
    done: dict[str, Any] = {}

    def execve(path: str, words: list[str], environment: dict[str, str]) -> None:
        done["started"] = (path, words)
        done["environment"] = environment
        raise Started

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"vllm": "0.26.0"}[name])
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [SimpleNamespace(name="qoq")])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(serve, "_compile", lambda terminal, checkpoint: done.update(compiled=checkpoint.folder))
    monkeypatch.setattr(serve.os, "execve", execve)
    return done


def test_it_becomes_vllm_with_the_options_that_are_vllms(
    qoq: Any, machine: dict[str, Any], small_checkpoint: Path
) -> None:
    with pytest.raises(Started):
        qoq("serve", small_checkpoint, "--tensor-parallel-size", 2, "--port=8001", traceback=True)
    path, words = machine["started"]
    assert path == words[0] == sys.executable
    assert words[1:] == [
        *("-m", "vllm.entrypoints.cli.main", "serve", str(small_checkpoint)),
        *("--tensor-parallel-size", "2", "--port=8001"),
    ]
    assert machine["compiled"] == small_checkpoint
    assert "PATH" in machine["environment"]
    assert "TQDM_DISABLE" not in machine["environment"]  # vLLM divides by the time of its progress bar


def test_a_dry_run_needs_neither_vllm_nor_a_gpu(qoq: Any, small_checkpoint: Path) -> None:
    outcome = qoq("serve", small_checkpoint, "--dry-run", "--json", "--max-model-len", 100)
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["command"][-2:] == ["--max-model-len", "100"]
    assert outcome.json["KV cache"] == "4 bit"
    assert "weights: 4 bit, groups of 128" in qoq("serve", small_checkpoint, "--dry-run").stdout


def test_what_is_missing_is_told(
    fails: Callable[..., str], machine: dict[str, Any], small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "vLLM needs a GPU" in fails(3, "serve", small_checkpoint)
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS is 'other'" in fails(3, "serve", small_checkpoint)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    assert "does not find qoq's plug-in" in fails(3, "serve", small_checkpoint)

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "vLLM is not installed" in fails(3, "serve", small_checkpoint)
    assert "no such folder" in fails(2, "serve", "nowhere")
    assert machine == {}


def test_the_plug_in_is_among_the_entry_points() -> None:
    assert "qoq" in {plugin.name for plugin in importlib.metadata.entry_points(group="vllm.general_plugins")}
