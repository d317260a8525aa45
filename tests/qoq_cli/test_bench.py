"""`qoq bench`: options, where sizes come from, and what is shown; the measuring itself is replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qoq.kernels.bench import GEMM_VARIANTS, GemmReport, GemmResult, Rates, gemm_bytes
from qoq.kernels.bench_attention import ATTENTION_VARIANTS, DEFAULT_CASES, AttentionReport, AttentionResult
from qoq.kernels.gpu_facts import GpuFacts, GpuState
from qoq.kernels.roofline import Roofline
from qoq.kernels.timing import Timing
from qoq_cli.commands import bench

ROOFLINE = Roofline(3060.0, {"8-bit": 1500.0, "fp16": 780.0, "bf16": 780.0}, {"read": "copy"})
FACTS = GpuFacts("NVIDIA H100 80GB HBM3", "9.0", 132, 50 << 20, 80 << 30, "580.1", "13.0", "2.13.0", "13.0")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Instead of measuring, every variant takes the time of its bytes; what was asked for is recorded."""
    asked: dict[str, Any] = {}

    def timing(us: float) -> tuple[Timing, Rates]:
        return Timing(us, 0.99 * us, 1.03 * us, 20, 100), Rates(1234.5, 678.9, 91.2)

    def gemms(shapes: Any, rows: Any, variants: Any, roofline: Roofline, *, on_step: Any, **options: Any) -> GemmReport:
        asked["gemm"] = {"shapes": shapes, "rows": rows, "variants": variants, **options}
        report = GemmReport(skipped={"int8": "torch._int_mm takes 17 rows or more"})
        for gemm, (n, k) in shapes.items():
            for m in rows:
                on_step(0, 1, gemm)
                for variant in variants:
                    if variant != "int8" or m > 16:
                        us = gemm_bytes(variant, m, n, k) / 3e6 + m
                        report.results.append(GemmResult(gemm, m, n, k, variant, *timing(us)))
        return report

    def attention(shape: Any, cases: Any, variants: Any, roofline: Roofline, **options: Any) -> AttentionReport:
        asked["attention"] = {"shape": shape, "cases": list(cases), "variants": variants, **options}
        return AttentionReport(
            [
                AttentionResult(batch, length, v, None if v.startswith("kv") else "cudnn", *timing(batch * length / 99))
                for batch, length in cases
                for v in variants
            ]
        )

    monkeypatch.setattr(bench, "open_gpu", lambda device: 0)
    monkeypatch.setattr("qoq_cli.bench_measured._compile", lambda *args: None)
    monkeypatch.setattr("qoq.kernels.gpu_facts.read_facts", lambda index: FACTS)
    monkeypatch.setattr("qoq.kernels.gpu_facts.read_state", lambda index: GpuState(sm_mhz=1980.0))
    monkeypatch.setattr("qoq.kernels.roofline.measure_roofline", lambda **options: ROOFLINE)
    monkeypatch.setattr("qoq.kernels.bench.bench_gemms", gemms)
    monkeypatch.setattr("qoq.kernels.bench_attention.bench_attention", attention)
    return asked


def test_tables_fit_80_columns(qoq: Any, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for options in ([], ["--details"]):
        outcome = qoq("bench", *options)
        assert outcome.code == 0, outcome.stderr
        assert "…" not in outcome.stdout
        assert max(len(line) for line in outcome.stdout.splitlines() if "not measured" not in line) <= 80
        assert "measured roofline: 3060 GB/s" in outcome.stdout
        assert "Products of one llama-3-8b layer" in outcome.stdout
        assert "not measured: int8: torch._int_mm takes 17 rows or more" in outcome.stdout
        assert ("│ fp8-row" in outcome.stdout) == bool(options), "only with rates of the baselines"
        assert "fp8-row: torch._scaled_mm, one scale a row" in outcome.stdout
    assert "sizes of llama-3-8b" in outcome.stderr


def test_everything_is_measured_by_default(qoq: Any, measured: dict[str, Any]) -> None:
    assert qoq("bench").code == 0
    assert measured["gemm"]["shapes"]["gate_up"] == (28672, 4096)
    assert measured["gemm"]["rows"] == [1, 8, 16, 32, 64, 128, 256, 1024, 4096]
    assert set(measured["gemm"]["variants"]) == set(GEMM_VARIANTS)
    assert [measured["gemm"][name] for name in ("repeat", "rest", "seed")] == [20, 3.0, 0]
    assert measured["attention"]["rest"] == 3.0
    assert measured["attention"]["cases"] == list(DEFAULT_CASES)
    assert measured["attention"]["variants"] == list(ATTENTION_VARIANTS)


def test_json_says_where_and_how(qoq: Any, measured: dict[str, Any]) -> None:
    outcome = qoq("bench", "--json", "--seed", 3, "--repeat", 5, "--rest", 0)
    data = outcome.json
    assert data["projected"] is False
    assert data["gpu"]["name"] == FACTS.name
    assert data["state"]["after"]["sm_mhz"] == 1980.0
    assert (data["seed"], data["repeat"], data["rest"]) == (3, 5, 0)
    assert measured["gemm"]["rest"] == 0
    assert data["command"].startswith("qoq")
    assert data["date"].endswith("+00:00")
    assert data["roofline"]["tops"]["8-bit"] == 1500.0
    (layer,) = (row for row in data["gemm"]["layer"] if (row["m"], row["variant"]) == (64, "w4a8-g128"))
    parts = [r for r in data["gemm"]["results"] if (r["m"], r["variant"]) == (64, "w4a8-g128")]
    assert layer["us"] == pytest.approx(sum(part["timing"]["median_us"] for part in parts))
    assert not any((row["m"], row["variant"]) == (1, "int8") for row in data["gemm"]["layer"])
    json.dumps(data)


def test_parts_and_baselines_are_chosen(qoq: Any, measured: dict[str, Any]) -> None:
    args = ("bench", "llama-2-7b", "--what", "gemm", "--batch", "1,17", "--against", "fp16,fp8", "--json")
    data = qoq(*args).json
    assert "attention" not in data
    assert measured["gemm"]["rows"] == [1, 17]
    assert measured["gemm"]["variants"] == ["w4a8-g128", "w4a8-chn", "fp16", "fp8", "fp8-row"]
    qoq("bench", "--against", "none", "--what", "attention", "--batch", "2,32", "--prompt-len", "100,2048")
    assert measured["attention"]["variants"] == ["kv4", "kv8"]
    assert measured["attention"]["cases"] == [(2, 100), (32, 100), (2, 2048), (32, 2048)]


def test_sizes_come_from_a_checkpoint_or_a_model(
    qoq: Any, measured: dict[str, Any], tiny_checkpoint: Path, small_model: Path
) -> None:
    assert qoq("bench", tiny_checkpoint, "--what", "gemm", "--json").json["shape"]["num_layers"] == 4
    shape = qoq("bench", small_model, "--what", "gemm", "--json").json["shape"]
    assert (shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]) == (128, 256, 64)
    assert measured["gemm"]["shapes"]["qkv"] == (256, 128)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--what", "gem"), "use some of gemm, attention, e2e"),
        (("--against", "fp16,marlin"), "--against marlin"),
        (("--batch", "0"), "--batch 0: expected whole numbers"),
        (("--batch", "1,,2"), "--batch '1,,2'"),
        (("--prompt-len", "1k"), "--prompt-len 1k"),
        (("--repeat", "0"), "--repeat 0"),
        (("--rest", "-1"), "--rest -1"),
        (("--rest", "nan"), "--rest nan"),
        (("--device", "cpu"), "--device cpu: the kernels run on CUDA devices only"),
        (("--plot", "speed.pdf"), "--plot speed.pdf"),
        (("--plot", "no/such/speed.svg"), "no folder no/such"),
        (("--what", "attention", "--batch", "32"), "--batch 32: attention also needs the tokens of each sequence"),
        (("--what", "gemm", "--prompt-len", "1024"), "--prompt-len: a product has no sequences"),
        (("--batch", "8192", "--prompt-len", "1024"), "attention takes at most 4096 sequences"),
        (("no-such-model",), "no-such-model"),
        (("--price", "1.2"), "--price: only e2e serves a model"),
        (("--output-len", "64"), "--output-len: only e2e serves a model"),
        (("--precision", "fp16"), "--precision: only e2e serves a model"),
    ],
)
def test_wrong_options_are_named(args: tuple[str, ...], words: str, qoq: Any) -> None:
    outcome = qoq("bench", *args)
    assert outcome.code == 2, outcome.stderr
    assert words in outcome.error
    assert outcome.stdout == ""


def test_without_a_gpu_it_says_so(fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    error = fails(3, "bench")
    assert "qoq bench measures the GPU of this machine" in error
    assert "--gpu NAME projects" in error


def test_the_gpu_at_hand_is_measured_when_it_is_named(
    qoq: Any, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("qoq.calib.job.check_device", lambda device: None)
    for name in ("h100", "H100-SXM"):
        assert qoq("bench", "--gpu", name, "--what", "gemm", "--json").json["projected"] is False
    projected = qoq("bench", "--gpu", "L40S", "--what", "gemm", "--json").json
    assert projected["projected"] is True
    assert projected["gpu"]["name"] == "l40s"


def test_without_matplotlib_a_plot_is_refused_before_measuring(
    fails: Any, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert "pip install 'qoq[report]'" in fails(3, "bench", "--plot", "speed.svg")
    assert measured == {}


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plot(qoq: Any, measured: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra [report] is not installed")
    outcome = qoq("bench", "--plot", f"speed.{suffix}")
    assert outcome.code == 0, outcome.stderr
    assert "drawn into" in outcome.stderr
    assert (tmp_path / f"speed.{suffix}").stat().st_size > 5000
