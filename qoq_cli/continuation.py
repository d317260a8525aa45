"""Continuing a prompt with a model: by qoq's runtime where its kernels run, through transformers elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qoq_cli.backends import kernel_problem


@dataclass(frozen=True)
class Continuation:
    """What to continue, and how: tokens, at most so many new ones, temperature 0 for the likeliest, top_p and seed of
    those that are drawn."""

    prompt: list[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Continued:
    """The new tokens, and the seconds that they took once the model was loaded."""

    tokens: tuple[int, ...]
    seconds: float


def runs_on_runtime(path: Path, device: str, *, trust_remote_code: bool) -> bool:
    """Whether the runtime continues with this model: a checkpoint with int8 activations on a GPU that has kernels.

    A model with code of its own may compute something else than its family does, and stays with transformers.
    """
    from qoq.formats.checkpoint import is_checkpoint, open_checkpoint

    if trust_remote_code or kernel_problem(device) is not None or not is_checkpoint(path):
        return False
    return open_checkpoint(path).quantization.act_bits == 8


def continue_on_runtime(
    path: Path, device: str, wanted: Continuation, *, on_load: Callable[[], None], on_token: Callable[[int], None]
) -> Continued:
    """`on_load` is called once the model is there, and `on_token` is told of each token as it comes."""
    from qoq.kernels.runtime.config import read_config, stop_tokens
    from qoq.kernels.runtime.engine import Engine
    from qoq.kernels.runtime.model import Options, RuntimeModel
    from qoq.kernels.runtime.scheduler import Request

    request = Request(
        wanted.prompt,
        wanted.max_new_tokens,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        seed=wanted.seed,
        stop=stop_tokens(path, read_config(path)),
    )
    chunk_tokens = min(Options.chunk_tokens, len(wanted.prompt))
    options = Options(device=device, max_batch=1, max_tokens=request.longest, chunk_tokens=chunk_tokens)
    engine = Engine(RuntimeModel.from_folder(path, options))
    engine.warm_up(draws=wanted.temperature > 0)
    on_load()
    (answer,) = engine.generate([request], on_token=lambda _, token: on_token(token))
    return Continued(answer.tokens, engine.stats.seconds)


def continue_through_transformers(
    path: Path,
    device: str,
    wanted: Continuation,
    *,
    pad_token: int | None,
    streamer: Any,
    trust_remote_code: bool,
    on_load: Callable[[], None],
) -> Continued:
    """`on_load` is called once the model is there; `streamer` gets the prompt, and then each token as it comes."""
    import torch

    from qoq.kernels.loading import load_model

    model: Any = load_model(path, device=device, trust_remote_code=trust_remote_code)
    on_load()
    options: dict[str, Any] = {"max_new_tokens": wanted.max_new_tokens, "do_sample": wanted.temperature > 0}
    if wanted.temperature > 0:
        options |= {"temperature": wanted.temperature, "top_p": wanted.top_p, "top_k": 0}
    torch.manual_seed(wanted.seed)
    tokens = torch.tensor([wanted.prompt], device=device)
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            streamer=streamer,
            pad_token_id=pad_token,
            **options,
        )
    return Continued(tuple(output[0, len(wanted.prompt) :].tolist()), time.perf_counter() - started)
