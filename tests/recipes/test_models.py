"""Model aliases: the table is whole, names are found, and reading it is quick."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Mapping

import pytest

from qoq.recipes.errors import InputError
from qoq.recipes.families import all_families
from qoq.recipes.models import ModelAlias, alias_of, find_alias, model_aliases

PROMISED = [
    "tiny",
    "tiny-outlier",
    "smollm2-135m",
    "llama-2-7b",
    "llama-2-13b",
    "llama-2-70b",
    "llama-30b",
    "llama-3-8b",
    "llama-3-70b",
    "llama-3.1-8b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "mistral-7b",
    "mixtral-8x7b",
    "qwen1.5-72b",
    "qwen2.5-0.5b",
    "qwen2.5-1.5b",
    "qwen2.5-7b",
    "qwen3-0.6b",
    "qwen3-1.7b",
    "qwen3-4b",
    "qwen3-8b",
    "yi-34b",
]


def test_the_promised_aliases_are_there() -> None:
    assert sorted(model_aliases()) == sorted(PROMISED)


@pytest.mark.parametrize("alias", model_aliases().values(), ids=lambda alias: alias.name)
def test_aliases_are_well_formed(alias: ModelAlias) -> None:
    kinds = {"name": str, "family": str, "hub_id": str | None, "note": str, "gated": bool, "refused": str | None}
    kinds["tuned"] = Mapping
    for field in dataclasses.fields(alias):
        assert isinstance(getattr(alias, field.name), kinds[field.name]), field.name
    assert alias.name == alias.name.lower()
    assert (alias.hub_id is None) == alias.name.startswith("tiny")
    assert alias.hub_id is None or re.fullmatch(r"[\w.-]+/[\w.-]+", alias.hub_id)
    assert (alias.refused is not None) == (alias.family not in {family.name for family in all_families()})


@pytest.mark.parametrize("alias", model_aliases().values(), ids=lambda alias: alias.name)
def test_tuned_strengths_are_those_of_a_grid(alias: ModelAlias) -> None:
    assert alias.tuned.keys() <= {"g128", "per_channel"}
    for values in alias.tuned.values():
        assert values.alpha + values.beta == pytest.approx(1)
        assert 0 <= values.alpha <= values.beta


def test_a_repository_is_found_by_its_name() -> None:
    assert alias_of("meta-llama/Meta-Llama-3-8B") is find_alias("llama-3-8b")
    assert alias_of("someone/something") is None


def test_hub_ids_are_named_once() -> None:
    ids = [alias.hub_id for alias in model_aliases().values() if alias.hub_id is not None]
    assert len(ids) == len(set(ids))


def test_experts_are_refused_by_name() -> None:
    assert "experts" in str(find_alias("mixtral-8x7b").refused)


def test_names_are_found_in_any_case() -> None:
    assert find_alias("Llama-3-8B").hub_id == "meta-llama/Meta-Llama-3-8B"


@pytest.mark.parametrize(("name", "suggestion"), [("lama-3-8b", "llama-3-8b"), ("qwen3-8", "qwen3-8b")])
def test_unknown_names_get_suggestions(name: str, suggestion: str) -> None:
    with pytest.raises(InputError, match=f"model '{name}'") as caught:
        find_alias(name)
    assert suggestion in str(caught.value.remedy)


def test_nothing_is_suggested_for_nonsense() -> None:
    with pytest.raises(InputError) as caught:
        find_alias("zzzzzz")
    assert caught.value.remedy == "`qoq models` lists every alias"


def test_the_table_is_read_only() -> None:
    with pytest.raises(TypeError):
        model_aliases()["mine"] = find_alias("tiny")  # type: ignore[index]


def test_nothing_heavy_is_imported() -> None:
    probe = "import json, sys, qoq.recipes.models as m; m.model_aliases(); print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-P", "-c", probe], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "transformers", "huggingface_hub", "pydantic"} & set(json.loads(result.stdout))
