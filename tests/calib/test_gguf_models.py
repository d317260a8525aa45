"""GGUF files of random models give the model that the safetensors they were made from give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from qoq.calib.corpus import Windows
from qoq.calib.job import run
from qoq.calib.plan import QuantizeRequest, make_plan, open_model
from qoq.calib.served import open_served
from qoq.calib.streaming import StreamedModel
from qoq.recipes.errors import InputError
from qoq.recipes.families import family_of
from qoq.recipes.schema import Calibration, Recipe, SmoothAttention

MakeModel = Callable[..., Any]
Tokens = Callable[..., Tensor]
CPU = torch.device("cpu")
VARIANTS = {
    "llama": ("llama", {}),
    "llama-grouped": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}),
    "llama-tied": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-4}),
}


def write_gguf(model: Any, path: Path, *, rope_factors: Any = None, scaling: str | None = None) -> None:
    """As llama.cpp's converter writes it: its names, and for Llama the rows of q and k in interleaved order."""
    config = model.config
    family = family_of(config.model_type)
    writer = gguf.GGUFWriter(str(path), family.gguf_arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(ord("!") + i) for i in range(config.vocab_size - 1)), "!!"])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        writer.add_rope_scaling_factor(4.0)
    theirs = {ours: name for name, ours in family.gguf_names.items()}
    for name, tensor in model.tensors.items():
        values = tensor.float().numpy()
        if name in theirs:
            writer.add_tensor(theirs[name], values)
            continue
        _, _, index, rest = name.split(".", 3)
        module, part = rest.rsplit(".", 1)
        if family.gguf_permuted and module[-6:] in ("q_proj", "k_proj"):
            values = np.concatenate([head[interleaved(len(head))] for head in np.split(values, len(values) // 64)])
        writer.add_tensor(f"blk.{index}.{theirs[module]}.{part}", values)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope_factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(size: int) -> list[int]:
    """Rows of a head, in halves, in the order 0, D/2, 1, D/2 + 1, ..."""
    return [row for pair in range(size // 2) for row in (pair, pair + size // 2)]


def logits_of(path: Path, windows: Tensor) -> Tensor:
    skeleton, source = open_model(path)
    return torch.stack(list(StreamedModel(skeleton, source, device=CPU).logits(windows)))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_file_is_the_model(name: str, make_model: MakeModel, tokens: Tokens, tmp_path: Path) -> None:
    family, overrides = VARIANTS[name]
    model = make_model(family, **overrides)
    write_gguf(model, tmp_path / "model.gguf")
    windows = tokens(2, 37)
    want, got = logits_of(model.folder, windows), logits_of(tmp_path / "model.gguf", windows)
    assert float((got - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("how", ["factors", "metadata"])
def test_a_scaled_rope_that_is_not_read_is_refused(how: str, make_model: MakeModel, tmp_path: Path) -> None:
    """Llama 3.1 and later keep their scaling in a tensor of factors, which transformers drops without a word."""
    path = tmp_path / "model.gguf"
    if how == "factors":
        write_gguf(make_model("llama"), path, rope_factors=np.linspace(1, 8, 32))
    else:
        write_gguf(make_model("llama"), path, scaling="linear")
    with pytest.raises(InputError, match="RoPE of this model is scaled"):
        open_model(path)


def test_a_run_from_a_file(make_model: MakeModel, tokens: Tokens, tmp_path: Path) -> None:
    """The same codes as from safetensors."""
    model = make_model("qwen2", dtype=torch.float32)
    write_gguf(model, tmp_path / "model.gguf")
    recipe = Recipe(
        name="t", smooth_attention=SmoothAttention(mode="fixed"), calibration=Calibration(samples=1, seq_len=16)
    )
    stored = []
    for i, source in enumerate((model.folder, tmp_path / "model.gguf")):
        plan = make_plan(QuantizeRequest(source, "m", tmp_path / f"out-{i}", recipe))
        load = Windows(tokens(1, 16), 1, "f", "s")
        run(plan, lambda load=load: load, restart=False, tool_version="0", on_progress=lambda _: None)
        tensors = open_served(tmp_path / f"out-{i}").checkpoint.source
        stored.append({name: tensors.load(name) for name in tensors.names()})
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])
