"""Attention over the paged cache, as far as it runs without a GPU: operands, kernels' sources, plans, the merge."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qoq.formats.arithmetic import QuantizedKV, dequantize_kv, quantize_kv
from qoq.kernels import attention, extend_batch, extend_plan
from qoq.kernels.attention import DecodeOptions, check_decode_operands, run_decode, specs
from qoq.kernels.attention_oracles import decode_attention_oracle, extend_attention_oracle
from qoq.kernels.compiler import KernelSpec, compile_kernel
from qoq.kernels.decode_plan import DecodeShape, decode_spec, hopper_decode_spec
from qoq.kernels.extend import extend_attention, merge_by_lse, run_extend
from qoq.kernels.extend_batch import DecodeCall, ExtendBatch, prepare_extend
from qoq.kernels.gemm_tiles import ARCHITECTURES, shared_bytes_of_sm
from qoq.kernels.layouts import PAGE_SIZE, pack_pages, page_bytes
from qoq.kernels.sources import CUDA_ROOT
from tests.kernels.attention_cases import StandIns, softmax_attention

PAGE_FLOATS = 2 * PAGE_SIZE * 64 * 2
"""Bytes that a page of one KV head of 64 dimensions takes in the scratch, in float16."""


def operands(**changes: Any) -> dict[str, Any]:
    """A legal call of two sequences on the CPU, with some operands replaced."""
    legal = {
        "query": torch.zeros(2, 6, 64, dtype=torch.float16),
        "kv_pages": torch.zeros(4, 2, page_bytes(64, 4), dtype=torch.uint8),
        "page_table": torch.zeros(2, 3, dtype=torch.int32),
        "kv_lens": torch.zeros(2, dtype=torch.int32),
        "scale": 0.125,
        "bits": 4,
        "window": 0,
    }
    return legal | changes


def random_cache(
    lens: Sequence[int], kv_heads: int, head_dim: int, bits: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pages in a shuffled pool, the page table, and the dequantized keys and values [B, tokens, KV heads, D].

    Scales of tokens past a length are NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    pages_each = max(1, math.ceil(max(lens) / PAGE_SIZE))
    size = (len(lens), pages_each * PAGE_SIZE, kv_heads, head_dim)
    parts = [quantize_kv(torch.randn(size, generator=generator), 4 if bits == 4 else 8) for _ in range(2)]
    table = torch.randperm(len(lens) * pages_each, generator=generator).view(len(lens), pages_each).int()
    for part in parts:
        for i, length in enumerate(lens):
            part.scales[i, length:] = torch.nan

    def by_page(tensor: Tensor) -> Tensor:
        pool = torch.empty(table.numel(), kv_heads, PAGE_SIZE, tensor.shape[-1], dtype=tensor.dtype)
        pool[table.long().view(-1)] = tensor.reshape(-1, PAGE_SIZE, kv_heads, tensor.shape[-1]).transpose(1, 2)
        return pool

    pages = pack_pages(*(QuantizedKV(by_page(p.codes), by_page(p.scales), by_page(p.zeros)) for p in parts), bits)
    key, value = (dequantize_kv(part) for part in parts)
    return pages, table, key, value


# ---- operands


def test_legal_operands_give_sizes() -> None:
    assert check_decode_operands(**operands()) == DecodeShape(2, 2, 3, 64, 1, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 6, 64)}, r"query: expected torch.float16 or torch.bfloat16"),
        ({"query": torch.zeros(6, 64, dtype=torch.float16)}, r"\[rows, heads, D\], got torch.float16 \[6, 64\]"),
        ({"query": torch.zeros(2, 6, 32, dtype=torch.float16)}, "head_dim is 32"),
        ({"query": torch.zeros(2, 64, 6, dtype=torch.float16).transpose(1, 2)}, "heads side by side"),
        ({"query": torch.zeros(2, 5, 64, dtype=torch.float16)}, "5 heads, expected a multiple of the 2 KV heads"),
        ({"query": torch.zeros(3, 6, 64, dtype=torch.float16)}, "a row for each of 3 queries, got 2"),
        ({"bits": 8}, r"kv_pages: expected torch.uint8 \[pages, kv_heads, 8704\]"),
        ({"bits": 16}, "bits is 16"),
        ({"kv_pages": torch.zeros(2, 4, page_bytes(64, 4), dtype=torch.uint8).transpose(0, 1)}, "contiguous pages"),
        ({"page_table": torch.zeros(2, 3, dtype=torch.int64)}, "page_table: expected contiguous torch.int32"),
        ({"kv_lens": torch.zeros(2, dtype=torch.int64)}, r"kv_lens: expected contiguous torch.int32 \[2\]"),
        ({"kv_lens": torch.zeros(3, dtype=torch.int32)}, r"kv_lens: expected contiguous torch.int32 \[2\]"),
        ({"kv_lens": torch.zeros(2, dtype=torch.int32, device="meta")}, "kv_lens: expected it on cpu, got meta"),
        ({"scale": math.nan}, "scale: expected a finite number"),
        ({"window": -1}, "window: expected 0"),
    ],
)
def test_illegal_operands_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_decode_operands(**operands(**changes))


def test_rows_of_a_fused_buffer_are_taken() -> None:
    fused = torch.zeros(2, 6 * 64 + 2 * 2 * 64, dtype=torch.float16)
    check_decode_operands(**operands(query=fused[:, : 6 * 64].view(2, 6, 64)))


def test_a_batch_beyond_32_bits_is_refused() -> None:
    sequences = 1 << 20
    huge = {
        "query": torch.zeros(sequences, 6, 64, dtype=torch.float16, device="meta"),
        "page_table": torch.zeros(sequences, 1024, dtype=torch.int32, device="meta"),
        "kv_lens": torch.zeros(sequences, dtype=torch.int32, device="meta"),
        "kv_pages": torch.zeros(4, 2, page_bytes(64, 4), dtype=torch.uint8, device="meta"),
    }
    with pytest.raises(ValueError, match="too large for one call"):
        check_decode_operands(**operands(**huge))


def test_the_fake_operator_has_the_query_s_form() -> None:
    call = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in operands().items()}
    result = torch.ops.qoq.paged_decode_attention(*call.values())
    assert (result.shape, result.dtype, result.is_contiguous()) == ((2, 6, 64), torch.float16, True)


def test_the_fake_overlapping_operator_has_it_too() -> None:
    call = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in operands().items()}
    result = torch.ops.qoq.overlapping_decode_attention(*call.values(), 1)
    assert (result.shape, result.dtype, result.is_contiguous()) == ((2, 6, 64), torch.float16, True)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Of each launch the source, and arguments by the names that the kernel has for them; on a Hopper GPU."""
    found: list[dict[str, Any]] = []

    def load(spec: KernelSpec, device: int) -> SimpleNamespace:
        signature = re.search(spec.entry + r"\(([^)]*)\)", (CUDA_ROOT / spec.source).read_text())
        assert signature
        names = [parameter.split()[-1].lstrip("*") for parameter in signature.group(1).split(",")]

        def launch(grid: tuple[int, int, int], arguments: tuple[Any, ...], *, overlapping: bool = False) -> None:
            about = {"source": spec.source, "grid": grid, "overlapping": overlapping}
            found.append(dict(zip(names, arguments, strict=True)) | about)

        return SimpleNamespace(launch=launch)

    monkeypatch.setattr(attention, "load_kernel", load)
    monkeypatch.setattr(attention, "num_sms", lambda device: 132)
    monkeypatch.setattr(attention, "is_hopper", lambda device: True)
    monkeypatch.setattr(attention, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(attention, "_slots", SimpleNamespace(of=lambda device: torch.full((132 * 8 * 130,), -1)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return found


@pytest.mark.parametrize("fresh_tokens", [None, 0, 5])
def test_hoppers_kernel_gets_what_its_parameters_are_called(
    launched: list[dict[str, Any]], fresh_tokens: int | None
) -> None:
    given = operands(window=9)
    out = run_decode(*given.values(), fresh_tokens=fresh_tokens)
    (found,) = launched
    for name in ("query", "kv_pages", "page_table", "kv_lens", "window"):
        assert found[name] is given[name], name
    assert found["output"] is out
    assert (found["sequences"], found["max_pages"], found["num_pages"]) == (2, 3, 4)
    assert [found[name] for name in ("kv_heads", "queries_of_kv", "passes", "queries_of_pass")] == [2, 3, 1, 3]
    assert (found["query_stride"], found["softmax_scale"]) == (6 * 64, 0.125)
    assert found["fresh_tokens"] == (-1 if fresh_tokens is None else fresh_tokens)
    assert (found["grid"], found["overlapping"]) == ((132, 1, 1), True)
    sums = 132 * 4 * 64
    assert found["slot_stats"].data_ptr() - found["slot_sums"].data_ptr() == 8 * sums
    assert found["slot_stats"].numel() >= 132 * 4 * 2


def test_the_portable_kernels_can_be_asked_for(launched: list[dict[str, Any]]) -> None:
    run_decode(*operands().values(), options=DecodeOptions(portable=True, blocks=7))
    assert [found["source"] for found in launched] == ["sm80/decode_attention.cu", "sm80/decode_combine.cu"]
    assert [found["grid"] for found in launched] == [(7, 1, 1), (7, 3, 1)]
    assert not any(found["overlapping"] for found in launched)


@pytest.mark.parametrize("share", range(1, 33))
def test_passes_cover_every_query_of_a_kv_head(share: int) -> None:
    shape = DecodeShape.of(1, 2 * share, 2, 64)
    sizes = [min(shape.queries_of_pass, share - i * shape.queries_of_pass) for i in range(shape.passes)]
    assert sum(sizes) == share
    assert all(0 < size <= shape.columns for size in sizes)
    assert shape.columns == (4 if share <= 4 else 8)


# ---- kernels


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_specs_fit_the_shared_memory(arch: str) -> None:
    found = specs(arch)
    assert len(set(found)) == len(found) == (36 if arch == "sm_90" else 20)
    for spec in found:
        defines = dict(spec.defines)
        if "WARPS" in defines:
            assert spec.threads == 32 * defines["WARPS"] <= 512
            assert defines["STAGES"] >= 2
            assert spec.shared_bytes + 4096 <= shared_bytes_of_sm(arch) - 1024


@pytest.mark.parametrize(
    "spec", [decode_spec("sm_90", 128, 4, 4, torch.float16), hopper_decode_spec(128, 4, 4, torch.float16)]
)
def test_a_hopper_block_keeps_enough_in_flight(spec: KernelSpec) -> None:
    defines = dict(spec.defines)
    assert 70_000 <= defines["WARPS"] * defines["STAGES"] * page_bytes(128, 4) // 2 <= 160_000


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_120a"])
def test_decode_kernels_compile_without_spills(arch: str) -> None:
    """One format and the larger page; the rest compiles in the run over all rows of dispatch."""
    for spec in specs(arch):
        defines = dict(spec.defines)
        if defines["FORMAT"] == 1 or defines["HEAD_DIM"] == 64:
            continue
        resources = compile_kernel(spec, arch).resources
        assert resources.spill_bytes == resources.stack_bytes == 0, spec.label


# ---- oracles


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("window", [0, 1, 40])
def test_oracle_agrees_with_a_softmax_of_dequantized_values(bits: int, window: int) -> None:
    lens = [0, 1, 33, 130]
    pages, table, key, value = random_cache(lens, 2, 64, bits)
    query = torch.randn(4, 6, 64, generator=torch.Generator().manual_seed(1)).half()
    found = decode_attention_oracle(query, pages, table, torch.tensor(lens), 0.125, bits, window)
    assert not found[0].any()
    for i, length in enumerate(lens[1:], start=1):
        first = max(0, length - window) if window else 0
        expected, _ = softmax_attention(query[i : i + 1], key[i, first:length], value[i, first:length], 0.125)
        torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-4, atol=1e-5)


# ---- extend attention


def test_merging_parts_is_attention_to_all() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(n, heads, 64, generator=generator) for n, heads in ((7, 6), (90, 2), (90, 2)))
    key[:20] *= 30  # one part far outweighs the others, and sums are large
    expected, _ = softmax_attention(query, key, value, 1.0)
    parts = [softmax_attention(query, key[at], value[at], 1.0) for at in (slice(0, 20), slice(20, 55), slice(55, 90))]
    found = merge_by_lse(torch.stack([values for values, _ in parts]), torch.stack([sums.t() for _, sums in parts]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    found = StandIns()
    found.take_place(monkeypatch)
    return found


@pytest.mark.parametrize("window", [None, 30, 100])
@pytest.mark.parametrize("pages", [100, 6, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_extend_attention_is_each_token_s_decode_step(
    stand_ins: StandIns, bits: int, pages: int, window: int | None
) -> None:
    new_lens, kv_lens = [5, 0, 1, 70, 3, 33, 40], [5, 20, 65, 300, 40, 33, 90]
    check_extend(new_lens, kv_lens, 1, bits, pages, window)
    assert stand_ins.decoded == 9
    assert stand_ins.largest <= pages * PAGE_FLOATS
    if pages == 100:
        assert stand_ins.flash_calls == [True]
    elif window is None:
        assert (False in stand_ins.flash_calls) == (pages == 3)


@pytest.mark.parametrize("window", [None, 310])
@pytest.mark.parametrize("pages", [100, 14, 6, 3])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_packed_calls_are_the_same(
    stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch, kv_heads: int, pages: int, window: int | None
) -> None:
    """Histories that are packed beside one that is not; scratches for several sequences, for one, for less."""
    monkeypatch.setattr(extend_plan, "PACKED_HISTORY", 64)
    monkeypatch.setattr(extend_batch, "PART_KEYS", 30)
    new_lens, kv_lens = [70, 20, 9, 17, 1, 0], [300, 200, 73, 50, 90, 320]
    check_extend(new_lens, kv_lens, kv_heads, 4, kv_heads * pages, window)
    assert stand_ins.decoded == 1
    assert stand_ins.flash_calls[:3] == [True, True, False]
    if pages == 100:
        assert len(stand_ins.flash_calls) == 3
        assert stand_ins.parts == 2  # 9 new tokens of 73 leave 64 keys


def check_extend(
    new_lens: list[int], kv_lens: list[int], kv_heads: int, bits: int, pages: int, window: int | None
) -> None:
    cache, table, *_ = random_cache(kv_lens, kv_heads, 64, bits)
    query = torch.randn(sum(new_lens), 3 * kv_heads, 64, generator=torch.Generator().manual_seed(1)).half()
    found = extend_attention(query, cache, table, new_lens, kv_lens, 0.125, bits, window, pages * PAGE_FLOATS)
    expected = extend_attention_oracle(query, cache, table, new_lens, kv_lens, 0.125, bits, window or 0)
    for row, wanted in zip(found.double(), expected, strict=True):
        assert float((row - wanted).norm() / wanted.norm()) < 1e-3


def test_a_batch_serves_every_layer(stand_ins: StandIns) -> None:
    """Other pages, queries and page numbers; queries that are part of a fused buffer."""
    new_lens, kv_lens = [2, 100, 0, 1], [70, 130, 64, 1]
    batch = prepared(new_lens, kv_lens)
    for layer in range(2):
        cache, table, *_ = random_cache(kv_lens, 2, 64, 4, seed=layer)
        fused = torch.randn(sum(new_lens), 8, 64, generator=torch.Generator().manual_seed(layer)).half()
        found = run_extend(fused[:, :4], cache, table, batch, 0.125, 4)
        expected = extend_attention_oracle(fused[:, :4], cache, table, new_lens, kv_lens, 0.125, 4)
        assert float((found.double() - expected).norm() / expected.norm()) < 1e-3
    assert stand_ins.flash_calls == [True, True]


def prepared(
    new_lens: list[int], kv_lens: list[int], heads: int = 4, kv_heads: int = 2, device: str = "cpu"
) -> ExtendBatch:
    return prepare_extend(
        new_lens, kv_lens, max_pages=3, heads=heads, kv_heads=kv_heads, head_dim=64, device=torch.device(device)
    )


def decode_call(new_lens: list[int], kv_lens: list[int]) -> DecodeCall:
    call = prepared(new_lens, kv_lens).decode
    assert call is not None
    return call


def test_rows_that_lie_together_need_no_index() -> None:
    assert decode_call([1, 1], [70, 9]).sequences is None  # the page table as it is
    with_gap = decode_call([1, 0, 2], [70, 80, 130])
    assert with_gap.rows.index is None
    assert with_gap.sequences is not None
    assert with_gap.sequences.tolist() == [0, 2, 2]
    assert (with_gap.kv_lens.tolist(), with_gap.pages) == ([70, 129, 130], 3)
    apart = prepared([1, 100, 1, 100], [70, 130, 1, 100])
    assert apart.decode is not None
    for rows, expected in ((apart.decode.rows, [0, 101]), (apart.flash[0].rows, [*range(1, 101), *range(102, 202)])):
        assert rows.index is not None
        assert rows.index.tolist() == expected
    assert apart.places.tolist() == [3, 4, 5, 9, 10]


def test_extend_attention_of_nothing() -> None:
    call = operands(query=torch.zeros(0, 6, 64, dtype=torch.float16))
    result = extend_attention(call["query"], call["kv_pages"], call["page_table"], [0, 0], [9, 0], 0.125, 4)
    assert result.shape == (0, 6, 64)


@pytest.mark.parametrize(
    ("new_lens", "kv_lens", "message"),
    [
        ([2], [2], r"page_table: expected \[1, 3\], a row for each of the lengths, got \[2, 3\]"),
        ([1, 1], [2], "expected one each a sequence, got 2 and 1"),
        ([1, 2], [1, 1], "sequence 1: 2 new tokens of 1"),
        ([1, 1], [1, 193], r"sequence 1: 1 new tokens of 193, expected 0 <= new <= all <= 192"),
        ([1, 2], [1, 2], "query: the new tokens of all sequences are 3, got 2 rows"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(new_lens: list[int], kv_lens: list[int], message: str) -> None:
    call = operands()
    with pytest.raises(ValueError, match=message):
        extend_attention(call["query"], call["kv_pages"], call["page_table"], new_lens, kv_lens, 0.125, 4)


def test_a_batch_of_another_form_is_refused() -> None:
    call = operands(query=torch.zeros(2, 6, 64, dtype=torch.float16))
    for batch, message in (
        (prepared([1, 1], [9, 9], 4, 2), r"\(4, 2, 64\) heads, KV heads and head_dim, got \(6, 2, 64\)"),
        (prepared([1, 1], [9, 9], 6, 1), r"\(6, 1, 64\) heads, KV heads and head_dim"),
        (prepared([1, 1], [9, 9], 6, 2, "meta"), "on meta"),
        (prepared([1, 1, 0], [9, 9, 9], 6, 2), r"page_table: expected \[3, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            run_extend(call["query"], call["kv_pages"], call["page_table"], batch, 0.125, 4)


def test_a_scratch_too_small_for_the_window_is_refused() -> None:
    call = operands(query=torch.zeros(70, 2, 64, dtype=torch.float16))
    rest = ([70, 0], [190, 0], 0.125, 4, 150, 3 * 2 * PAGE_FLOATS)
    with pytest.raises(ValueError, match=rf"scratch_bytes: expected at least {4 * 2 * PAGE_FLOATS} \(window 150\)"):
        extend_attention(call["query"], call["kv_pages"], call["page_table"], *rest)
