"""Attention over the paged cache, as far as it runs without a GPU: operands, kernels' sources, plans, the merge."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qoq.formats.arithmetic import QuantizedKV, dequantize_kv, quantize_kv
from qoq.kernels import attention
from qoq.kernels.attention import check_decode_operands, extend_attention, merge_by_lse, specs
from qoq.kernels.attention_oracles import decode_attention_oracle, extend_attention_oracle
from qoq.kernels.compiler import compile_kernel
from qoq.kernels.decode_plan import DecodeShape, decode_spec
from qoq.kernels.dispatch import ARCHITECTURES, shared_bytes_of_sm
from qoq.kernels.extend_plan import DECODE_ROWS, ExtendPlan, plan_extend
from qoq.kernels.layouts import PAGE_SIZE, pack_pages, page_bytes, unpack_pages

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


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Plain attention of query [T, H, D] to all keys [L, KVH, D], float64, and its log-sum-exp [H, T]."""
    share = query.shape[1] // key.shape[1]
    keys, values = (x.double().repeat_interleave(share, dim=1).transpose(0, 1) for x in (key, value))
    scores = query.double().transpose(0, 1) @ keys.transpose(1, 2) * scale
    return (scores.softmax(2) @ values).transpose(0, 1), scores.logsumexp(2)


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
    assert len(set(found)) == len(found) == 20
    for spec in found:
        defines = dict(spec.defines)
        if "WARPS" in defines:
            assert spec.threads == 32 * defines["WARPS"] <= 512
            assert defines["STAGES"] >= 2
            assert spec.shared_bytes + 4096 <= shared_bytes_of_sm(arch) - 1024


def test_a_hopper_block_keeps_enough_in_flight() -> None:
    defines = dict(decode_spec("sm_90", 128, 4, 4, torch.float16).defines)
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


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_plans_show_every_token_exactly_its_keys(data: st.DataObject) -> None:
    sequences = data.draw(st.integers(1, 4))
    new_lens = data.draw(st.lists(st.integers(0, 400), min_size=sequences, max_size=sequences))
    kv_lens = [new + data.draw(st.integers(0, 900)) for new in new_lens]
    window = data.draw(st.sampled_from([0, 1, 5, 64, 65, 200, 5000]))
    capacity = data.draw(st.integers(2, 12))
    plan = plan_extend(new_lens, kv_lens, window, capacity)
    if plan.pages_needed:
        assert 0 < window < max(kv_lens)
        assert plan.pages_needed > capacity
        assert not plan_extend(new_lens, kv_lens, window, max(plan.pages_needed, 12)).pages_needed
        return
    firsts = [sum(new_lens[:i]) for i in range(sequences)]
    seen: dict[int, list[tuple[int, int]]] = {}  # row: ranges of keys
    for row in plan.decode:
        start = max(0, row.kv_len - window) if window else 0
        seen.setdefault(row.row, []).append((start, row.kv_len))
        assert new_lens[row.sequence] <= DECODE_ROWS
    for batch in plan.batches:
        assert sum(item.keys.pages for item in batch) <= capacity
        for item in batch:
            assert item.keys.start % PAGE_SIZE == 0
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
    assert plan_extend([0, 0], [5, 0], 0, 4) == ExtendPlan()


def test_merging_parts_is_attention_to_both() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(n, heads, 64, generator=generator) for n, heads in ((7, 6), (90, 2), (90, 2)))
    key[:20] *= 30  # one part far outweighs the other, and sums are large
    expected, sums = softmax_attention(query, key, value, 1.0)
    parts = [softmax_attention(query, key[at], value[at], 1.0) for at in (slice(0, 20), slice(20, 55), slice(55, 90))]
    for order in ([0, 1, 2], [2, 0, 1]):
        found = parts[order[0]]
        for i in order[1:]:
            found = merge_by_lse(*found, *parts[i])
        torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1], sums)


class StandIns:
    """What extend attention calls on a GPU, on the CPU; counts calls, and bytes dequantized at a time."""

    def __init__(self) -> None:
        self.flash_calls: list[bool] = []
        self.largest = 0
        self.decoded = 0

    def gather_kv(
        self, pages: Tensor, page_ids: Tensor, head_dim: int, bits: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        key, value = (
            dequantize_kv(part).to(dtype).transpose(1, 2).reshape(-1, pages.shape[1], head_dim)
            for part in unpack_pages(pages[page_ids.long()], head_dim, bits)
        )
        self.largest = max(self.largest, 2 * key.numel() * key.element_size())
        return key, value

    def decode(self, query: Tensor, *args: Any) -> Tensor:
        self.decoded += query.shape[0]
        check_decode_operands(query, *args)
        return decode_attention_oracle(query, *args).to(query.dtype)

    def flash(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        row_lens: Sequence[int],
        key_lens: Sequence[int],
        scale: float,
        causal: bool,
        window: int,
    ) -> tuple[Tensor, Tensor]:
        """As the real one: padded keys, the last row sees the last key, a left window; NaN where nothing is read."""
        self.flash_calls.append(causal)
        outputs, sums, row, at = [], [], 0, 0
        for rows, keys in zip(row_lens, key_lens, strict=True):
            for i in range(rows):
                end = keys - rows + i + 1 if causal else keys
                start = max(0, end - window) if window else 0
                part = slice(at + start, at + end)
                output, total = softmax_attention(query[row + i : row + i + 1], key[part], value[part], scale)
                outputs.append(output)
                sums.append(total)
            row, at = row + rows, at + math.ceil(keys / PAGE_SIZE) * PAGE_SIZE
        assert (row, at) == (query.shape[0], key.shape[0])
        return torch.cat(outputs).to(query.dtype), torch.cat(sums, dim=1).float()


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIns]:
    import qoq.kernels.kv_cache  # noqa: F401  (declares gather_kv)

    found = StandIns()
    monkeypatch.setattr(attention, "_flash", found.flash)
    with torch.library._scoped_library("qoq", "IMPL") as library:
        library.impl("gather_kv", found.gather_kv, "CPU")
        library.impl("paged_decode_attention", found.decode, "CPU")
        yield found


@pytest.mark.parametrize("window", [None, 30, 100])
@pytest.mark.parametrize("pages", [100, 6, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_extend_attention_is_each_token_s_decode_step(
    stand_ins: StandIns, bits: int, pages: int, window: int | None
) -> None:
    new_lens, kv_lens = [5, 0, 1, 70, 3, 33], [5, 20, 65, 300, 40, 33]
    cache, table, *_ = random_cache(kv_lens, 1, 64, bits)
    query = torch.randn(sum(new_lens), 3, 64, generator=torch.Generator().manual_seed(1)).half()
    found = extend_attention(query, cache, table, new_lens, kv_lens, 0.125, bits, window, pages * PAGE_FLOATS)
    expected = extend_attention_oracle(query, cache, table, new_lens, kv_lens, 0.125, bits, window or 0)
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-3
    assert stand_ins.decoded == 4
    assert stand_ins.largest <= pages * PAGE_FLOATS
    if pages == 100:
        assert stand_ins.flash_calls == [True]
    elif window is None:
        assert (False in stand_ins.flash_calls) == (pages == 3)


def test_extend_attention_of_nothing() -> None:
    call = operands(query=torch.zeros(0, 6, 64, dtype=torch.float16))
    result = extend_attention(call["query"], call["kv_pages"], call["page_table"], [0, 0], [9, 0], 0.125, 4)
    assert result.shape == (0, 6, 64)


@pytest.mark.parametrize(
    ("new_lens", "kv_lens", "message"),
    [
        ([2], [2], "expected 2 each, one a row of page_table, got 1, 1"),
        ([1, 2], [1, 1], "sequence 1: 2 new tokens of 1"),
        ([1, 1], [1, 193], r"sequence 1: 1 new tokens of 193, expected 0 <= new <= all <= 192"),
        ([1, 2], [1, 2], "new_lens: the sum is 3, query has 2 rows"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(new_lens: list[int], kv_lens: list[int], message: str) -> None:
    call = operands()
    with pytest.raises(ValueError, match=message):
        extend_attention(call["query"], call["kv_pages"], call["page_table"], new_lens, kv_lens, 0.125, 4)


def test_a_scratch_too_small_for_the_window_is_refused() -> None:
    call = operands(query=torch.zeros(10, 2, 64, dtype=torch.float16))
    with pytest.raises(ValueError, match=rf"scratch_bytes: expected at least {4 * 2 * PAGE_FLOATS} \(window 150\)"):
        extend_attention(
            call["query"], call["kv_pages"], call["page_table"], [10, 0], [190, 0], 0.125, 4, 150, 3 * 2 * PAGE_FLOATS
        )
