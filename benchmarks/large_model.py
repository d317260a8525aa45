"""Time and memory of the recipes on a random model with blocks of the sizes of Llama-3-8B, extrapolated from a few.

Runs `qoq quantize` on one block and on --blocks of them; the difference gives the time of a block, and what is left is
the rest (embedding, head, reading the text). The whole model is the rest and 32 blocks. Peak memory does not grow with
the depth of a model.

    python benchmarks/large_model.py --calib TEXT --out benchmarks/large-model.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from qoq_cli.model_location import tiny_folder

_QOQ = [sys.executable, "-c", "from qoq_cli.app import main; main()"]
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


def main() -> None:
    """Measure each recipe in processes of its own, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calib", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--recipe", nargs="+", default=["qoq-g128", "qoq-g128-best"])
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for blocks in (1, arguments.blocks):
            random_model(Path(work, f"model-{blocks}"), blocks)
        for recipe in arguments.recipe:
            runs = {}
            for blocks in (1, arguments.blocks):
                model, output = Path(work, f"model-{blocks}"), Path(work, "checkpoint")
                command = [*_QOQ, "quantize", str(model), "--recipe", recipe, "-o", str(output), "--restart"]
                options = ["--samples", str(arguments.samples), "--seq-len", str(arguments.seq_len)]
                options += ["--calib", arguments.calib, "--device", arguments.device, "--json", "--quiet"]
                done = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE, text=True)
                runs[blocks] = json.loads(done.stdout)["run"]
            each = (runs[arguments.blocks]["seconds"] - runs[1]["seconds"]) / (arguments.blocks - 1)
            rest = runs[1]["seconds"] - each
            rows.append(
                {
                    "recipe": recipe,
                    "seconds": {str(blocks): run["seconds"] for blocks, run in runs.items()},
                    "seconds_block": round(each, 1),
                    "seconds_rest": round(rest, 1),
                    "seconds_whole": round(rest + _WHOLE * each, 1),
                    "peak_bytes": runs[arguments.blocks]["peak_bytes"],
                }
            )
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
