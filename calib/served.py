"""A checkpoint joined with its model: what `eval`, `verify` and `inspect` open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qoq.calib.plan import output_tensors
from qoq.calib.skeleton import Skeleton, build_skeleton, load_config
from qoq.formats.checkpoint import Checkpoint, open_checkpoint
from qoq.formats.packing import padded_in_features
from qoq.recipes.errors import InputError, raise_problems


@dataclass(frozen=True)
class ServedModel:
    """An opened checkpoint whose tensors were found to be exactly those its configuration asks for."""

    checkpoint: Checkpoint
    skeleton: Skeleton
    quantized: dict[str, nn.Linear]


def open_served(folder: Path, *, trust_remote_code: bool = False) -> ServedModel:
    """Open a checkpoint and check its structure. Raises InputError that lists everything that is off."""
    checkpoint = open_checkpoint(folder)
    skeleton = build_skeleton(load_config(folder, trust_remote_code=trust_remote_code), where=str(folder))
    raise_problems(
        f"{folder}: the files are not what the configuration asks for",
        structure_problems(checkpoint, skeleton),
        remedy="copy the whole folder again, or quantize the model again",
    )
    return ServedModel(checkpoint, skeleton, quantized_linears(checkpoint, skeleton))


def quantized_linears(checkpoint: Checkpoint, skeleton: Skeleton) -> dict[str, nn.Linear]:
    """The linears that the configuration says are quantized."""
    kept = set(checkpoint.quantization.modules_to_not_convert)
    return {name: linear for name, linear in skeleton.all_linears().items() if name not in kept}


def structure_problems(checkpoint: Checkpoint, skeleton: Skeleton) -> list[str]:
    """Missing, unexpected or misshapen tensors, and padding that does not fit; empty when all is well."""
    quantization = checkpoint.quantization
    quantized = quantized_linears(checkpoint, skeleton)
    dtype = _kept_dtype(checkpoint)
    expected = output_tensors(skeleton, quantized, progressive=quantization.group_size is not None, dtype=dtype)
    names = set(checkpoint.source.names())
    problems = [f"{name}: missing" for name in expected if name not in names]
    problems += [f"{name}: not a tensor of this model" for name in sorted(names - expected.keys())]
    for name, want in expected.items():
        got = checkpoint.source.info(name) if name in names else want
        if (got.dtype, got.shape) != (want.dtype, want.shape):
            problems.append(f"{name}: {got.dtype} {list(got.shape)}, expected {want.dtype} {list(want.shape)}")
    padded = {
        name: linear.in_features
        for name, linear in quantized.items()
        if linear.in_features != padded_in_features(linear.in_features)
    }
    if padded != dict(quantization.padded):
        wrong = min(padded.items() ^ dict(quantization.padded).items())
        problems.append(f"config.json: padded does not agree with the model about {wrong[0]} (in_features {wrong[1]})")
    return problems


def _kept_dtype(checkpoint: Checkpoint) -> torch.dtype:
    name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    types = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in types:
        raise InputError(f"{checkpoint.folder}/config.json: dtype is {name!r}, expected float16 or bfloat16")
    return types[name]
