"""A step of extend attention as `prepare_extend` makes it: planned on the host, sent to the device in one copy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from qoq.kernels.extend_plan import PART_KEYS, Batch, DecodeRow, Heads, KeyRange, plan_extend
from qoq.kernels.layouts import PAGE_SIZE
from qoq.kernels.upload import Upload

DEFAULT_SCRATCH_BYTES = 256 << 20
"""Dequantized keys and values held at a time."""

_VALUE_BYTES = 2


@dataclass(frozen=True)
class Rows:
    """Rows first .. first + count - 1 of the queries; or those of `index`, int64 [count], which do not lie together."""

    first: int
    count: int
    index: Tensor | None

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of `tensor`, without a copy where they lie together."""
        return self._slice(tensor) if self.index is None else tensor.index_select(0, self.index)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write `values` into these rows of `tensor`."""
        if self.index is None:
            self._slice(tensor).copy_(values)
        else:
            tensor.index_copy_(0, self.index, values.to(tensor.dtype))

    def _slice(self, tensor: Tensor) -> Tensor:
        return tensor[self.first : self.first + self.count]


@dataclass(frozen=True)
class DecodeCall:
    """Rows for the decode kernel: row i attends to kv_lens[i] tokens, int32 [rows], of sequences[i], int64 [rows].

    Those lie in the first `pages` pages. `sequences` is None where row i is that of sequence i, and none is left out.
    """

    rows: Rows
    kv_lens: Tensor
    sequences: Tensor | None
    pages: int


@dataclass(frozen=True)
class FlashCall:
    """One call of flash attention over the scratch; of n items, or of `parts` times n: packed (`extend_plan`), every
    item with its first range of keys, then every item with its second.

    row_ends   int32 [n + 1]: where their rows end, from 0 on
    key_starts int32 [n + 1]: where their keys start in the scratch, and one number that is not used
    key_lens   int32 [n]
    max_rows, max_keys   of an item
    causal     the last row of an item sees its last key, each before it one less; otherwise every row sees all keys
    parts      0 for a call that is not packed
    """

    row_ends: Tensor
    key_starts: Tensor
    key_lens: Tensor
    max_rows: int
    max_keys: int
    causal: bool
    parts: int


@dataclass(frozen=True)
class FlashLoad:
    """Pages (which of `ExtendBatch.places`) for the scratch, and the calls over them."""

    pages: slice
    calls: tuple[FlashCall, ...]

    @property
    def num_pages(self) -> int:
        return int(self.pages.stop - self.pages.start)


@dataclass(frozen=True)
class FlashBatch:
    """Rows whose attention to the keys of all calls of all loads is merged."""

    rows: Rows
    loads: tuple[FlashLoad, ...]


@dataclass(frozen=True)
class ExtendBatch:
    """A step, as `prepare_extend` planned it: what does not depend on the layer. Its tensors are on the device.

    rows, sequences, max_pages   T, and the shape of the page table, that it was made for
    places                       int64: which numbers of the flat page table are dequantized, for all calls
    scratch_pages                as many as are dequantized at a time
    """

    rows: int
    sequences: int
    max_pages: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    device: torch.device
    places: Tensor
    scratch_pages: int
    decode: DecodeCall | None
    flash: tuple[FlashBatch, ...]


def prepare_extend(
    new_lens: Sequence[int],
    kv_lens: Sequence[int],
    *,
    max_pages: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    device: torch.device,
    window: int | None = None,
    scratch_bytes: int = DEFAULT_SCRATCH_BYTES,
) -> ExtendBatch:
    """Plan a step of sequences; every layer of it, and every later step of the same lengths, can run with the result.

    new_lens       how many new tokens each sequence has;  kv_lens its tokens, the new ones included
    max_pages      columns of the page table
    heads          of queries: a multiple of kv_heads
    window         each token attends to the last `window` tokens up to itself; None or 0 for all
    scratch_bytes  dequantized keys and values held at a time

    One copy to the device, on its current stream, that the host does not wait for. Raises ValueError for lengths that
    do not fit, or a scratch that cannot hold the window.
    """
    _check_lens(new_lens, kv_lens, max_pages * PAGE_SIZE)
    window = window or 0
    if window < 0:
        raise ValueError(f"window: expected 0 (no window) or a number of tokens, got {window}")
    if window >= max(kv_lens, default=0):
        window = 0
    page_scratch = 2 * PAGE_SIZE * kv_heads * head_dim * _VALUE_BYTES
    plan = plan_extend(new_lens, kv_lens, window, scratch_bytes // page_scratch, Heads(heads, kv_heads))
    if plan.pages_needed:
        raise ValueError(
            f"scratch_bytes: expected at least {plan.pages_needed * page_scratch} (window {window}), "
            f"got {scratch_bytes}"
        )
    upload = Upload(device)
    builder = _FlashBuilder(upload, heads // kv_heads, max_pages)
    decode = _decode_call(plan.decode, len(kv_lens), upload) if plan.decode else None
    flash = tuple(builder.batch(batch) for batch in plan.batches)
    result = ExtendBatch(
        rows=sum(new_lens),
        sequences=len(kv_lens),
        max_pages=max_pages,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        window=window,
        device=upload.device,
        places=upload.add(builder.places, torch.int64),
        scratch_pages=max((load.num_pages for batch in flash for load in batch.loads), default=0),
        decode=decode,
        flash=flash,
    )
    upload.send()
    return result


class _FlashBuilder:
    """Makes calls of flash attention, and collects the places of their pages."""

    def __init__(self, upload: Upload, share: int, max_pages: int) -> None:
        self.places: list[int] = []
        self._upload = upload
        self._share = share
        self._max_pages = max_pages

    def batch(self, batch: Batch) -> FlashBatch:
        items, parts = batch.items, batch.parts
        rows = [item.rows for item in items]
        starts = _ends(item.keys.pages * PAGE_SIZE for item in items)[:-1]
        if parts:
            before = [item.before for item in items]
            own = [start + length for start, length in zip(starts, before, strict=True)]
            calls = [self._call(rows, own, rows, causal=True), self._packed(rows, starts, before, parts)]
        else:
            calls = [self._call(rows, starts, [item.before + item.rows for item in items], causal=True)]
        loads = [self._load([item.keys for item in items], calls)]
        for keys in items[0].history:  # of the only item
            lens = [keys.end - keys.start]
            call = self._packed(rows, [0], lens, parts) if parts else self._call(rows, [0], lens, causal=False)
            loads.append(self._load([keys], [call]))
        ranges = [range(item.first_row, item.first_row + item.rows) for item in items]
        return FlashBatch(_rows(ranges, self._upload), tuple(loads))

    def _load(self, ranges: Sequence[KeyRange], calls: Sequence[FlashCall]) -> FlashLoad:
        start = len(self.places)
        for keys in ranges:
            first = keys.sequence * self._max_pages
            self.places.extend(range(first + keys.start // PAGE_SIZE, first + keys.end_page))
        return FlashLoad(slice(start, len(self.places)), tuple(calls))

    def _packed(self, rows: Sequence[int], starts: Sequence[int], lens: Sequence[int], parts: int) -> FlashCall:
        parts = max(1, min(parts, min(lens) // PART_KEYS))
        borders = [[length * part // parts for length in lens] for part in range(parts + 1)]
        return self._call(
            [self._share * count for count in rows] * parts,
            [start + border for part in borders[:-1] for start, border in zip(starts, part, strict=True)],
            [end - start for part in pairwise(borders) for start, end in zip(*part, strict=True)],
            causal=False,
            parts=parts,
        )

    def _call(
        self, rows: Sequence[int], starts: Sequence[int], lens: Sequence[int], *, causal: bool, parts: int = 0
    ) -> FlashCall:
        return FlashCall(
            row_ends=self._upload.add(_ends(rows), torch.int32),
            key_starts=self._upload.add([*starts, starts[-1] + lens[-1]], torch.int32),
            key_lens=self._upload.add(lens, torch.int32),
            max_rows=max(rows),
            max_keys=max(lens),
            causal=causal,
            parts=parts,
        )


def _rows(ranges: Sequence[range], upload: Upload) -> Rows:
    """Rows in ascending ranges."""
    first, count = ranges[0].start, sum(map(len, ranges))
    if ranges[-1].stop - first == count:
        return Rows(first, count, None)
    return Rows(first, count, upload.add([row for rows in ranges for row in rows], torch.int64))


def _decode_call(decode: Sequence[DecodeRow], sequences: int, upload: Upload) -> DecodeCall:
    of_rows = [row.sequence for row in decode]
    kv_lens = [row.kv_len for row in decode]
    return DecodeCall(
        rows=_rows([range(row.row, row.row + 1) for row in decode], upload),
        kv_lens=upload.add(kv_lens, torch.int32),
        sequences=None if of_rows == list(range(sequences)) else upload.add(of_rows, torch.int64),
        pages=math.ceil(max(kv_lens) / PAGE_SIZE),
    )


def _ends(lens: Iterable[int]) -> list[int]:
    """0, and where each of things of these lengths ends that lie one after the other."""
    ends = [0]
    for length in lens:
        ends.append(ends[-1] + length)
    return ends


def _check_lens(new_lens: Sequence[int], kv_lens: Sequence[int], max_tokens: int) -> None:
    """Raise ValueError where lengths of sequences do not fit each other or the page table."""
    if len(new_lens) != len(kv_lens):
        raise ValueError(f"new_lens, kv_lens: expected one each a sequence, got {len(new_lens)} and {len(kv_lens)}")
    for i, (new, total) in enumerate(zip(new_lens, kv_lens, strict=True)):
        if not 0 <= new <= total <= max_tokens:
            raise ValueError(
                f"sequence {i}: {new} new tokens of {total}, expected 0 <= new <= all <= {max_tokens} (page_table)"
            )
