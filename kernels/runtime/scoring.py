"""Logits of windows of text, for perplexity: each window is prefilled into pages of its own, then free again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qoq.kernels.runtime.model import Options, RuntimeModel
from qoq.kernels.runtime.steps import Piece
from qoq.recipes.errors import InputError

_CHUNK_TOKENS = 4096
"""Tokens that go through the model at once."""


class RuntimeWindows:
    """A checkpoint as the runtime serves it: loaded when its first logits are asked for, given back after the last."""

    def __init__(self, path: Path, options: Options, *, on_windows: Callable[[int], None] = lambda _: None) -> None:
        """`options` are those of the model; max_tokens, max_batch and chunk_tokens are set by the windows."""
        self._path, self._options, self._on_windows = path, options, on_windows

    def logits(self, windows: Tensor) -> Iterator[Tensor]:
        """Logits float32 [L, V] of each window of token ids [S, L], in order.

        Raises EnvironmentProblem when the kernels cannot run or lack memory, InputError when the checkpoint cannot be
        loaded.
        """
        count, length = windows.shape
        at_once = max(1, min(count, _CHUNK_TOKENS // length))
        sizes = {"max_tokens": length, "max_batch": at_once, "chunk_tokens": _CHUNK_TOKENS}
        model = RuntimeModel.from_folder(self._path, Options(**{**vars(self._options), **sizes}))
        for hidden in hidden_states(model, windows.tolist()):
            self._on_windows(1)
            with torch.no_grad():  # not inference mode, whose tensors the caller could not edit
                logits = model.decoder.logits(hidden).float()
            yield logits


def hidden_states(model: RuntimeModel, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Hidden states [L, H] before the final norm of each window of tokens, as many at once as a step takes.

    Raises InputError for a window that there is no room for.
    """
    vocabulary = model.config.vocab_size
    if not all(0 <= min(window) <= max(window) < vocabulary for window in windows if window):
        raise InputError(f"a window has tokens that the model's {vocabulary} do not hold")
    waiting = deque(windows)
    while waiting:
        batch = [waiting.popleft()]
        while waiting and _fits(model, [*batch, waiting[0]]):
            batch.append(waiting.popleft())
        yield from _score(model, batch)


def _fits(model: RuntimeModel, windows: Sequence[Sequence[int]]) -> bool:
    """Whether windows share a step."""
    tokens, pages = sum(map(len, windows)), sum(model.pool.pages_for(len(window)) for window in windows)
    return tokens <= model.options.chunk_tokens and pages <= model.pool.free


@torch.inference_mode()
def _score(model: RuntimeModel, windows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Several windows in one step, or a single one in chunks."""
    pool, step = model.pool, model.options.chunk_tokens
    longest = max(map(len, windows))
    room = min(model.longest, pool.free * pool.page_size)
    if longest > room:
        raise InputError(
            f"a window has {longest} tokens, there is room for {room}",
            remedy="use shorter windows, or give the runtime more memory",
        )
    pages = [pool.take(pool.pages_for(len(window))) for window in windows]
    try:
        chunks = [
            model.extend([
                Piece(window[start : start + step], start, own) for window, own in zip(windows, pages, strict=True)
            ])
            for start in range(0, longest, step)
        ]  # fmt: skip
    finally:
        for own in pages:
            pool.give_back(own)
    return list(torch.cat(chunks).split([len(window) for window in windows]))
