"""Tables of runs of vLLM, from files as the commands write them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.benchmarks.scripts import load_script

_, _, vllm_tables = map(load_script, ("gpu_tables", "markdown_table", "vllm_tables"))  # the last imports the others


def write(folder: Path, name: str, configuration: str, tokens_per_s: float, kv_tokens: int | None) -> None:
    run = {"configuration": configuration, "prompt_len": 1000, "output_len": 1000}
    data = {"vllm": {"results": [{**run, "tokens_per_s": tokens_per_s, "kv_tokens": kv_tokens}]}}
    (folder / f"vllm-{name}-1000-1000-h200.json").write_text(json.dumps(data))


def test_throughput_is_compared_with_fp8(tmp_path: Path) -> None:
    write(tmp_path, "w4a8kv4", "w4a8kv4-g128", 21000.4, 1819259)
    write(tmp_path, "fp8", "fp8", 14000.0, None)
    write(tmp_path, "w4a8kv4-again", "w4a8kv4-g128", 20300.0, 1819259)
    ((title, table),) = vllm_tables.tables(tmp_path, "h200")
    assert title == "1000 tokens in, 1000 out"
    assert table.splitlines()[2:] == [
        "| w4a8kv4-g128 | 21,000 | 1.50 | 1,819,259 |",
        "| fp8 | 14,000 | 1.00 | - |",
        "| w4a8kv4-g128, again | 20,300 | 1.45 | 1,819,259 |",
    ]


def test_latency_is_listed_by_rate(tmp_path: Path) -> None:
    for name, configuration, ms in (("w4a8kv4", "w4a8kv4-g128", 1.0), ("fp8", "fp8", 2.0)):
        times = {"p50_ttft_ms": 40 * ms, "p99_ttft_ms": 90 * ms, "p50_tpot_ms": 5 * ms, "p99_tpot_ms": 8.24 * ms}
        rates = [{"rate": rate, "output_throughput": 500 * rate, **times} for rate in (4.0, 8.0)]
        data = {"configuration": configuration, "rates": rates}
        (tmp_path / f"vllm-latency-{name}-h200.json").write_text(json.dumps(data))
    ((_, table),) = vllm_tables.tables(tmp_path, "h200")
    assert table.splitlines()[2:] == [
        "| 4 | w4a8kv4-g128 | 40 / 90 | 5.0 / 8.2 | 2,000 |",
        "| 4 | fp8 | 80 / 180 | 10.0 / 16.5 | 2,000 |",
        "| 8 | w4a8kv4-g128 | 40 / 90 | 5.0 / 8.2 | 4,000 |",
        "| 8 | fp8 | 80 / 180 | 10.0 / 16.5 | 4,000 |",
    ]


def test_no_files_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vllm_tables.py", "--gpu", "h200", "--folder", str(tmp_path)])
    assert vllm_tables.main() == 1
    assert "no vllm-*-h200.json in" in capsys.readouterr().err
