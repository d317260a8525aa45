"""`qoq bench --what e2e`: its options, and what is shown; the measuring itself is replaced."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qoq.kernels.bench_decode import DecodeResult
from qoq.kernels.bench_served import Percentiles, ServedCase, ServedReport, ServedResult
from qoq.kernels.gpu_facts import GpuFacts, GpuState
from qoq.kernels.roofline import Roofline
from qoq.kernels.runtime.memory import MemoryPlan
from qoq.kernels.timing import Timing
from qoq_cli.commands import bench

FACTS = GpuFacts("NVIDIA H100 80GB HBM3", "9.0", 132, 50 << 20, 80 << 30, "580.1", "13.0", "2.13.0", "13.0")
SPEEDS = {
    "w4a8kv4-g128": 20000.0,
    "w4a8kv4-chn": 21000.0,
    "w4a8kv8-g128": 15000.0,
    "fp16": 8000.0,
    "w8a8kv8": 12000.0,
    "fp8": 13000.0,
}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Instead of measuring, every precision has a speed; what was asked for is recorded."""
    asked: dict[str, Any] = {}

    def served(shape: Any, precisions: Any, cases: Any, *, on_step: Any, **options: Any) -> ServedReport:
        asked.update(shape=shape, precisions=[p.name for p in precisions], cases=cases, **options)
        on_step(0, 1, "weights")
        results = [result(p.name, case) for case in cases for p in precisions]
        steps = [step for p in precisions for step in decode_steps(p.name, cases[0].batch)]
        return ServedReport(results, steps, {"w4a16, ...": "no kernels"})

    monkeypatch.setattr(bench, "open_gpu", lambda device: 0)
    monkeypatch.setattr("qoq_cli.bench_measured._compile", lambda *args: None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr("qoq.kernels.gpu_facts.read_facts", lambda index: FACTS)
    monkeypatch.setattr("qoq.kernels.gpu_facts.read_state", lambda index: GpuState())
    monkeypatch.setattr("qoq.kernels.roofline.measure_roofline", lambda **options: Roofline(3060.0, {"8-bit": 1500.0}))
    monkeypatch.setattr("qoq.kernels.bench_served.bench_served", served)
    return asked


def result(precision: str, case: ServedCase) -> ServedResult:
    requests = case.requests or case.batch
    speed = SPEEDS[precision] * case.batch / 512
    token_ms = 1000 * case.batch / speed
    return ServedResult(
        precision=precision,
        case=case,
        requests=requests,
        together=case.batch,
        seconds=requests * case.output_len / speed,
        tokens_per_s=speed,
        first_token_s=Percentiles(2.5, 4.75),
        token_ms=Percentiles(token_ms, 1.2 * token_ms),
        joules=0.03 * requests * case.output_len,
        memory=MemoryPlan(73 * 10**9, 5_700_000_000, 2_000_000_000, 1_600_000_000, 4_456_448, 14_000),
        prefill_steps=64,
        decode_steps=512,
        decode_rows=512 * case.batch,
        preemptions=0,
    )


def decode_steps(precision: str, batch: int) -> list[DecodeResult]:
    kernels = {
        "products": 3600.0,
        "attention": 9000.0,
        "norms, quantizers": 500.0,
        "RoPE, append": 200.0,
        "other": 60.0,
    }
    return [
        DecodeResult(precision, 1, 1024, Timing(2400.0, 2390.0, 2450.0, 10, 8), 66.6, kernels),
        DecodeResult(precision, batch, 1280, Timing(15000.0, 14900.0, 15300.0, 10, 8), 80.0, kernels),
    ]


def test_tables_fit_80_columns(qoq: Any, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = qoq("bench", "--what", "e2e", "--price", 2)
    assert outcome.code == 0, outcome.stderr
    assert "…" not in outcome.stdout
    assert max(len(line) for line in outcome.stdout.splitlines() if line.startswith(("│", "┃"))) <= 80
    assert "Throughput of llama-3-8b, 1024 tokens in, 512 out" in outcome.stdout
    assert "20000" in outcome.stdout
    assert "not measured: w4a16, ...: no kernels" in outcome.stdout
    assert "What a request waits for" in outcome.stdout
    assert re.search(r"tokens of each +│ +1280", outcome.stdout)
    assert "66.6" not in outcome.stdout
    assert "67 %" in outcome.stdout
    assert "projected" not in outcome.stdout.lower()


def test_lm_head_of_8_bits_is_told(qoq: Any, measured: dict[str, Any]) -> None:
    outcome = qoq("bench", "--what", "e2e", "--lm-head-bits", 8)
    assert outcome.code == 0, outcome.stderr
    assert measured["options"].lm_head_bits == 8
    assert "lm_head has 8 bits, at every precision" in outcome.stdout
    assert qoq("bench", "--what", "e2e", "--lm-head-bits", 8, "--json").json["e2e"]["lm_head_bits"] == 8
    assert "lm_head has" not in qoq("bench", "--what", "e2e").stdout
    refused = qoq("bench", "--what", "e2e", "--lm-head-bits", 4)
    assert refused.code == 2
    assert "--lm-head-bits 4: not supported" in refused.stderr
    assert "--lm-head-bits: a projection has none" in qoq("bench", "--gpu", "l40s", "--lm-head-bits", 8).stderr


def test_json_has_all_of_it(qoq: Any, measured: dict[str, Any]) -> None:
    data = qoq("bench", "--what", "e2e", "--json", "--price", 2).json
    assert data["projected"] is False
    first = data["e2e"]["results"][0]
    assert first["precision"] == "w4a8kv4-g128"
    assert first["case"] == {"prompt_len": 1024, "output_len": 512, "batch": 512, "requests": None}
    assert first["joules_per_token"] == pytest.approx(0.03)
    assert first["tokens_per_dollar"] == pytest.approx(20000 * 3600 / 2)
    assert data["e2e"]["steps"][0]["kernels_us"]["attention"] == 9000.0
    assert qoq("bench", "--what", "e2e", "--json").json["e2e"]["results"][0]["tokens_per_dollar"] is None


def test_options_reach_the_benchmark(qoq: Any, measured: dict[str, Any]) -> None:
    args = ("--what", "e2e", "--batch", "1,64", "--prompt-len", "1000,128", "--output-len", 100, "--requests", 70)
    more = ("--memory", "73GB", "--precision", "w4a8kv4-chn", "--against", "fp16,w8a8", "--seed", 4)
    assert qoq("bench", "llama-2-7b", *args, *more).code == 0
    assert measured["shape"].name == "llama-2-7b"
    assert measured["precisions"] == ["w4a8kv4-chn", "fp16", "w8a8kv8"]
    lengths = [(case.prompt_len, case.batch) for case in measured["cases"]]
    assert lengths == [(1000, 1), (1000, 64), (128, 1), (128, 64)]
    assert {(case.output_len, case.requests) for case in measured["cases"]} == {(100, 70)}
    assert measured["options"].memory_bytes == 73 * 10**9
    assert measured["options"].chunk_tokens == 8192
    assert measured["read_gb_s"] == 3060.0
    assert measured["seed"] == 4


def test_nothing_measured_is_a_failure(fails: Any, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = ServedReport([], [], {"fp16, 1024 in": "out of luck"})
    monkeypatch.setattr("qoq.kernels.bench_served.bench_served", lambda *_, **__: nothing)
    message = fails(3, "bench", "--what", "e2e", "--json")
    assert "fp16, 1024 in: out of luck" in message


def test_each_prompt_can_have_an_answer_of_its_own_length(qoq: Any, measured: dict[str, Any]) -> None:
    qoq("bench", "--what", "e2e", "--prompt-len", "1024,1000,128,1000", "--output-len", "512,1000,128,1000")
    assert [(case.prompt_len, case.output_len) for case in measured["cases"]] == [(1024, 512), (1000, 1000), (128, 128)]


def test_baselines_are_chosen_and_float8_needs_a_gpu_that_has_it(
    qoq: Any, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    qoq("bench", "--what", "e2e")
    assert measured["precisions"] == ["w4a8kv4-g128", "w4a8kv8-g128", "fp16", "fp8", "w8a8kv8"]
    qoq("bench", "--what", "e2e", "--against", "none")
    assert measured["precisions"] == ["w4a8kv4-g128", "w4a8kv8-g128"]
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (8, 0))
    outcome = qoq("bench", "--what", "e2e", "--json")
    assert "fp8" not in measured["precisions"]
    assert "float8" in outcome.json["e2e"]["skipped"]["fp8"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--what", "gemm", "--output-len", "5"), "--output-len: only e2e serves a model"),
        (("--requests", "5"), "--requests: only e2e serves a model"),
        (("--what", "e2e", "--requests", "0"), "--requests 0: out of range"),
        (("--what", "e2e", "--memory", "much"), "--memory 'much': not a size"),
        (("--what", "e2e", "--output-len", "0"), "--output-len 0: expected whole numbers"),
        (("--what", "e2e", "--prompt-len", "1,2,3", "--output-len", "4,5"), "--output-len 4,5: 2 lengths for 3"),
        (("--what", "e2e", "--price", "-1"), "--price -1.0"),
        (("--what", "e2e", "--precision", "int3"), "--precision int3: not known"),
        (("--what", "e2e", "--batch", "5000"), "--batch 5000"),
        (("--gpu", "l40s", "--memory", "40GB"), "--memory: a projection has none"),
        (("--gpu", "l40s", "--requests", "4"), "--requests: a projection has none"),
        (("--gpu", "l40s", "--rest", "3"), "--rest: a projection has none"),
    ],
)
def test_wrong_options_are_named(args: tuple[str, ...], words: str, fails: Any) -> None:
    assert words in fails(2, "bench", *args)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plot(qoq: Any, measured: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    picture = tmp_path / f"served.{suffix}"
    outcome = qoq("bench", "--what", "e2e", "--batch", "1,16,128,512", "--plot", picture)
    assert outcome.code == 0, outcome.stderr
    content = picture.read_bytes()
    if suffix == "svg":
        assert b"w4a8kv4-g128" in content
        assert b"output tokens/s" in content
    else:
        assert content.startswith(b"\x89PNG")
