"""What outliers in the keys cost, and what SmoothAttention takes back: a table of perplexities on one model.

Every number comes from the `qoq` command, run as a user would. The model and a copy of the same function with key
outliers (factor 20 on two RoPE pairs a head) are quantized under three ways of smoothing: none, the paper's constant
alpha = 0.5, and the search. The table is written anew after every group, and --reuse takes checkpoints that an earlier
run left in --work.

    python benchmarks/key_outliers.py MODEL --calib TEXT --evaluation TEXT --out benchmarks/key-outliers-NAME.json
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

_SMOOTHING: dict[str, Any] = {
    "none": None,
    "paper": {"mode": "fixed", "alpha": 0.5, "beta": 0.0},
    "search": {"mode": "search"},
}


def qoq(*arguments: object) -> dict[str, Any]:
    """Run one `qoq` command with --json and return what it prints."""
    command = ["qoq", *map(str, arguments), "--json", "--quiet"]
    print("$", " ".join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


class Table:
    """Runs quantizations and evaluations of one table with shared options."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self.seconds: dict[str, float] = {}

    def quantize(self, name: str, model: object, recipe: object, *more: object) -> Path:
        """Quantize under `name` in the work folder; an existing result is replaced."""
        output = Path(self._arguments.work) / name
        if self._arguments.reuse and (output / "qoq_manifest.json").is_file():
            return output
        options = ("--samples", self._arguments.samples, "--seq-len", self._arguments.calib_seq_len)
        calib = ("--calib", self._arguments.calib, "--device", self._arguments.device)
        manifest = qoq("quantize", model, "--recipe", recipe, "-o", output, "--restart", *options, *calib, *more)
        self.seconds[name] = manifest["run"]["seconds"]
        return output

    def evaluate(self, baseline: object, checkpoints: list[Path], *more: object) -> dict[str, Any]:
        """Scores by checkpoint name; the baseline's are under `16 bit`."""
        text = str(self._arguments.evaluation)
        options = ("--ppl", text, "--seq-len", self._arguments.seq_len, "--limit", self._arguments.limit)
        result = qoq("eval", *checkpoints, "--baseline", baseline, *options, "--device", self._arguments.device, *more)
        scores = result["texts"][text]["models"]
        return {"16 bit" if name == str(baseline) else Path(name).name: score for name, score in scores.items()}


def main() -> None:
    """Make the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/key-outliers"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--calib-seq-len", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--limit", type=int, default=6)
    parser.add_argument("--reuse", action="store_true")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    table = Table(arguments)
    left_out = ("out", "work", "model", "calib", "evaluation", "reuse")
    result: dict[str, Any] = {
        "setting": {key: value for key, value in vars(arguments).items() if key not in left_out}
        | {"model": Path(arguments.model).name},
        "machine": {
            "device": torch.cuda.get_device_name() if arguments.device != "cpu" else platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "quantize_seconds": table.seconds,
    }

    def add(group: str, scores: dict[str, Any]) -> None:
        result[group] = scores
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
        for name, score in scores.items():
            print(f"{group:20} {name:28} {score['scheme']:12} {score['perplexity']:9.3f}", flush=True)

    injected = arguments.work / "injected"
    inject = [sys.executable, str(Path(__file__).with_name("inject_outliers.py")), arguments.model, str(injected)]
    subprocess.run(inject, check=True)
    for kind, more in (("w16a16kv4", ("--ignore", ".")), ("w4a8kv4", ())):
        for source, model in (("plain", arguments.model), ("injected", injected)):
            names = []
            for smoothing, spec in _SMOOTHING.items():
                recipe = arguments.work / f"{smoothing}.yaml"
                recipe.write_text(json.dumps({"group_size": 128, "smooth_attention": spec}))
                names.append(table.quantize(f"{kind}-{source}-{smoothing}", model, recipe, *more))
            add(f"{kind}_{source}", table.evaluate(model, names))


if __name__ == "__main__":
    main()
