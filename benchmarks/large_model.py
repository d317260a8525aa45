"""Time and memory of the recipes on a random model with blocks of the sizes of Llama-3-8B, extrapolated from a few.

Quantizes --blocks of them as `qoq quantize` does, each recipe in a process of its own. The blocks after the first,
which waits for kernels to be loaded, give the time of a block; the rest is embedding, head, and reading the text. The
whole model is the rest and 32 blocks. Peak memory does not grow with the depth of a model.

    python benchmarks/large_model.py --calib TEXT --out benchmarks/large-model.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from qoq.calib.corpus import Windows, calibration_windows, load_corpus
from qoq.calib.job import run
from qoq.calib.plan import QuantizeRequest, make_plan
from qoq.calib.progress import Progress
from qoq.calib.skeleton import load_tokenizer
from qoq.recipes.load import load_recipe
from qoq.recipes.schema import Calibration
from qoq_cli.model_location import tiny_folder

_WHOLE = 32


def random_model(folder: Path, blocks: int) -> None:
    """Write a Llama of `blocks` blocks, with a vocabulary of 32000 and tiny's tokenizer; weights are random."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="float16",
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator, device=device) * 0.02
        weights[name] = (1 + values if "norm" in name else values).half().cpu()
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_folder() / name, folder / name)


def measure(arguments: argparse.Namespace, recipe: str, model: Path, output: Path) -> dict[str, Any]:
    """One recipe on the model; seconds of each block, of the rest, and peak bytes."""
    calibration = Calibration(dataset=arguments.calib, samples=arguments.samples, seq_len=arguments.seq_len)
    settings = load_recipe(recipe).model_copy(update={"calibration": calibration})
    started = time.monotonic()
    plan = make_plan(QuantizeRequest(model, "random", output, settings, device=arguments.device))
    ends = [0.0]

    def windows() -> Windows:
        corpus = load_corpus(calibration.dataset, builtin={}, purpose="calibration")
        drawn = {"samples": calibration.samples, "seq_len": calibration.seq_len, "seed": calibration.seed}
        return calibration_windows(corpus, load_tokenizer(model), **drawn)

    def on_progress(step: Progress) -> None:
        if step.message.endswith(": done"):
            ends.append(time.monotonic() - started)
            print(f"{recipe}, {step.message} after {ends[-1]:.1f} s", file=sys.stderr, flush=True)
        elif step.message.startswith("block 0") and ends == [0.0]:
            ends[0] = time.monotonic() - started

    result = run(plan, windows, restart=True, tool_version="benchmark", on_progress=on_progress)
    whole = time.monotonic() - started
    blocks = [end - begin for begin, end in pairwise(ends)]
    each, rest = statistics.mean(blocks[1:]), whole - sum(blocks)
    return {
        "recipe": recipe,
        "seconds_blocks": [round(seconds, 1) for seconds in blocks],
        "seconds_rest": round(rest, 1),
        "seconds_whole": round(rest + _WHOLE * each, 1),
        "peak_bytes": result.manifest["run"]["peak_bytes"],
    }


def main() -> None:
    """Measure each recipe, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calib", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--recipe", nargs="+", default=["qoq-g128", "qoq-g128-best"])
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    if arguments.blocks < 2:
        parser.error("--blocks: at least 2, the first is not typical")
    rows = []
    with tempfile.TemporaryDirectory() as work:
        random_model(Path(work, "model"), arguments.blocks)
        for recipe in arguments.recipe:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                task = process.submit(measure, arguments, recipe, Path(work, "model"), Path(work, "checkpoint"))
                rows.append(task.result())
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu",
        "setting": {"samples": arguments.samples, "seq_len": arguments.seq_len, "blocks_whole": _WHOLE},
        "rows": rows,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
