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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from qoq.formats.quantization_config import QuantizationConfig
from qoq.recipes.errors import EnvironmentProblem, InputError
from qoq.recipes.precisions import WeightKind
from qoq.recipes.schema import GROUP_SIZE
from qoq.recipes.shapes import ModelShape
from qoq_cli.bench_options import check_price, choose, served_lengths, split
from qoq_cli.model_location import tiny_folder
from qoq_cli.progress import progress
from qoq_cli.sizes import parse_size
from qoq_cli.terminal import Terminal, print_text
from qoq_cli.vllm_environment import VLLM, check_vllm, environment


@dataclass(frozen=True)
class Configuration:
    """What vLLM is given beyond what all have: `options`, and `quantization`, of the model's config.json.

    weights   what the bytes of the linears are counted as
    """

    weights: WeightKind
    options: tuple[str, ...] = ()
    quantization: Mapping[str, Any] | None = None


def _groups_of_int4() -> dict[str, Any]:
    """What `qoq export --to vllm-w4a8` writes: vLLM's own products of 4-bit weights and 8-bit activations."""
    weights = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": GROUP_SIZE, "dynamic": False}
    activations = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "format": "pack-quantized",
        "weights": {**weights, "type": "int"},
        "input_activations": {**activations, "type": "int"},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


CONFIGURATIONS = {
    "w4a8kv4-g128": Configuration("g128", quantization=QuantizationConfig(GROUP_SIZE).to_dict()),
    "w4a8kv4-chn": Configuration("per_channel", quantization=QuantizationConfig(None).to_dict()),
    "fp8": Configuration("fp8", ("--quantization", "fp8", "--kv-cache-dtype", "fp8")),
    "bf16": Configuration("fp16"),
    # On Hopper vLLM would take activations in fp8 for it, but for Humming.
    "w4a8-int4kv": Configuration(
        "g128", ("--kv-cache-dtype", "int4_per_token_head", "--linear-backend", "humming"), _groups_of_int4()
    ),
}
_OURS = ("w4a8kv4-g128", "w4a8kv4-chn")
_DEFAULT = ("w4a8kv4-g128", "fp8", "bf16")
_REQUESTS, _SEQUENCES, _WARM_UP = 512, 512, 64
_UTILIZATION = 0.92
"""vLLM's own default."""
_OF_THROUGHPUT = ("--disable-detokenize", "--num-warmups", str(_WARM_UP))
"""The requests before the timed ones meet the kernels that are compiled at their first use."""
_ENGINE = (
    *("--load-format", "dummy", "--dtype", "bfloat16", "--no-enable-prefix-caching"),
    *("--max-num-seqs", str(_SEQUENCES), "--max-num-batched-tokens", "8192"),
)
_SPEED = re.compile(r"Throughput: [\d.]+ requests/s, [\d.]+ total tokens/s, ([\d.]+) output tokens/s")
_COUNTS = re.compile(r"Total num (prompt|output) tokens:\s+(\d+)")
_CAPACITY = re.compile(r"KV cache size: ([\d,]+) tokens")
_ENGINE_ERROR = re.compile(r"\(EngineCore\b[^)]*\) ERROR [^\]]*\] (.*)")
ROOM = 64
"""Tokens of a sequence beyond prompt and answer: vLLM's random prompts can be a little longer than asked for."""


@dataclass(frozen=True)
class VllmPlan:
    """The options, checked: `lengths` are of prompts and answers. `memory_bytes`: of the GPU, None for vLLM's share."""

    lengths: list[tuple[int, int]]
    configurations: list[str]
    requests: int
    memory_bytes: int | None
    price: float | None

    @staticmethod
    def parse(
        prompt_len: str | None,
        output_len: str | None,
        precision: str | None,
        against: str | None,
        requests: int | None,
        memory: str | None,
        price: float | None,
    ) -> VllmPlan:
        """From the options of `qoq bench`; `against` is None where it was not given. Raises InputError."""
        check_price(price)
        if requests is not None and requests < 1:
            raise InputError(f"--requests {requests}: out of range", remedy="pass at least 1")
        theirs = tuple(name for name in CONFIGURATIONS if name not in _OURS)
        chosen = [
            *_chosen("--precision", precision, _OURS, _DEFAULT[:1]),
            *_chosen("--against", against, theirs, _DEFAULT[1:]),
        ]
        if not chosen:
            raise InputError(
                "--precision none, --against none: nothing is left to run",
                remedy=f"name one of {', '.join(CONFIGURATIONS)}",
            )
        return VllmPlan(
            lengths=served_lengths(prompt_len, output_len),
            configurations=chosen,
            requests=requests or _REQUESTS,
            memory_bytes=None if memory is None else parse_size("--memory", memory),
            price=price,
        )


def _chosen(option: str, text: str | None, known: tuple[str, ...], default: Sequence[str]) -> Sequence[str]:
    if text is None:
        return default
    return [] if text.strip().lower() == "none" else choose(option, split(option, text), known)


def run_vllm(terminal: Terminal, plan: VllmPlan, shape: ModelShape, seed: int) -> dict[str, Any]:
    """Measure; what `--json` has under "vllm".

    Raises EnvironmentProblem where vLLM is missing or fails, InputError for memory that this GPU or a model has no use
    for.
    """
    version, results = check_vllm(), []
    gpu = gpu_at_hand()
    share = share_of_memory(plan.memory_bytes, gpu, shape, plan.configurations)
    # The first once more, for what the GPU's warmth does to it; a single one is compared with nothing.
    order = [*plan.configurations, *(plan.configurations[:1] if len(plan.configurations) > 1 else [])]
    runs = [(lengths, name) for lengths in plan.lengths for name in order]
    with tempfile.TemporaryDirectory(prefix="qoq-vllm-") as folder, progress(terminal, "vLLM") as update:
        for done, ((prompt_len, output_len), name) in enumerate(runs):
            model = Path(folder) / f"{done}-{name}"
            write_model(model, shape, name, max_positions=prompt_len + output_len + ROOM)
            words = command(model, name, prompt_len, output_len, plan.requests, share, seed)
            label = f"{name}, {prompt_len} in, {output_len} out"

            def tell(line: str, done: int = done, label: str = label) -> None:
                update(done, len(runs), f"{label}: {line[:60]}")

            log = _run(words, Path(folder) / f"{done}.log", tell)
            speed, capacity = _SPEED.search(log), _CAPACITY.search(log)
            counts = {kind: int(count) for kind, count in _COUNTS.findall(log)}
            if speed is None or counts.keys() != {"prompt", "output"}:
                raise EnvironmentProblem(f"vLLM with {name} told no throughput:\n{_end(log)}", remedy=shlex.join(words))
            _check_counts(name, counts, prompt_len, output_len, plan.requests)
            tokens_per_s = float(speed[1])
            results.append(
                {
                    "configuration": name,
                    "prompt_len": prompt_len,
                    "output_len": output_len,
                    "requests": plan.requests,
                    "prompt_tokens": counts["prompt"],
                    "output_tokens": counts["output"],
                    "tokens_per_s": tokens_per_s,
                    "kv_tokens": None if capacity is None else int(capacity[1].replace(",", "")),
                    "tokens_per_dollar": None if plan.price is None else 3600 * tokens_per_s / plan.price,
                    "said_by_qoq": [line for line in log.splitlines() if "qoq:" in line],
                    "command": shlex.join(["vllm", *words[len(VLLM) :]]),
                }
            )
    settings = {
        "options": shlex.join([*_ENGINE, *_OF_THROUGHPUT]),
        "configurations": {name: shlex.join(CONFIGURATIONS[name].options) for name in plan.configurations},
        "seed": seed,
    }
    memory = {"asked_bytes": plan.memory_bytes, "bytes": int(share * gpu.memory_bytes), "share": share}
    return {
        "version": version,
        "gpu": asdict(gpu),
        "memory": memory,
        "settings": settings,
        "results": results,
        "price": plan.price,
    }


def _check_counts(name: str, counts: Mapping[str, int], prompt_len: int, output_len: int, requests: int) -> None:
    """Raises EnvironmentProblem where vLLM had other lengths than were asked for; its prompts are so but nearly."""
    if counts["output"] != requests * output_len or abs(counts["prompt"] - requests * prompt_len) > requests * ROOM:
        raise EnvironmentProblem(
            f"vLLM with {name} took {counts['prompt']} tokens of prompts and gave {counts['output']}, expected "
            f"{requests} times {prompt_len} and {output_len}",
            remedy="this version of vLLM understands its options in another way than vLLM 0.26",
        )


@dataclass(frozen=True)
class GpuAtHand:
    """The GPU that vLLM takes."""

    name: str
    memory_bytes: int


def gpu_at_hand() -> GpuAtHand:
    """The first that this process sees, as vLLM's does; nothing is allocated on it."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return GpuAtHand(properties.name, int(properties.total_memory))


def share_of_memory(memory_bytes: int | None, gpu: GpuAtHand, shape: ModelShape, names: Sequence[str]) -> float:
    """`--memory` as vLLM's --gpu-memory-utilization. Raises InputError where the GPU or one of `names` cannot do."""
    from qoq.kernels.footprint import RESERVED_BYTES, weight_bytes

    if memory_bytes is None:
        return _UTILIZATION
    asked = f"--memory {memory_bytes / 1e9:.4g}GB"
    if memory_bytes > gpu.memory_bytes:
        raise InputError(
            f"{asked}: this GPU has {gpu.memory_bytes / 1e9:.4g} GB ({gpu.name})",
            remedy=f"pass less, or leave it out: vLLM then takes {_UTILIZATION * 100:.0f} % of it",
        )
    needed = {name: weight_bytes(shape, CONFIGURATIONS[name].weights) + RESERVED_BYTES for name in names}
    largest = max(needed, key=needed.__getitem__)
    if memory_bytes < needed[largest]:
        raise InputError(
            f"{asked}: {shape.name} in {largest} takes {needed[largest] / 1e9:.4g} GB before its KV cache",
            remedy="pass more, or leave that configuration out",
        )
    return round(memory_bytes / gpu.memory_bytes, 4)


def command(
    model: Path, name: str, prompt_len: int, output_len: int, requests: int, share: float, seed: int
) -> list[str]:
    """What is run for one configuration."""
    # By these names: --input-len and --output-len give way to the defaults of the random ones (vLLM 0.26).
    lengths = ("--random-input-len", str(prompt_len), "--random-output-len", str(output_len))
    asked = ("--dataset-name", "random", *lengths, "--num-prompts", str(requests))
    engine = engine_options(name, prompt_len + output_len, share, seed)
    return [*VLLM, "bench", "throughput", "--model", str(model), *asked, *_OF_THROUGHPUT, *engine]


def engine_options(name: str, tokens: int, share: float, seed: int) -> list[str]:
    """Options of vLLM's engine for sequences of `tokens`, whichever of its commands starts it."""
    sizes = ("--max-model-len", str(tokens + ROOM), "--gpu-memory-utilization", str(share), "--seed", str(seed))
    return [*_ENGINE, *sizes, *CONFIGURATIONS[name].options]


def write_model(folder: Path, shape: ModelShape, name: str, *, max_positions: int) -> None:
    """A model of these sizes without weights, with a tokenizer of few tokens."""
    from qoq.kernels.runtime.config import llama_of_shape

    data = json.loads(llama_of_shape(shape, max_positions=max_positions).to_json_string(use_diff=False))
    data |= {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    if CONFIGURATIONS[name].quantization is not None:
        data["quantization_config"] = CONFIGURATIONS[name].quantization
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_folder() / file, folder / file)


def _run(words: Sequence[str], log: Path, tell: Callable[[str], None]) -> str:
    """What the command printed. Raises EnvironmentProblem when it ends with an error."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment()
        )
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
        kept = Path(tempfile.gettempdir()) / f"qoq-vllm-{process.pid}.log"
        shutil.copyfile(log, kept)
        raise EnvironmentProblem(
            f"vLLM ended with exit code {process.returncode} (all it printed: {kept}):\n{cause(text)}",
            remedy=f"run it by hand: {shlex.join(words)}",
        )
    return text


def cause(text: str) -> str:
    """The errors that vLLM's engine told, which is a process of its own, without the places; else the log's end."""
    told = [found[1] for line in text.splitlines() if (found := _ENGINE_ERROR.match(line))]
    errors = [line for line in told if not line.startswith((" ", "Traceback"))]
    return _end("\n".join(errors) or text)


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
    gpu, memory = data["gpu"], data["memory"]
    print_text(
        console,
        f"each in {memory['bytes'] / 1e9:.1f} of {gpu['memory_bytes'] / 1e9:.1f} GB of an {gpu['name']}",
        style="dim",
    )
    for line in dict.fromkeys(line for row in data["results"] for line in row["said_by_qoq"]):
        print_text(console, line, style="dim")
