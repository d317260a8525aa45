"""How new tokens over a paged history are cut into calls: every token sees exactly its keys, whatever the scratch."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qoq.kernels.extend_plan import (
    CROWD,
    CROWDED_DECODE_ROWS,
    DECODE_ROWS,
    ExtendPlan,
    Heads,
    plan_extend,
)
from qoq.kernels.layouts import PAGE_SIZE

LLAMA = Heads(32, 8)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_plans_show_every_token_exactly_its_keys(data: st.DataObject) -> None:
    sequences = data.draw(st.integers(1, 4))
    new_lens = data.draw(st.lists(st.integers(0, 400), min_size=sequences, max_size=sequences))
    kv_lens = [new + data.draw(st.integers(0, 900) | st.integers(4090, 4700)) for new in new_lens]
    window = data.draw(st.sampled_from([0, 1, 5, 64, 65, 200, 5000]))
    capacity = data.draw(st.integers(2, 12))
    plan = plan_extend(new_lens, kv_lens, window, capacity, LLAMA)
    if plan.pages_needed:
        assert 0 < window < max(kv_lens)
        assert plan.pages_needed > capacity
        assert not plan_extend(new_lens, kv_lens, window, max(plan.pages_needed, 12), LLAMA).pages_needed
        return
    firsts = [sum(new_lens[:i]) for i in range(sequences)]
    seen: dict[int, list[tuple[int, int]]] = {}  # row: ranges of keys
    for row in plan.decode:
        start = max(0, row.kv_len - window) if window else 0
        seen.setdefault(row.row, []).append((start, row.kv_len))
        assert new_lens[row.sequence] <= DECODE_ROWS
    for group in plan.batches:
        batch = group.items
        assert sum(item.keys.pages for item in batch) <= capacity
        assert len(batch) == 1 or not any(item.history for item in batch)
        for item in batch:
            assert item.keys.start % PAGE_SIZE == 0
            assert item.before >= (1 if group.parts else 0)
            assert not (item.history and 0 < window < kv_lens[item.keys.sequence])
            for i in range(item.rows):
                end = item.keys.end - item.rows + i + 1
                start = max(item.keys.start, end - window) if window else item.keys.start
                assert end > start
                ranges = [*((keys.start, keys.end) for keys in item.history), (start, end)]
                seen.setdefault(item.first_row + i, []).extend(ranges)
            for keys in item.history:
                assert keys.pages <= capacity
                assert keys.start % PAGE_SIZE == keys.end % PAGE_SIZE == 0
    for sequence, first in enumerate(firsts):
        for i in range(new_lens[sequence]):
            ranges = seen.pop(first + i)
            end = kv_lens[sequence] - new_lens[sequence] + i + 1
            assert ranges[0][0] == (max(0, end - window) if window else 0)
            assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
            assert ranges[-1][1] == end
    assert not seen


def test_an_empty_plan() -> None:
    assert plan_extend([0, 0], [5, 0], 0, 4, LLAMA) == ExtendPlan()


def decoded(new_lens: list[int], kv_lens: list[int], window: int = 0) -> int:
    return len(plan_extend(new_lens, kv_lens, window, 1024, LLAMA).decode)


def test_rows_of_the_decode_kernel() -> None:
    assert decoded([DECODE_ROWS], [8192]) == DECODE_ROWS
    assert decoded([DECODE_ROWS + 1], [8192]) == 0
    assert decoded([DECODE_ROWS] * 2, [8192] * 2) == 2 * DECODE_ROWS
    crowd = CROWD + 1
    assert decoded([DECODE_ROWS] * crowd, [8192] * crowd) == 0
    assert decoded([CROWDED_DECODE_ROWS] * crowd, [8192] * crowd) == crowd * CROWDED_DECODE_ROWS
    assert decoded([DECODE_ROWS] * crowd, [2048] * crowd) == crowd * DECODE_ROWS  # nothing is packed
    assert decoded([DECODE_ROWS] * crowd, [8192] * crowd, 4096) == crowd * DECODE_ROWS


@pytest.mark.parametrize(
    ("sequences", "new", "total", "heads", "parts"),
    [
        (1, 64, 8192, LLAMA, 16),
        (1, 384, 8192, LLAMA, 2),
        (1, 512, 8192, LLAMA, 0),
        (8, 64, 8192, LLAMA, 2),
        (8, 32, 8192, LLAMA, 4),
        (8, 512, 8192, LLAMA, 0),
        (1, 64, 4096, LLAMA, 0),
        (1, 64, 8192, Heads(32, 32), 8),
        (8, 64, 8192, Heads(32, 32), 0),
    ],
)
def test_what_is_packed(sequences: int, new: int, total: int, heads: Heads, parts: int) -> None:
    (batch,) = plan_extend([new] * sequences, [total] * sequences, 0, 1024, heads).batches
    assert batch.parts == parts
