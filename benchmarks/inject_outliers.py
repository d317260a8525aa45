"""Write a copy of a model whose keys have outlier channels; it computes the same function.

Two RoPE pairs of every KV head are multiplied by a factor in the keys and divided by it in the queries. The copy is a
Hugging Face folder in float32, so that no rounding hides behind the injection.

    python benchmarks/inject_key_outliers.py MODEL OUT --factor 20
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safetensors.torch import save_file

from qoq.calib.plan import open_model
from qoq.calib.skeleton import load_tokenizer
from qoq_cli.demo.outliers import inject_key_outliers, inject_norm_outliers
from qoq_cli.model_location import resolve_model


def main() -> None:
    """Read MODEL (folder, .gguf file or alias) whole, inject, write OUT."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--factor", type=float, default=20.0)
    parser.add_argument("--pairs", type=int, default=2, help="RoPE pairs of each KV head")
    parser.add_argument("--gains", type=float, default=1.0, help="factor of norm gains")
    parser.add_argument("--channels", type=int, default=4, help="channels whose gains are multiplied")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    path = resolve_model(arguments.model).path
    skeleton, source = open_model(path)
    tensors = inject_key_outliers(
        {name: source.load(name).float().contiguous() for name in skeleton.tensor_shapes()},
        num_heads=skeleton.num_heads,
        num_kv_heads=skeleton.num_kv_heads,
        head_dim=skeleton.head_dim,
        factor=arguments.factor,
        pairs_per_head=arguments.pairs,
        seed=arguments.seed,
    )
    tensors = inject_norm_outliers(tensors, channels=arguments.channels, factor=arguments.gains, seed=arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, arguments.out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(skeleton.config.to_json_string())
    config["architectures"] = [skeleton.family.architecture]
    config["dtype"] = "float32"
    (arguments.out / "config.json").write_text(json.dumps(config, indent=2))
    load_tokenizer(path).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
