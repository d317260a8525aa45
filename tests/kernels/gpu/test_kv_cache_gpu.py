"""The KV cache kernels against the oracles, bit for bit: every layout and dtype, odd numbers of tokens and heads,
shuffled slots, tokens that go nowhere, parts of a fused buffer, and heads of all kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qoq.kernels.kv_cache as kernels
from qoq.formats.arithmetic import kv_round_trip
from qoq.kernels.kv_oracles import append_oracle, gather_oracle, rope_oracle, round_trip_oracle
from qoq.kernels.layouts import PAGE_SIZE, pack_pages, page_bytes, unpack_pages

pytestmark = pytest.mark.gpu
DTYPES = (torch.float16, torch.bfloat16)
SHAPES = [(64, 4), (64, 8), (128, 4), (128, 8)]
MAX_POSITIONS = 300


class Case:
    """Random operands on the CPU: queries, keys and values are parts of a fused buffer, slots are shuffled, some tokens
    go nowhere, and the pages hold 0x7F bytes."""

    def __init__(self, tokens: int, heads: int, kv_heads: int, head_dim: int, bits: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(tokens + heads + head_dim + bits)
        self.heads, self.kv_heads, self.head_dim, self.bits, self.dtype = heads, kv_heads, head_dim, bits, dtype
        self.qkv = random_heads((tokens, heads + 2 * kv_heads, head_dim), dtype, generator)
        self.num_pages = tokens // PAGE_SIZE + 3
        self.pages = torch.full((self.num_pages, kv_heads, page_bytes(head_dim, bits)), 0x7F, dtype=torch.uint8)
        self.slots = torch.randperm(self.num_pages * PAGE_SIZE, generator=generator)[:tokens]
        self.slots[1::7] = -1
        self.slots[-1:] = self.num_pages * PAGE_SIZE - 1
        self.slots[:-1][self.slots[:-1] == self.slots[-1]] = -5
        self.positions = torch.randint(0, MAX_POSITIONS, (tokens,), generator=generator).int()
        self.positions[: tokens // 2] = torch.arange(tokens // 2) % MAX_POSITIONS
        frequencies = 1.0 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)
        angles = torch.arange(MAX_POSITIONS).float()[:, None] * frequencies
        self.cos, self.sin = angles.cos() * 1.25, angles.sin() * 1.25

    def parts(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of queries, keys and values."""
        query, key, value = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return query, key, value

    def rope_append(self, device: torch.device) -> tuple[Tensor, ...]:
        """Outputs and pages of the operator, on the CPU."""
        pages = self.pages.to(device)
        outputs = torch.ops.qoq.rope_append_kv(
            *self.parts(self.qkv.to(device)),
            *(x.to(device) for x in (self.cos, self.sin, self.positions)),
            pages,
            self.slots.to(device),
            self.bits,
        )
        return tuple(x.cpu() for x in (*outputs, pages))

    def expected(self) -> tuple[Tensor, ...]:
        query, key, value = self.parts(self.qkv)
        query, key = (rope_oracle(x, self.cos, self.sin, self.positions) for x in (query, key))
        pages = append_oracle(self.pages, key, value, self.slots, self.bits)
        return query, round_trip_oracle(key, self.bits), round_trip_oracle(value, self.bits), pages


def random_heads(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random values, with heads of other sizes, with outliers and offsets, constant ones, and ones full of ties."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    heads = x.view(-1, shape[-1])
    heads[::3] *= 10 ** (torch.rand(len(heads[::3]), 1, generator=generator) * 6 - 3)
    heads[1::5, :2] *= 50
    heads[2::5] += 20
    heads[3::11] = 0
    heads[4::11] = heads[4::11, :1]
    heads[5::11] = torch.arange(shape[-1]) % 16 / 2
    heads[5::11, 0] = 15
    return x.clamp(-60000, 60000).to(dtype)


def assert_same(what: str, found: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, NaN in the same places, or the coordinate of the first difference."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    found, expected = found.cpu(), expected.cpu()
    equal = found == expected
    if found.is_floating_point():
        equal |= found.isnan() & expected.isnan()
    if not bool(equal.all()):
        place = tuple(int(i) for i in (~equal).nonzero()[0])
        wrong = int((~equal).sum())
        raise AssertionError(
            f"{what}: {wrong} of {equal.numel()} differ, first at {place}: {found[place]} instead of {expected[place]}"
        )


def assert_same_pages(found: Tensor, expected: Tensor, head_dim: int, bits: int) -> None:
    """Every byte, but for the sign of a zero that is 0: it depends on which 0 of a head is called the smallest."""

    def unsigned(pages: Tensor) -> Tensor:
        parts = unpack_pages(pages.cpu(), head_dim, bits)
        for kv in parts:
            kv.zeros[kv.zeros == 0] = 0
        return pack_pages(*parts, bits)

    assert_same("pages", unsigned(found), unsigned(expected))


def assert_all_same(case: Case, found: tuple[Tensor, ...]) -> None:
    *outputs, pages = case.expected()
    for what, ours, theirs in zip(("query", "key", "value"), found, outputs, strict=False):
        assert_same(what, ours, theirs)
    assert_same_pages(found[3], pages, case.head_dim, case.bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "bits"), SHAPES)
def test_small_rope_append_is_exact(gpu: torch.device, head_dim: int, bits: int, dtype: torch.dtype) -> None:
    for tokens, heads, kv_heads in ((1, 1, 1), (5, 3, 1), (9, 9, 3)):
        case = Case(tokens, heads, kv_heads, head_dim, bits, dtype)
        assert_all_same(case, case.rope_append(gpu))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "bits"), SHAPES)
def test_rope_append_of_many_tokens_is_exact(gpu: torch.device, head_dim: int, bits: int, dtype: torch.dtype) -> None:
    case = Case(333, 8, 2, head_dim, bits, dtype)
    found = case.rope_append(gpu)
    assert_all_same(case, found)
    for again, first in zip(case.rope_append(gpu), found, strict=True):
        assert_same("second run", again, first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "bits"), SHAPES)
def test_small_append_is_exact(gpu: torch.device, head_dim: int, bits: int, dtype: torch.dtype) -> None:
    for tokens, kv_heads in ((1, 1), (3, 5), (70, 2)):
        case = Case(tokens, 0, kv_heads, head_dim, bits, dtype)
        _, key, value = case.parts(case.qkv)
        pages = case.pages.to(gpu)
        torch.ops.qoq.append_kv(*case.parts(case.qkv.to(gpu))[1:], pages, case.slots.to(gpu), bits)
        assert_same_pages(pages, append_oracle(case.pages, key, value, case.slots, bits), head_dim, bits)


def test_small_calls_without_tokens_do_nothing(gpu: torch.device) -> None:
    pages = torch.full((2, 2, page_bytes(64, 4)), 0x7F, dtype=torch.uint8, device=gpu)
    x = torch.zeros(0, 2, 64, dtype=torch.float16, device=gpu)
    slots = torch.zeros(0, dtype=torch.int64, device=gpu)
    torch.ops.qoq.append_kv(x, x, pages, slots, 4)
    table = torch.zeros(5, 32, device=gpu)
    outputs = torch.ops.qoq.rope_append_kv(x, x, x, table, table, slots.int(), pages, slots, 4)
    assert [tuple(out.shape) for out in outputs] == [(0, 2, 64)] * 3
    assert tuple(torch.ops.qoq.gather_kv(pages, slots.int(), 64, 4, torch.float16)[0].shape) == (0, 2, 64)
    assert tuple(torch.ops.qoq.kv_round_trip(x, 4).shape) == (0, 2, 64)
    assert bool((pages == 0x7F).all())


def test_small_positions_outside_the_tables_give_nan(gpu: torch.device) -> None:
    case = Case(6, 4, 2, 64, 4, torch.float16)
    case.slots = torch.arange(6)
    case.positions[1], case.positions[4] = -1, MAX_POSITIONS
    query, key, value, pages = case.rope_append(gpu)
    for x in (query, key):
        assert x.isnan().flatten(1).any(1).tolist() == [False, True, False, False, True, False]
    assert not value.isnan().any()
    keys, values = unpack_pages(pages, 64, 4)
    assert keys.scales[0, 0, :6, 0].isnan().tolist() == [False, True, False, False, True, False]
    assert not values.scales[0, 0, :6].isnan().any()
    assert int(keys.codes[0, 0, 1].max()) == 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_heads_that_are_not_finite_become_nan(gpu: torch.device, dtype: torch.dtype, bits: int) -> None:
    case = Case(8, 0, 2, 128, bits, dtype)
    case.slots = torch.arange(60, 68)
    largest = torch.finfo(dtype).max
    for head, bad in enumerate((float("nan"), float("inf"), -float("inf"), largest, -largest)):
        case.qkv[head, 1, 17 * head + 3] = bad
        case.qkv[head, 2, 127 - head] = bad
    case.qkv[5, 0, :2] = torch.tensor([largest, -largest]).to(dtype)
    case.qkv[6, 0] = -largest
    _, key, value = case.parts(case.qkv)
    pages = case.pages.to(gpu)
    torch.ops.qoq.append_kv(key.to(gpu), value.to(gpu), pages, case.slots.to(gpu), bits)
    found = unpack_pages(pages.cpu(), 128, bits)
    expected = unpack_pages(append_oracle(case.pages, key, value, case.slots, bits), 128, bits)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same("scales", ours.scales, theirs.scales)
        assert_same("zeros", ours.zeros, theirs.zeros)
        assert_same("codes", ours.codes, theirs.codes)
    for x in (key.contiguous(), value.contiguous()):
        assert_same("round trip", torch.ops.qoq.kv_round_trip(x.to(gpu), bits), round_trip_oracle(x, bits))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 96, 128, 200, 256])
def test_small_round_trip_is_exact(gpu: torch.device, head_dim: int, dtype: torch.dtype, bits: int) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    for shape in ((1, head_dim), (3, 2, 7, head_dim), (515, head_dim)):
        x = random_heads(shape, dtype, generator)
        padded = torch.full((x.numel() + 256,), 7, dtype=dtype, device=gpu)
        out = padded[128:-128].view(shape)
        kernels.run_round_trip(x.to(gpu), bits, out)
        assert_same("out", out, round_trip_oracle(x, bits))
        assert_same("out", out, kv_round_trip(x, bits))
        assert bool((padded[:128] == 7).all()), "wrote before the output"
        assert bool((padded[-128:] == 7).all()), "wrote behind the output"
        assert_same("out", torch.ops.qoq.kv_round_trip(x.to(gpu), bits), out)


def test_every_float16_goes_through_unharmed(gpu: torch.device) -> None:
    """All numbers of the dtypes, in heads of neighbours and in shuffled ones: every exponent of scales and zeros."""
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x[x.isfinite()]
        x = torch.cat([x, x[torch.randperm(len(x), generator=generator)]])
        x = x[: len(x) // 64 * 64].view(-1, 64)
        for bits in (4, 8):
            assert_same(f"{dtype}", torch.ops.qoq.kv_round_trip(x.to(gpu), bits), round_trip_oracle(x, bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "bits"), SHAPES)
def test_small_gather_is_exact(gpu: torch.device, head_dim: int, bits: int, dtype: torch.dtype) -> None:
    """Also for pages of random bytes, whose scales and zeros are any float16."""
    generator = torch.Generator().manual_seed(head_dim + bits)
    for kv_heads, ids in ((1, [0]), (3, [2, 0, 2, 1])):
        pages = torch.randint(0, 256, (3, kv_heads, page_bytes(head_dim, bits)), generator=generator).to(torch.uint8)
        page_ids = torch.tensor(ids, dtype=torch.int32)
        shape = (PAGE_SIZE * len(ids) + 2, kv_heads, head_dim)
        padded = [torch.full(shape, 7, dtype=dtype, device=gpu) for _ in range(2)]
        kernels.run_gather(pages.to(gpu), page_ids.to(gpu), head_dim, bits, (padded[0][1:-1], padded[1][1:-1]))
        expected = gather_oracle(pages, page_ids, head_dim, bits, dtype)
        found = torch.ops.qoq.gather_kv(pages.to(gpu), page_ids.to(gpu), head_dim, bits, dtype)
        for name, with_border, operator, wanted in zip(("key", "value"), padded, found, expected, strict=True):
            assert_same(name, with_border[1:-1], wanted)
            assert_same(name, operator, wanted)
            assert bool((with_border[[0, -1]] == 7).all()), "wrote outside the output"


@pytest.mark.parametrize(("head_dim", "bits"), SHAPES)
def test_what_was_appended_is_gathered(gpu: torch.device, head_dim: int, bits: int) -> None:
    """Gathered keys and values are those that rope_append_kv returned: all paths see the same."""
    case = Case(300, 4, 2, head_dim, bits, torch.bfloat16)
    _, key, value, pages = case.rope_append(gpu)
    ids = torch.arange(case.num_pages).flip(0).int()
    for found, returned in zip(
        torch.ops.qoq.gather_kv(pages.to(gpu), ids.to(gpu), head_dim, bits, torch.bfloat16), (key, value), strict=True
    ):
        by_slot = found.cpu().view(-1, PAGE_SIZE, 2, head_dim).flip(0).reshape(-1, 2, head_dim)
        taken = case.slots >= 0
        assert_same("gathered", by_slot[case.slots[taken]], returned[taken])


def test_graphs_replay_with_changed_contents(gpu: torch.device) -> None:
    first, second = (Case(37, 8, 2, 128, 4, torch.float16) for _ in range(2))
    second.qkv, second.slots = second.qkv.flip(0), second.slots.flip(0)
    qkv, pages, slots = first.qkv.to(gpu), first.pages.to(gpu), first.slots.to(gpu)
    cos, sin, positions = (x.to(gpu) for x in (first.cos, first.sin, first.positions))
    ids = torch.arange(first.num_pages, dtype=torch.int32, device=gpu)

    def step() -> tuple[Any, Any]:
        outputs = torch.ops.qoq.rope_append_kv(*first.parts(qkv), cos, sin, positions, pages, slots, 4)
        return outputs, torch.ops.qoq.gather_kv(pages, ids, 128, 4, torch.float16)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs, gathered = step()
    for case in (second, first):
        qkv.copy_(case.qkv)
        slots.copy_(case.slots)
        pages.fill_(0x7F)
        graph.replay()
        assert_all_same(case, (*outputs, pages))
        expected = gather_oracle(pages.cpu(), ids.cpu(), 128, 4, torch.float16)
        for found, wanted in zip(gathered, expected, strict=True):
            assert_same("gathered", found, wanted)


def test_the_operators_compile(gpu: torch.device) -> None:
    case = Case(20, 4, 2, 64, 4, torch.float16)

    @torch.compile(fullgraph=True)
    def step(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, pages: Tensor, slots: Tensor) -> Any:
        query, key, value = torch.ops.qoq.rope_append_kv(*case.parts(qkv), cos, sin, positions, pages, slots, 4)
        return query + 0, torch.ops.qoq.kv_round_trip(key, 4), value

    pages = case.pages.to(gpu)
    operands = (x.to(gpu) for x in (case.qkv, case.cos, case.sin, case.positions))
    query, key, value = step(*operands, pages, case.slots.to(gpu))
    assert_all_same(case, (query, case.expected()[1], value, pages))
    assert_same("key", key, round_trip_oracle(case.expected()[1], 4))
