"""Which sequences run in a step, on which rows and pages: continuous batching of a closed set of requests.

A sequence waits, is prefilled in chunks, then has a row of the decode batch until its last token is asked for. It takes
the pages of all tokens that it has when it is admitted, and one more whenever a page is full. Where there is none, the
sequence that was admitted last gives all of its own back and waits again, to be prefilled with the tokens it had: the
one admitted first always goes on, so that every request ends.

All of it is bookkeeping on the host. Tokens are drawn on the device, and what they are is known a step late: the
scheduler counts tokens that were asked for (`launched`), and is told of them by `record`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qoq.kernels.runtime.page_pool import PagePool
from qoq.recipes.errors import InputError

Finish = Literal["stop", "length"]
_INT64 = 1 << 63


@dataclass(frozen=True)
class Request:
    """Tokens to continue.

    temperature   0 takes the likeliest token;  top_p and seed: see `sampling`
    stop          tokens that end the answer, as its last one
    """

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: frozenset[int] = frozenset()

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longest answer."""
        return len(self.prompt) + self.max_new_tokens

    def problem(self) -> str | None:
        """What of it makes no sense, whatever the model."""
        if not self.prompt or self.max_new_tokens < 1:
            return "a prompt of at least one token and max_new_tokens of 1 are needed"
        if not (math.isfinite(self.temperature) and self.temperature >= 0 and 0 <= self.top_p <= 1):
            return f"temperature {self.temperature} and top_p {self.top_p}, expected 0 or more and 0 to 1"
        if not -_INT64 <= self.seed < _INT64:
            return f"seed {self.seed} does not fit 64 bits"
        return None


@dataclass(eq=False)
class Running:
    """A request and how far it is.

    tokens    the prompt and what is known of the answer
    cached    tokens whose keys and values are in the cache after the steps that were launched
    launched  tokens of the answer that were asked for, known or not
    row       in the decode batch, from the last chunk of the prompt on
    """

    index: int
    request: Request
    tokens: list[int]
    cached: int = 0
    launched: int = 0
    pages: list[int] = field(default_factory=list)
    row: int | None = None
    finish: Finish | None = None
    preemptions: int = 0

    @property
    def answered(self) -> int:
        """Tokens of the answer that are known."""
        return len(self.tokens) - len(self.request.prompt)


@dataclass(frozen=True)
class Chunk:
    """Tokens start .. start + count - 1 of a sequence, whose next token is drawn after its last chunk (`row`)."""

    sequence: Running
    start: int
    count: int
    row: int | None


@dataclass(frozen=True)
class DecodePlan:
    """A decode step.

    sequences   what runs, each in its `row`
    batch       rows 0 .. batch - 1 are computed; those that no sequence has are idle
    moved       (from, to): a sequence's row has changed
    pages       (row, place, page): what the page table says anew
    """

    sequences: tuple[Running, ...]
    batch: int
    moved: tuple[tuple[int, int], ...]
    pages: tuple[tuple[int, int, int], ...]


class Scheduler:
    """Plans steps over `pool` for at most max_batch sequences at a time and chunk_tokens tokens a prefill step."""

    def __init__(self, pool: PagePool, *, max_batch: int, chunk_tokens: int) -> None:
        self._pool, self._max_batch, self._chunk_tokens = pool, max_batch, chunk_tokens
        self._buckets = decode_batches(max_batch)
        self._waiting: deque[Running] = deque()
        self._admitted: list[Running] = []  # in this order; without those whose last token was asked for
        self._rows: dict[int, Running] = {}
        self._free_rows = set(range(max_batch))
        self._changed_rows: set[int] = set()  # whose page table row is another sequence's
        self._unfinished = 0

    def add(self, requests: Sequence[Request]) -> list[Running]:
        """Take in requests. Raises InputError, by the request's number, for one that can never run."""
        capacity = self._pool.num_pages * self._pool.page_size
        for index, request in enumerate(requests):
            if problem := request.problem():
                raise InputError(f"request {index}: {problem}")
            if self._pool.pages_for(request.longest) > self._pool.num_pages:
                raise InputError(
                    f"request {index}: {len(request.prompt)} tokens and {request.max_new_tokens} new ones do not fit "
                    f"the KV cache of {capacity} tokens",
                    remedy="ask for fewer tokens, give the runtime more memory, or use a cache of fewer bits",
                )
        sequences = [Running(index, request, list(request.prompt)) for index, request in enumerate(requests)]
        self._waiting.extend(sequences)
        self._unfinished += len(sequences)
        return sequences

    @property
    def unfinished(self) -> int:
        """Requests whose last token is not known."""
        return self._unfinished

    @property
    def running(self) -> int:
        """Sequences that have pages."""
        return len(self._admitted)

    def next_chunks(self) -> list[Chunk]:
        """What to prefill now, within the budget of tokens; sequences are admitted as pages and rows allow."""
        budget, chunks = self._chunk_tokens, []
        for sequence in self._admitted:
            if sequence.row is None and budget:
                chunks.append(self._chunk(sequence, budget))
                budget -= chunks[-1].count
        wanting = sum(map(self._wants_pages, self._admitted)) if budget and self._waiting else 0
        while budget and self._admit(wanting):
            wanting += self._wants_pages(self._admitted[-1])
            chunks.append(self._chunk(self._admitted[-1], budget))
            budget -= chunks[-1].count
        return chunks

    def lacks_pages(self) -> bool:
        """Whether `next_decode` would set sequences back: first every token that was asked for must be known."""
        return len(self._full()) > self._pool.free

    def next_decode(self) -> DecodePlan | None:
        """The next decode step of every sequence that has a row; None when there is none.

        Raises RuntimeError where it has to set back a sequence with tokens that are not known yet (`lacks_pages`).
        """
        pages = []
        while len(full := self._full()) > self._pool.free:
            self._preempt(self._admitted[-1])
        for sequence in full:
            sequence.pages += self._pool.take(1)
            if sequence.row is not None and sequence.row not in self._changed_rows:
                pages.append((sequence.row, len(sequence.pages) - 1, sequence.pages[-1]))
        if not self._rows:
            return None
        batch = next(size for size in self._buckets if size >= len(self._rows))
        moved = self._compact(batch)
        for row in self._changed_rows:
            if row in self._rows:
                pages += [(row, place, page) for place, page in enumerate(self._rows[row].pages)]
        self._changed_rows.clear()
        sequences = tuple(self._rows.values())
        plan = DecodePlan(sequences, batch, moved, tuple(pages))
        for sequence in sequences:
            sequence.cached += 1
        return plan

    def launched(self, sequences: Iterable[Running]) -> None:
        """A step was launched that draws a token of each of `sequences`: for some the last, whose pages are free now.

        What was launched before runs before whatever takes them next.
        """
        for sequence in sequences:
            sequence.launched += 1
            if sequence.launched >= sequence.request.max_new_tokens:
                self._release(sequence)

    def record(self, sequence: Running, token: int) -> None:
        """A token is known; those that come after the answer's end are dropped."""
        if sequence.finish is not None:
            return
        sequence.tokens.append(token)
        if token in sequence.request.stop:
            sequence.finish = "stop"
        elif sequence.answered == sequence.request.max_new_tokens:
            sequence.finish = "length"
        if sequence.finish is not None:
            self._unfinished -= 1
            self._release(sequence)

    def _admit(self, wanting: int) -> bool:
        """Admit the first that waits, unless it would leave no page for each of `wanting` that will want one more."""
        if not self._waiting or len(self._admitted) >= self._max_batch:
            return False
        sequence, pool = self._waiting[0], self._pool
        count = pool.pages_for(len(sequence.tokens))
        if count + wanting + (count < pool.pages_for(sequence.request.longest)) > pool.free:
            return False
        sequence.pages = pool.take(count)
        self._admitted.append(self._waiting.popleft())
        return True

    def _wants_pages(self, sequence: Running) -> bool:
        """Whether it may need more pages than it has."""
        return len(sequence.pages) < self._pool.pages_for(sequence.request.longest)

    def _chunk(self, sequence: Running, budget: int) -> Chunk:
        start = sequence.cached
        count = min(budget, len(sequence.tokens) - start)
        sequence.cached += count
        if sequence.cached == len(sequence.tokens):
            row = min(self._free_rows)
            self._free_rows.remove(row)
            self._place(sequence, row)
        return Chunk(sequence, start, count, sequence.row)

    def _place(self, sequence: Running, row: int) -> None:
        sequence.row = row
        self._rows[row] = sequence
        self._changed_rows.add(row)

    def _full(self) -> list[Running]:
        """Sequences whose next token needs a page that they do not have."""
        size = self._pool.page_size
        return [s for s in self._rows.values() if s.cached >= len(s.pages) * size]

    def _preempt(self, sequence: Running) -> None:
        if sequence.launched != sequence.answered:
            raise RuntimeError(f"request {sequence.index} is to be set back with tokens under way")
        self._release(sequence)
        sequence.cached = 0
        sequence.launched = sequence.answered
        sequence.preemptions += 1
        self._waiting.appendleft(sequence)

    def _release(self, sequence: Running) -> None:
        """Give back row and pages, if it still has them."""
        if sequence in self._admitted:
            self._admitted.remove(sequence)
        self._pool.give_back(sequence.pages)
        sequence.pages = []
        if sequence.row is not None:
            del self._rows[sequence.row]
            self._free_rows.add(sequence.row)
            sequence.row = None

    def _compact(self, batch: int) -> tuple[tuple[int, int], ...]:
        """Move sequences from rows beyond the batch to free ones within."""
        moved = []
        for row in sorted(row for row in self._rows if row >= batch):
            target = min(self._free_rows)
            self._free_rows.remove(target)
            self._free_rows.add(row)
            self._place(self._rows.pop(row), target)
            moved.append((row, target))
        return tuple(moved)


def decode_batches(max_batch: int) -> tuple[int, ...]:
    """Sizes that decode batches are rounded up to, the last max_batch: finer where a row costs a larger share."""
    sizes = [1, 2, 4, 8]
    for step, limit in ((8, 64), (16, 128), (32, 256), (64, max_batch)):
        sizes += range(sizes[-1] + step, limit + step, step)
    return (*(size for size in sizes if size < max_batch), max_batch)
