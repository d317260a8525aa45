"""Peak memory of `qoq quantize` on random models of 8, 16 and 32 equal blocks: it must not grow with the depth.

python benchmarks/peak_memory.py --out benchmarks/peak-memory.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from qoq_cli.model_location import builtin_text, tiny_folder


def random_model(folder: Path, blocks: int) -> int:
    """Write a random Llama of `blocks` blocks with tiny's tokenizer; returns the bytes of its weights in 16 bit."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=4096,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    weights = {
        name: tensor.half().contiguous()
        for name, tensor in LlamaForCausalLM(config).state_dict().items()
        if name != "lm_head.weight"
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_folder() / name, folder / name)
    return sum(tensor.nbytes for tensor in weights.values())


def main() -> None:
    """Measure each depth in a process of its own and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    rows = []
    for blocks in arguments.blocks:
        with tempfile.TemporaryDirectory() as work:
            model, output = Path(work, "model"), Path(work, "checkpoint")
            size = random_model(model, blocks)
            command = ["qoq", "quantize", str(model), "-o", str(output), "--calib", str(builtin_text("calibration"))]
            options = ["--samples", "4", "--seq-len", "256", "--device", arguments.device, "--json", "--quiet"]
            done = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE, text=True)
            run = json.loads(done.stdout)["run"]
            rows.append({"blocks": blocks, "model_bytes": size, "peak_bytes": run["peak_bytes"]})
            print(f"{blocks:3} blocks, {size / 1e6:7.1f} MB of weights: peak {run['peak_bytes']['host'] / 1e6:7.1f} MB")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"device": arguments.device, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
