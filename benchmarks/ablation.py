"""What each step of the recipes contributes on one model: perplexity, KL divergence, and agreement on the top token.

Rows begin with plain rounding and add a step at a time, to the recipe of the paper and from its GPTQ to ours. Named
recipes are run with every seed of the calibration windows, steps with the first. With --injections, the best recipe is
run once more on copies of the model with outliers in keys (x20) and norm gains (x30), which compute the same.
Every number comes from the `qoq` command, run as a user would; --jobs of them run at a time.

    python benchmarks/ablation.py MODEL --calib TEXT --evaluation TEXT --out benchmarks/ablation-NAME.json
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from qoq.recipes.load import load_recipe

_QOQ = [sys.executable, "-c", "from qoq_cli.app import main; main()"]
_GRIDS = {"g128": 128, "chn": None}


@dataclass(frozen=True, eq=False)
class Row:
    """One recipe of the table; `is_named` ones are run with every seed, and on injected models if `is_injected`."""

    name: str
    recipe: dict[str, Any]
    is_named: bool = False
    is_injected: bool = False


def rows(grid: str) -> list[Row]:
    """The steps for one grid, each with all that are above it."""
    paper = _settings(f"qoq-{grid}")
    best = _settings(f"qoq-{grid}-best")
    plain = {"group_size": _GRIDS[grid]}
    gptq = {**plain, "rotation": paper["rotation"], "smooth_attention": paper["smooth_attention"], "rounding": "gptq"}
    searched = {**gptq, "grid": "search"}
    keys = {**searched, "smooth_attention": best["smooth_attention"], "align_keys": best["align_keys"]}
    damped = {**keys, "gptq": {"damping": "auto"}}
    untuned = {**best, "tuning": None}
    steps = [
        Row(f"rtn-{grid}", plain),
        Row("+ rotation", {**plain, "rotation": paper["rotation"]}),
        Row("+ SmoothAttention", {**gptq, "rounding": "rtn"}),
        Row("+ output smoothing, reorder", {**paper, "rounding": "rtn", "grid": "range"}),
        Row("+ GPTQ", {**paper, "grid": "range"}),
        Row(f"qoq-{grid}", paper, is_named=True),
        Row(".. without output smoothing, reorder", gptq),
        Row(".. + searched grid", searched),
        Row(".. + aligned keys, searched strength", keys),
        Row(".. + damping by tokens", damped),
        Row(".. + aims at the 16-bit model, zeros between codes", untuned),
        Row(f"qoq-{grid}-best", best, is_named=True, is_injected=True),
        Row(f"qoq-{grid}-best, keys rotated", _rotated(best), is_named=True),
    ]
    return [Row(f"{grid}: {row.name}", row.recipe, row.is_named, row.is_injected) for row in steps]


def _settings(name: str) -> dict[str, Any]:
    left_out = {"name", "description", "calibration"}
    return load_recipe(name).model_dump(mode="json", exclude=left_out)


def _rotated(recipe: dict[str, Any]) -> dict[str, Any]:
    """With rotated keys, an aligned mean would become an outlier again."""
    return {**recipe, "key_rotation": "hadamard", "align_keys": None}


@dataclass(frozen=True)
class Run:
    """One checkpoint to make: of which row, with which calibration seed, from which model."""

    row: Row
    seed: int
    model: str
    injection: int | None

    @property
    def folder(self) -> str:
        name = "".join(letter if letter.isalnum() else "-" for letter in self.row.name)
        return f"{name}-{self.seed}" + ("" if self.injection is None else f"-injected-{self.injection}")


def qoq(*arguments: object) -> dict[str, Any]:
    """Run one `qoq` command with --json and return what it prints."""
    command = [*_QOQ, *map(str, arguments), "--json", "--quiet"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def make(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Quantize; the manifest. A checkpoint that an earlier run left in --work is taken if it was asked for alike."""
    folder, recipe = options.work / run.folder, options.work / f"{run.folder}.yaml"
    asked = options.work / f"{run.folder}.asked.json"
    calibration = ("--calib", options.calib, "--samples", options.samples, "--seq-len", options.calib_seq_len)
    given = ("--recipe", recipe, *calibration, "--seed", run.seed, "--device", options.device)
    question = json.dumps([run.model, run.row.recipe, *map(str, given)])
    if (folder / "qoq_manifest.json").is_file() and asked.is_file() and asked.read_text() == question:
        manifest: dict[str, Any] = json.loads((folder / "qoq_manifest.json").read_text())
        return manifest
    recipe.write_text(json.dumps(run.row.recipe))
    asked.write_text(question)
    return qoq("quantize", run.model, *given, "-o", folder, "--restart")


def score(run: Run, options: argparse.Namespace) -> tuple[dict[str, Any], float]:
    """Scores of a checkpoint, and the perplexity of the 16-bit model."""
    text = ("--ppl", options.evaluation, "--seq-len", options.seq_len, "--limit", options.limit)
    backend = ("--device", options.device, "--backend", "reference")
    result = qoq("eval", options.work / run.folder, "--baseline", options.model, *text, *backend)
    models: dict[str, Any] = result["texts"][str(options.evaluation)]["models"]
    found = {Path(name).name: scores for name, scores in models.items()}
    return found[run.folder], found[Path(options.model).name]["perplexity"]


def inject(options: argparse.Namespace, seed: int) -> str:
    """A copy of the model with outliers, in the work folder."""
    folder = options.work / f"injected-{seed}"
    script = str(Path(__file__).with_name("inject_outliers.py"))
    arguments = [options.model, str(folder), "--factor", "20", "--gains", "30", "--seed", str(seed)]
    subprocess.run([sys.executable, script, *arguments], check=True)
    return str(folder)


def plan(options: argparse.Namespace) -> list[Run]:
    """Every checkpoint of the table; those that matter most come first."""
    found: list[Run] = []
    copies = {seed: inject(options, seed) for seed in range(options.injections)}
    for row in [row for grid in options.grid for row in rows(grid)]:
        seeds = options.seeds if row.is_named else options.seeds[:1]
        found += [Run(row, seed, options.model, None) for seed in seeds]
        if row.is_injected:
            found += [Run(row, options.seeds[0], model, seed) for seed, model in copies.items()]
    return sorted(found, key=lambda run: not run.row.is_named)


def summary(scores: list[dict[str, Any]], baseline: float) -> dict[str, Any]:
    """One row of the table: means over its runs."""
    measures = ("perplexity", "kl_divergence", "top1_agreement", "seconds")
    mean = {key: statistics.mean(each[key] for each in scores) for key in measures}
    return {
        "runs": len(scores),
        **mean,
        "loss": mean["perplexity"] / baseline - 1,
        "perplexities": [each["perplexity"] for each in scores],
        "kl_divergences": [each["kl_divergence"] for each in scores],
    }


class Table:
    """What is measured so far; written after every run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._baseline = float("nan")
        self._scores: dict[Run, dict[str, Any]] = {}

    def add(self, run: Run, scores: dict[str, Any], seconds: float, baseline: float) -> None:
        """One run, which took `seconds` to quantize."""
        self._scores[run], self._baseline = {**scores, "seconds": seconds}, baseline
        self._options.out.write_text(json.dumps(self._content(), indent=2) + "\n")

    def _rows(self) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for row in [row for grid in self._options.grid for row in rows(grid)]:
            for suffix, is_injected in (("", False), (", outliers injected", True)):
                mine = [
                    run
                    for run in self._scores
                    if run.row.name == row.name and (run.injection is not None) == is_injected
                ]
                if mine:
                    mine.sort(key=lambda run: (run.seed, run.injection))
                    table[row.name + suffix] = summary([self._scores[run] for run in mine], self._baseline)
        return table

    def _content(self) -> dict[str, Any]:
        options = self._options
        settings = ("samples", "calib_seq_len", "seeds", "seq_len", "limit", "jobs")
        return {
            "model": Path(options.model).name,
            "setting": {key: getattr(options, key) for key in settings},
            "machine": {
                "device": platform.machine() if options.device == "cpu" else torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "perplexity_16bit": self._baseline,
            "rows": self._rows(),
        }

    def show(self) -> None:
        """Print it."""
        print(f"{'16 bit':50} {self._baseline:8.2f}")
        for name, row in self._rows().items():
            print(
                f"{name:50} {row['perplexity']:8.2f} {row['loss']:+7.1%} KL {row['kl_divergence']:.4f}"
                f" top {row['top1_agreement']:.1%} {row['runs']} run(s) {row['seconds']:.0f} s"
            )


def main() -> None:
    """Make the table, print it and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/ablation"))
    parser.add_argument("--grid", choices=sorted(_GRIDS), action="append")
    parser.add_argument("--rows", choices=("all", "named", "steps"), default="all", help="named recipes, or the rest")
    parser.add_argument("--only", default="", help="rows whose names match this regular expression")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--calib-seq-len", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--injections", type=int, default=0, help="copies of the model with outliers")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--limit", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=1, help="commands at a time")
    options = parser.parse_args()
    options.grid = options.grid or list(_GRIDS)
    options.work.mkdir(parents=True, exist_ok=True)
    runs = [run for run in plan(options) if re.search(options.only, run.row.name)]
    if options.rows != "all":
        runs = [run for run in runs if run.row.is_named == (options.rows == "named")]
    table = Table(options)

    def measure(run: Run) -> tuple[Run, dict[str, Any], float, float]:
        seconds: float = make(run, options)["run"]["seconds"]
        return (run, *score(run, options), seconds)

    with ThreadPoolExecutor(options.jobs) as pool:
        for done in as_completed([pool.submit(measure, run) for run in runs]):
            run, scores, baseline, seconds = done.result()
            table.add(run, scores, seconds, baseline)
    table.show()


if __name__ == "__main__":
    main()
