"""`qoq --help` answers at once, because nothing heavy is imported before a command runs."""

import json
import resource
import subprocess
import sys
from pathlib import Path

QOQ = Path(sys.executable).with_name("qoq")
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "tokenizers",
    "safetensors",
    "gguf",
    "cupy",
    "pandas",
    "vllm",
}
LIMIT_SECONDS, MOST_RUNS = 0.5, 25


def processor_seconds_for_help() -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([QOQ, "--help"], capture_output=True, check=True, timeout=30)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def test_help_is_quick() -> None:
    """Start-up is one thread of imports, so on a free core this is the time a user waits.

    Processor time, and the best of several, because on a busy machine the clock on the wall measures the neighbours,
    and a shared core is slow for seconds at a time.
    """
    times = [processor_seconds_for_help()]
    while min(times) >= LIMIT_SECONDS and len(times) < MOST_RUNS:
        times.append(processor_seconds_for_help())
    assert min(times) < LIMIT_SECONDS, times


def test_the_app_imports_nothing_heavy() -> None:
    probe = "import json, sys, qoq_cli.app; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-P", "-c", probe], capture_output=True, text=True, check=True)
    assert HEAVY & set(json.loads(result.stdout)) == set()
