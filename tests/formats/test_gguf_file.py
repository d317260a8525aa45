"""GGUF files written by the gguf package, compared with what transformers loads from them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st

from qoq.formats import gguf_file
from qoq.formats.gguf_file import GGUFSource, gguf_architecture
from qoq.formats.gguf_header import read_gguf_header
from qoq.formats.safetensors_file import TensorInfo
from qoq.formats.sources import open_source
from qoq.recipes.errors import InputError
from qoq.recipes.families import Family
from qoq.recipes.families.llama import LLAMA
from qoq.recipes.families.qwen2 import QWEN2
from qoq.recipes.families.qwen3 import QWEN3

HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 64, 96, 4, 2, 16, 40, 2
Array = npt.NDArray[Any]


def model_arrays(*, biases: bool = False) -> dict[str, Array]:
    """Float32 tensors of a small model, by GGUF name, in the row order of the file."""
    rng = np.random.default_rng(7)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    arrays = {"token_embd.weight": normal(VOCAB, HIDDEN), "output_norm.weight": normal(HIDDEN)}
    for block in range(LAYERS):
        arrays |= {
            f"blk.{block}.attn_norm.weight": normal(HIDDEN),
            f"blk.{block}.ffn_norm.weight": normal(HIDDEN),
            f"blk.{block}.attn_q.weight": normal(HEADS * HEAD_DIM, HIDDEN),
            f"blk.{block}.attn_k.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{block}.attn_v.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{block}.attn_output.weight": normal(HIDDEN, HEADS * HEAD_DIM),
            f"blk.{block}.ffn_gate.weight": normal(MLP, HIDDEN),
            f"blk.{block}.ffn_up.weight": normal(MLP, HIDDEN),
            f"blk.{block}.ffn_down.weight": normal(HIDDEN, MLP),
        }
        if biases:
            arrays[f"blk.{block}.attn_q.bias"] = normal(HEADS * HEAD_DIM)
            arrays[f"blk.{block}.attn_k.bias"] = normal(KV_HEADS * HEAD_DIM)
            arrays[f"blk.{block}.attn_v.bias"] = normal(KV_HEADS * HEAD_DIM)
    return arrays


def write(
    path: Path,
    arrays: dict[str, Array],
    kind: Kind = Kind.F32,
    *,
    arch: str = "llama",
    extra: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
) -> Path:
    """Matrices in `kind`, vectors in float32, as converters do."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("small")
    writer.add_context_length(128)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(VOCAB)
    writer.add_token_list([f"token {i}" for i in range(VOCAB)])
    writer.add_token_scores([float(i) for i in range(VOCAB)])
    extra(writer)
    for name, array in arrays.items():
        if array.ndim == 1 or kind == Kind.F32:
            writer.add_tensor(name, array)
        elif kind == Kind.F16:
            writer.add_tensor(name, array.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def open_as(path: Path, family: Family = LLAMA) -> GGUFSource:
    return GGUFSource(path, names=family.gguf_names, blocks=family.blocks, permuted=family.gguf_permuted)


# ---- against transformers


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1, Kind.Q5_0], ids=lambda k: k.name)
@pytest.mark.parametrize("family", [LLAMA, QWEN2, QWEN3], ids=lambda f: f.name)
def test_equals_what_transformers_loads(
    family: Family, kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    arrays = model_arrays(biases=family is QWEN2)
    if family is QWEN3:
        for block in range(LAYERS):
            for which in "qk":
                gains = np.linspace(1, 2, HEAD_DIM, dtype=np.float32) + block
                arrays[f"blk.{block}.attn_{which}_norm.weight"] = gains
    path = write(tmp_path / "m.gguf", arrays, kind, arch=family.gguf_arch)
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf")
    config.head_dim = HEAD_DIM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]

    monkeypatch.setattr(gguf_file, "_CHUNK_ELEMENTS", 5 * HIDDEN)  # so that matrices take several chunks
    source = open_source(path, family)
    assert source.names() == sorted(expected)
    assert set(source.names()) | {"lm_head.weight"} == set(model.state_dict())
    for name in source.names():
        loaded = source.load(name)
        assert source.info(name) == TensorInfo(loaded.dtype, tuple(loaded.shape))
        assert loaded.shape == model.get_parameter(name).shape, name
        assert loaded.is_contiguous()
        assert torch.equal(loaded.float(), expected[name].float()), name
    matrix = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind, torch.float32)
    assert source.info("model.layers.1.mlp.up_proj.weight") == TensorInfo(matrix, (MLP, HIDDEN))
    assert source.info("model.norm.weight") == TensorInfo(torch.float32, (HIDDEN,))


def interleave(rows: Array, heads: int) -> Array:
    """What a converter does to q and k: row j + h D/2 of a head moves to 2 j + h."""
    result = np.empty_like(rows)
    half = len(rows) // heads // 2
    for head in range(heads):
        for j in range(half):
            for h in range(2):
                result[2 * half * head + 2 * j + h] = rows[2 * half * head + half * h + j]
    return result


@pytest.mark.parametrize("with_kv_count", [True, False])
def test_rows_and_biases_of_q_and_k_come_in_halves(tmp_path: Path, with_kv_count: bool) -> None:
    original = model_arrays(biases=True)
    if not with_kv_count:  # then there are as many KV heads as heads
        for name in ("blk.0.attn_k.weight", "blk.0.attn_k.bias", "blk.1.attn_k.weight", "blk.1.attn_k.bias"):
            original[name] = original[name.replace("_k", "_q")] + 1
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS if with_kv_count else HEADS}
    stored = {n: interleave(a, heads[n[6:12]]) if n[6:12] in heads else a for n, a in original.items()}

    def drop_kv_count(writer: gguf.GGUFWriter) -> None:
        if not with_kv_count:
            del writer.kv_data[0]["llama.attention.head_count_kv"]

    source = open_as(write(tmp_path / "m.gguf", stored, extra=drop_kv_count))
    for role in "qkv":
        for ending in ("weight", "bias"):
            loaded = source.load(f"model.layers.1.self_attn.{role}_proj.{ending}")
            assert np.array_equal(loaded.numpy(), original[f"blk.1.attn_{role}.{ending}"])
    unpermuted = GGUFSource(source.location, names=LLAMA.gguf_names, blocks="model.layers", permuted=False)
    loaded = unpermuted.load("model.layers.1.self_attn.q_proj.bias")
    assert np.array_equal(loaded.numpy(), stored["blk.1.attn_q.bias"])


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q6_K, Kind.Q2_K, Kind.IQ4_XS, Kind.MXFP4], ids=lambda k: k.name)
def test_types_that_have_no_writer_here(kind: Kind, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    block, width = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (6, 512 // block * width), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    writer.add_tensor("output.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_as(tmp_path / "m.gguf", QWEN2)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, kind)
    assert source.info("lm_head.weight") == TensorInfo(torch.float32, (6, 512))
    assert np.array_equal(source.load("lm_head.weight").numpy(), expected, equal_nan=True)


def test_source_and_architecture(tmp_path: Path) -> None:
    arrays = {"rope_freqs.weight": np.ones(8, np.float32)} | model_arrays()
    path = write(tmp_path / "M.GGUF", arrays)
    source = open_source(path, LLAMA)
    assert gguf_architecture(path) == "llama"
    assert source.location == path
    assert source.files() == [path]
    assert len(source.names()) == len(arrays) - 1  # rope_freqs is left out
    with pytest.raises(InputError, match=r"no tensor 'rope_freqs\.weight'"):
        source.load("rope_freqs.weight")
    metadata = read_gguf_header(path).metadata
    assert metadata["llama.attention.head_count"] == HEADS
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert "tokenizer.ggml.tokens" not in metadata
    with pytest.raises(InputError, match="architecture 'llama', expected 'qwen2' for the family qwen2"):
        open_source(path, QWEN2)


def test_writing_into_a_loaded_tensor_changes_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", model_arrays())
    before = path.read_bytes()
    source = open_as(path)
    source.load("model.norm.weight").zero_()
    assert source.load("model.norm.weight").abs().sum() > 0
    assert path.read_bytes() == before


# ---- refused models


def test_unknown_tensors_are_listed(tmp_path: Path) -> None:
    odd = ["blk.0.ffn_gate_exps.weight", "blk.01.attn_q.weight", "blk.0.attn_q.scale", "attn_q", "enc.weight"]
    odd += ["blk.0.output.weight.weight", "blk.٣.attn_q.weight"]
    arrays = model_arrays() | {name: np.ones((8, 32), np.float32) for name in odd}
    path = write(tmp_path / "m.gguf", arrays)
    with pytest.raises(InputError, match=r"without a known meaning in architecture 'llama' \(7\):") as caught:
        open_as(path)
    for name in odd:
        assert f"  - {name} F32 [8, 32]" in caught.value.message
    assert caught.value.remedy


def test_head_counts_that_do_not_fit(tmp_path: Path) -> None:
    def heads(value: object) -> Callable[[gguf.GGUFWriter], None]:
        def change(writer: gguf.GGUFWriter) -> None:
            if value is None:
                del writer.kv_data[0]["llama.attention.head_count"]
            else:
                writer.kv_data[0]["llama.attention.head_count"].value = value

        return change

    def per_layer(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0]["llama.attention.head_count"]
        writer.add_head_count([4, 4])

    cases = [(heads(None), "None"), (heads(0), "'0'"), (per_layer, "None"), (heads(5), "64 rows, which 5 heads")]
    for number, (change, message) in enumerate(cases):
        path = write(tmp_path / f"{number}.gguf", model_arrays(), extra=change)
        with pytest.raises(InputError, match=message) as caught:
            open_as(path)
        assert "llama.attention.head_count" in caught.value.message


def test_parts_of_a_split_model_and_joined_ones(tmp_path: Path) -> None:
    def split(count: int) -> Callable[[gguf.GGUFWriter], None]:
        return lambda writer: writer.add_uint16("split.count", count)

    with pytest.raises(InputError, match=r"one of 3 parts(.|\n)*llama-gguf-split --merge"):
        open_as(write(tmp_path / "3.gguf", model_arrays(), extra=split(3)))
    open_as(write(tmp_path / "0.gguf", model_arrays(), extra=split(0)))


def test_missing_file_folder_and_a_file_that_shrinks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_source(tmp_path / "absent.gguf", LLAMA)
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(InputError, match="the folder is empty"):  # a folder is a model folder, whatever its name
        open_source(tmp_path / "folder.gguf", LLAMA)
    path = write(tmp_path / "m.gguf", model_arrays())
    source = open_as(path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match=r"'model\.norm\.weight' cannot be read"):
        source.load("model.norm.weight")


HOSTILE = st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\xff" * 4, struct.pack("<Q", 2**40), b"\x09\0\0\0", b"\x08\0\0\0"])


@pytest.fixture(scope="session")
def seed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("seed")
    arrays = {n: a for n, a in model_arrays().items() if "ffn" not in n and ".1." not in n}
    return write(folder / "seed.gguf", arrays, Kind.Q8_0).read_bytes()


@given(
    edits=st.lists(st.tuples(st.integers(0, 2600), HOSTILE | st.binary(max_size=4), st.booleans()), max_size=4),
    keep=st.none() | st.integers(0, 4000),
)
def test_no_mutation_raises_anything_but_input_errors(
    edits: list[tuple[int, bytes, bool]], keep: int | None, seed: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = seed
    for position, new, inserts in edits:
        content = content[:position] + new + content[position + (0 if inserts else len(new)) :]
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(content[:keep])
    try:
        source = open_as(path)
        for name in source.names():
            assert source.info(name).nbytes <= 32 * len(content)
            source.load(name)
    except InputError:
        pass
