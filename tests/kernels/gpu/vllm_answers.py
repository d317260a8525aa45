"""Greedy answers of vLLM, with what its engine holds: a job in JSON, a result in JSON, in a process of its own.

    python tests/kernels/gpu/vllm_answers.py JOB RESULT

A process each, because an engine keeps its GPU memory, and environment variables hold for a process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_METRICS = ("vllm:num_preemptions", "vllm:prefix_cache_hits")
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # errors come from this process, with their stack
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `evidence` is sent to the engine as a function
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_COLOR": "0",
    "HF_HUB_OFFLINE": "1",
    "PYTHONFAULTHANDLER": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "4",  # several processes share the cores
}


@dataclass(frozen=True)
class Job:
    """`options` are of vLLM's LLM; `turns`: how often all prompts are answered, one time after the other."""

    model: str
    options: Mapping[str, Any]
    prompts: list[list[int]]
    new_tokens: int
    turns: int = 1


@dataclass
class Result:
    """answers and cached_tokens are of each turn, in the order of the prompts; `said`: what the plug-in logged."""

    version: str
    answers: list[list[list[int]]] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


def ask(job: Job, folder: Path, environment: Mapping[str, str], timeout: float) -> Result:
    """Have `job` done by a new process, with files in `folder`. Raises RuntimeError, with the end of its log."""
    folder.mkdir(parents=True)
    asked, told, log = folder / "job.json", folder / "result.json", folder / "log"
    asked.write_text(json.dumps(asdict(job)), encoding="utf-8")
    own = {**_ENVIRONMENT, "VLLM_CACHE_ROOT": str(folder / "cache"), **environment}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-u", __file__, str(asked), str(told)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **own},
            start_new_session=True,
        )
        try:
            how = f"exit code {process.wait(timeout)}"
        except subprocess.TimeoutExpired:
            how = f"no answer within {timeout:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # an engine may be a process of its own
            process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if process.returncode or not told.is_file():
        errors = list(dict.fromkeys(line[:300] for line in lines if "Error" in line))[:10]
        end = [line[:300] for line in lines[-60:]]
        raise RuntimeError("\n".join([f"vLLM: {how}; {log}", "lines with errors:", *errors, "end of the log:", *end]))
    result = Result(**json.loads(told.read_text(encoding="utf-8")))
    result.said = [line for line in lines if "qoq: " in line]
    return result


def answer(job: Job) -> Result:
    """In the process that has vLLM."""
    import vllm

    llm = vllm.LLM(model=job.model, **job.options)
    params = vllm.SamplingParams(temperature=0, max_tokens=job.new_tokens, ignore_eos=True, detokenize=False)
    result = Result(version=str(vllm.__version__))
    for _ in range(job.turns):
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in job.prompts], params, use_tqdm=False)
        result.answers.append([[int(token) for token in output.outputs[0].token_ids] for output in outputs])
        result.cached_tokens.append(sum(output.num_cached_tokens or 0 for output in outputs))
    result.metrics = {metric.name: metric.value for metric in llm.get_metrics() if metric.name in _METRICS}
    result.evidence = llm.collective_rpc(evidence)[0]
    return result


def evidence(worker: Any) -> dict[str, Any]:
    """What a worker of vLLM 0.26 serves the model with: the cache of its first attention layer, and its linears.

    Imports nothing of this module: it is sent to a process that does not have it.
    """
    worker = getattr(worker, "worker", worker)
    config, runner = worker.vllm_config, worker.model_runner
    layers = config.compilation_config.static_forward_context.values()
    layer = next(layer for layer in layers if hasattr(layer, "kv_cache"))
    cache, backend = layer.kv_cache, layer.attn_backend
    methods = [getattr(module, "quant_method", None) for module in runner.get_model().modules()]
    return {
        "runner": type(runner).__module__,
        "attention": f"{backend.__module__}.{backend.__qualname__}",
        "cache_dtype": str(config.cache_config.cache_dtype),
        "cache_shape": list(cache.shape),
        "cache_bytes": cache.nbytes,
        "filled_pages": int((cache.flatten(1) != 0).any(1).sum()),
        "linears": sorted({getattr(method, "backend", "") for method in methods if hasattr(method, "progressive")}),
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
    }


def main(asked: str, told: str) -> None:
    result = answer(Job(**json.loads(Path(asked).read_text(encoding="utf-8"))))
    partial = Path(f"{told}.tmp")
    partial.write_text(json.dumps(asdict(result)), encoding="utf-8")
    partial.replace(told)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # how an engine is taken down is not what is asked for


if __name__ == "__main__":
    main(*sys.argv[1:])
