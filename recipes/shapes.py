"""Sizes of models by their short name, read from shapes.yaml."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType

import yaml

from qoq.recipes.errors import InputError


@dataclass(frozen=True)
class ModelShape:
    """Sizes that decide what a model costs; those of config.json, by qoq's names."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    vocab_size: int
    tied_embeddings: bool = False

    def layer_gemms(self) -> dict[str, tuple[int, int]]:
        """N and K of the four products of a decoder layer, as a server runs them: qkv and gate_up are one each."""
        heads = self.num_heads * self.head_dim
        return {
            "qkv": (heads + 2 * self.num_kv_heads * self.head_dim, self.hidden_size),
            "o": (self.hidden_size, heads),
            "gate_up": (2 * self.intermediate_size, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
        }


@lru_cache(maxsize=1)
def model_shapes() -> Mapping[str, ModelShape]:
    """Every known shape by its name, in the order of shapes.yaml; read-only."""
    table = yaml.safe_load((files("qoq.recipes") / "shapes.yaml").read_text(encoding="utf-8"))
    return MappingProxyType({name: ModelShape(name, **sizes) for name, sizes in table.items()})


def find_shape(name: str) -> ModelShape:
    """The shape called `name`, in any case of letters. Raises InputError that names the closest."""
    shapes = model_shapes()
    shape = shapes.get(name.lower())
    if shape is None:
        close = difflib.get_close_matches(name.lower(), shapes, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise InputError(f"model shapes {name!r}: not known", remedy=f"{hint}known: {', '.join(shapes)}")
    return shape
