"""How attention of several new tokens a sequence is cut into calls, as data: nothing is launched here.

A sequence with few new tokens goes through the decode kernel, each token as a row with its own length. For the others,
keys and values are dequantized page by page into a scratch that holds `capacity` pages, and a call attends to what the
scratch holds. Sequences share a call where their pages fit together. One that does not fit is cut:

    new tokens   into equal items, so that the keys from an item's first new token on fit the scratch (with a window:
                 all keys that it sees)
    history      an item's call sees the last `capacity` pages; what lies before, all of which every token of the item
                 sees, follows in calls of its own that are merged by log-sum-exp
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qoq.kernels.layouts import PAGE_SIZE

DECODE_ROWS = 4
"""Up to so many new tokens, a sequence goes through the decode kernel, which reads its pages once a token."""


@dataclass(frozen=True)
class DecodeRow:
    """A row of the queries that attends to the first `kv_len` tokens of a sequence."""

    row: int
    sequence: int
    kv_len: int


@dataclass(frozen=True)
class KeyRange:
    """Tokens start .. end - 1 of a sequence; `start` is the first of a page."""

    sequence: int
    start: int
    end: int

    @property
    def end_page(self) -> int:
        return math.ceil(self.end / PAGE_SIZE)

    @property
    def pages(self) -> int:
        return self.end_page - self.start // PAGE_SIZE


@dataclass(frozen=True)
class Item:
    """Consecutive rows of a sequence: causal attention to `keys`, whose last token is that of the last row; then all
    of them attend to every token of each range of `history`."""

    first_row: int
    rows: int
    keys: KeyRange
    history: tuple[KeyRange, ...] = ()


@dataclass(frozen=True)
class ExtendPlan:
    """Rows for the decode kernel, and batches of items that share a call. Where a window does not fit the scratch
    there is no plan, and `pages_needed` is the capacity that would do."""

    decode: tuple[DecodeRow, ...] = ()
    batches: tuple[tuple[Item, ...], ...] = ()
    pages_needed: int = 0


def plan_extend(new_lens: Sequence[int], kv_lens: Sequence[int], window: int, capacity: int) -> ExtendPlan:
    """Cut the new tokens of sequences into calls.

    new_lens, kv_lens: new tokens of each sequence, and all of its tokens; window 0 for none; capacity: pages.
    """
    decode: list[DecodeRow] = []
    items: list[Item] = []
    row = 0
    for sequence, (new, total) in enumerate(zip(new_lens, kv_lens, strict=True)):
        history = total - new
        if new <= DECODE_ROWS:
            decode += [DecodeRow(row + i, sequence, history + i + 1) for i in range(new)]
        else:
            span = window - 1 if 0 < window < total else None
            needed = math.ceil(((span or 0) + 1) / PAGE_SIZE) + 1
            if capacity < needed:
                return ExtendPlan(pages_needed=needed)
            items += _items_of(sequence, row, new, history, span, capacity)
        row += new
    return ExtendPlan(tuple(decode), tuple(_batches(items, capacity)))


def _items_of(sequence: int, row: int, new: int, history: int, span: int | None, capacity: int) -> Iterator[Item]:
    """Items of one sequence; `span` is how many tokens before itself a token sees, None for all.

    Any (capacity - 1) * PAGE_SIZE tokens lie on at most `capacity` pages.
    """
    longest = (capacity - 1) * PAGE_SIZE - (span or 0)
    count = math.ceil(new / longest)
    for i in range(count):
        first, last = new * i // count, new * (i + 1) // count
        end = history + last
        start = 0 if span is None else max(0, history + first - span)
        keys = KeyRange(sequence, start // PAGE_SIZE * PAGE_SIZE, end)
        earlier: tuple[KeyRange, ...] = ()
        if keys.pages > capacity:
            border = (keys.end_page - capacity) * PAGE_SIZE
            step = capacity * PAGE_SIZE
            earlier = tuple(KeyRange(sequence, at, min(at + step, border)) for at in range(0, border, step))
            keys = KeyRange(sequence, border, end)
        yield Item(row + first, last - first, keys, earlier)


def _batches(items: Sequence[Item], capacity: int) -> Iterator[tuple[Item, ...]]:
    batch: list[Item] = []
    pages = 0
    for item in items:
        if batch and pages + item.keys.pages > capacity:
            yield tuple(batch)
            batch, pages = [], 0
        batch.append(item)
        pages += item.keys.pages
    if batch:
        yield tuple(batch)
