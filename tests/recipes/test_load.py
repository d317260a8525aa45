"""Recipes: the presets, files of users, and what is said about a recipe that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from qoq.recipes.errors import InputError
from qoq.recipes.load import load_recipe, parse_recipe, preset_names, tuned_for
from qoq.recipes.models import find_alias
from qoq.recipes.schema import Recipe


def parse(text: str) -> Recipe:
    return parse_recipe(text, origin="test.yaml", name="test")


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_under_their_name(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert (recipe.group_size is None) == name.removesuffix("-best").endswith("-chn")
    assert recipe.act_bits == 8
    assert recipe.kv_bits == 4


def test_the_method_and_its_baseline_come_in_both_modes() -> None:
    for grid in ("g128", "chn"):
        assert {f"qoq-{grid}", f"qoq-{grid}-best", f"rtn-{grid}"} <= set(preset_names())
        plain, paper, best = (load_recipe(name) for name in (f"rtn-{grid}", f"qoq-{grid}", f"qoq-{grid}-best"))
        assert (plain.rounding, plain.rotation, plain.smooth_attention) == ("rtn", None, None)
        assert (paper.rounding, paper.rotation, paper.gptq.target) == ("gptq", "hadamard", "served")
        assert (best.rounding, best.rotation, best.gptq.target) == ("gptq", "hadamard", "exact")
        assert best.tuning is not None
        assert paper.tuning is None


def test_the_recipes_of_the_paper_are_tuned_for_models_its_authors_measured() -> None:
    """Their script, for Llama 3 8B: 0.3 and 0.7 in groups, with SmoothAttention searched; else 0.1 and no search."""
    alias = find_alias("llama-3-8b")
    grouped, channels = (tuned_for(load_recipe(name), alias) for name in ("qoq-g128", "qoq-chn"))
    assert grouped.smooth_output is not None
    assert channels.smooth_output is not None
    assert grouped.smooth_attention is not None
    assert channels.smooth_attention is not None
    assert (grouped.smooth_output.alpha, grouped.smooth_output.beta) == (0.3, 0.7)
    assert (channels.smooth_output.alpha, channels.smooth_output.beta) == (0.1, 0.9)
    assert (grouped.smooth_attention.mode, channels.smooth_attention.mode) == ("search", "fixed")
    other = tuned_for(load_recipe("qoq-g128"), find_alias("mistral-7b"))
    assert other.smooth_output is not None
    assert other.smooth_output.alpha == 0.15
    assert other.smooth_attention == load_recipe("qoq-g128").smooth_attention


@pytest.mark.parametrize("name", ["rtn-g128", "qoq-g128-best", "qoq-chn-best"])
def test_recipes_that_search_or_leave_out_smoothing_stay(name: str) -> None:
    assert tuned_for(load_recipe(name), find_alias("llama-3-8b")) == load_recipe(name)
    assert tuned_for(load_recipe("qoq-g128"), find_alias("qwen3-8b")) == load_recipe("qoq-g128")


@pytest.mark.parametrize("name", preset_names())
def test_a_printed_recipe_reads_back(name: str) -> None:
    recipe = load_recipe(name)
    assert parse(yaml.safe_dump(recipe.model_dump(mode="json"))) == recipe


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("{}", "w4a8kv4-g128"),
        ("{group_size: null, kv_bits: 8}", "w4a8kv8-per-channel"),
        ("{act_bits: 16, kv_bits: 16}", "w4a16kv16-g128"),
    ],
)
def test_the_scheme_names_the_bits(text: str, scheme: str) -> None:
    assert parse(text).scheme == scheme


@pytest.mark.parametrize("text", ["{symmetric: true, group_size: null}", "{symmetric: true, zero_domain: post_scale}"])
def test_symmetric_groups_need_groups_and_zeros_that_are_codes(text: str) -> None:
    with pytest.raises(InputError, match="symmetric needs groups"):
        parse(text)


def test_a_file_is_named_after_itself_unless_it_says_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("kv_bits: 8\ncalibration: {samples: 16}\n")
    recipe = load_recipe(str(path))
    assert (recipe.name, recipe.kv_bits, recipe.calibration.samples) == ("mine", 8, 16)
    path.write_text("name: other\n")
    assert load_recipe(str(path)).name == "other"


def test_recipes_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        load_recipe("qoq-g128").kv_bits = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{align_keys: mean, key_rotation: hadamard}", "exclude each other"),
        ("{gptq: {damping: none}}", "damping"),
        ("{group_size: null, zero_domain: post_scale}", "needs groups"),
        ("kv_bit: 4", "kv_bit: Extra inputs"),
        ("calibration: {sample: 4}", "calibration.sample: Extra inputs"),
        ("smooth_attention: {beta1: 4}", "smooth_attention.beta1: Extra inputs"),
        ("kv_bits: 3", "kv_bits: Input should be 4, 8 or 16"),
        ("group_size: 64", "group_size: Input should be 128"),
        ("calibration: {samples: 0}", "calibration.samples: .* greater than or equal to 1"),
        ("calibration: {seq_len: 8}", "calibration.seq_len: .* greater than or equal to 16"),
        ("smooth_attention: {alpha: 1.5}", "smooth_attention.alpha: .* less than or equal to 1"),
        ("smooth_attention: {alpha: .nan}", "smooth_attention.alpha"),
        ("smooth_attention: {alphas: []}", "one or more numbers"),
        ("smooth_attention: {alphas: [0.5, 2.0]}", "numbers in .0, 1."),
        ("rounding: magic", "rounding: Input should be"),
        ("kv_bits: [", "not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("- one\n- two", "expected a mapping of keys to values, got list"),
        ("", "expected a mapping of keys to values, got NoneType"),
    ],
)
def test_problems_are_named_with_their_place(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse(text)
    assert "test.yaml" in caught.value.message


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(InputError, match=r"2 problem\(s\)"):
        parse("{kv_bits: 3, act_bits: 4}")


def test_unknown_recipes_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a known recipe nor a file") as caught:
        load_recipe("qoq-g64")
    assert "qoq-g128" in str(caught.value.remedy)
    with pytest.raises(InputError, match="neither a known recipe nor a file"):
        load_recipe(str(tmp_path))
    path = tmp_path / "junk.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"junk\.yaml: cannot be read as text"):
        load_recipe(str(path))
