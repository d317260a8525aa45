"""`qoq serve`: vLLM, started on a checkpoint with qoq's plug-in."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from qoq_cli.terminal import JsonOption, QuietOption, Terminal, TracebackOption, guarded, print_text
from qoq_cli.vllm_environment import VLLM, check_vllm, environment

if TYPE_CHECKING:
    from qoq.formats.checkpoint import Checkpoint

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context settings of the command: what it does not know is vLLM's."""


@guarded
def serve(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Folder that `qoq quantize` wrote.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command and start nothing.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Serve a checkpoint with vLLM, on qoq's kernels.

    It checks that vLLM, qoq's plug-in and a GPU are there, compiles the kernels that the checkpoint needs, and then
    becomes `vllm serve`. Options that it does not know go to vLLM as they are.

    Example: `qoq serve checkpoints/llama-3-8b-w4a8kv4-g128 --tensor-parallel-size 2 --port 8001`.
    """
    from qoq.formats.checkpoint import open_checkpoint

    terminal = Terminal(as_json, quiet)
    opened = open_checkpoint(checkpoint)
    words = [*VLLM, "serve", str(checkpoint), *context.args]
    chosen = _chosen(opened)
    if dry_run:
        data: dict[str, Any] = {"command": words, **chosen}
        terminal.result(data, lambda console: _render(console, words, chosen))
        return
    version = check_vllm()
    terminal.note(f"vLLM {version}; " + "; ".join(f"{what}: {value}" for what, value in chosen.items()))
    _compile(terminal, opened)
    terminal.note(shlex.join(words))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(words[0], words, environment())  # its signals and its exit code are vLLM's from here on


def _chosen(checkpoint: Checkpoint) -> dict[str, str]:
    quantization = checkpoint.quantization
    grid = "per channel" if quantization.group_size is None else "groups of 128"
    cache = "vLLM's own, 16 bit" if quantization.kv_bits == 16 else f"{quantization.kv_bits} bit"
    return {
        "weights": f"4 bit, {grid}",
        "activations": f"{quantization.act_bits} bit",
        "KV cache": cache,
        "model": str(checkpoint.config["model_type"]),
    }


def _compile(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """The kernels, now and in parallel: the server would compile each at its first use."""
    import torch

    from qoq.kernels.launch import architecture
    from qoq.kernels.warm import needed_specs
    from qoq_cli.kernel_cache import compile_with_progress

    target = architecture(torch.cuda.current_device())
    specs = needed_specs(target, checkpoint.quantization, checkpoint.config.get("torch_dtype"))
    compile_with_progress(terminal, [(spec, target) for spec in specs])


def _render(console: Console, words: list[str], chosen: dict[str, str]) -> None:
    for what, value in chosen.items():
        print_text(console, f"{what}: {value}")
    print_text(console, shlex.join(words))
