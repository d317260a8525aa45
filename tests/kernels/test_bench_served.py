"""The benchmark of whole models, run on the CPU with the reference arithmetic: what is counted, and over which time."""

from __future__ import annotations

from typing import Any

import pytest

from qoq.kernels import bench_served as module
from qoq.kernels.bench_decode import OTHER, group_of, spent_by_group, step_bytes
from qoq.kernels.bench_served import Percentiles, ServedCase, bench_served, gemm_rows
from qoq.kernels.runtime.model import Options
from qoq.recipes.precisions import find_precision
from qoq.recipes.shapes import ModelShape, find_shape

SHAPE = ModelShape("small", 128, 256, 2, 1, 64, num_layers=2, vocab_size=256)
OPTIONS = Options(device="cpu", chunk_tokens=64)


@pytest.mark.parametrize("precision", ["w4a8kv4-g128", "w4a8kv8-chn", "fp16"])
def test_every_request_is_answered_and_counted(precision: str) -> None:
    told: list[tuple[int, int, str]] = []
    report = bench_served(
        SHAPE,
        [find_precision(precision)],
        [ServedCase(prompt_len=40, output_len=5, batch=4, requests=7)],
        options=OPTIONS,
        on_step=lambda *step: told.append(step),
    )
    (result,) = report.results
    assert not report.skipped
    assert (result.precision, result.requests, result.together) == (precision, 7, 4)
    assert result.tokens_per_s == pytest.approx(7 * 5 / result.seconds)
    assert 0 < result.first_token_s.p50 <= result.first_token_s.p99 < result.seconds
    assert result.token_ms is not None
    assert 0 < result.token_ms.p50 <= result.token_ms.p99 < 1000 * result.seconds
    assert result.prefill_steps >= 7 * 40 / 64  # in chunks of 64 tokens
    assert result.decode_steps >= 2 * 4  # seven requests, four at a time
    assert result.joules is None
    assert told[0][2].startswith(f"{precision}, 40 in, 5 out")


def test_without_a_number_of_requests_those_that_fit_together_come() -> None:
    case = ServedCase(prompt_len=100, output_len=28, batch=8)
    memory = bench_served(SHAPE, [find_precision("w4a8kv4-g128")], [case], options=OPTIONS).results[0].memory
    pages = 2 * 3  # two a sequence of 128 tokens
    small = Options(device="cpu", chunk_tokens=64, memory_bytes=memory.budget - memory.pages + pages * memory.page)
    (result,) = bench_served(SHAPE, [find_precision("w4a8kv4-g128")], [case], options=small).results
    assert result.memory.num_pages == pages
    assert (result.requests, result.together, result.preemptions) == (3, 3, 0)


def test_a_batch_of_a_page_each_has_no_row_too_few() -> None:
    """Three sequences in three pages run together: as many steps as an answer has, each of three rows."""
    case = ServedCase(prompt_len=20, output_len=20, batch=8)
    precision = find_precision("w4a8kv4-g128")
    memory = bench_served(SHAPE, [precision], [case], options=OPTIONS).results[0].memory
    small = Options(device="cpu", chunk_tokens=64, memory_bytes=memory.budget - memory.pages + 3 * memory.page)
    (result,) = bench_served(
        SHAPE, [precision], [case], options=Options(**{**vars(small), "prefill_first": True})
    ).results
    assert (result.memory.num_pages, result.together, result.requests) == (3, 3, 3)
    assert (result.decode_steps, result.decode_rows) == (19, 57)


def test_what_does_not_fit_is_told_and_the_rest_goes_on() -> None:
    precisions, case = [find_precision("fp16"), find_precision("w4a8kv4-g128")], ServedCase(16, 2, batch=2)
    plans = [result.memory for result in bench_served(SHAPE, precisions, [case], options=OPTIONS).results]
    most, least = (plan.weights + plan.workspace + plan.page for plan in plans)
    assert least < most
    tight = Options(device="cpu", chunk_tokens=64, memory_bytes=(least + most) // 2)
    report = bench_served(SHAPE, precisions, [case], options=tight)
    assert [result.precision for result in report.results] == ["w4a8kv4-g128"]
    ((what, why),) = report.skipped.items()
    assert what.startswith("fp16, 16 in, 2 out")
    assert why


def test_one_token_has_no_time_between_tokens() -> None:
    (result,) = bench_served(SHAPE, [find_precision("fp16")], [ServedCase(8, 1, batch=2)], options=OPTIONS).results
    assert result.token_ms is None
    assert result.tokens_per_s == pytest.approx(2 / result.seconds)


def test_prompts_are_the_same_for_every_precision_and_differ_from_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = module.Engine.generate

    def generate(self: Any, requests: Any, **options: Any) -> Any:
        seen.append([tuple(request.prompt) for request in requests])
        return original(self, requests, **options)

    monkeypatch.setattr(module.Engine, "generate", generate)
    precisions = [find_precision(name) for name in ("fp16", "w4a8kv4-g128")]
    bench_served(SHAPE, precisions, [ServedCase(8, 2, batch=3)], options=OPTIONS, seed=5)
    assert seen[1] == seen[3]  # the first and the third warm up
    assert len(set(seen[1])) == 3


def test_percentiles_of_requests() -> None:
    found = Percentiles.of([float(value) for value in range(100, -1, -1)])
    assert (found.p50, found.p99) == (50.0, 99.0)
    assert Percentiles.of([2.0, 4.0]).p50 == 3.0


def test_bytes_of_a_decode_step() -> None:
    """Llama-3-8B by hand: 32 layers of 218,103,808 weights at 4 bits and 2 bytes a group, lm_head, the cache."""
    weights = 32 * (218_103_808 // 2 + 218_103_808 // 64 + 2 * (6144 + 4096 + 28672 + 4096))
    cache = 3 * 1000 * 32 * 2 * 8 * 68
    shape = find_shape("llama-3-8b")
    assert step_bytes(shape, find_precision("w4a8kv4-g128"), 3, 1000) == weights + 2 * 128256 * 4096 + cache
    small = step_bytes(shape, find_precision("w4a8kv4-g128"), 3, 1000, lm_head_bits=8)
    assert small == weights + 128256 * 4096 + 2 * 128256 + cache
    tied = find_shape("llama-3.2-1b")
    linears = 16 * (3072 * 2048 + 2048 * 2048 + 16384 * 2048 + 2048 * 8192)
    expected = 2 * (linears + 128256 * 2048) + 16 * 2 * 8 * 2 * 64
    assert step_bytes(tied, find_precision("fp16"), 1, 1) == expected


def test_kernels_are_told_apart_by_their_names() -> None:
    assert group_of("qoq_gemm_decode_sm90") == "products"
    assert group_of("qoq_decode_attention_sm90") == "attention"
    assert group_of("void flash::flash_fwd_kernel<...>") == "attention"
    assert group_of("qoq_kv_append_sm80") == "RoPE, append"
    assert group_of("qoq_act_quant_sm80") == "norms, quantizers"
    assert group_of("nvjet_hsh_128x8_64x12_1x2_h_bz_TNT") == "PyTorch's products"
    assert group_of("void at::native::index_elementwise_kernel") == OTHER


def test_time_that_two_kernels_share_counts_for_the_earlier() -> None:
    spans = [(10.0, 14.0, "qoq_gemm_sm90"), (13.0, 15.0, "qoq_act_quant_sm80"), (13.5, 14.5, "qoq_kv_append_sm80")]
    assert spent_by_group(spans) == {"products": 4.0, "norms, quantizers": 1.0, "RoPE, append": 0.0}
    assert spent_by_group([]) == {}


def test_what_fails_in_a_run_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    original = module.run_case

    def run_case(engine: Any, precision: str, *args: Any, **options: Any) -> Any:
        if precision == "fp16":
            raise RuntimeError("CUDA error: out of luck\nmore of it")
        return original(engine, precision, *args, **options)

    monkeypatch.setattr(module, "run_case", run_case)
    precisions = [find_precision(name) for name in ("fp16", "w4a8kv4-g128")]
    report = bench_served(SHAPE, precisions, [ServedCase(8, 2, batch=2)], options=OPTIONS)
    assert [result.precision for result in report.results] == ["w4a8kv4-g128"]
    assert report.skipped == {"fp16, 8 in, 2 out, batch 2": "CUDA error: out of luck"}


def test_single_steps_come_last_and_have_sizes_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int]] = []

    def bench_decode(engine: Any, shape: Any, precision: Any, batch: int, context: int, *, read_gb_s: float) -> Any:
        assert read_gb_s == 3000.0
        asked.append((precision.name, batch, context))
        return (precision.name, batch)

    monkeypatch.setattr(module, "bench_decode", bench_decode)
    precisions = [find_precision(name) for name in ("fp16", "w4a8kv4-g128")]
    cases = [ServedCase(30, 4, batch=3), ServedCase(8, 2, batch=2)]
    report = bench_served(SHAPE, precisions, cases, options=OPTIONS, read_gb_s=3000.0)
    assert asked == [("fp16", 3, 32), ("w4a8kv4-g128", 3, 32)]
    assert len(report.results) == 4
    assert len(report.steps) == 2


def test_rows_of_products_reach_from_one_token_to_a_chunk() -> None:
    rows = gemm_rows(512)
    assert rows[0] == 1
    assert rows[-1] == 8192
    assert {16, 64, 256, 512, 4096} <= set(rows)
