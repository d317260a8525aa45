"""Shards: planned from names and shapes alone, readable by the safetensors library, the same bytes every time."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qoq.formats.safetensors_file import SafetensorsFile, TensorInfo
from qoq.formats.sources import open_folder
from qoq.formats.writer import ShardPlan, ShardWriter, index_json, plan_shards
from qoq.recipes.errors import EnvironmentProblem, InputError

TENSORS = {
    "z.codes": torch.arange(-60, 60, dtype=torch.int8).view(8, 15),
    "a.scale": torch.tensor([1.0, -0.0, 65504.0, 6e-8, 0.1], dtype=torch.float16),
    "m.gain": torch.tensor([1.5, 3e38], dtype=torch.bfloat16),
    "b.wide": torch.linspace(-1, 1, 7).view(7, 1),
    "c.scalar": torch.tensor(2.5, dtype=torch.float16),
    "d.empty": torch.zeros(0, 4, dtype=torch.int8),
    'ünï¢ode "quoted"': torch.ones(3, dtype=torch.int8),
}
NO_LIMIT = 10**12


def infos(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(folder: Path, tensors: dict[str, Tensor], limit: int = NO_LIMIT) -> tuple[ShardPlan, ...]:
    shards = plan_shards(infos(tensors), limit)
    writer = ShardWriter(folder, shards)
    writer.prepare()
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.sync()
    return shards


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return length, json.loads(data[8 : 8 + length])


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and torch.equal(a[name], b[name])
        for name in a
    )


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    (shard,) = write(tmp_path, TENSORS)
    assert shard.name == "model.safetensors"
    path = tmp_path / shard.name
    assert path.stat().st_size == shard.nbytes
    assert same(load_file(path), TENSORS)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_file_says_the_same_as_the_librarys_own(tmp_path: Path) -> None:
    (shard,) = write(tmp_path, TENSORS)
    save_file(TENSORS, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    _, ours = header_of(tmp_path / shard.name)
    _, theirs = header_of(tmp_path / "theirs.safetensors")
    for header in (ours, theirs):  # types of one size may stand in another order
        for entry in header.values():
            entry.pop("data_offsets", None)
    assert ours == theirs


def test_our_own_strict_reader_takes_it(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    file = SafetensorsFile(tmp_path / "model.safetensors")
    assert same({name: file.load(name).clone() for name in file.names()}, TENSORS)


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    """The data begins at a multiple of 8, and each tensor at a multiple of its type's size."""
    (shard,) = write(tmp_path, TENSORS)
    length, header = header_of(tmp_path / shard.name)
    assert length % 8 == 0
    for name, tensor in TENSORS.items():
        begin, end = header[name]["data_offsets"]
        assert (8 + length + begin) % tensor.element_size() == 0, name
        assert end - begin == tensor.nbytes
        assert shard.offsets[name] == 8 + length + begin


@given(
    sizes=st.dictionaries(
        st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8),
        st.tuples(
            st.sampled_from([torch.int8, torch.float16, torch.bfloat16, torch.float32]),
            st.lists(st.integers(0, 5), max_size=3),
        ),
        min_size=1,
        max_size=8,
    ),
    limit=st.integers(1, 400),
)
def test_any_tensors_are_cut_into_shards_that_hold_them_all(
    sizes: dict[str, Any], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in sizes.items()}
    shards = write(folder, tensors, limit)
    loaded: dict[str, Tensor] = {}
    for shard in shards:
        part = load_file(folder / shard.name)
        assert not part.keys() & loaded.keys()
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= limit
        loaded |= part
    assert same(loaded, tensors)
    assert (index_json(shards) is None) == (len(shards) == 1)


def test_shards_follow_the_order_given() -> None:
    """Tensors of one block stay together, so that a run writes to one or two files at a time."""
    tensors = {f"block {i:02d}": TensorInfo(torch.int8, (40,)) for i in (3, 1, 2, 0)}
    shards = plan_shards(tensors, 80)
    assert [set(shard.tensors) for shard in shards] == [{"block 03", "block 01"}, {"block 02", "block 00"}]
    assert [shard.name for shard in shards] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_a_tensor_larger_than_the_limit_gets_a_shard_of_its_own() -> None:
    tensors = {name: TensorInfo(torch.float16, (size,)) for name, size in (("a", 1), ("big", 1000), ("c", 1))}
    assert [set(shard.tensors) for shard in plan_shards(tensors, 100)] == [{"a"}, {"big"}, {"c"}]


def test_the_index_is_what_readers_expect(tmp_path: Path) -> None:
    shards = write(tmp_path, TENSORS, 50)
    index = index_json(shards)
    assert index is not None
    (tmp_path / ShardWriter.index_name).write_text(json.dumps(index))
    source = open_folder(tmp_path)
    assert same({name: source.load(name).clone() for name in source.names()}, TENSORS)
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in TENSORS.values())}
    assert len(shards) > 1


def test_the_order_of_writing_does_not_matter(tmp_path: Path) -> None:
    for name, order in (("a", 1), ("b", -1)):
        (tmp_path / name).mkdir()
        shards = plan_shards(infos(TENSORS), 60)
        writer = ShardWriter(tmp_path / name, shards)
        writer.prepare()
        for tensor in list(TENSORS)[::order]:
            writer.write(tensor, TENSORS[tensor])
    for shard in shards:
        assert (tmp_path / "a" / shard.name).read_bytes() == (tmp_path / "b" / shard.name).read_bytes()


def test_preparing_again_keeps_what_is_there(tmp_path: Path) -> None:
    shards = write(tmp_path, TENSORS, 60)
    before = {shard.name: (tmp_path / shard.name).read_bytes() for shard in shards}
    writer = ShardWriter(tmp_path, shards)
    writer.prepare(must_exist=True)
    assert {shard.name: (tmp_path / shard.name).read_bytes() for shard in shards} == before
    (tmp_path / shards[0].name).write_bytes(b"what a smaller plan left" * 1000)
    for name in shards[0].tensors:
        writer.prepare()
        writer.write(name, TENSORS[name])
    assert {shard.name: (tmp_path / shard.name).read_bytes() for shard in shards} == before


@pytest.mark.parametrize("damage", ["gone", "short", "long", "folder"])
def test_a_shard_that_must_be_there_is_not_made_of_zeros(damage: str, tmp_path: Path) -> None:
    (shard,) = write(tmp_path, TENSORS)
    path = tmp_path / shard.name
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes(data[:-1] if damage == "short" else data + b"\0")
    with pytest.raises(InputError, match=f"{shard.name}.*missing or damaged"):
        ShardWriter(tmp_path, (shard,)).prepare(must_exist=True)


def test_prepared_files_have_their_full_size_and_their_blocks(tmp_path: Path) -> None:
    shards = plan_shards({"big": TensorInfo(torch.int8, (1_000_000,))}, NO_LIMIT)
    ShardWriter(tmp_path, shards).prepare()
    status = (tmp_path / shards[0].name).stat()
    assert status.st_size == shards[0].nbytes
    assert status.st_blocks * 512 >= 1_000_000
    assert load_file(tmp_path / shards[0].name)["big"].count_nonzero() == 0


def test_a_full_disk_is_told_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    shards = plan_shards(infos(TENSORS), NO_LIMIT)
    with pytest.raises(EnvironmentProblem, match=r"model\.safetensors: no space left"):
        ShardWriter(tmp_path, shards).prepare()


@pytest.mark.parametrize("tensor", [torch.zeros(5), torch.zeros(6).half(), torch.zeros(5, 1).half()])
def test_what_was_not_planned_is_refused(tensor: Tensor, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, write(tmp_path, TENSORS))
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"a\.scale: planned torch\.float16 \[5\], got"):
        writer.write("a.scale", tensor)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_views_are_written_as_they_read(tmp_path: Path) -> None:
    """Transposed, strided and overlapping tensors, not the storage behind them."""
    base = torch.arange(24, dtype=torch.int8)
    views = {"t": base.view(4, 6).T, "s": base[::3], "e": base[:1].expand(5), "g": base.half().requires_grad_()}
    write(tmp_path, views)
    assert same(load_file(tmp_path / "model.safetensors"), {name: view.detach() for name, view in views.items()})


def test_sizes_add_up() -> None:
    (shard,) = plan_shards(infos(TENSORS), NO_LIMIT)
    assert shard.nbytes == len(shard.header) + sum(math.prod(t.shape) * t.element_size() for t in TENSORS.values())
