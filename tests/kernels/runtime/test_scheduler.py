"""Plans of the scheduler, run by a device that only remembers: what each row and page holds, and who wrote it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qoq.kernels.runtime.page_pool import PagePool
from qoq.kernels.runtime.scheduler import Chunk, DecodePlan, Request, Running, Scheduler, decode_batches
from qoq.recipes.errors import InputError

STOP = 0


def next_token(tokens: Sequence[int], *, stops_after: int) -> int:
    """What a model would say: of all tokens before, and STOP when there are enough."""
    return STOP if len(tokens) >= stops_after else 1 + hash(tuple(tokens)) % 1000


class Device:
    """Keeps tokens in pages, as a model does its keys and values, and refuses what no model could run."""

    def __init__(self, pool: PagePool, max_batch: int, stops: Sequence[int]) -> None:
        self.pool, self.stops = pool, stops
        self.memory: dict[int, int] = {}  # slot: token
        self.newest: dict[int, int] = {}  # row: token
        self.table: dict[tuple[int, int], int] = {}
        self.max_batch = max_batch

    def read(self, pages: Sequence[int], count: int) -> list[int]:
        size = self.pool.page_size
        return [self.memory[pages[place // size] * size + place % size] for place in range(count)]

    def write(self, pages: Sequence[int], place: int, token: int) -> None:
        size = self.pool.page_size
        self.memory[pages[place // size] * size + place % size] = token

    def prefill(self, chunks: Sequence[Chunk]) -> list[tuple[Running, int]]:
        drawn = []
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            for place in range(chunk.start, end):
                self.write(sequence.pages, place, sequence.tokens[place])
            if chunk.row is not None:
                assert end == len(sequence.tokens)
                token = next_token(self.read(sequence.pages, end), stops_after=self.stops[sequence.index])
                self.newest[chunk.row] = token
                drawn.append((sequence, token))
        return drawn

    def decode(self, plan: DecodePlan) -> list[tuple[Running, int]]:
        for source, target in plan.moved:
            self.newest[target] = self.newest[source]
        for row, place, page in plan.pages:
            self.table[row, place] = page
        rows = [sequence.row for sequence in plan.sequences]
        assert len(set(rows)) == len(rows)
        assert all(row is not None and row < plan.batch <= self.max_batch for row in rows)
        drawn = []
        for sequence in plan.sequences:
            assert sequence.row is not None
            pages = [self.table[sequence.row, place] for place in range(len(sequence.pages))]
            assert pages == sequence.pages
            place = sequence.cached - 1
            self.write(pages, place, self.newest[sequence.row])
            token = next_token(self.read(pages, place + 1), stops_after=self.stops[sequence.index])
            self.newest[sequence.row] = token
            drawn.append((sequence, token))
        return drawn


def run(
    requests: Sequence[Request], stops: Sequence[int], *, num_pages: int, page_size: int, max_batch: int, chunk: int
) -> list[Running]:
    """All requests to their end, tokens known one turn late, as the engine does it."""
    pool = PagePool(num_pages, page_size)
    scheduler = Scheduler(pool, max_batch=max_batch, chunk_tokens=chunk)
    sequences, device = scheduler.add(requests), Device(pool, max_batch, stops)
    flights: deque[list[tuple[Running, int]]] = deque()

    def land(most: int) -> None:
        while len(flights) > most:
            for sequence, token in flights.popleft():
                scheduler.record(sequence, token)

    for _ in range(10_000):
        if not scheduler.unfinished:
            break
        before = len(flights)
        chunks = scheduler.next_chunks()
        assert sum(c.count for c in chunks) <= chunk
        if drawn := device.prefill(chunks):
            flights.append(drawn)
            scheduler.launched([sequence for sequence, _ in drawn])
        if scheduler.lacks_pages():
            land(0)
            before = 0
        plan = scheduler.next_decode()
        if plan is not None:
            flights.append(device.decode(plan))
            scheduler.launched(plan.sequences)
        held = [page for sequence in sequences for page in sequence.pages]
        assert len(held) == len(set(held)) == num_pages - pool.free
        assert scheduler.running <= max_batch
        land(len(flights) - before if chunks or plan else 0)
    assert not scheduler.unfinished
    assert pool.free == num_pages
    return sequences


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    page_size = draw(st.sampled_from([1, 2, 4]))
    requests = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 45)), max_size=12))
    longest = max((-(-(prompt + new) // page_size) for prompt, new, _ in requests), default=1)
    return {
        "requests": [
            Request([100 + i] * prompt, new, stop=frozenset({STOP})) for i, (prompt, new, _) in enumerate(requests)
        ],
        "stops": [stop for _, _, stop in requests],
        "num_pages": longest + draw(st.integers(0, 3 * longest)),
        "page_size": page_size,
        "max_batch": draw(st.integers(1, 6)),
        "chunk": draw(st.integers(1, 30)),
    }


@settings(max_examples=300)
@given(cases())
def test_every_request_ends_with_its_own_answer(case: dict[str, object]) -> None:
    """Chunks, rows that move, pages that run out and are used again: each answer is what its own tokens lead to."""
    stops: list[int] = case["stops"]  # type: ignore[assignment]
    for sequence in run(**case):  # type: ignore[arg-type]
        request, tokens = sequence.request, list(sequence.request.prompt)
        while len(tokens) < request.longest:
            tokens.append(next_token(tokens, stops_after=stops[sequence.index]))
            if tokens[-1] == STOP:
                break
        assert sequence.tokens == tokens
        assert sequence.finish == ("stop" if tokens[-1] == STOP else "length")


def test_the_first_goes_on_when_pages_run_out() -> None:
    """Two sequences of 4 pages in 5: the second is set back, and never the first."""
    requests = [Request([5] * 4, 12), Request([6] * 4, 12)]
    first, second = run(requests, [99, 99], num_pages=5, page_size=4, max_batch=2, chunk=8)
    assert (first.preemptions, second.preemptions) == (0, 1)


def test_room_is_left_for_those_that_run() -> None:
    """A third of 2 pages is not admitted into the last 2, which the first two will want."""
    pool = PagePool(4, 4)
    scheduler = Scheduler(pool, max_batch=4, chunk_tokens=100)
    scheduler.add([Request([1] * 4, 4), Request([1] * 4, 4), Request([1] * 4, 1)])
    assert [chunk.count for chunk in scheduler.next_chunks()] == [4, 4]
    assert pool.free == 2


def test_batches_shrink_when_answers_end() -> None:
    """Of 9 sequences 8 end at once: the last one's row moves to the front."""
    scheduler = Scheduler(PagePool(100, 4), max_batch=16, chunk_tokens=100)
    sequences = scheduler.add([Request([1], 9 if i == 8 else 1) for i in range(9)])
    drawn = [chunk.sequence for chunk in scheduler.next_chunks()]
    assert sequences[8].row == 8
    scheduler.launched(drawn)
    plan = scheduler.next_decode()
    assert plan is not None
    assert (plan.batch, plan.moved, plan.sequences) == (1, ((8, 0),), (sequences[8],))
    assert {row for row, _, _ in plan.pages} == {0}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([1] * 30, 11), "request 1: 30 tokens and 11 new ones do not fit the KV cache of 40 tokens"),
        (Request([], 1), "request 1: a prompt of at least one token"),
        (Request([1], 0), "request 1: a prompt of at least one token and max_new_tokens of 1"),
        (Request([1], 1, temperature=-1.0), "request 1: temperature -1.0 and top_p 1.0, expected 0 or more and 0 to 1"),
        (Request([1], 1, temperature=float("nan")), "request 1: temperature nan"),
        (Request([1], 1, top_p=1.5), "request 1: temperature 0.0 and top_p 1.5"),
        (Request([1], 1, seed=1 << 63), "request 1: seed 9223372036854775808 does not fit 64 bits"),
    ],
)
def test_a_request_that_can_never_run(request_: Request, message: str) -> None:
    scheduler = Scheduler(PagePool(10, 4), max_batch=2, chunk_tokens=8)
    with pytest.raises(InputError, match=message):
        scheduler.add([Request([1], 1), request_])


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 64, 100, 128, 512, 513])
def test_batches_are_near_what_is_asked(most: int) -> None:
    sizes = decode_batches(most)
    assert sizes[-1] == most
    assert list(sizes) == sorted(set(sizes))
    for count in range(1, most + 1):
        size = next(size for size in sizes if size >= count)
        assert size <= 2 * count
