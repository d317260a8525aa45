"""Model families as data: one file each. Adding a family is adding a file here and naming it in `_ALL`."""

from __future__ import annotations

from qoq.recipes.errors import InputError
from qoq.recipes.families.family import Family, KeyFold
from qoq.recipes.families.llama import LLAMA
from qoq.recipes.families.mistral import MISTRAL
from qoq.recipes.families.qwen2 import QWEN2
from qoq.recipes.families.qwen3 import QWEN3

__all__ = ["Family", "KeyFold", "all_families", "family_of"]

_ALL = (LLAMA, MISTRAL, QWEN2, QWEN3)


def all_families() -> tuple[Family, ...]:
    return _ALL


def family_of(model_type: str | None, architectures: tuple[str, ...] = ()) -> Family:
    """The family of a model by its config's `model_type` and `architectures`.

    Raises InputError, naming what is supported, for any other model: a wrong guess would corrupt weights silently.
    """
    for family in _ALL:
        if model_type == family.model_type and (not architectures or family.architecture in architectures):
            return family
    supported = ", ".join(f"{family.model_type} ({family.architecture})" for family in _ALL)
    raise InputError(
        f"model_type {model_type!r} with architectures {list(architectures)} is not supported",
        remedy=f"supported: {supported}",
    )
