"""`qoq bench --gpu` of a GPU that is not here, and `qoq gpus`: options, labels, error bars, and how long they take."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qoq.recipes.gpus import gpus

QOQ = Path(sys.executable).with_name("qoq")
LIMIT_SECONDS = 8.0


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.parametrize("columns", [80, 100])
def test_every_table_is_labelled_and_fits(qoq: Any, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for model, gpu in (("llama-3-8b", "l40s"), ("llama-3-70b", "b200"), ("qwen1.5-72b", "rtx-6000-ada")):
        outcome = qoq("bench", model, "--gpu", gpu, "--price", 1.2)
        assert outcome.code == 0, outcome.stderr
        assert "…" not in outcome.stdout
        tables = [line for line in outcome.stdout.splitlines() if line[:1] in "┏┃┡│└"]
        assert max(map(len, tables)) <= columns
        assert outcome.stdout.startswith(f"PROJECTED for {gpus()[gpu].title}, not measured")
        titles = [line for line in outcome.stdout.splitlines() if f" of {model} on " in line]
        assert len(titles) == 3
        assert all(title.startswith("Projected: ") for title in titles)
        assert "error bars: ± " in outcome.stdout


def test_json_is_one_object_with_error_bars(qoq: Any) -> None:
    data = qoq("bench", "--gpu", "l40s", "--price", 2, "--json").json
    assert data["projected"] is True
    assert data["gpu"]["name"] == "l40s"
    assert data["kernels"] == "portable"
    assert data["measured_on"] == "h100-sxm"
    assert [row["precision"] for row in data["e2e"]] == ["w4a8kv4-g128", "w4a8kv4-chn", "fp16", "fp8", "w8a8kv8"]
    for row in data["e2e"]:
        tokens = row["speed"]["tokens_per_s"]
        assert row["low_tokens_per_s"] < tokens < row["high_tokens_per_s"]
        assert row["high_tokens_per_s"] == pytest.approx(tokens * (1 + row["error"]))
        assert row["tokens_per_dollar"] == pytest.approx(tokens * 1800)
        assert row["dollars_per_million"] == pytest.approx(1e6 / row["tokens_per_dollar"])
        assert row["first_token_alone_s"] < row["speed"]["prefill_s"]
        used = sum(row["memory"][part] for part in ("weights", "kv_cache", "activations", "reserved", "left"))
        assert used == data["gpu"]["memory_mib"] << 20
    for row in [*data["gemm"]["layer"], *data["attention"]["results"]]:
        assert row["low_us"] < row["us"] < row["high_us"]
    ours, fp16 = (next(row for row in data["e2e"] if row["precision"] == name) for name in ("w4a8kv4-g128", "fp16"))
    assert ours["speed"]["tokens_per_s"] > 1.5 * fp16["speed"]["tokens_per_s"]


def test_without_a_price_there_is_none(qoq: Any) -> None:
    data = qoq("bench", "--gpu", "l40s", "--what", "e2e", "--json").json
    assert data["price"] is None
    assert all(row["tokens_per_dollar"] is row["dollars_per_million"] is None for row in data["e2e"])
    assert "per $" not in qoq("bench", "--gpu", "l40s", "--what", "e2e").stdout


def test_options_choose_what_is_projected(qoq: Any) -> None:
    options = ("--batch", "8,32", "--prompt-len", "512,2048", "--output-len", 64, "--precision", "w4a8kv8-chn")
    data = qoq("bench", "llama-2-7b", "--gpu", "a100", "--against", "fp16", *options, "--json").json
    cases = [(row["prompt_len"], row["speed"]["sequences"], row["precision"]) for row in data["e2e"]]
    names = ("w4a8kv8-chn", "fp16")
    assert cases == [(length, batch, name) for length in (512, 2048) for batch in (8, 32) for name in names]
    assert {row["output_len"] for row in data["e2e"]} == {64}
    assert [row["m"] for row in data["gemm"]["layer"]] == [8] * 3 + [32] * 3
    assert {(row["batch"], row["length"]) for row in data["attention"]["results"]} == {
        (8, 512),
        (32, 512),
        (8, 2048),
        (32, 2048),
    }
    alone = qoq("bench", "--gpu", "a100", "--what", "gemm", "--against", "none", "--json").json
    assert alone["gemm"]["variants"] == ["w4a8-g128", "w4a8-chn"]
    assert "e2e" not in alone


def test_float8_is_left_out_where_there_is_none(qoq: Any) -> None:
    outcome = qoq("bench", "--gpu", "a10")
    assert "not projected: fp8: the tensor cores of A10 have no float8" in outcome.stdout
    data = qoq("bench", "--gpu", "a10", "--json").json
    assert "fp8" not in data["gemm"]["variants"]
    assert all(row["precision"] != "fp8" for row in data["e2e"])


def test_what_does_not_fit_says_so(qoq: Any) -> None:
    outcome = qoq("bench", "llama-2-70b", "--gpu", "l40s", "--what", "e2e", "--against", "fp16")
    assert "too large" in outcome.stdout
    data = qoq("bench", "llama-2-70b", "--gpu", "l40s", "--what", "e2e", "--against", "fp16", "--json").json
    speeds = {row["precision"]: row["speed"] for row in data["e2e"]}
    assert speeds["fp16"] is None
    assert speeds["w4a8kv4-g128"]["sequences"] > 1
    crowded = qoq("bench", "--gpu", "l4", "--what", "e2e", "--batch", "4000", "--json").json
    assert all(row["speed"] is None and row["memory"]["left"] < 0 for row in crowded["e2e"])


def test_sizes_come_from_a_model_too(qoq: Any, small_model: Path) -> None:
    data = qoq("bench", small_model, "--gpu", "rtx-4090", "--json").json
    assert data["shape"]["head_dim"] == 64
    assert all(row["speed"]["sequences"] == 512 for row in data["e2e"])


def test_hopper_and_blackwell_say_which_kernels(qoq: Any) -> None:
    assert "qoq's kernels for Hopper" in qoq("bench", "--gpu", "h200").stdout
    blackwell = " ".join(qoq("bench", "--gpu", "b200").stdout.split())
    assert "qoq's portable kernels" in blackwell
    assert "is an assumption" in blackwell
    assert "2 times as wide" in blackwell


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--gpu", "l40x"), "GPU 'l40x': not in the data sheet -> did you mean l40s"),
        (("--gpu", "mi300x"), "`qoq gpus` lists every one"),
        (("--gpu", "l40s", "--price", "0"), "--price 0.0: expected dollars an hour"),
        (("--gpu", "l40s", "--price", "-1"), "--price -1.0"),
        (("--gpu", "l40s", "--price", "nan"), "--price nan"),
        (("--gpu", "l40s", "--price", "inf"), "--price inf"),
        (("--gpu", "l40s", "--what", "gemm", "--price", "1"), "--price: only e2e serves a model"),
        (("--gpu", "l40s", "--what", "gemm", "--output-len", "9"), "--output-len: only e2e serves a model"),
        (("--gpu", "l40s", "--what", "gemm", "--prompt-len", "9"), "--prompt-len: a product has no sequences"),
        (("--gpu", "l40s", "--output-len", "0"), "--output-len 0: expected whole numbers"),
        (("--gpu", "l40s", "--precision", "w4a16"), "--precision w4a16: not known"),
        (("--gpu", "l40s", "--against", "marlin"), "--against marlin: not known"),
        (("--gpu", "l40s", "--what", "e2e,fast"), "--what fast: not known"),
        (("--gpu", "l40s", "--what", "e2e", "--batch", "8192"), "--batch 8192: e2e takes at most 4096 sequences"),
        (("--gpu", "l40s", "--plot", "speed.svg"), "--plot: a projection is not drawn"),
        (("no-such-model", "--gpu", "l40s"), "no-such-model"),
    ],
)
def test_wrong_options_are_named(args: tuple[str, ...], words: str, fails: Any) -> None:
    assert words in fails(2, "bench", *args)


def test_what_is_not_projected_is_told(qoq: Any) -> None:
    data = qoq("bench", "--gpu", "a100", "--what", "gemm", "--against", "int8", "--json").json
    assert "int8" in data["skipped"]
    assert "int8" not in qoq("bench", "--gpu", "a100", "--what", "gemm", "--json").json["skipped"]
    outcome = qoq("bench", "llama-3-70b", "--gpu", "l4", "--what", "e2e")
    assert "too large: fp16, 1 x 1536 tokens" in outcome.stdout
    assert "up to 512" in outcome.stdout


def test_gpus_lists_the_data_sheet(qoq: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = qoq("gpus")
    assert "…" not in outcome.stdout
    assert all(f"│ {name} " in outcome.stdout for name in gpus())
    sheets = qoq("gpus", "--json").json["gpus"]
    assert [sheet["name"] for sheet in sheets] == list(gpus())
    assert sheets[1]["int8_tops"] == 733


def test_a_machine_without_a_gpu_answers_in_seconds() -> None:
    """Processor time of the whole command, imports and all."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [QOQ, "bench", "--gpu", "l40s", "--what", "e2e", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert json.loads(done.stdout)["projected"] is True
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < LIMIT_SECONDS
