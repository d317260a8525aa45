"""How many bits a served model has, by the name that tables and options use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qoq.recipes.errors import InputError

WeightKind = Literal["g128", "per_channel", "int8", "fp8", "int4_fp16", "fp16"]
"""Weights of the linears of decoder blocks, and what they are multiplied by: g128 and per_channel are qoq's 4 bits with
int8 activations, int8 and fp8 have activations of their kind, int4_fp16 is 4 bits in groups of 128 with 16-bit
activations, fp16 has 16 bits in both."""


@dataclass(frozen=True)
class Precision:
    """`kv_bits` 4, 8 or 16; embedding, norms and lm_head have 16 bits everywhere."""

    name: str
    weights: WeightKind
    kv_bits: int


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("w4a8kv4-g128", "g128", 4),
        Precision("w4a8kv4-chn", "per_channel", 4),
        Precision("w4a8kv8-g128", "g128", 8),
        Precision("w4a8kv8-chn", "per_channel", 8),
        Precision("w8a8kv8", "int8", 8),
        Precision("w4a16", "int4_fp16", 16),
        Precision("fp8", "fp8", 8),
        Precision("fp16", "fp16", 16),
    )
}


def find_precision(name: str) -> Precision:
    """The precision called `name`. Raises InputError that lists the known ones."""
    precision = PRECISIONS.get(name.lower())
    if precision is None:
        raise InputError(f"precision {name!r}: not known", remedy=f"known: {', '.join(PRECISIONS)}")
    return precision
