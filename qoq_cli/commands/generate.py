"""`qoq generate`: try a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console

from qoq.recipes.errors import InputError
from qoq_cli.continuation import Continuation, continue_on_runtime, continue_through_transformers, runs_on_runtime
from qoq_cli.devices import resolve_device
from qoq_cli.model_location import resolve_model
from qoq_cli.terminal import DeviceOption, JsonOption, QuietOption, Terminal, TracebackOption, TrustOption, guarded


@guarded
def generate(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="A checkpoint (or a 16-bit model).")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue, or a question for a chat model.")],
    max_new_tokens: Annotated[
        int, typer.Option("-n", "--max-new-tokens", min=1, help="At most this many tokens.")
    ] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="With --temperature: draw from the likeliest tokens of this share."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Draws the tokens when the temperature is above 0.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Continue PROMPT with a checkpoint, printing text as it comes.

    On a GPU that has the kernels, checkpoints run on qoq's own runtime; everything else through transformers.

    Example: `qoq generate checkpoints/tiny-w4a8kv4-g128 "In the beginning"`.
    """
    terminal = Terminal(as_json, quiet)
    if top_p < 1 and temperature == 0:
        raise InputError(
            f"--top-p {top_p:g}: with temperature 0 nothing is drawn",
            remedy="add --temperature 0.7, say, or leave it out",
        )
    location = resolve_model(checkpoint, note=terminal.note)
    target = resolve_device(device)

    from transformers import TextStreamer
    from transformers.utils.logging import disable_progress_bar

    from qoq.calib.job import check_device
    from qoq.calib.skeleton import load_tokenizer

    check_device(target)
    disable_progress_bar()  # of loading weights; it would write to stderr
    tokenizer = load_tokenizer(location.path, trust_remote_code=trust_remote_code)
    text = prompt
    if tokenizer.chat_template and not raw:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(text, add_special_tokens=raw or not tokenizer.chat_template)["input_ids"]
    if not tokens:
        raise InputError(
            "the prompt is empty, and this model has no token to begin a text with", remedy="give a PROMPT"
        )
    wanted = Continuation(tokens, max_new_tokens, temperature, top_p, seed)
    streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    shown = prompt if streamer is not None and not tokenizer.chat_template else ""
    on_runtime = runs_on_runtime(location.path, target, trust_remote_code=trust_remote_code)
    if on_runtime:
        printer = _printer(streamer, tokens)
        continued = continue_on_runtime(location.path, target, wanted, on_load=partial(_show, shown), on_token=printer)
    else:
        pad_token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        continued = continue_through_transformers(
            location.path,
            target,
            wanted,
            pad_token=pad_token,
            streamer=streamer,
            trust_remote_code=trust_remote_code,
            on_load=partial(_show, shown),
        )
    if on_runtime and streamer is not None:
        streamer.end()
    facts = {
        "checkpoint": str(location.path),
        "prompt": prompt,
        "text": tokenizer.decode(continued.tokens, skip_special_tokens=True),
        "new_tokens": len(continued.tokens),
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "seconds": round(continued.seconds, 3),
        "device": target,
    }

    def render(console: Console) -> None:
        how = "qoq's runtime" if on_runtime else "transformers"
        terminal.note(f"{facts['new_tokens']} tokens in {continued.seconds:.1f} s on {target} ({how})")

    terminal.result(facts, render)


def _show(text: str) -> None:
    sys.stdout.write(text)


def _printer(streamer: Any, prompt: list[int]) -> Callable[[int], None]:
    """What prints each token as it comes, through a streamer that skips the prompt; nothing without one."""
    import torch

    if streamer is None:
        return lambda token: None
    streamer.put(torch.tensor([prompt]))
    return lambda token: streamer.put(torch.tensor([token]))
