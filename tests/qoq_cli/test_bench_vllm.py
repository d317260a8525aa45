"""`qoq bench --what vllm`: what vLLM is asked for, and what is read from what it prints; vLLM itself is replaced."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from qoq.formats.exporters.compressed_tensors import VllmW4A8
from qoq.formats.quantization_config import QuantizationConfig
from qoq.recipes.shapes import find_shape
from qoq_cli import bench_vllm

FAKE = """
import json, os, pathlib, sys
words = sys.argv[1:]
options = dict(zip(words, words[1:]))
model = pathlib.Path(options["--model"])
config = json.loads((model / "config.json").read_text())
asked = {"words": words, "config": config, "files": sorted(path.name for path in model.iterdir())}
with open(sys.argv[0] + ".asked", "a") as file:
    print(json.dumps(asked), file=file)
if "TQDM_DISABLE" in os.environ:
    sys.exit("ZeroDivisionError: division by zero")  # as vLLM 0.26, whose progress bar then has no time
if "--engine-fails" in words:
    print("(EngineCore pid=7) INFO 12-01 03:02:40 [core.py:340] starting")
    print("(EngineCore pid=7) ERROR 12-01 03:02:44 [core.py:1330] Traceback (most recent call last):")
    print("(EngineCore pid=7) ERROR 12-01 03:02:44 [core.py:1330] RuntimeError: the root cause")
    sys.exit("RuntimeError: Engine core initialization failed. See root cause above." + 20 * "\\n  more")
if "--fail" in words:
    sys.exit("CUDA out of memory, or so")
ours = config.get("quantization_config", {}).get("quant_method") == "qoq"
speed = 20000 if ours else 13000 if "fp8" in words else 7000
if ours:
    print("INFO qoq: KV cache of 4 bit in pages of 64 tokens")
print("INFO GPU KV cache size: 2,040,128 tokens", file=sys.stderr)
requests = int(options["--num-prompts"])
print(f"Throughput: 20.00 requests/s, 40000.00 total tokens/s, {speed}.25 output tokens/s")
print("Total num prompt tokens: ", requests * int(options["--random-input-len"]) + 1)
print("Total num output tokens: ", requests * (128 if "--short" in words else int(options["--random-output-len"])))
"""

Asked = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """What the stand-in was asked for, one entry a run."""
    script = tmp_path_factory.mktemp("fake") / "vllm.py"
    script.write_text(FAKE)
    monkeypatch.setattr(bench_vllm, "VLLM", (sys.executable, str(script)))
    monkeypatch.setattr(bench_vllm, "check_vllm", lambda: "0.26.0")
    monkeypatch.setattr(bench_vllm, "gpu_at_hand", lambda: bench_vllm.GpuAtHand("NVIDIA H200", 150 * 10**9))
    record = Path(f"{script}.asked")
    return lambda: [json.loads(line) for line in record.read_text().splitlines()]


def test_every_configuration_runs_and_the_first_again(qoq: Any, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = qoq("bench", "--what", "vllm", "--price", 2)
    assert outcome.code == 0, outcome.stderr
    runs = asked()
    assert [("fp8" in run["words"], "quantization_config" in run["config"]) for run in runs] == [
        (False, True),
        (True, False),
        (False, False),
        (False, True),
    ]
    for run in runs:
        words = run["words"]
        assert words[:2] == ["bench", "throughput"]
        options = dict(pairwise(words))
        lengths = (options["--random-input-len"], options["--random-output-len"], options["--num-prompts"])
        assert lengths == ("1024", "512", "512")
        assert options["--dataset-name"] == "random"
        assert int(options["--max-model-len"]) == run["config"]["max_position_embeddings"] >= 1024 + 512
        assert options["--load-format"] == "dummy"
        assert options["--gpu-memory-utilization"] == "0.92"
        assert run["files"] == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    assert "…" not in outcome.stdout
    assert "1.54" in outcome.stdout  # 20000 of 13000
    assert "vLLM 0.26.0, llama-3-8b, 512 requests: 1024 tokens in, 512 out" in outcome.stdout
    assert "KV cache of 4 bit in pages" in outcome.stdout
    assert "each in 138.0 of 150.0 GB of an NVIDIA H200" in outcome.stdout


def test_json_and_lengths(qoq: Any, asked: Asked) -> None:
    args = ("--prompt-len", "1000,128", "--output-len", "1000,128", "--against", "none", "--requests", 7, "--json")
    data = qoq("bench", "llama-2-7b", "--what", "vllm", *args).json
    assert data["shape"]["name"] == "llama-2-7b"
    results = data["vllm"]["results"]
    lengths = [(row["prompt_len"], row["output_len"], row["requests"]) for row in results]
    assert lengths == [(1000, 1000, 7), (128, 128, 7)]
    assert {row["tokens_per_s"] for row in results} == {20000.25}
    assert {row["kv_tokens"] for row in results} == {2040128}
    assert results[0]["command"].startswith("vllm bench throughput")
    assert len(asked()) == 2


def test_one_configuration_alone_in_the_memory_of_another_gpu(qoq: Any, asked: Asked) -> None:
    data = qoq("bench", "--what", "vllm", "--precision", "none", "--against", "fp8", "--memory", "75GB", "--json").json
    (run,) = asked()
    assert "fp8" in run["words"]
    assert dict(pairwise(run["words"]))["--gpu-memory-utilization"] == "0.5"
    told = data["vllm"]
    assert told["version"] == "0.26.0"
    assert told["gpu"] == {"name": "NVIDIA H200", "memory_bytes": 150 * 10**9}
    assert told["memory"] == {"asked_bytes": 75 * 10**9, "bytes": 75 * 10**9, "share": 0.5}
    assert told["settings"]["configurations"] == {"fp8": "--quantization fp8 --kv-cache-dtype fp8"}
    words = " ".join(run["words"])
    assert all(f"--{option}" in words for option in told["settings"]["options"].removeprefix("--").split(" --"))
    assert [row["tokens_per_s"] for row in told["results"]] == [13000.25]


def test_vllms_own_4_bits_are_those_of_the_export(qoq: Any, asked: Asked) -> None:
    assert qoq("bench", "--what", "vllm", "--precision", "none", "--against", "w4a8-int4kv").code == 0
    (run,) = asked()
    checkpoint: Any = SimpleNamespace(config={}, quantization=QuantizationConfig(128))
    exported = VllmW4A8().config(checkpoint)["quantization_config"]
    assert run["config"]["quantization_config"] == exported
    assert dict(pairwise(run["words"]))["--kv-cache-dtype"] == "int4_per_token_head"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--memory", "200GB"), "--memory 200GB: this GPU has 150 GB (NVIDIA H200)"),
        (("--memory", "12GB"), "--memory 12GB: llama-3-8b in bf16 takes 17.13 GB before its KV cache"),
        (("--memory", "5GB", "--against", "none"), "llama-3-8b in w4a8kv4-g128 takes"),
    ],
)
def test_memory_that_cannot_be_is_refused_before_anything_runs(
    args: tuple[str, ...], words: str, fails: Any, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_vllm, "_run", lambda *_: pytest.fail("vLLM was started"))
    assert words in fails(2, "bench", "--what", "vllm", *args)


def test_models_are_those_that_vllm_would_load(tmp_path: Path) -> None:
    shape = find_shape("llama-3-8b")
    bench_vllm.write_model(tmp_path / "model", shape, "w4a8kv4-chn", max_positions=2048)
    config = AutoConfig.from_pretrained(tmp_path / "model")
    sizes = (config.hidden_size, config.intermediate_size, config.num_key_value_heads, config.vocab_size)
    assert sizes == (4096, 14336, 8, 128256)
    assert config.architectures == ["LlamaForCausalLM"]
    keys = json.loads((tmp_path / "model" / "config.json").read_bytes())["quantization_config"]
    assert QuantizationConfig.from_dict(keys).group_size is None
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) <= shape.vocab_size


def test_answers_of_another_length_are_no_result(fails: Any, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.26 has options of lengths that it takes and does not follow."""
    monkeypatch.setitem(bench_vllm.CONFIGURATIONS, "fp8", bench_vllm.Configuration("fp8", ("--short",)))
    message = fails(3, "bench", "--what", "vllm", "--precision", "none", "--against", "fp8")
    assert "gave 65536, expected 512 times 1024 and 512" in message


def test_what_vllm_says_at_its_end_is_shown(fails: Any, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_vllm.CONFIGURATIONS, "fp8", bench_vllm.Configuration("fp8", ("--fail",)))
    message = fails(3, "bench", "--what", "vllm", "--against", "fp8")
    assert "exit code 1" in message
    assert "CUDA out of memory, or so" in message
    assert len(asked()) == 2


def test_what_vllms_engine_said_is_shown_and_all_is_kept(
    fails: Any, asked: Asked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_vllm.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(bench_vllm.CONFIGURATIONS, "fp8", bench_vllm.Configuration("fp8", ("--engine-fails",)))
    message = fails(3, "bench", "--what", "vllm", "--precision", "none", "--against", "fp8")
    assert "RuntimeError: the root cause" in message
    assert "See root cause above" not in message
    (kept,) = tmp_path.glob("qoq-vllm-*.log")
    assert kept.name in message
    assert "See root cause above" in kept.read_text()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--what", "vllm,gemm"), "vllm takes the GPU for itself"),
        (("--what", "vllm", "--batch", "4"), "--batch: vLLM's own benchmark has none"),
        (("--what", "vllm", "--against", "int8"), "--against int8: not known"),
        (("--what", "vllm", "--precision", "w4a8kv8-g128"), "--precision w4a8kv8-g128: not known"),
        (("--what", "vllm", "--requests", "0"), "--requests 0"),
        (("--what", "vllm", "--memory", "all"), "--memory 'all': not a size"),
        (("--what", "vllm", "--precision", "none", "--against", "none"), "nothing is left to run"),
        (("--what", "vllm", "--gpu", "l40s"), "--what vllm: not known"),
    ],
)
def test_wrong_options_are_named(args: tuple[str, ...], words: str, fails: Any) -> None:
    assert words in fails(2, "bench", *args)
