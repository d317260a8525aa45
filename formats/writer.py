"""Sharded safetensors written tensor by tensor, in place.

Every name, dtype and shape is known before the first number, so each shard is created at its full size with its header
and tensors are written at their offsets. Memory is one tensor; a full disk shows at the start; writing a tensor again
after an interruption gives the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qoq.formats.disk import disk_errors
from qoq.formats.packing import pack_linear
from qoq.formats.quantized_linear import QuantizedLinear
from qoq.formats.safetensors_file import TensorInfo
from qoq.recipes.errors import InputError

_DTYPE_NAMES = {
    torch.int8: "I8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int64: "I64",
}
_INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class ShardPlan:
    """One safetensors file: its name, its tensors in file order, where each begins, and the bytes of its header."""

    name: str
    tensors: Mapping[str, TensorInfo]
    offsets: Mapping[str, int]
    header: bytes

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(info.nbytes for info in self.tensors.values())


def plan_shards(tensors: Mapping[str, TensorInfo], max_shard_bytes: int) -> tuple[ShardPlan, ...]:
    """Cut tensors, in their order, into shards of at most `max_shard_bytes`; a larger tensor gets one of its own."""
    groups: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors.items():
        if groups[-1] and size + info.nbytes > max_shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = info
        size += info.nbytes
    if len(groups) == 1:
        return (_plan_shard("model.safetensors", groups[0]),)
    return tuple(
        _plan_shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)
    )


def _plan_shard(name: str, tensors: Mapping[str, TensorInfo]) -> ShardPlan:
    # Wider types first, as the safetensors library writes them, so that every tensor is aligned to its type.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    begins = {}
    for tensor, info in ordered.items():
        entries[tensor] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [begin, begin + info.nbytes],
        }
        begins[tensor] = begin
        begin += info.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return ShardPlan(name, ordered, {tensor: len(header) + at for tensor, at in begins.items()}, header)


def index_json(shards: tuple[ShardPlan, ...]) -> dict[str, object] | None:
    """The content of model.safetensors.index.json, or None where one file holds everything."""
    if len(shards) == 1:
        return None
    sizes = [info.nbytes for shard in shards for info in shard.tensors.values()]
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    return {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}


class ShardWriter:
    """Writes tensors of planned shards into `folder`, which must exist."""

    index_name = _INDEX_NAME

    def __init__(self, folder: Path, shards: tuple[ShardPlan, ...]) -> None:
        self._folder = folder
        self._home = {name: shard for shard in shards for name in shard.tensors}
        self._shards = shards
        self._dirty: set[str] = set()

    def prepare(self, *, must_exist: bool = False) -> None:
        """Create every shard at its full size, or keep what an interrupted run left. Raises EnvironmentProblem.

        With `must_exist`, a shard that is gone or has another size is an InputError: its tensors would be zeros.
        """
        for shard in self._shards:
            path = self._folder / shard.name
            if must_exist and not (path.is_file() and path.stat().st_size == shard.nbytes):
                raise InputError(
                    f"{path}: this part of an unfinished run is missing or damaged",
                    remedy="pass --restart to begin again",
                )
            with disk_errors(path), path.open("r+b" if path.exists() else "w+b") as file:
                if hasattr(os, "posix_fallocate"):  # not on macOS, where a full disk shows later
                    os.posix_fallocate(file.fileno(), 0, shard.nbytes)
                file.truncate(shard.nbytes)
                file.write(shard.header)
                file.flush()
                os.fsync(file.fileno())

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; InputError when it is not what was planned or is not finite in its type."""
        shard = self._home[name]
        info = shard.tensors[name]
        if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
            raise InputError(
                f"{name}: planned {info.dtype} {list(info.shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
        path = self._folder / shard.name
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        with disk_errors(path), path.open("r+b") as file:
            file.seek(shard.offsets[name])
            file.write(data.data)
        self._dirty.add(shard.name)

    def write_linear(self, name: str, linear: QuantizedLinear) -> None:
        """Pack one linear and write its tensors."""
        for part, tensor in pack_linear(linear).items():
            self.write(f"{name}.{part}", tensor)

    def sync(self) -> None:
        """Make what was written so far survive a crash."""
        for name in sorted(self._dirty):
            path = self._folder / name
            with disk_errors(path), path.open("r+b") as file:
                os.fsync(file.fileno())
        self._dirty.clear()
