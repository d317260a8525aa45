"""Recipes by name or from a YAML file."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import yaml
from pydantic import ValidationError

from qoq.recipes.errors import InputError
from qoq.recipes.models import ModelAlias
from qoq.recipes.schema import Recipe

_EXAMPLE = "`qoq recipes qoq-g128` prints a complete recipe to start from"


def preset_names() -> list[str]:
    """Names of the recipes that come with qoq, in a fixed order."""
    folder = files("qoq.recipes") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_file: str) -> Recipe:
    """Read a preset by name, or a recipe from a YAML file.

    Raises InputError when there is no such preset or file, or when a key or value is not understood.
    """
    if name_or_file in preset_names():
        text = (files("qoq.recipes") / "presets" / f"{name_or_file}.yaml").read_text(encoding="utf-8")
        return parse_recipe(text, origin=name_or_file, name=name_or_file)
    path = Path(name_or_file)
    if not path.is_file():
        raise InputError(
            f"recipe {name_or_file!r}: neither a known recipe nor a file",
            remedy=f"known recipes: {', '.join(preset_names())}; `qoq recipes` describes them",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe file {path}: cannot be read as text ({error})") from error
    return parse_recipe(text, origin=str(path), name=path.stem)


def parse_recipe(text: str, *, origin: str, name: str) -> Recipe:
    """Parse YAML `text`; `name` is used when the text does not name the recipe itself."""
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"recipe {origin}: not valid YAML ({error})", remedy=_EXAMPLE) from error
    if not isinstance(data, dict):
        raise InputError(
            f"recipe {origin}: expected a mapping of keys to values, got {type(data).__name__}", remedy=_EXAMPLE
        )
    try:
        return Recipe.model_validate({"name": name, **data})
    except ValidationError as error:
        lines = [f"  - {'.'.join(map(str, item['loc'])) or 'recipe'}: {item['msg']}" for item in error.errors()]
        raise InputError(
            "\n".join([f"recipe {origin}: {error.error_count()} problem(s)", *lines]),
            remedy=_EXAMPLE,
        ) from error


def tuned_for(recipe: Recipe, alias: ModelAlias) -> Recipe:
    """A recipe of the paper with the strengths that its authors use for this model; any other as it is.

    The paper's are those that smooth outputs with a fixed strength.
    """
    values = alias.tuned.get("g128" if recipe.group_size else "per_channel")
    if values is None or recipe.smooth_output is None or recipe.smooth_output.mode != "fixed":
        return recipe
    output = recipe.smooth_output.model_copy(update={"alpha": values.alpha, "beta": values.beta})
    attention = recipe.smooth_attention
    if attention is not None and values.search_keys is not None:
        attention = attention.model_copy(update={"mode": "search" if values.search_keys else "fixed"})
    return recipe.model_copy(update={"smooth_output": output, "smooth_attention": attention})
