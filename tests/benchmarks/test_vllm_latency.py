"""Latency under load: what the server and the client are asked for, and what is kept; vLLM itself is replaced."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.benchmarks.scripts import load_script

FAKE = """
import http.server, json, pathlib, sys
words = sys.argv[1:]
options = dict(zip(words, words[1:]))
with open(sys.argv[0] + ".asked", "a") as file:
    print(json.dumps(words), file=file)
if words[0] == "serve":
    config = json.loads((pathlib.Path(words[1]) / "config.json").read_text())
    if "fp8" in words:
        sys.exit("CUDA out of memory, or so")
    print("INFO qoq: KV cache of 4 bits", config["quantization_config"]["quant_method"], flush=True)
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()
    http.server.HTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
requests, rate = int(options["--num-prompts"]), float(options["--request-rate"])
told = {f"{kind}_{what}_ms": rate for what in ("ttft", "tpot", "itl") for kind in ("mean", "p50", "p99")}
told |= {"completed": requests - (rate == 7), "failed": int(rate == 7), "duration": 1, "request_throughput": rate}
told |= {"output_throughput": 5.5, "total_output_tokens": requests * int(options["--random-output-len"]), "ttfts": []}
(pathlib.Path(options["--result-dir"]) / options["--result-filename"]).write_text(json.dumps(told))
"""

vllm_latency = load_script("vllm_latency")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The stand-in; what it is asked for is appended to script.py.asked."""
    script = tmp_path / "vllm.py"
    script.write_text(FAKE)
    monkeypatch.setattr(vllm_latency, "VLLM", (sys.executable, str(script)))
    monkeypatch.setattr(vllm_latency, "check_vllm", lambda: "0.26.0")
    gpu = vllm_latency.bench_vllm.GpuAtHand("NVIDIA H200", 146 * 10**9)
    monkeypatch.setattr(vllm_latency.bench_vllm, "gpu_at_hand", lambda: gpu)
    return script


def run(out: Path, *options: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    words = ["vllm_latency.py", "--out", str(out), "--seconds", "2", *options]
    monkeypatch.setattr(sys, "argv", [*words, "--shape", "llama-3.2-1b", "--prompt-len", "100", "--output-len", "20"])
    return vllm_latency.main()


def test_three_rates_against_one_server(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "found.json"
    assert run(out, "--memory", "73GB", "--rates", "2,4.5,8", monkeypatch=monkeypatch) == 0
    found = json.loads(out.read_text())
    assert [(row["rate"], row["requests"], row["p99_ttft_ms"]) for row in found["rates"]] == [
        (2, 4, 2),
        (4.5, 9, 4.5),
        (8, 16, 8),
    ]
    assert found["memory"]["share"] == 0.5
    assert found["version"] == "0.26.0"
    assert found["said_by_qoq"] == ["INFO qoq: KV cache of 4 bits qoq"]
    server, *clients = [json.loads(line) for line in Path(f"{script}.asked").read_text().splitlines()]
    assert dict(pairwise(server))["--gpu-memory-utilization"] == "0.5"
    assert {tuple(client[:2]) for client in clients} == {("bench", "serve")}
    assert dict(pairwise(clients[0]))["--base-url"].endswith(dict(pairwise(server))["--port"])


def test_a_server_that_ends_is_shown(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="exit code 1:\nCUDA out of memory, or so"):
        run(tmp_path / "found.json", "--configuration", "fp8", monkeypatch=monkeypatch)


def test_lost_requests_are_no_result(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="13 of 14 requests were answered"):
        run(tmp_path / "found.json", "--rates", "7", monkeypatch=monkeypatch)
    assert not (tmp_path / "found.json").exists()


def test_the_tokenizer_has_a_word_for_every_token(tmp_path: Path) -> None:
    vllm_latency.write_tokenizer(tmp_path, 5000)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = [4999, 0, 17, 17, 300]
    assert len(tokenizer) == 5000
    assert tokenizer.encode(tokenizer.decode(tokens)) == tokens
