"""A checkpoint folder opened for reading: its configuration, its tensors, its linears."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from qoq.formats.manifest import MANIFEST_NAME, read_manifest
from qoq.formats.packing import packed_shapes, unpack_linear
from qoq.formats.quantization_config import QUANT_METHOD, QuantizationConfig
from qoq.formats.quantized_linear import QuantizedLinear
from qoq.formats.safetensors_file import COPY_AGAIN
from qoq.formats.sources import TensorSource, open_folder
from qoq.recipes.errors import InputError


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder as it stands. Raises InputError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no config.json", remedy="pass the folder of a Hugging Face model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})", remedy=COPY_AGAIN) from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(config).__name__}", remedy=COPY_AGAIN)
    return config


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder says of itself that it is one of qoq's checkpoints, complete or not."""
    if not folder.is_dir():
        return False
    if (folder / MANIFEST_NAME).is_file():
        return True
    if not (folder / "config.json").is_file():
        return False
    quantization = read_config(folder).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Tensors are read lazily; each linear is checked when it is decoded."""

    folder: Path
    config: dict[str, Any]
    quantization: QuantizationConfig
    source: TensorSource
    manifest: dict[str, Any]

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.source.names())

    def has_tensor(self, name: str) -> bool:
        return name in self._names

    def is_quantized(self, linear: str) -> bool:
        return f"{linear}.qweight" in self._names

    def quantized_linears(self) -> list[str]:
        """Names of the quantized linears, sorted as the tensors are."""
        return [name.removesuffix(".qweight") for name in self.source.names() if name.endswith(".qweight")]

    def packed(self, linear: str, *, in_features: int) -> dict[str, Tensor]:
        """The packed tensors of one linear, checked for presence, dtype and shape. Raises InputError by name."""
        progressive = self.quantization.group_size is not None
        if not self.is_quantized(linear):
            raise InputError(f"{self.folder}: {linear} has no packed weights")
        out_features = self.source.info(f"{linear}.qweight").shape[0]
        has_bias = f"{linear}.bias" in self._names
        shapes = packed_shapes(out_features, in_features, progressive=progressive, has_bias=has_bias)
        for part, (dtype, shape) in shapes.items():
            name = f"{linear}.{part}"
            if name not in self._names:
                raise InputError(f"{self.folder}: tensor {name} is missing")
            info = self.source.info(name)
            if (info.dtype, info.shape) != (dtype, shape):
                raise InputError(
                    f"{self.folder}: tensor {name} is {info.dtype} {list(info.shape)}, expected {dtype} {list(shape)}"
                )
        return {part: self.source.load(f"{linear}.{part}") for part in shapes}

    def linear(self, name: str, *, in_features: int) -> QuantizedLinear:
        """Decode one linear; anything that is not legal on disk is an InputError that names it."""
        try:
            return unpack_linear(
                self.packed(name, in_features=in_features),
                in_features=in_features,
                zero_domain=self.quantization.zero_domain,
            )
        except ValueError as error:
            raise InputError(
                f"{self.folder}: {name}: {error}", remedy="the checkpoint is damaged: quantize the model again"
            ) from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a complete checkpoint. Raises InputError when it is incomplete or cannot be understood."""
    manifest = read_manifest(folder)
    config = read_config(folder)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        raise InputError(f"{folder}/config.json: no quantization_config", remedy="quantize the model again")
    where = f"{folder}/config.json: quantization_config"
    return Checkpoint(
        folder=folder,
        config=config,
        quantization=QuantizationConfig.from_dict(quantization, where=where),
        source=open_folder(folder),
        manifest=manifest,
    )
