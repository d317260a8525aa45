"""`qoq generate`: try a checkpoint."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from qoq.recipes.errors import InputError
from qoq_cli.backends import kernel_problem
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
    """Continue PROMPT with a checkpoint loaded through transformers, printing text as it comes.

    Example: `qoq generate checkpoints/tiny-w4a8kv4-g128 "In the beginning"`.
    """
    terminal = Terminal(as_json, quiet)
    location = resolve_model(checkpoint, note=terminal.note)
    target = resolve_device(device)

    import torch
    from transformers import TextStreamer
    from transformers.utils.logging import disable_progress_bar

    from qoq.calib.job import check_device
    from qoq.calib.skeleton import load_tokenizer
    from qoq.kernels.loading import load_model

    check_device(target)
    disable_progress_bar()  # of loading weights; it would write to stderr
    tokenizer = load_tokenizer(location.path, trust_remote_code=trust_remote_code)
    model = load_model(location.path, device=target, trust_remote_code=trust_remote_code)
    text = prompt
    if tokenizer.chat_template and not raw:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=raw or not tokenizer.chat_template).to(target)
    if not inputs["input_ids"].shape[1]:
        raise InputError(
            "the prompt is empty, and this model has no token to begin a text with", remedy="give a PROMPT"
        )
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    torch.manual_seed(seed)
    streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if streamer is not None and not tokenizer.chat_template:
        sys.stdout.write(prompt)
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]  # a mixin whose type mypy loses
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **options,
        )
    seconds = time.perf_counter() - started
    new = output[0, inputs["input_ids"].shape[1] :]
    facts = {
        "checkpoint": str(location.path),
        "prompt": prompt,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "new_tokens": int(new.numel()),
        "seconds": round(seconds, 3),
        "device": target,
    }

    def render(console: Console) -> None:
        how = "kernels" if kernel_problem(target) is None else "reference arithmetic"
        terminal.note(f"{facts['new_tokens']} tokens in {seconds:.1f} s on {target} ({how})")

    terminal.result(facts, render)
