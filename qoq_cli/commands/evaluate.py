"""`qoq eval`: what quantization costs, measured on text and on tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qoq.recipes.errors import InputError
from qoq_cli.backends import KERNELS, REFERENCE, BackendOption, resolve_backend
from qoq_cli.harness_runs import Candidate, check_lengths, run_suite, suite_json
from qoq_cli.harness_tables import render_suite
from qoq_cli.harness_tasks import Suite, named_suite
from qoq_cli.longbench import longbench_suite
from qoq_cli.model_location import EMBEDDED, TINY, TINY_OUTLIER, builtin_texts, find_newest_checkpoint, resolve_model
from qoq_cli.progress import progress
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

if TYPE_CHECKING:
    import torch

    from qoq.calib.perplexity import Forward
    from qoq.kernels.modules import Backend

_DEFAULT_LENGTH = 2048


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
    evaluation = _Evaluation(terminal, backend, device, kv_bits, act_bits, revision, trust_remote_code)
    opened = {name: evaluation.open(name, is_baseline=name == baseline) for name in dict.fromkeys(names)}
    if any(model.has_quantized for model in opened.values()):
        terminal.note(f"backend of checkpoints: {evaluation.backend} ({evaluation.reason})")
    if backend == KERNELS and not any(model.facts["backend"] == KERNELS for model in opened.values()):
        raise InputError("--backend kernels: none of the models is a checkpoint", remedy="use --backend reference")
    if act_bits == 8 and not any(model.has_quantized for model in opened.values()):
        raise InputError("--act-bits 8: only quantized linears take 8-bit activations", remedy="pass a checkpoint")
    default = ["builtin"] if evaluation.all_embedded else ["wikitext"]
    texts = ppl or ([] if suites else default)
    candidates = [model.candidate for model in opened.values()]
    for suite in suites.values():
        check_lengths(suite, candidates, seq_len)
    results = {
        text: evaluation.score(opened, text, baseline, seq_len=seq_len, limit=limit) for text in dict.fromkeys(texts)
    }
    runs = {
        key: run_suite(
            terminal,
            suite,
            candidates,
            device=evaluation.device,
            limit=limit,
            seq_len=seq_len,
            batch_size=batch_size,
            trust_remote_code=trust_remote_code,
        )
        for key, suite in suites.items()
    }
    data = {"baseline": baseline, "device": evaluation.device, "texts": results}
    data |= {key: suite_json(suite, runs[key], limit=limit) for key, suite in suites.items()}

    def render(console: Console) -> None:
        _render(console, results, baseline)
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


class _Model:
    """One opened model and how it is run; `make` takes what to call with the blocks that were done since the last."""

    def __init__(self, candidate: Candidate, make: Callable[[Callable[[float], None]], Forward], blocks: int):
        self.candidate, self.make, self.blocks = candidate, make, blocks
        self.label, self.path, self.positions = candidate.label, candidate.path, candidate.positions
        self.facts = {
            "scheme": candidate.scheme,
            "key_rotation": candidate.served_key_rotation,
            "backend": candidate.backend,
        }
        self.has_quantized = candidate.weights == 4


class _Evaluation:
    def __init__(
        self,
        terminal: Terminal,
        backend: str,
        device: str,
        kv_bits: int | None,
        act_bits: int | None,
        revision: str | None,
        trust_remote_code: bool,
    ) -> None:
        self.backend, self.device, self.reason = resolve_backend(backend, device)
        if self.backend == KERNELS and act_bits == 16:
            self.backend, self.reason = REFERENCE, "the kernels take 8-bit activations only"
        self._must_run_kernels = backend == KERNELS
        self.terminal = terminal
        self._kv_bits, self._act_bits = kv_bits, act_bits
        self._revision, self._trust = revision, trust_remote_code
        self.all_embedded = True

    def open(self, name: str, *, is_baseline: bool) -> _Model:
        """Open a checkpoint or a 16-bit model; only the KV cache of the latter can be told to have fewer bits."""
        from torch import device as torch_device

        from qoq.calib.plan import open_model
        from qoq.calib.served import open_served
        from qoq.calib.streaming import StreamedModel
        from qoq.formats.checkpoint import is_checkpoint

        location = resolve_model(name, hub_revision=self._revision, with_code=self._trust, note=self.terminal.note)
        target = torch_device(self.device)
        if is_checkpoint(location.path):
            served = open_served(location.path, trust_remote_code=self._trust)
            config = served.checkpoint.quantization
            made_from = str(served.checkpoint.manifest.get("source", {}).get("model"))
            self.all_embedded &= made_from in (TINY, TINY_OUTLIER)
            skeleton, source, checkpoint = served.skeleton, served.checkpoint.source, served.checkpoint
            kv_bits = self._kv_bits or config.kv_bits
            # Only quantized linears take 8-bit activations, so without any there are none.
            act_bits = (self._act_bits or config.act_bits) if served.quantized else 16
            weights, key_rotation = 4 if served.quantized else 16, config.key_rotation
        else:
            self.all_embedded &= location.kind == EMBEDDED
            skeleton, source = open_model(location.path, trust_remote_code=self._trust)
            kv_bits = 16 if is_baseline else self._kv_bits or 16
            checkpoint, act_bits, weights, key_rotation = None, 16, 16, "none"

        backend: Backend = (
            KERNELS if self.backend == KERNELS and checkpoint is not None and act_bits == 8 else REFERENCE
        )
        if checkpoint is not None and self._must_run_kernels and backend != KERNELS:
            raise InputError(
                f"--backend kernels: {name} has {act_bits}-bit activations, and the kernels take 8-bit ones only",
                remedy="pass --act-bits 8, or --backend reference",
            )

        def make(on_blocks: Callable[[float], None]) -> Forward:
            if backend == KERNELS:
                return self._kernel_forward(location.path, kv_bits, skeleton.num_blocks, on_blocks)
            return StreamedModel(
                skeleton,
                source,
                device=target,
                checkpoint=checkpoint,
                act_bits=act_bits,
                kv_bits=kv_bits,
                on_block=lambda _: on_blocks(1),
            ).logits

        candidate = Candidate(
            name,
            location.path,
            weights=weights,
            act_bits=act_bits,
            kv_bits=kv_bits,
            key_rotation=key_rotation,
            backend=backend,
            positions=int(getattr(skeleton.config, "max_position_embeddings", _DEFAULT_LENGTH)),
            is_baseline=is_baseline,
        )
        return _Model(candidate, make, skeleton.num_blocks)

    def _kernel_forward(self, path: Path, kv_bits: int, blocks: int, on_blocks: Callable[[float], None]) -> Forward:
        from transformers.utils.logging import disable_progress_bar

        from qoq.kernels.loading import KernelModel

        disable_progress_bar()  # of loading weights; it would write to stderr

        def forward(windows: torch.Tensor) -> Iterator[torch.Tensor]:
            model = KernelModel(
                path,
                device=self.device,
                kv_bits=kv_bits,
                on_windows=lambda count: on_blocks(blocks * count / len(windows)),
                trust_remote_code=self._trust,
            )
            return model.logits(windows)

        return forward

    def windows(self, model: _Model, text: str, length: int, limit: int | None) -> torch.Tensor:
        """Evaluation windows of `text` in the tokens of `model`."""
        from qoq.calib.corpus import evaluation_windows, load_corpus
        from qoq.calib.skeleton import load_tokenizer

        tokenizer = load_tokenizer(model.path, trust_remote_code=self._trust)
        corpus = load_corpus(text, builtin=builtin_texts("evaluation"), purpose="evaluation")
        return evaluation_windows(corpus, tokenizer, seq_len=length, limit=limit).tokens

    def score(
        self, models: dict[str, _Model], text: str, baseline: str | None, *, seq_len: int | None, limit: int | None
    ) -> dict[str, Any]:
        """Score all models on one text, side by side."""
        from qoq.calib.perplexity import score_models

        positions = min(model.positions for model in models.values())
        length = seq_len or min(_DEFAULT_LENGTH, positions)
        if length > positions:
            raise InputError(f"--seq-len {length}: the model knows {positions} positions", remedy="pass a shorter one")
        first, *others = models.values()
        windows = self.windows(first, text, length, limit)
        for other in others:
            if not _same(windows, self.windows(other, text, length, limit)):
                raise InputError(
                    f"{first.label} and {other.label} cut {text} into different tokens, so their perplexities cannot "
                    "be compared",
                    remedy="evaluate them one at a time",
                )
        with progress(self.terminal, f"evaluating on {text}") as update:
            total = sum(model.blocks for model in models.values())
            done = 0.0

            def watch(name: str) -> Callable[[float], None]:
                def on_blocks(count: float) -> None:
                    nonlocal done
                    done += count
                    update(min(done, total), total, name)

                return on_blocks

            forwards = {name: model.make(watch(name)) for name, model in models.items()}
            scores = score_models(forwards, windows, baseline=baseline)
        return {
            "windows": int(windows.shape[0]),
            "seq_len": length,
            "models": {name: {**models[name].facts, **asdict(score)} for name, score in scores.items()},
        }


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def _render(console: Console, results: dict[str, Any], baseline: str | None) -> None:
    for text, result in results.items():
        title = f"{text}: {result['windows']} windows of {result['seq_len']} tokens"
        table = Table(title=title, title_justify="left")
        table.add_column("model", overflow="fold")
        table.add_column("scheme")
        on_kernels = any(score["backend"] == KERNELS for score in result["models"].values())
        if on_kernels:
            table.add_column("backend")
        table.add_column("perplexity", justify="right", style="bold")
        if baseline is not None:
            table.add_column("loss", justify="right")
            table.add_column("KL divergence", justify="right")
            table.add_column("same top token", justify="right")
        for name, score in result["models"].items():
            cells = [name, score["scheme"], *([score["backend"]] if on_kernels else []), f"{score['perplexity']:.3f}"]
            if baseline is not None and name == baseline:
                cells += ["", "", ""]
            elif baseline is not None:
                loss = score["perplexity"] / result["models"][baseline]["perplexity"] - 1
                cells += [f"{loss:+.2%}", f"{score['kl_divergence']:.4f}", f"{score['top1_agreement']:.1%}"]
            table.add_row(*cells)
        console.print(table)
