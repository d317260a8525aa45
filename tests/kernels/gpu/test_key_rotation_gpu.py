"""Rotated keys and queries on the GPU: every kernel that rotates against the oracles, bit for bit, and attention over
what they write."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import qoq.kernels.kv_cache as kernels
from qoq.formats.arithmetic import kv_round_trip, rotate_heads
from qoq.kernels.attention_oracles import decode_attention_oracle
from qoq.kernels.kv_oracles import append_oracle, gather_oracle, rotate_oracle, round_trip_oracle
from qoq.kernels.kv_verification import check_cache_kernels
from qoq.kernels.layouts import PAGE_SIZE, page_bytes
from tests.kernels.kv_cases import DTYPES, SHAPES, Case, assert_all_same, assert_same, assert_same_pages, random_heads

pytestmark = pytest.mark.gpu
ROTATED = (64, 128, 256)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "bits"), SHAPES)
def test_small_rope_append_is_exact(gpu: torch.device, head_dim: int, bits: int, dtype: torch.dtype) -> None:
    for tokens, heads, kv_heads in ((1, 1, 1), (5, 3, 1), (9, 9, 3), (70, 2, 2)):
        case = Case(tokens, heads, kv_heads, head_dim, bits, dtype, "hadamard")
        assert_all_same(case, case.rope_append(gpu))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "bits"), SHAPES)
def test_rope_append_of_many_tokens_is_exact(gpu: torch.device, head_dim: int, bits: int, dtype: torch.dtype) -> None:
    case = Case(333, 8, 2, head_dim, bits, dtype, "hadamard")
    found = case.rope_append(gpu)
    assert_all_same(case, found)
    for again, first in zip(case.rope_append(gpu), found, strict=True):
        assert_same("second run", again, first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "bits"), SHAPES)
def test_small_append_is_exact(gpu: torch.device, head_dim: int, bits: int, dtype: torch.dtype) -> None:
    for tokens, kv_heads in ((1, 1), (3, 5), (70, 2)):
        case = Case(tokens, 0, kv_heads, head_dim, bits, dtype, "hadamard")
        _, key, value = case.parts(case.qkv)
        pages = case.pages.to(gpu)
        torch.ops.qoq.append_kv(*case.parts(case.qkv.to(gpu))[1:], pages, case.slots.to(gpu), bits, "hadamard")
        expected = append_oracle(case.pages, rotate_oracle(key), value, case.slots, bits)
        assert_same_pages(pages, expected, head_dim, bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", ROTATED)
def test_small_rotation_is_exact(gpu: torch.device, head_dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    for shape in ((head_dim,), (3, 2, 7, head_dim), (515, head_dim)):
        x = random_heads(shape, dtype, generator)
        padded = torch.full((x.numel() + 256,), 7, dtype=dtype, device=gpu)
        kernels.run_rotate(x.to(gpu), padded[128:-128].view(shape))
        assert_same("out", padded[128:-128].view(shape), rotate_oracle(x))
        assert bool((padded[:128] == 7).all()), "wrote before the output"
        assert bool((padded[-128:] == 7).all()), "wrote behind the output"
        assert_same("operator", torch.ops.qoq.rotate_heads(x.to(gpu)), rotate_heads(x, "hadamard"))
        assert_same("PyTorch on the GPU", rotate_heads(x.to(gpu), "hadamard"), rotate_heads(x, "hadamard"))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", ROTATED)
def test_small_round_trip_is_exact(gpu: torch.device, head_dim: int, dtype: torch.dtype, bits: int) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    for shape in ((1, head_dim), (3, 2, 7, head_dim), (515, head_dim)):
        x = random_heads(shape, dtype, generator)
        found = torch.ops.qoq.kv_round_trip(x.to(gpu), bits, "hadamard")
        assert_same("round trip", found, round_trip_oracle(rotate_oracle(x), bits))
        assert_same("round trip", found, kv_round_trip(rotate_heads(x, "hadamard"), bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_heads_that_are_not_finite_become_nan(gpu: torch.device, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = random_heads((9, 128), dtype, torch.Generator().manual_seed(0))
    x[0, 3], x[1, 7], x[2, 100] = torch.nan, torch.inf, -torch.inf
    x[3], x[4, :2] = largest, torch.tensor([largest, -largest])
    assert_same("rotated", torch.ops.qoq.rotate_heads(x.to(gpu)), rotate_oracle(x))
    for bits in (4, 8):
        found = torch.ops.qoq.kv_round_trip(x.to(gpu), bits, "hadamard")
        assert_same("round trip", found, round_trip_oracle(rotate_oracle(x), bits))


def test_small_calls_without_tokens_do_nothing(gpu: torch.device) -> None:
    pages = torch.full((2, 2, page_bytes(64, 4)), 0x7F, dtype=torch.uint8, device=gpu)
    x = torch.zeros(0, 2, 64, dtype=torch.float16, device=gpu)
    slots = torch.zeros(0, dtype=torch.int64, device=gpu)
    torch.ops.qoq.append_kv(x, x, pages, slots, 4, "hadamard")
    assert tuple(torch.ops.qoq.rotate_heads(x).shape) == (0, 2, 64)
    assert tuple(torch.ops.qoq.kv_round_trip(x, 4, "hadamard").shape) == (0, 2, 64)
    assert bool((pages == 0x7F).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "bits"), SHAPES)
def test_small_prefill_and_decode_see_the_same_keys(
    gpu: torch.device, head_dim: int, bits: int, dtype: torch.dtype
) -> None:
    """One call for all tokens and one for each: the same pages and outputs; what is gathered is what was returned."""
    case = Case(7, 4, 2, head_dim, bits, dtype, "hadamard")
    case.slots = torch.randperm(case.num_pages * PAGE_SIZE, generator=torch.Generator().manual_seed(1))[:7]
    *outputs, pages = case.rope_append(gpu)
    stepwise = case.pages.to(gpu)
    tables = case.cos.to(gpu), case.sin.to(gpu)
    parts = case.parts(case.qkv.to(gpu))
    for token in range(7):
        rows = slice(token, token + 1)
        step = torch.ops.qoq.rope_append_kv(
            *(part[rows] for part in parts),
            *tables,
            case.positions[rows].to(gpu),
            stepwise,
            case.slots[rows].to(gpu),
            bits,
            "hadamard",
        )
        for found, whole in zip(step, outputs, strict=True):
            assert_same(f"token {token}", found, whole[rows])
    assert_same("pages", stepwise, pages)
    gathered = gather_oracle(pages, torch.arange(case.num_pages).int(), head_dim, bits, dtype)
    for found, returned in zip(gathered, outputs[1:], strict=True):
        assert_same("gathered", found[case.slots], returned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_are_those_without_rotation(gpu: torch.device, head_dim: int, dtype: torch.dtype) -> None:
    """Decode attention over an 8-bit cache, written with and without rotation: both near attention over 16 bits."""
    tokens, heads, kv_heads = 201, 8, 2
    generator = torch.Generator().manual_seed(head_dim)
    key, value = (torch.randn(tokens, kv_heads, head_dim, generator=generator).to(dtype).to(gpu) for _ in range(2))
    query = torch.randn(1, heads, head_dim, generator=generator).to(dtype).to(gpu)
    num_pages = math.ceil(tokens / PAGE_SIZE)
    table = torch.arange(num_pages, dtype=torch.int32, device=gpu)[None]
    lens = torch.tensor([tokens], dtype=torch.int32, device=gpu)
    scale = 1 / math.sqrt(head_dim)
    k, v = (x.double().repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1) for x in (key, value))
    exact = torch.nn.functional.scaled_dot_product_attention(query[0].double()[:, None], k, v, scale=scale)[:, 0]

    def attended(turned: Tensor, key_rotation: str) -> Tensor:
        pages = torch.zeros(num_pages, kv_heads, page_bytes(head_dim, 8), dtype=torch.uint8, device=gpu)
        torch.ops.qoq.append_kv(key, value, pages, torch.arange(tokens, device=gpu), 8, key_rotation)
        found: Tensor = torch.ops.qoq.paged_decode_attention(turned, pages, table, lens, scale, 8, 0)
        oracle = decode_attention_oracle(turned, pages, table, lens, scale, 8)
        assert float((found.double() - oracle).norm() / oracle.norm()) < (1e-3 if dtype == torch.float16 else 4e-3)
        return found[0].double()

    # Half a step of an 8-bit code of values from -3 to 3 is 1/85 of their size, and its mean a third of that.
    for found in (attended(query, "none"), attended(torch.ops.qoq.rotate_heads(query), "hadamard")):
        assert float((found - exact).norm() / exact.norm()) < 2e-2
    # Queries that are not rotated like the keys attend to something else.
    assert float((attended(query, "hadamard") - exact).norm() / exact.norm()) > 0.3


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_proof_holds(gpu: torch.device, dtype: torch.dtype, bits: int) -> None:
    check = check_cache_kernels(8, 2, 128, bits, dtype, key_rotation="hadamard", window=None, device=gpu)
    assert check.problems == ()
    assert check.key_rotation == "hadamard"


def test_graphs_and_compiled_code_rotate(gpu: torch.device) -> None:
    case = Case(37, 8, 2, 128, 4, torch.float16, "hadamard")
    qkv, pages, slots = (x.to(gpu) for x in (case.qkv, case.pages, case.slots))
    cos, sin, positions = (x.to(gpu) for x in (case.cos, case.sin, case.positions))

    def step(qkv: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        outputs = torch.ops.qoq.rope_append_kv(*case.parts(qkv), cos, sin, positions, pages, slots, 4, "hadamard")
        return outputs[0], torch.ops.qoq.rotate_heads(outputs[2])

    query, _, value, expected_pages = case.expected()
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        pages.copy_(case.pages)
        found = run(qkv, pages)
        assert_same("query", found[0], query)
        assert_same("value", found[1], rotate_oracle(value))
        assert_same_pages(pages, expected_pages, 128, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(qkv, pages)
    for _ in range(2):
        pages.copy_(case.pages)
        graph.replay()
        assert_same("query", found[0], query)
        assert_same_pages(pages, expected_pages, 128, 4)
