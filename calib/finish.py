"""The last step of a run: configuration, tokenizer, index, model card, and the manifest that says "complete"."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from qoq.calib.corpus import Windows
from qoq.calib.plan import Plan
from qoq.calib.skeleton import load_tokenizer
from qoq.formats.checkpoint import read_config
from qoq.formats.disk import disk_errors, write_atomically
from qoq.formats.manifest import CARD_NAME, MANIFEST_NAME, MANIFEST_VERSION, describe_files, write_manifest
from qoq.formats.packing import packed_shapes
from qoq.formats.sources import is_gguf
from qoq.formats.work_folder import JobState, WorkFolder
from qoq.formats.writer import ShardWriter, index_json
from qoq.recipes.schema import KeyRotation

_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.txt",
)
"""Files of the source model that a checkpoint carries along unchanged."""


def finish_checkpoint(
    plan: Plan,
    work: WorkFolder,
    state: JobState,
    windows: Windows,
    source_hashes: dict[str, str],
    *,
    tool_version: str,
    run: dict[str, Any],
) -> dict[str, Any]:
    """Publish the shards and write every other file, the manifest last; may be repeated. Returns the manifest."""
    output = plan.request.output
    shards = [shard.name for shard in plan.shards]
    index = index_json(plan.shards)
    indexes = [] if index is None else [ShardWriter.index_name]
    with _companions(plan, work) as (folder, companions):
        names = [*shards, *indexes, *companions, "config.json", "quant_config.json", CARD_NAME]
        work.claim([*names, MANIFEST_NAME])
        work.publish(shards)
        _copy(folder, output, companions)
    if index is not None:
        _write_json(output / ShardWriter.index_name, index)
    _write_json(output / "config.json", _config(plan))
    _write_json(output / "quant_config.json", {"wbits": 4, "group_size": plan.config.to_dict()["group_size"]})
    totals = checkpoint_totals(plan)
    manifest = {
        "format_version": MANIFEST_VERSION,
        "tool": {"name": "qoq", "version": tool_version},
        "recipe": _recipe(plan, windows),
        "source": {"model": plan.request.model_name, "revision": plan.request.revision, "sha256": source_hashes},
        "calibration": {
            "source": windows.source,
            "windows": int(windows.tokens.shape[0]),
            "seq_len": int(windows.tokens.shape[1]),
            "fingerprint": windows.fingerprint,
        },
        "quantization_config": plan.config.to_dict(),
        "totals": totals,
        "blocks": list(state.records),
    }
    write_atomically(output / CARD_NAME, _model_card(plan, manifest).encode())
    manifest["files"] = describe_files(output, names)
    manifest["run"] = run
    write_manifest(output, manifest)
    return manifest


def _recipe(plan: Plan, windows: Windows) -> dict[str, Any]:
    """The recipe as resolved, with the calibration text by its name and not by the path it had here."""
    recipe = plan.request.recipe.model_dump(mode="json")
    recipe["calibration"]["dataset"] = windows.source
    return recipe


def checkpoint_totals(plan: Plan) -> dict[str, Any]:
    """Sizes in bytes, and bits per weight of the quantized linears, from the shapes on disk."""
    packed = weights = 0
    progressive = plan.request.recipe.group_size is not None
    for linear in plan.quantized.values():
        shapes = packed_shapes(linear.out_features, linear.in_features, progressive=progressive, has_bias=False)
        for dtype, shape in shapes.values():
            size = dtype.itemsize
            for axis in shape:
                size *= axis
            packed += size
        weights += linear.weight.numel()
    return {
        "checkpoint_bytes": sum(shard.nbytes for shard in plan.shards),
        "model_bytes_16bit": plan.model_bytes,
        "quantized_linears": len(plan.quantized),
        "quantized_weights": weights,
        "bits_per_weight": round(packed * 8 / weights, 4) if weights else None,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def _config(plan: Plan) -> dict[str, Any]:
    model = plan.request.model
    config = json.loads(plan.skeleton.config.to_json_string()) if is_gguf(model) else read_config(model)
    config.pop("_name_or_path", None)
    config["architectures"] = [plan.skeleton.family.architecture]
    config["tie_word_embeddings"] = plan.skeleton.is_tied
    # transformers 5 writes `dtype`; the servers that read this method ask for `torch_dtype`.
    config["dtype"] = config["torch_dtype"] = plan.request.kept_dtype
    config["quantization_config"] = plan.config.to_dict()
    return dict(config)


@contextmanager
def _companions(plan: Plan, work: WorkFolder) -> Iterator[tuple[Path, list[str]]]:
    """The folder that holds the files to carry along, and their names."""
    model = plan.request.model
    if not is_gguf(model):
        code = sorted(path.name for path in model.glob("*.py")) if plan.request.trust_remote_code else []
        yield model, [*(name for name in _COMPANIONS if (model / name).is_file()), *code]
        return
    tokenizer = load_tokenizer(model, trust_remote_code=plan.request.trust_remote_code)
    with disk_errors(work.path), tempfile.TemporaryDirectory(dir=work.path, prefix="tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        yield Path(folder), sorted(path.name for path in Path(folder).iterdir())


def _copy(source: Path, output: Path, names: list[str]) -> None:
    for name in names:
        with disk_errors(output / name):
            content = (source / name).read_bytes()
        write_atomically(output / name, content)


def _model_card(plan: Plan, manifest: dict[str, Any]) -> str:
    request, totals, calibration = plan.request, manifest["totals"], manifest["calibration"]
    front = ModelCardData(
        base_model=request.model_name if "/" in request.model_name else None,  # only hub ids have a slash
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["qoq", request.recipe.scheme],
    )
    bits = totals["bits_per_weight"]
    norms = "folded into" if plan.config.norms_folded else "kept apart from"
    sizes = f"{totals['checkpoint_bytes'] / 1e9:.3f} GB, {totals['model_bytes_16bit'] / 1e9:.3f} GB in 16 bit"
    weights = (
        "left in 16 bit" if bits is None else f"4 bit on the {_grid(request.recipe.group_size)} ({bits:g} bits each)"
    )
    return f"""---
{front.to_yaml()}
---

# {request.model_name} in {request.recipe.scheme}

{request.model_name}, quantized with qoq {manifest["tool"]["version"]}, recipe `{request.recipe.name}`:

- weights of {totals["quantized_linears"]} linears: {weights}
- activations: {request.recipe.act_bits} bit per token; KV cache: {request.recipe.kv_bits} bit per token and head
- key rotation: {_rotation(plan.config.key_rotation)}
- size: {sizes}
- calibration: {calibration["windows"]} windows of {calibration["seq_len"]} tokens of {calibration["source"]}

## Use

```python
import torch
import qoq.kernels.hf  # teaches transformers this format
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

`qoq verify PATH` checks every file and every weight; `qoq eval PATH --baseline MODEL` measures what it costs.
Norm gains are {norms} the weights. `qoq_manifest.json` has the recipe, the source's hashes and the error of each layer.
"""


def _rotation(key_rotation: KeyRotation) -> str:
    if key_rotation == "none":
        return "none"
    return f"{key_rotation}; queries and keys are rotated while the model runs, which other runtimes do not do"


def _grid(group_size: int | None) -> str:
    return "progressive grid in groups of 128" if group_size else "grid of each channel"
