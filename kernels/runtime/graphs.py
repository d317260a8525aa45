"""Decode steps as CUDA graphs: one for each size of batch, captured when it is first wanted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qoq.kernels.runtime.steps import DecodeInputs


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage that is freed during a capture would break it."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class DecodeSteps:
    """Runs `run(batch, draws)` over `inputs`: as a CUDA graph, or as it is."""

    def __init__(self, run: Callable[[int, bool], None], inputs: DecodeInputs, *, graphs: bool) -> None:
        self._run, self._inputs, self._graphs = run, inputs, graphs
        self._captured: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def prepare(self, batch: int, draws: bool) -> None:
        """Capture the graph of this size, unless there is one: before the step's inputs are sent."""
        if not self._graphs or (batch, draws) in self._captured:
            return
        tokens = self._inputs.tokens.clone()
        self._inputs.send_idle()
        self._run(batch, draws)  # loads kernels and makes workspaces, which a capture must not do
        torch.cuda.synchronize(tokens.device)
        graph = torch.cuda.CUDAGraph()
        with _no_collection(), torch.cuda.graph(graph, pool=self._pool):
            self._run(batch, draws)
        graph.replay()  # the first replay takes longer than others
        self._pool = self._pool or graph.pool()  # graphs run one at a time, so they share their memory
        self._inputs.tokens.copy_(tokens)
        self._captured[batch, draws] = graph

    def launch(self, batch: int, draws: bool) -> None:
        """Enqueue a step on inputs that were sent."""
        if self._graphs:
            self._captured[batch, draws].replay()
        else:
            self._run(batch, draws)
