"""`qoq eval`: what quantization costs, measured on text and on tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qoq.recipes.errors import InputError
from qoq_cli.backends import KERNELS, BackendOption
from qoq_cli.candidates import Opener
from qoq_cli.harness_runs import check_lengths, run_suite, suite_json
from qoq_cli.harness_tables import render_suite
from qoq_cli.harness_tasks import Suite, named_suite
from qoq_cli.longbench import longbench_suite
from qoq_cli.model_location import find_newest_checkpoint
from qoq_cli.perplexity import render_texts, score_text
from qoq_cli.terminal import (
    DeviceOption,
    JsonOption,
    QuietOption,
    RevisionOption,
    Terminal,
    TracebackOption,
    TrustOption,
    guarded,
)


@guarded
def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Checkpoints or 16-bit models.  [default: the newest under checkpoints/]"),
    ] = None,
    ppl: Annotated[
        list[str] | None,
        typer.Option(help="Text for perplexity: wikitext, c4, builtin, or a file. Repeatable.  [default: wikitext]"),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES", help="Tasks of lm-eval, such as hellaswag,arc_easy: groups and * too. Repeatable."
        ),
    ] = None,
    longbench: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="LongBench: default, all, e, tasks such as qasper,lcc, or a folder of data."
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="16-bit model to compare with: adds KL divergence and top-1 agreement.")
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens in a window, or a prompt.  [default: 2048, or what the model knows]"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Score only the first N windows, or documents of a task.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(metavar="N", help="Examples in a prompt of --tasks.  [default: the task's]")
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Task files (YAML) of your own for --tasks, found first.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Prompts at once in tasks.  [default: 8, in LongBench 1]")
    ] = None,
    kv_bits: Annotated[
        int | None, typer.Option(metavar="N", help="KV cache bits: 4, 8 or 16.  [default: the checkpoint's]")
    ] = None,
    act_bits: Annotated[
        int | None, typer.Option(metavar="N", help="Activation bits: 8 or 16.  [default: the checkpoint's]")
    ] = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Measure checkpoints as they will be served, and 16-bit models: perplexity, or tasks of lm-eval and LongBench.

    Weights are decoded from the packed bytes, activations are int8 per token, keys (after RoPE) and values go through
    the 4-bit cache. Windows do not overlap; each is scored on its own.

    On a GPU, checkpoints run on the CUDA kernels, loaded whole in 16 bit, as they are served. The reference computes in
    float32, one decoder block at a time; it takes any machine, 16-bit models, the baseline, and 16-bit activations.

    `--tasks` and `--longbench` take lm-eval (`pip install 'qoq[lm-eval]'`, `'qoq[longbench]'`) and hold each model
    whole, one after the other: in its 16-bit type on a GPU, in float32 without one. LongBench is run a second time with
    a 16-bit KV cache, so that the cost of the cache stands by itself. With either, perplexity needs `--ppl`.

    Examples: `qoq eval checkpoints/tiny-w4a8kv4-g128 --baseline tiny --ppl builtin`; `qoq eval CKPT --kv-bits 16`;
    `qoq eval CKPT --tasks hellaswag,arc_easy --baseline llama-3-8b`; `qoq eval CKPT --longbench default`.
    """
    terminal = Terminal(as_json, quiet)
    for option, count, least in (
        ("--seq-len", seq_len, 2),
        ("--limit", limit, 1),
        ("--num-fewshot", num_fewshot, 0),
        ("--batch-size", batch_size, 1),
    ):
        if count is not None and count < least:
            raise InputError(f"{option} {count}: too small", remedy=f"pass at least {least}")
    if kv_bits not in (None, 4, 8, 16):
        raise InputError(f"--kv-bits {kv_bits}: not supported", remedy="use 4, 8 or 16")
    if act_bits not in (None, 8, 16):
        raise InputError(f"--act-bits {act_bits}: not supported", remedy="use 8 or 16")
    suites = _suites(terminal, tasks, longbench, task_path, num_fewshot, batch_size)
    names = list(models or ())
    if not names:
        newest = find_newest_checkpoint(Path("checkpoints"))
        terminal.note(f"evaluating the newest checkpoint, {newest}")
        names = [str(newest)]
    if baseline is not None and baseline not in names:
        names.insert(0, baseline)
    if backend == KERNELS and act_bits == 16:
        raise InputError("--backend kernels: the kernels take 8-bit activations only", remedy="leave --act-bits 16 out")
    opener = Opener(terminal, backend, device, kv_bits, act_bits, revision, trust_remote_code)
    opened = {name: opener.open(name, is_baseline=name == baseline) for name in dict.fromkeys(names)}
    candidates = [model.candidate for model in opened.values()]
    if any(candidate.is_quantized for candidate in candidates):
        terminal.note(f"backend of checkpoints: {opener.backend} ({opener.reason})")
    if backend == KERNELS and not any(candidate.backend == KERNELS for candidate in candidates):
        raise InputError("--backend kernels: none of the models is a checkpoint", remedy="use --backend reference")
    if act_bits == 8 and not any(candidate.is_quantized for candidate in candidates):
        raise InputError("--act-bits 8: only quantized linears take 8-bit activations", remedy="pass a checkpoint")
    default = ["builtin"] if opener.all_embedded else ["wikitext"]
    texts = ppl or ([] if suites else default)
    for suite in suites.values():
        check_lengths(suite, candidates, seq_len)
    results = {
        text: score_text(
            terminal, opened, text, baseline, seq_len=seq_len, limit=limit, trust_remote_code=trust_remote_code
        )
        for text in dict.fromkeys(texts)
    }
    runs = {
        key: run_suite(
            terminal,
            suite,
            candidates,
            device=opener.device,
            limit=limit,
            seq_len=seq_len,
            batch_size=batch_size,
            trust_remote_code=trust_remote_code,
        )
        for key, suite in suites.items()
    }
    data = {"baseline": baseline, "device": opener.device, "texts": results}
    data |= {key: suite_json(suite, runs[key], limit=limit) for key, suite in suites.items()}

    def render(console: Console) -> None:
        render_texts(console, results, baseline)
        for key, suite in suites.items():
            render_suite(console, suite, runs[key])

    terminal.result(data, render)


def _suites(
    terminal: Terminal,
    tasks: list[str] | None,
    longbench: str | None,
    task_path: Path | None,
    num_fewshot: int | None,
    batch_size: int | None,
) -> dict[str, Suite]:
    """What lm-eval is to do, by its key in the JSON: loaded first, because that takes less time than a model."""
    if tasks is None:
        for option, value in (("--task-path", task_path), ("--num-fewshot", num_fewshot)):
            if value is not None:
                raise InputError(f"{option} {value}: only --tasks uses it", remedy="add --tasks NAMES")
        if batch_size is not None and longbench is None:
            raise InputError(
                f"--batch-size {batch_size}: only --tasks and --longbench use it", remedy="add one of them"
            )
    suites = {}
    if tasks is not None:
        names = [name for part in tasks for name in (word.strip() for word in part.split(",")) if name]
        if not names:
            raise InputError("--tasks: no name", remedy="give some, such as --tasks hellaswag,arc_easy")
        if task_path is not None and not task_path.is_dir():
            raise InputError(f"--task-path {task_path}: no such folder", remedy="give a folder with YAML files")
        terminal.note("reading the tasks of lm-eval")
        suites["tasks"] = named_suite(names, folder=task_path, num_fewshot=num_fewshot)
    if longbench is not None:
        terminal.note("reading the tasks and the data of LongBench")
        suites["longbench"] = longbench_suite(longbench)
    return suites
