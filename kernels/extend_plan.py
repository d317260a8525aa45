"""How attention of several new tokens a sequence is cut into calls, as data: nothing is launched here.

A sequence with few new tokens goes through the decode kernel, each token as a row with its own length. For the others,
keys and values are dequantized page by page into a scratch that holds `capacity` pages, and calls of flash attention
attend to what the scratch holds. Sequences share a scratch, and its calls, where their pages fit together:

    plain    one causal call. A block of flash attention computes a tile of rows of one head against all keys, so few
             new tokens leave tiles, and few tiles leave the GPU, partly idle
    packed   what all rows of a sequence see, the keys before its new tokens, in a call without a mask, which may take
             the query heads of a KV head for rows of one head, and each range of keys for a sequence of its own. A
             causal call for the new tokens follows, and a merge by log-sum-exp

One that does not fit is cut:

    new tokens   into equal items, so that the keys from an item's first new token on fit the scratch (with a window:
                 all keys that it sees)
    history      the scratch holds the last `capacity` pages that an item sees; what lies before, all of which every
                 token of the item sees, follows a scratch at a time, merged by log-sum-exp
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qoq.kernels.layouts import PAGE_SIZE

# Costs on an H100 with Llama-3-8B's 32 query heads of 128 on 8 KV heads, in nanoseconds a token of history: the decode
# kernel 0.5 a row; dequantizing 1.7; flash attention 6.9 for up to 128 rows, or up to 32 packed ones, where the GPU is
# busy, and 33 for a block of it however few there are. Packing adds some 50 us of small operations.

DECODE_ROWS = 16
"""Up to so many new tokens, a sequence goes through the decode kernel, which reads its pages once a token: as much as
dequantizing and plain flash attention, or as the small operations where packing pays."""

CROWDED_DECODE_ROWS = 8
"""The same where more than `CROWD` sequences can share those small operations."""

CROWD = 2

PACKED_HISTORY = 4096
"""Tokens before the new ones from which on packing may pay: what a block attends to in 130 us."""

FLASH_TILE_ROWS = 128
"""Rows that a block of flash attention computes, or leaves idle."""

BUSY_BLOCKS = 256
"""Blocks of flash attention that keep a GPU busy: some two on each of an H100's 132 processors."""

PART_KEYS = 256
"""Keys of a part, at least."""

PACKED_WORK = 0.75
"""Packing pays on a busy GPU where it leaves at most this share of the tiles."""


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

    @property
    def before(self) -> int:
        """Keys in the scratch before the rows' own."""
        return self.keys.end - self.keys.start - self.rows


@dataclass(frozen=True)
class Batch:
    """Items that share a scratch; one with a history has it for itself. `parts`: ranges of keys for packed calls that
    keep the GPU busy; 0 for plain ones."""

    items: tuple[Item, ...]
    parts: int = 0


@dataclass(frozen=True)
class ExtendPlan:
    """Rows for the decode kernel, and batches. Where a window does not fit the scratch there is no plan, and
    `pages_needed` is the capacity that would do."""

    decode: tuple[DecodeRow, ...] = ()
    batches: tuple[Batch, ...] = ()
    pages_needed: int = 0


@dataclass(frozen=True)
class Heads:
    """How many heads queries have, and keys and values."""

    query: int
    kv: int


def plan_extend(
    new_lens: Sequence[int], kv_lens: Sequence[int], window: int, capacity: int, heads: Heads
) -> ExtendPlan:
    """Cut the new tokens of sequences into calls.

    new_lens, kv_lens: new tokens of each sequence, and all of its tokens; window 0 for none; capacity: pages.
    """
    decode: list[DecodeRow] = []
    items: dict[bool, list[Item]] = {False: [], True: []}  # by whether a history is worth packing
    spans = [window - 1 if 0 < window < total else None for total in kv_lens]
    packable = [
        span is None and total - new >= PACKED_HISTORY
        for new, total, span in zip(new_lens, kv_lens, spans, strict=True)
    ]
    crowd = sum(packs and new > CROWDED_DECODE_ROWS for new, packs in zip(new_lens, packable, strict=True))
    row = 0
    for sequence, (new, total, span, packs) in enumerate(zip(new_lens, kv_lens, spans, packable, strict=True)):
        history = total - new
        if new <= (CROWDED_DECODE_ROWS if packs and crowd > CROWD else DECODE_ROWS):
            decode += [DecodeRow(row + i, sequence, history + i + 1) for i in range(new)]
        else:
            needed = math.ceil(((span or 0) + 1) / PAGE_SIZE) + 1
            if capacity < needed:
                return ExtendPlan(pages_needed=needed)
            items[packs] += _items_of(sequence, row, new, history, span, capacity)
        row += new
    plain = [Batch(shared) for shared in _share_scratch(items[False], capacity)]
    packed = [Batch(shared, _parts(shared, heads)) for shared in _share_scratch(items[True], capacity)]
    return ExtendPlan(tuple(decode), (*plain, *packed))


def _parts(items: Sequence[Item], heads: Heads) -> int:
    share = heads.query // heads.kv
    plain = heads.query * sum(math.ceil(item.rows / FLASH_TILE_ROWS) for item in items)
    packed = heads.kv * sum(math.ceil(item.rows * share / FLASH_TILE_ROWS) for item in items)
    if plain >= BUSY_BLOCKS // 2 and packed > PACKED_WORK * plain:
        return 0
    return max(1, BUSY_BLOCKS // packed)


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


def _share_scratch(items: Sequence[Item], capacity: int) -> Iterator[tuple[Item, ...]]:
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
