"""The KV cache kernels against the oracles, bit for bit: every layout and dtype, odd numbers of tokens and heads,
shuffled slots, tokens that go nowhere, parts of a fused buffer, and heads of all kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qoq.kernels.kv_cache as kernels
from qoq.formats.arithmetic import kv_round_trip
from qoq.kernels.kv_oracles import append_oracle, gather_oracle, round_trip_oracle
from qoq.kernels.layouts import PAGE_SIZE, page_bytes, unpack_pages
from tests.kernels.kv_cases import (
    DTYPES,
    MAX_POSITIONS,
    SHAPES,
    Case,
    assert_all_same,
    assert_same,
    assert_same_pages,
    random_heads,
)

pytestmark = pytest.mark.gpu


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


@pytest.mark.parametrize("tokens", [1, 37, 300])
def test_settled_positions_may_be_read_early(gpu: torch.device, tokens: int) -> None:
    """As in a decode step, in a graph that is replayed with other places: copies, an ordinary kernel, two of ours that
    overlap, of which the second writes the queries, keys and values."""
    first, second = (Case(tokens, 8, 2, 128, 4, torch.float16) for _ in range(2))
    second.qkv, second.slots, second.positions = second.qkv.flip(0), second.slots.flip(0), second.positions.flip(0)
    qkv, given, pages = first.qkv.to(gpu), first.qkv.to(gpu), first.pages.to(gpu)
    slots, positions, cos, sin = (x.to(gpu) for x in (first.slots, first.positions, first.cos, first.sin))

    def step() -> Tensor:
        qkv.copy_(given)
        torch.ops.qoq.quantize_activation(qkv.view(tokens, -1))
        turned: Tensor = torch.ops.qoq.rope_append(
            *first.parts(qkv), cos, sin, positions, pages, slots, 4, "none", True
        )
        return turned

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        turned = step()
    for case in (second, first, second):
        given.copy_(case.qkv)
        slots.copy_(case.slots)
        positions.copy_(case.positions)
        pages.copy_(case.pages)
        graph.replay()
        query, *_, expected_pages = case.expected()
        assert_same("query", turned, query)
        assert_same_pages(pages, expected_pages, 128, 4)


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
