"""Perplexity of models on one text, side by side, and the table of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from qoq.recipes.errors import InputError
from qoq_cli.backends import KERNELS
from qoq_cli.candidates import Candidate, OpenedModel
from qoq_cli.model_location import builtin_texts
from qoq_cli.progress import progress
from qoq_cli.terminal import Terminal

if TYPE_CHECKING:
    import torch

_DEFAULT_LENGTH = 2048


def score_text(
    terminal: Terminal,
    models: Mapping[str, OpenedModel],
    text: str,
    baseline: str | None,
    *,
    seq_len: int | None,
    limit: int | None,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Score all models on one text, as one JSON object.

    Raises InputError for windows that a model is too short for, and for models that tokenize the text differently.
    """
    from qoq.calib.perplexity import score_models

    candidates = [model.candidate for model in models.values()]
    positions = min(candidate.positions for candidate in candidates)
    length = seq_len or min(_DEFAULT_LENGTH, positions)
    if length > positions:
        raise InputError(f"--seq-len {length}: the model knows {positions} positions", remedy="pass a shorter one")
    first, *others = candidates
    windows = _windows(first, text, length, limit, trust_remote_code)
    for other in others:
        if not _same(windows, _windows(other, text, length, limit, trust_remote_code)):
            raise InputError(
                f"{first.label} and {other.label} cut {text} into different tokens, so their perplexities cannot "
                "be compared",
                remedy="evaluate them one at a time",
            )
    with progress(terminal, f"evaluating on {text}") as update:
        total = sum(model.blocks for model in models.values())
        done = 0.0

        def watch(name: str) -> Callable[[float], None]:
            def on_blocks(count: float) -> None:
                nonlocal done
                done += count
                update(min(done, total), total, name)

            return on_blocks

        forwards = {name: model.make_forward(watch(name)) for name, model in models.items()}
        scores = score_models(forwards, windows, baseline=baseline)
    return {
        "windows": int(windows.shape[0]),
        "seq_len": length,
        "models": {name: _facts(models[name].candidate) | asdict(score) for name, score in scores.items()},
    }


def render_texts(console: Console, results: Mapping[str, Any], baseline: str | None) -> None:
    """Print one table for each text, from what `score_text` gave for it."""
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


def _windows(candidate: Candidate, text: str, length: int, limit: int | None, trust_remote_code: bool) -> torch.Tensor:
    """Evaluation windows [S, L] of `text` in the tokens of a model."""
    from qoq.calib.corpus import evaluation_windows, load_corpus
    from qoq.calib.skeleton import load_tokenizer

    tokenizer = load_tokenizer(candidate.path, trust_remote_code=trust_remote_code)
    corpus = load_corpus(text, builtin=builtin_texts("evaluation"), purpose="evaluation")
    return evaluation_windows(corpus, tokenizer, seq_len=length, limit=limit).tokens


def _facts(candidate: Candidate) -> dict[str, Any]:
    return {"scheme": candidate.scheme, "key_rotation": candidate.served_key_rotation, "backend": candidate.backend}


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())
