"""The analytic model: limits that follow from arithmetic, monotonicity, and the times that it was fitted to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qoq.kernels.projected_bench import (
    ATTENTION_VARIANTS,
    GEMM_VARIANTS,
    MAX_BATCH,
    project_attention,
    project_gemms,
    project_model,
    runs_on,
)
from qoq.kernels.projected_kernels import VALIDATED, error_bars, kernel_set, projected_system, projection_table
from qoq.kernels.projection import MMA_SYNC_SHARE, KernelModel, served_speed, served_work
from qoq.kernels.work import Work, decode_work, prefill_work
from qoq.recipes.gpus import find_gpu, gpus
from qoq.recipes.precisions import PRECISIONS, find_precision
from qoq.recipes.shapes import find_shape, model_shapes

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LLAMA = find_shape("llama-3-8b")
L40S, H100 = find_gpu("l40s"), find_gpu("h100-sxm")
SERVED = ("w4a8kv4-g128", "w4a8kv4-chn", "w8a8kv8", "fp8", "fp16")


def test_a_call_takes_what_it_needs_longest() -> None:
    """1 GB at half of 864 GB/s, and 10^12 operations at half of 733 TOPS, by hand."""
    model = KernelModel(0.5, 0.5, "int8", latency_us=7.0, overlap=50.0)
    assert model.call_us(Work("gemm", 1e9), L40S) == pytest.approx(7 + 1e6 / 432, rel=1e-6)
    assert model.call_us(Work("gemm", 1.0, operations=1e12), L40S) == pytest.approx(7 + 2e6 / 733, rel=1e-6)
    both = Work("gemm", 1e9, operations=1e12 * 733 / 864)  # as long for either
    assert replace(model, overlap=1.0).call_us(both, L40S) == pytest.approx(7 + 2e6 / 432, rel=1e-6)
    assert model.call_us(Work("gemm", 0.0), L40S) == 7.0


def test_the_portable_instruction_is_slower_on_hopper_only() -> None:
    work = Work("gemm", 0.0, operations=1e12)
    native, portable = KernelModel(1.0, operand="int8"), KernelModel(1.0, operand="int8", portable=True)
    assert portable.call_us(work, L40S) == native.call_us(work, L40S)
    assert portable.call_us(work, H100) == pytest.approx(native.call_us(work, H100) / MMA_SYNC_SHARE["sm_90"])


def test_a_type_that_the_gpu_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match="A10 has no fp8"):
        KernelModel(1.0, operand="fp8").call_us(Work("gemm", 0.0, operations=1.0), find_gpu("a10"))


def test_operations_of_a_step_by_hand() -> None:
    """Twice the weights for each token, and lm_head for each sequence."""
    precision, blocks = find_precision("fp16"), 32 * (4096 * (6144 + 4096 + 28672) + 14336 * 4096)
    step = decode_work(LLAMA, precision, 7, 1000)
    head = 128256 * 4096
    assert sum(work.count * work.operations for work in step) == 2 * 7 * (blocks + head)
    read = [work.count * work.nbytes for work in step if work.kernel == "decode_attention"]
    assert read == [7 * 1000 * 131072]
    prompts = prefill_work(LLAMA, precision, 5, 1000, chunk_tokens=2048)
    products = sum(work.count * work.operations for work in prompts if work.kernel == "gemm")
    assert products == 2 * 5000 * blocks
    assert {work.count for work in prompts if work.kernel == "gemm"} == {32, 64}, "two whole chunks and a rest"
    causal = sum(work.count * work.operations for work in prompts if work.kernel == "prefill_attention")
    assert causal == 5 * 32 * 4 * (1000 * 1000 / 2) * 32 * 128


def test_tokens_a_second_are_tokens_over_seconds() -> None:
    system = projected_system(L40S, find_precision("w4a8kv4-g128"))
    work = served_work(LLAMA, find_precision("w4a8kv4-g128"), 16, 512, 100, chunk_tokens=8192)
    speed = served_speed(work, system, L40S)
    assert speed.tokens_per_s == pytest.approx(1600 / (speed.prefill_s + 99 * speed.step_ms * 1e-3))
    only_first = served_speed(served_work(LLAMA, find_precision("fp16"), 4, 512, 1, chunk_tokens=8192), system, L40S)
    assert only_first.step_ms == 0
    assert only_first.tokens_per_s == pytest.approx(4 / only_first.prefill_s)


@given(
    name=st.sampled_from(sorted(gpus())),
    precision=st.sampled_from(SERVED),
    faster=st.floats(1.0, 4.0),
    sequences=st.integers(1, 600),
    prompt_len=st.integers(1, 4000),
)
def test_more_of_anything_is_never_slower(
    name: str, precision: str, faster: float, sequences: int, prompt_len: int
) -> None:
    gpu, served = find_gpu(name), find_precision(precision)
    if not runs_on(gpu, served):
        return
    system = projected_system(gpu, served)

    def speed(gpu: Any, sequences: int, prompt_len: int) -> Any:
        work = served_work(LLAMA, served, sequences, prompt_len, 64, chunk_tokens=8192)
        return served_speed(work, system, gpu)

    here = speed(gpu, sequences, prompt_len)
    for better in (
        replace(gpu, bandwidth_gb_s=gpu.bandwidth_gb_s * faster),
        replace(gpu, int8_tops=gpu.int8_tops * faster, fp16_tops=gpu.fp16_tops * faster),
    ):
        found = speed(better, sequences, prompt_len)
        assert found.step_ms <= here.step_ms * (1 + 1e-9)
        assert found.prefill_s <= here.prefill_s * (1 + 1e-9)
    larger = speed(gpu, sequences + 1, prompt_len)
    assert larger.step_ms >= here.step_ms
    assert larger.prefill_s >= here.prefill_s
    assert speed(gpu, sequences, prompt_len + 1).step_ms >= here.step_ms


@given(memory=st.integers(24 << 10, 200 << 10), more=st.integers(0, 50 << 10))
def test_more_memory_is_never_a_smaller_batch(memory: int, more: int) -> None:
    precision = find_precision("w4a8kv4-g128")
    batches = [
        project_model(LLAMA, replace(L40S, memory_mib=mib), precision, prompt_len=1024, output_len=512).memory.sequences
        for mib in (memory, memory + more)
    ]
    assert batches[0] <= batches[1] <= MAX_BATCH


@pytest.mark.parametrize("gpu", gpus().values(), ids=lambda gpu: gpu.name)
def test_every_gpu_has_a_projection_of_every_model(gpu: Any) -> None:
    for shape in model_shapes().values():
        for precision in map(find_precision, SERVED):
            if runs_on(gpu, precision):
                model = project_model(shape, gpu, precision, prompt_len=1024, output_len=512)
                assert (model.speed is None) == (model.memory.left < 0)
                if model.speed is not None:
                    floor_s = model.memory.weights / gpu.bandwidth_gb_s * 1e-9
                    embedding = 2 * shape.vocab_size * shape.hidden_size
                    assert model.speed.step_ms > (1 - embedding / model.memory.weights) * floor_s * 1e3
    gemms = project_gemms(LLAMA, gpu, [1, 4096], [v for v in GEMM_VARIANTS if v != "fp8" or gpu.fp8_tops])
    attention = project_attention(LLAMA, gpu, [(64, 1024)], list(ATTENTION_VARIANTS))
    assert all(0 < time.low_us < time.us < time.high_us for time in [*gemms, *attention])


def test_hopper_alone_has_kernels_of_its_own() -> None:
    assert {gpu.name for gpu in gpus().values() if kernel_set(gpu) != "portable"} == {
        "h100-pcie",
        "h100-sxm",
        "h100-nvl",
        "h200",
    }


def test_error_bars_are_narrowest_where_the_projection_was_checked() -> None:
    checked, others = [error_bars(find_gpu(name)).ours for name in VALIDATED], error_bars(find_gpu("b200")).ours
    assert len(set(checked)) == 1
    assert checked[0] < error_bars(find_gpu("a10")).ours < others


def test_the_table_covers_what_can_be_served() -> None:
    for precision in PRECISIONS.values():
        if precision.name != "w4a16":
            assert projected_system(H100, precision).kernels["gemm"].bandwidth > 0.5
    for entries in projection_table()["kernels"].values():
        for entry in [*entries["gemm"].values(), *entries["decode_attention"].values(), entries["small"]]:
            assert 0.5 < entry["bandwidth"] <= 1
            assert 0.4 < entry["operations"] <= 1
            assert 0.5 < entry["sustained"] <= 1
            assert entry["source"].startswith("benchmarks/")


@pytest.mark.parametrize(
    ("file", "gpu", "variants"),
    [("hopper-h100", H100, ("w4a8-g128", "w4a8-chn", "fp8", "w8a8")), ("kernels-h100", H100, ("fp16",))],
)
def test_projected_products_are_near_the_measured_ones(file: str, gpu: Any, variants: tuple[str, ...]) -> None:
    """On the H100 itself: within 15 % for every M, within 5 % for half of them."""
    layers = json.loads((BENCHMARKS / f"{file}.json").read_text())["gemm"]["layer"]
    for variant in variants:
        measured = {row["m"]: row["us"] for row in layers if row["variant"] == variant}
        errors = sorted(
            abs(time.us / measured[time.rows] - 1) for time in project_gemms(LLAMA, gpu, list(measured), [variant])
        )
        assert errors[-1] < 0.15, variant
        assert errors[len(errors) // 2] < 0.05, variant
