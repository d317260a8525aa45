"""Latency of one configuration of `qoq bench --what vllm` under load: a server of vLLM, and vLLM's own client.

    python benchmarks/vllm_latency.py --configuration w4a8kv4-g128 --memory 73GB --out benchmarks/latency.json

Random weights in a model's sizes. Requests come at random times (a Poisson process), --rates of them a second, one rate
after the other for --seconds each, against one server: `vllm serve` and `vllm bench serve` of the installed vLLM. Times
to first token and per output token are medians and 99th percentiles over all requests of a rate.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from qoq.recipes.errors import QoQError
from qoq.recipes.shapes import find_shape
from qoq_cli import bench_vllm
from qoq_cli.sizes import parse_size
from qoq_cli.vllm_environment import check_vllm

VLLM = bench_vllm.VLLM
_WARM_UP = 32
_KEPT = (
    *(f"{kind}_{what}_ms" for what in ("ttft", "tpot", "itl") for kind in ("mean", "p50", "p99")),
    *("completed", "failed", "duration", "request_throughput", "output_throughput"),
)
"""Of what the client writes."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configuration", choices=bench_vllm.CONFIGURATIONS, default="w4a8kv4-g128")
    parser.add_argument("--shape", default="llama-3-8b", help="a model whose sizes are taken")
    parser.add_argument("--memory", help="of the GPU: 73GB, ...; by default 92 %% of it")
    parser.add_argument("--rates", default="4,8,16", help="requests a second")
    parser.add_argument("--seconds", type=float, default=60, help="how long requests come, for each rate")
    parser.add_argument("--prompt-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=float, default=400, help="seconds that the server may take to start")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rates = [float(rate) for rate in options.rates.split(",")]
    if min(rates) <= 0 or options.seconds <= 0:
        parser.error("--rates and --seconds are larger than 0")
    try:
        report = measure(options, rates)
    except QoQError as error:
        print(f"vllm_latency: {error}", file=sys.stderr)
        return 1
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for row in report["rates"]:
        print(
            f"{report['configuration']} at {row['rate']:g}/s: first token {row['p50_ttft_ms']:.0f} ms (p50), "
            f"{row['p99_ttft_ms']:.0f} (p99); each further one {row['p50_tpot_ms']:.1f}, {row['p99_tpot_ms']:.1f}; "
            f"{row['output_throughput']:.0f} tokens/s"
        )
    return 0


def measure(options: argparse.Namespace, rates: list[float]) -> dict[str, Any]:
    """All rates against one server. Raises QoQError for options or a machine that cannot do, RuntimeError where vLLM
    fails."""
    version, gpu, shape = check_vllm(), bench_vllm.gpu_at_hand(), find_shape(options.shape)
    asked = None if options.memory is None else parse_size("--memory", options.memory)
    share = bench_vllm.share_of_memory(asked, gpu, shape, [options.configuration])
    tokens = options.prompt_len + options.output_len
    engine = bench_vllm.engine_options(options.configuration, tokens, share, options.seed)
    with tempfile.TemporaryDirectory(prefix="qoq-vllm-") as folder:
        model, log = Path(folder) / "model", Path(folder) / "server.log"
        bench_vllm.write_model(model, shape, options.configuration, max_positions=tokens + bench_vllm.ROOM)
        write_tokenizer(model, shape.vocab_size)
        port = free_port()
        server = [*VLLM, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *engine]
        with running(server, log) as process:
            started = time.monotonic()
            wait_for(process, port, log, options.start)
            start_s = time.monotonic() - started
            found = [one_rate(rate, options, model, port, log) for rate in rates]
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if "qoq:" in line]
    return {
        "configuration": options.configuration,
        "shape": asdict(shape),
        "version": version,
        "gpu": asdict(gpu),
        "memory": {"asked_bytes": asked, "bytes": int(share * gpu.memory_bytes), "share": share},
        "prompt_len": options.prompt_len,
        "output_len": options.output_len,
        "seconds": options.seconds,
        "command": shlex.join(["vllm", *server[len(VLLM) :]]),
        "start_s": start_s,
        "said_by_qoq": list(dict.fromkeys(said)),
        "rates": found,
    }


def write_tokenizer(folder: Path, tokens: int) -> None:
    """One word a token: a prompt has the length that was asked for, and every answer can be spelled."""
    tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(tokens)}, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def one_rate(rate: float, options: argparse.Namespace, model: Path, port: int, log: Path) -> dict[str, Any]:
    """What the client measured. Raises RuntimeError when a request failed or was cut short."""
    requests = max(1, round(rate * options.seconds))
    result = model.parent / f"{rate:g}.json"
    words = [
        *(
            *VLLM,
            "bench",
            "serve",
            "--backend",
            "vllm",
            "--base-url",
            f"http://127.0.0.1:{port}",
            "--model",
            str(model),
        ),
        *("--dataset-name", "random", "--ignore-eos", "--temperature", "1.0", "--seed", str(options.seed)),
        *("--random-input-len", str(options.prompt_len), "--random-output-len", str(options.output_len)),
        *("--num-prompts", str(requests), "--request-rate", str(rate), "--num-warmups", str(_WARM_UP)),
        *("--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99", "--disable-tqdm"),
        *("--save-result", "--result-dir", str(result.parent), "--result-filename", result.name),
    ]
    print(f"{requests} requests at {rate:g} a second", file=sys.stderr, flush=True)
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode or not result.is_file():
        raise RuntimeError(f"{shlex.join(words)}: exit code {done.returncode}\n{done.stdout[-3000:]}\n{end_of(log)}")
    told = json.loads(result.read_text(encoding="utf-8"))
    counts = told["completed"], told["total_output_tokens"]
    if counts != (requests, requests * options.output_len):
        raise RuntimeError(
            f"{counts[0]} of {requests} requests were answered, with {counts[1]} tokens instead of "
            f"{requests * options.output_len}:\n{end_of(log)}"
        )
    return {"rate": rate, "requests": requests, **{key: told[key] for key in _KEPT}}


@contextlib.contextmanager
def running(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The server, in a process group of its own, since its engine is a process that has the GPU."""
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(process: subprocess.Popen[bytes], port: int, log: Path, seconds: float) -> None:
    """Until the server answers. Raises RuntimeError, with the end of its log, when it ends or takes too long."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        time.sleep(0.5)
    how = "does not answer" if process.poll() is None else f"ended with exit code {process.returncode}"
    raise RuntimeError(f"vLLM's server {how}:\n{end_of(log)}")


def end_of(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:])


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
    return port


if __name__ == "__main__":
    sys.exit(main())
