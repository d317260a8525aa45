"""What an exporter has to say, and what several of them ask of a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qoq.formats.checkpoint import Checkpoint
from qoq.formats.quantized_linear import QuantizedLinear
from qoq.formats.safetensors_file import TensorInfo
from qoq.recipes.families import family_of
from qoq.recipes.schema import GROUP_SIZE

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""Of the tensors of a checkpoint that are not quantized, by the name in config.json."""


class Exporter(ABC):
    """A form of a whole checkpoint: how each quantized linear is stored, and what config.json says of it.

    name      as `--to` takes it
    summary   what it is, in a line
    readers   which versions of which runtimes read it
    notes     what whoever serves it must know, a sentence each
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    readers: ClassVar[str]
    notes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def problems(self, checkpoint: Checkpoint) -> list[str]:
        """Everything that keeps this checkpoint from being stored so; headers and small tensors are read."""

    @abstractmethod
    def shapes(self, checkpoint: Checkpoint, linear: str) -> dict[str, TensorInfo]:
        """Names relative to the linear, dtypes and shapes of what `tensors` gives for it."""

    @abstractmethod
    def tensors(self, linear: QuantizedLinear, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a linear, for a model whose other tensors are `dtype`."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], in_features: int) -> Tensor:
        """The weight float32 [N, K] that a reader computes from what was stored."""

    @abstractmethod
    def config(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """config.json."""


def plain_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json without anything of qoq's."""
    return {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}


def kept_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Of the tensors that are not quantized."""
    return DTYPES.get(str(checkpoint.config.get("torch_dtype", checkpoint.config.get("dtype"))), torch.float32)


def out_features(checkpoint: Checkpoint, linear: str) -> int:
    """N of a quantized linear, by the header of its file."""
    return int(checkpoint.source.info(f"{linear}.qweight").shape[0])


def in_features(checkpoint: Checkpoint, linear: str) -> int:
    """The true K of a quantized linear, by headers and configuration."""
    stored = 2 * int(checkpoint.source.info(f"{linear}.qweight").shape[1])
    return checkpoint.quantization.padded.get(linear, stored)


def has_bias(checkpoint: Checkpoint, linear: str) -> bool:
    """Whether a quantized linear has one."""
    return checkpoint.has_tensor(f"{linear}.bias")


def rotation_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Only qoq's own runtime rotates queries and keys."""
    rotation = checkpoint.quantization.key_rotation
    if rotation != "none":
        yield f"key_rotation is {rotation}, and other runtimes do not rotate keys: quantize with key_rotation none"


def padding_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Other readers know no padded inputs."""
    for linear, true in sorted(checkpoint.quantization.padded.items()):
        yield f"{linear}: in_features {true} is no multiple of {GROUP_SIZE}: leave it in 16 bit (--ignore)"


def fusion_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Servers run q, k and v as one linear, and gate and up: either all of them are quantized or none."""
    family = family_of(str(checkpoint.config["model_type"]))
    for index in range(int(checkpoint.config["num_hidden_layers"])):
        for roles in family.shared_inputs:
            names = [family.block_prefix(index) + family.roles[role] for role in roles]
            quantized = [name for name in names if checkpoint.is_quantized(name)]
            if quantized and len(quantized) < len(names):
                missing = sorted(set(names) - set(quantized))
                yield f"{', '.join(missing)}: in 16 bit, but served as one linear with {', '.join(quantized)}"
