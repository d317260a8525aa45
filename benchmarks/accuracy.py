"""What quantization costs on one model: a table of perplexities, with and without outliers injected into the keys.

Every number comes from the `qoq` command, run as a user would. MODEL is quantized with each recipe and evaluated with a
KV cache of 16 and 4 bits; then the same function with key outliers (factor 20 on two RoPE pairs a head) is compared
under three ways of smoothing: none, the paper's constant alpha = 0.5, and the search.

    python benchmarks/accuracy.py MODEL --calib TEXT --evaluation TEXT --out benchmarks/accuracy-NAME.json
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
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
    parser.add_argument("--work", type=Path, default=Path("build/accuracy"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--calib-seq-len", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--limit", type=int, default=6)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    table = Table(arguments)
    started = time.time()

    recipes = ("rtn-g128", "qoq-g128", "rtn-chn", "qoq-chn")
    made = [table.quantize(recipe, arguments.model, recipe) for recipe in recipes]
    result: dict[str, Any] = {
        "recipes_kv4": table.evaluate(arguments.model, made),
        "recipes_kv16": table.evaluate(arguments.model, made, "--kv-bits", "16"),
    }

    injected = arguments.work / "injected"
    inject = [sys.executable, str(Path(__file__).with_name("inject_key_outliers.py")), arguments.model, str(injected)]
    subprocess.run(inject, check=True)
    for kind, more in (("w16a16kv4", ("--ignore", ".")), ("w4a8kv4", ())):
        for source, model in (("plain", arguments.model), ("injected", injected)):
            names = []
            for smoothing, spec in _SMOOTHING.items():
                recipe = arguments.work / f"{smoothing}.yaml"
                recipe.write_text(json.dumps({"group_size": 128, "smooth_attention": spec}))
                names.append(table.quantize(f"{kind}-{source}-{smoothing}", model, recipe, *more))
            result[f"{kind}_{source}"] = table.evaluate(model, names)

    result["setting"] = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(arguments).items()
        if key not in ("out", "work", "model", "calib", "evaluation")
    } | {"model": Path(arguments.model).name}
    result["machine"] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    result["quantize_seconds"] = table.seconds
    result["seconds"] = round(time.time() - started, 1)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    for group, scores in result.items():
        if group.startswith(("recipes", "w")):
            for name, score in scores.items():
                print(f"{group:20} {name:28} {score['scheme']:12} {score['perplexity']:9.3f}")


if __name__ == "__main__":
    main()
