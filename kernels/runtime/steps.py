"""What a step must know on the device, sent there in one copy each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qoq.kernels.runtime.attention import DecodeStep, ExtendStep, KVCache
from qoq.kernels.runtime.sampling import Draws
from qoq.kernels.runtime.scheduler import DecodePlan, Running
from qoq.kernels.upload import Upload

_ROW_FIELDS = {
    "slots": np.int64,
    "seeds": np.int64,
    "positions": np.int32,
    "kv_lens": np.int32,
    "temperatures": np.float32,
    "top_ps": np.float32,
}
"""Of a row of a decode step, the widest first, so that every list begins at a multiple of its width."""


@dataclass(frozen=True)
class Piece:
    """Tokens of a sequence from place `start` on, and all of its pages."""

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]


def extend_step(pieces: Sequence[Piece], page_size: int, upload: Upload) -> tuple[Tensor, ExtendStep]:
    """Tokens int64 [T] of several new ones a sequence, and their step; the upload is for the caller to send."""
    width = max(len(piece.pages) for piece in pieces)
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    table: list[int] = []
    for piece in pieces:
        places = range(piece.start, piece.start + len(piece.tokens))
        tokens += piece.tokens
        positions += places
        slots += [piece.pages[place // page_size] * page_size + place % page_size for place in places]
        table += [*piece.pages, *[0] * (width - len(piece.pages))]
    step = ExtendStep(
        positions=upload.add(positions, torch.int32),
        slots=upload.add(slots, torch.int64),
        page_table=upload.add(table, torch.int32, (len(pieces), width)),
        new_lens=tuple(len(piece.tokens) for piece in pieces),
        kv_lens=tuple(piece.start + len(piece.tokens) for piece in pieces),
    )
    return upload.add(tokens, torch.int64), step


def draws_of(sequences: Sequence[Running], upload: Upload) -> Draws | None:
    """How sequences draw the token after those that are cached; None where all take the likeliest."""
    requests = [sequence.request for sequence in sequences]
    if all(request.temperature <= 0 for request in requests):
        return None
    return Draws(
        temperatures=upload.add([request.temperature for request in requests], torch.float32),
        top_ps=upload.add([request.top_p for request in requests], torch.float32),
        seeds=upload.add([request.seed for request in requests], torch.int64),
        places=upload.add([sequence.cached for sequence in sequences], torch.int64),
    )


class DecodeInputs:
    """What decode steps read and write, in memory that stays where it is, so that CUDA graphs can replay them.

    tokens      int64 [max_batch]: the newest of each row, which a step reads and replaces
    page_table  int32 [max_batch, max_pages]
    """

    def __init__(self, cache: KVCache, max_batch: int, max_pages: int, device: torch.device) -> None:
        self._cache, self._max_batch, self._device = cache, max_batch, device
        self.tokens = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.page_table = torch.zeros(max_batch, max_pages, dtype=torch.int32, device=device)
        widths = [np.dtype(kind).itemsize for kind in _ROW_FIELDS.values()]
        self._host = np.zeros(max_batch * sum(widths), dtype=np.uint8)
        self._memory = torch.zeros(len(self._host), dtype=torch.uint8, device=device)
        self._rows: dict[str, np.ndarray] = {}
        self._fields: dict[str, Tensor] = {}
        start = 0
        for (name, kind), width in zip(_ROW_FIELDS.items(), widths, strict=True):
            part = slice(start, start + max_batch * width)
            self._rows[name] = self._host[part].view(kind)
            self._fields[name] = self._memory[part].view(torch.from_numpy(self._rows[name]).dtype)
            start = part.stop
        self._clear()

    def step(self, batch: int) -> DecodeStep:
        """The step of the first `batch` rows: views of what is sent."""
        fields = {name: self._fields[name][:batch] for name in ("positions", "slots", "kv_lens")}
        return DecodeStep(**fields, page_table=self.page_table[:batch])

    def draws(self, batch: int) -> Draws:
        """How the first `batch` rows draw; made within the step, because places follow lengths."""
        temperatures, top_ps, seeds = (self._fields[name][:batch] for name in ("temperatures", "top_ps", "seeds"))
        return Draws(temperatures, top_ps, seeds, self._fields["kv_lens"][:batch].long())

    def send_idle(self) -> None:
        """Rows that run nothing: for steps whose results nobody wants."""
        self._clear()
        self._send()

    def send(self, plan: DecodePlan) -> None:
        """What `plan` runs; rows that it does not are idle."""
        self._clear()
        rows, size = self._rows, self._cache.page_size
        places = [row_of(sequence) for sequence in plan.sequences]
        positions = [sequence.cached - 1 for sequence in plan.sequences]
        rows["positions"][places] = positions
        rows["kv_lens"][places] = [sequence.cached for sequence in plan.sequences]
        rows["slots"][places] = [
            sequence.pages[place // size] * size + place % size
            for sequence, place in zip(plan.sequences, positions, strict=True)
        ]
        for name, field in (("seeds", "seed"), ("temperatures", "temperature"), ("top_ps", "top_p")):
            rows[name][places] = [getattr(sequence.request, field) for sequence in plan.sequences]
        if plan.moved:
            self._move(plan.moved)
        if plan.pages:
            self._set_pages(plan.pages)
        self._send()

    def _clear(self) -> None:
        self._host[:] = 0
        self._rows["slots"][:] = self._cache.idle_slot
        self._rows["kv_lens"][:] = self._cache.idle_len

    def _send(self) -> None:
        host = torch.from_numpy(self._host)
        if self._device.type == "cuda":
            host = host.pin_memory()  # a copy, which PyTorch gives to nobody else before it was sent
        self._memory.copy_(host, non_blocking=True)

    def _move(self, moved: Sequence[tuple[int, int]]) -> None:
        upload = Upload(self._device)
        sources, targets = (upload.add(rows, torch.int64) for rows in zip(*moved, strict=True))
        upload.send()
        self.tokens.index_copy_(0, targets, self.tokens.index_select(0, sources))

    def _set_pages(self, pages: Sequence[tuple[int, int, int]]) -> None:
        upload = Upload(self._device)
        width = self.page_table.shape[1]
        places = upload.add([row * width + place for row, place, _ in pages], torch.int64)
        numbers = upload.add([page for _, _, page in pages], torch.int32)
        upload.send()
        self.page_table.view(-1).index_copy_(0, places, numbers)


def row_of(sequence: Running) -> int:
    """The row of a sequence that is in the decode batch."""
    if sequence.row is None:
        raise RuntimeError(f"request {sequence.index} has no row")
    return sequence.row
