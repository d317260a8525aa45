"""The tensors of a GGUF file (llama.cpp), dequantized one at a time, under transformers' names and in its row order."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from qoq.formats.gguf_header import GGUFHeader, GGUFTensor, read_gguf_header
from qoq.formats.safetensors_file import COPY_AGAIN, TensorInfo
from qoq.recipes.errors import InputError, raise_problems

_CHUNK_ELEMENTS = 1 << 20  # dequantized at once, so that temporary arrays stay small beside the result
_SKIPPED = {"rope_freqs.weight"}  # factors that transformers computes from the config
_BLOCK_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([^.]+)\.(weight|bias)")

_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def gguf_architecture(path: Path) -> str:
    """What `general.architecture` says, such as "llama". Raises InputError as `read_gguf_header` does."""
    return _architecture(path, read_gguf_header(path))


def _architecture(path: Path, header: GGUFHeader) -> str:
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise InputError(f"{path}: no general.architecture in the metadata", remedy="convert the model again")
    return architecture


class GGUFSource:
    """The tensors of a GGUF file as transformers names and orders them, dequantized one at a time.

    `names` maps GGUF names to transformers': whole names of top-level tensors, and within block i the part between
    `blk.{i}.` and `.weight` or `.bias` to a module of `{blocks}.{i}`. `permuted`: the file holds the rows of each head
    of q and k in the order of interleaved RoPE. Raises InputError for tensors that are not in `names`.
    """

    def __init__(self, path: Path, *, names: Mapping[str, str], blocks: str, permuted: bool) -> None:
        self._path = path
        self.header = read_gguf_header(path)
        self.architecture = _architecture(path, self.header)
        self._tensors: dict[str, GGUFTensor] = {}
        self._heads: dict[str, int] = {}  # of tensors whose rows are interleaved
        unknown = []
        for gguf_name, tensor in self.header.tensors.items():
            if gguf_name in _SKIPPED:
                continue
            name = _transformers_name(gguf_name, names, blocks)
            if name is None:
                unknown.append(f"{gguf_name} {tensor.kind.name} {list(tensor.shape)}")
                continue
            self._tensors[name] = tensor
            if permuted and ".attn_q." in gguf_name:
                self._heads[name] = self._head_count("head_count", gguf_name, tensor)
            elif permuted and ".attn_k." in gguf_name:
                key = "head_count_kv" if self._key("head_count_kv") in self.header.metadata else "head_count"
                self._heads[name] = self._head_count(key, gguf_name, tensor)
        raise_problems(
            f"{path}: tensors without a known meaning in architecture {self.architecture!r}",
            unknown,
            remedy="the model is not of a supported family, or was changed; try its safetensors",
        )

    @property
    def location(self) -> Path:
        return self._path

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of what `load` returns: float32 for a quantized tensor, else the file's dtype."""
        tensor = self._tensor(name)
        return TensorInfo(_PLAIN.get(tensor.kind, torch.float32), tensor.shape)

    def load(self, name: str) -> Tensor:
        """The tensor on the CPU; values are not checked (a damaged scale gives NaN or infinity).

        Raises InputError when there is none of that name, or when the file has shrunk since it was opened.
        """
        tensor = self._tensor(name)
        try:
            # Copy on write: torch wants a writable array, and neither the file nor a later load may see a change.
            raw = np.memmap(self._path, np.uint8, "c", tensor.start, (tensor.nbytes,))
        except (OSError, ValueError) as error:
            raise InputError(f"{self._path}: tensor {name!r} cannot be read ({error})", remedy=COPY_AGAIN) from error
        dtype = _PLAIN.get(tensor.kind)
        values = _dequantize(raw, tensor) if dtype is None else torch.from_numpy(raw).view(dtype).view(tensor.shape)
        heads = self._heads.get(name)
        return values if heads is None else _rows_in_halves(values, heads)

    def files(self) -> list[Path]:
        return [self._path]

    def _tensor(self, name: str) -> GGUFTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise InputError(f"{self._path}: no tensor {name!r}", remedy="check that this is the right model") from None

    def _key(self, name: str) -> str:
        return f"{self.architecture}.attention.{name}"

    def _head_count(self, key: str, gguf_name: str, tensor: GGUFTensor) -> int:
        heads = self.header.metadata.get(self._key(key))
        if type(heads) is not int or heads < 1:
            raise InputError(
                f"{self._path}: metadata {self._key(key)} is {str(heads)[:40]!r}, expected one number of heads",
                remedy="the model is not of a supported family, or was changed; try its safetensors",
            )
        if tensor.shape[0] % (2 * heads):
            raise InputError(
                f"{self._path}: tensor {gguf_name!r} has {tensor.shape[0]} rows, which {heads} heads of an even size "
                f"cannot share ({self._key(key)})",
                remedy=COPY_AGAIN,
            )
        return heads


def _transformers_name(gguf_name: str, names: Mapping[str, str], blocks: str) -> str | None:
    match = _BLOCK_TENSOR.fullmatch(gguf_name)
    if match is None:
        return names.get(gguf_name) if "." in gguf_name else None  # names without a dot are parts of a block
    index, part, ending = match.groups()
    module = names.get(part)
    return None if module is None else f"{blocks}.{index}.{module}.{ending}"


def _dequantize(raw: np.ndarray[Any, np.dtype[np.uint8]], tensor: GGUFTensor) -> Tensor:
    """Decode bytes [nbytes] to float32 of the tensor's shape, some rows at a time."""
    columns = tensor.shape[-1]
    rows = raw.reshape(math.prod(tensor.shape[:-1]), -1)
    values = torch.empty(rows.shape[0], columns, dtype=torch.float32)
    into = values.numpy()
    step = max(1, _CHUNK_ELEMENTS // columns)
    with np.errstate(all="ignore"):  # a damaged scale overflows; whoever uses the values checks them
        for first in range(0, rows.shape[0], step):
            into[first : first + step] = gguf.dequantize(np.asarray(rows[first : first + step]), tensor.kind)
    return values.view(tensor.shape)


def _rows_in_halves(rows: Tensor, heads: int) -> Tensor:
    """Reorder q or k rows [heads * D, ...] from interleaved RoPE, row 2 j + h of a head, to halves, row h D/2 + j."""
    pairs = rows.view(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
