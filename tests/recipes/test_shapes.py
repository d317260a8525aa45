"""Sizes of known models: the table agrees with itself and with the aliases."""

from __future__ import annotations

import pytest

from qoq.recipes.errors import InputError
from qoq.recipes.models import model_aliases
from qoq.recipes.shapes import find_shape, model_shapes


def test_every_shape_is_an_alias_and_plausible() -> None:
    for name, shape in model_shapes().items():
        assert name in model_aliases()
        assert shape.num_heads % shape.num_kv_heads == 0, name
        assert shape.head_dim in (64, 128), name
        assert shape.intermediate_size % 32 == shape.hidden_size % 32 == 0, name


def test_products_of_a_layer() -> None:
    """As in performance.md section 1."""
    assert find_shape("Llama-3-8B").layer_gemms() == {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    }
    assert find_shape("smollm2-135m").layer_gemms()["qkv"] == (960, 576)


def test_an_unknown_name_gets_the_closest() -> None:
    with pytest.raises(InputError, match="did you mean llama-3-8b"):
        find_shape("llama-3-8")
