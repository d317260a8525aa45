"""Short names of models (`llama-3-8b`), read from models.yaml."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import yaml

from qoq.recipes.errors import InputError


@dataclass(frozen=True)
class Tuned:
    """Strengths for one model: of output smoothing, and whether to search those of SmoothAttention (None: either)."""

    alpha: float
    beta: float
    search_keys: bool | None = None


@dataclass(frozen=True)
class ModelAlias:
    """A short name and what it stands for; the fields are described in models.yaml."""

    name: str
    family: str
    hub_id: str | None = None
    note: str = ""
    gated: bool = False
    tuned: Mapping[str, Tuned] = field(default_factory=dict)
    refused: str | None = None

    @staticmethod
    def parse(name: str, fields: Mapping[str, Any]) -> ModelAlias:
        """From an entry of models.yaml."""
        tuned = {grid: Tuned(**values) for grid, values in fields.get("tuned", {}).items()}
        return ModelAlias(name, **{**fields, "tuned": tuned})


@lru_cache(maxsize=1)
def model_aliases() -> Mapping[str, ModelAlias]:
    """Every alias by its name, in the order of models.yaml; read-only."""
    table = yaml.safe_load((files("qoq.recipes") / "models.yaml").read_text(encoding="utf-8"))
    return MappingProxyType({name: ModelAlias.parse(name, fields) for name, fields in table.items()})


def find_alias(name: str) -> ModelAlias:
    """The alias called `name`, in any case of letters. A refused alias is returned too: see its `refused`.

    Raises InputError, naming the closest aliases, when there is none.
    """
    aliases = model_aliases()
    alias = aliases.get(name.lower())
    if alias is not None:
        return alias
    close = difflib.get_close_matches(name.lower(), aliases, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise InputError(f"model {name!r}: no such alias", remedy=f"{hint}`qoq models` lists every alias")


def alias_of(hub_id: str) -> ModelAlias | None:
    """The alias of a repository on the hub, if it has one."""
    return next((alias for alias in model_aliases().values() if alias.hub_id == hub_id), None)
