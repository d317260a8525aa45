"""Recipes with GPTQ and rotation from the command line: what is told where GPTQ falls back, --strict, verification."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def options(tmp_path: Path, text_file: Path) -> tuple[object, ...]:
    """160 calibration tokens: enough for the 128 inputs of most linears, too few for the 256 of down_proj."""
    recipe = tmp_path / "gptq.yaml"
    recipe.write_text("rounding: gptq\ngptq: {damping: 0.02}\n", encoding="utf-8")
    return ("--recipe", recipe, "--calib", text_file, "--samples", 10, "--seq-len", 16, "--device", "cpu")


@pytest.fixture
def model(tmp_path: Path, make_model: Callable[..., Path]) -> Path:
    return make_model(tmp_path / "model")


def test_linears_that_fall_back_are_counted_and_named(
    qoq: Any, model: Path, options: tuple[object, ...], tmp_path: Path
) -> None:
    outcome = qoq("quantize", model, *options, "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.stderr
    said = " ".join(outcome.stdout.split())
    assert "2 of 14 linears were rounded to nearest instead of with GPTQ" in said
    assert "160 calibration tokens for 256 inputs: model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj" in said
    shutil.rmtree(tmp_path / "out")
    data = qoq("quantize", model, *options, "-o", tmp_path / "out", "--json").json
    reasons = {name: linear["fallback"] for name, linear in data["blocks"][0]["linears"].items()}
    assert reasons.pop("mlp.down_proj") == "160 calibration tokens for 256 inputs"
    assert set(reasons.values()) == {None}
    assert data["recipe"]["gptq"] == {"damping": 0.02, "target": "served"}
    assert qoq("verify", tmp_path / "out").code == 0


def test_strict_stops_instead(fails: Any, qoq: Any, model: Path, options: tuple[object, ...], tmp_path: Path) -> None:
    error = fails(2, "quantize", model, *options, "-o", tmp_path / "out", "--strict")
    assert "model.layers.0.mlp.down_proj: GPTQ failed: 160 calibration tokens for 256 inputs" in error
    assert not (tmp_path / "out" / "qoq_manifest.json").exists()
    assert qoq("quantize", model, *options, "-o", tmp_path / "out").code == 0, "the same command goes on without it"


def test_the_plan_counts_what_gptq_takes(qoq: Any, model: Path, options: tuple[object, ...], tmp_path: Path) -> None:
    facts = qoq("quantize", model, *options, "--dry-run", "--json").json
    plain = qoq("quantize", model, *options, "--recipe", "rtn-g128", "--dry-run", "--json").json
    # Of the 256 inputs of down_proj: moments in float64, a factor in float32, and three matrices on the way to it.
    more = (8 + 4 + 3 * 8) * 256**2
    assert facts["memory_bytes"]["one_block"] - plain["memory_bytes"]["one_block"] == more
    assert not (tmp_path / "checkpoints").exists()


def test_a_rotated_model_is_held_against_the_rotated_original(
    qoq: Any, fails: Any, model: Path, make_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "rotated.yaml"
    recipe.write_text("rotation: hadamard\nrounding: gptq\ngrid: search\n", encoding="utf-8")
    quick = ("--calib", text_file, "--samples", 16, "--seq-len", 32, "--device", "cpu")
    assert qoq("quantize", model, "--recipe", recipe, *quick, "-o", tmp_path / "out").code == 0
    report = qoq("verify", tmp_path / "out", "--against", model, "--json").json
    errors = [error for row in report["against"] for error in row["weight_errors"].values()]
    assert len(errors) == 14
    assert max(errors) < 0.2
    other = make_model(tmp_path / "other", intermediate_size=288)
    fails(2, "verify", tmp_path / "out", "--against", other)
