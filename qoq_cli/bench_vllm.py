"""`qoq bench --what vllm`: vLLM's own throughput benchmark, with qoq's plug-in and with what vLLM has by itself.

Random weights in a model's sizes, as a Llama; one configuration after the other in a process of its own, and the first
once more at the end, since a GPU gets warm.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from qoq.recipes.errors import EnvironmentProblem, InputError
from qoq.recipes.shapes import ModelShape
from qoq_cli.bench_options import check_price, choose, served_lengths, split
from qoq_cli.model_location import tiny_folder
from qoq_cli.progress import progress
from qoq_cli.terminal import Terminal, print_text
from qoq_cli.vllm_environment import VLLM, check_vllm

CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "w4a8kv4-g128": (),
    "w4a8kv4-chn": (),
    "fp8": ("--quantization", "fp8", "--kv-cache-dtype", "fp8"),
    "bf16": (),
}
"""What each adds to the options of vLLM; those of qoq say it in config.json."""
_OURS = {"w4a8kv4-g128": 128, "w4a8kv4-chn": None}
_DEFAULT = ("w4a8kv4-g128", "fp8", "bf16")
_REQUESTS, _SEQUENCES = 512, 512
_COMMON = ("--load-format", "dummy", "--dtype", "bfloat16", "--disable-detokenize", "--no-enable-prefix-caching")
_SIZES = ("--max-num-seqs", str(_SEQUENCES), "--max-num-batched-tokens", "8192", "--gpu-memory-utilization", "0.92")
_SPEED = re.compile(r"Throughput: [\d.]+ requests/s, [\d.]+ total tokens/s, ([\d.]+) output tokens/s")
_CAPACITY = re.compile(r"KV cache size: ([\d,]+) tokens")
_ROOM = 64
"""Tokens of a sequence beyond prompt and answer: vLLM's random prompts can be a little longer than asked for."""


@dataclass(frozen=True)
class VllmPlan:
    """The options, checked: `lengths` are of prompts and answers."""

    lengths: list[tuple[int, int]]
    configurations: list[str]
    requests: int
    price: float | None

    @staticmethod
    def parse(
        prompt_len: str | None,
        output_len: str | None,
        precision: str | None,
        against: str | None,
        requests: int | None,
        price: float | None,
    ) -> VllmPlan:
        """From the options of `qoq bench`; `against` is None where it was not given. Raises InputError."""
        check_price(price)
        if requests is not None and requests < 1:
            raise InputError(f"--requests {requests}: out of range", remedy="pass at least 1")
        ours = choose("--precision", split("--precision", precision or _DEFAULT[0]), tuple(_OURS))
        others = list(_DEFAULT[1:])
        if against is not None:
            known = tuple(name for name in CONFIGURATIONS if name not in _OURS)
            others = [] if against == "none" else choose("--against", split("--against", against), known)
        return VllmPlan(served_lengths(prompt_len, output_len), [*ours, *others], requests or _REQUESTS, price)


def run_vllm(terminal: Terminal, plan: VllmPlan, shape: ModelShape, seed: int) -> dict[str, Any]:
    """Measure; what `--json` has under "vllm". Raises EnvironmentProblem where vLLM is missing or fails."""
    version, results = check_vllm(), []
    order = plan.configurations if len(plan.configurations) == 1 else [*plan.configurations, plan.configurations[0]]
    runs = [(lengths, name) for lengths in plan.lengths for name in order]
    with tempfile.TemporaryDirectory(prefix="qoq-vllm-") as folder, progress(terminal, "vLLM") as update:
        for done, ((prompt_len, output_len), name) in enumerate(runs):
            model = Path(folder) / f"{done}-{name}"
            write_model(model, shape, name, max_positions=prompt_len + output_len + _ROOM)
            words = command(model, name, prompt_len, output_len, plan.requests, seed)
            label = f"{name}, {prompt_len} in, {output_len} out"

            def tell(line: str, done: int = done, label: str = label) -> None:
                update(done, len(runs), f"{label}: {line[:60]}")

            log = _run(words, Path(folder) / f"{done}.log", tell)
            speed, capacity = _SPEED.search(log), _CAPACITY.search(log)
            if speed is None:
                raise EnvironmentProblem(f"vLLM with {name} told no throughput:\n{_end(log)}", remedy=shlex.join(words))
            tokens_per_s = float(speed[1])
            results.append(
                {
                    "configuration": name,
                    "prompt_len": prompt_len,
                    "output_len": output_len,
                    "requests": plan.requests,
                    "tokens_per_s": tokens_per_s,
                    "kv_tokens": None if capacity is None else int(capacity[1].replace(",", "")),
                    "tokens_per_dollar": None if plan.price is None else 3600 * tokens_per_s / plan.price,
                    "said_by_qoq": [line for line in log.splitlines() if "qoq:" in line],
                    "command": shlex.join(["vllm", *words[len(VLLM) :]]),
                }
            )
    return {"version": version, "results": results, "price": plan.price}


def command(model: Path, name: str, prompt_len: int, output_len: int, requests: int, seed: int) -> list[str]:
    """What is run for one configuration."""
    lengths = ("--input-len", str(prompt_len), "--output-len", str(output_len), "--num-prompts", str(requests))
    longest = ("--max-model-len", str(prompt_len + output_len + _ROOM))
    options = (*lengths, *longest, *_SIZES, *_COMMON, "--seed", str(seed), *CONFIGURATIONS[name])
    return [*VLLM, "bench", "throughput", "--model", str(model), *options]


def write_model(folder: Path, shape: ModelShape, name: str, *, max_positions: int) -> None:
    """A model of these sizes without weights, with a tokenizer of few tokens."""
    from qoq.formats.quantization_config import QuantizationConfig
    from qoq.kernels.runtime.config import llama_of_shape

    data = json.loads(llama_of_shape(shape, max_positions=max_positions).to_json_string(use_diff=False))
    data |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    folder.mkdir()
    if name in _OURS:
        data["quantization_config"] = QuantizationConfig(_OURS[name]).to_dict()
    (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_folder() / file, folder / file)


def _run(words: Sequence[str], log: Path, tell: Callable[[str], None]) -> str:
    """What the command printed. Raises EnvironmentProblem when it ends with an error."""
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None:
                tell(_end(log.read_text(encoding="utf-8", errors="replace"), lines=1))
                time.sleep(0.2)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its engine is a process of its own, and has the GPU
            process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    if process.returncode:
        raise EnvironmentProblem(
            f"vLLM ended with exit code {process.returncode}:\n{_end(text)}",
            remedy=f"run it by hand: {shlex.join(words)}",
        )
    return text


def _end(text: str, *, lines: int = 12) -> str:
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def render_vllm(console: Console, data: dict[str, Any], shape: dict[str, Any]) -> None:
    """One table for each pair of lengths; the last column compares with vLLM's fp8 of the same lengths."""
    from qoq_cli.bench_tables import print_titled, short
    from qoq_cli.served_tables import served_table

    pairs = dict.fromkeys((row["prompt_len"], row["output_len"]) for row in data["results"])
    for prompt_len, output_len in pairs:
        rows = [row for row in data["results"] if (row["prompt_len"], row["output_len"]) == (prompt_len, output_len)]
        fp8 = next((row["tokens_per_s"] for row in rows if row["configuration"] == "fp8"), None)
        headings = ["tokens/s", "of fp8", "KV cache,\ntokens"]
        table = served_table([*headings, *["tokens\nper $"] * (data["price"] is not None)])
        for row in rows:
            cells = [
                f"{row['tokens_per_s']:.0f}",
                "-" if fp8 is None else f"{row['tokens_per_s'] / fp8:.2f}",
                "-" if row["kv_tokens"] is None else f"{row['kv_tokens']}",
            ]
            if data["price"] is not None:
                cells.append(f"{short(row['tokens_per_dollar'] / 1e6)} M")
            table.add_row(row["configuration"], *cells)
        title = f"vLLM {data['version']}, {shape['name']}, {rows[0]['requests']} requests"
        print_titled(console, f"{title}: {prompt_len} tokens in, {output_len} out", table)
    for line in dict.fromkeys(line for row in data["results"] for line in row["said_by_qoq"]):
        print_text(console, line, style="dim")
