"""A recipe with rotated keys from the command line: what is written, said, verified and evaluated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qoq.calib.against import compare
from qoq.calib.plan import open_model
from qoq.calib.served import ServedModel, open_served
from qoq.calib.streaming import StreamedModel
from qoq.kernels.loading import load_model

WINDOWS = torch.randint(5, 90, (2, 96), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def checkpoints(
    qoq: Any, small_model: Path, quick: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The same model quantized with both rotations and a cache of 4 bits."""
    folder, found = tmp_path_factory.mktemp("rotated-keys"), {}
    for key_rotation in ("none", "hadamard"):
        recipe = folder / f"{key_rotation}.yaml"
        recipe.write_text(f"smooth_attention: {{mode: search}}\nkey_rotation: {key_rotation}\n", encoding="utf-8")
        found[key_rotation] = folder / f"{key_rotation}-out"
        outcome = qoq("quantize", small_model, "--recipe", recipe, *quick, "-o", found[key_rotation])
        assert outcome.code == 0, outcome.stderr
    return found


@pytest.mark.parametrize("key_rotation", ["none", "hadamard"])
def test_files_and_commands_say_which(qoq: Any, checkpoints: dict[str, Path], key_rotation: str) -> None:
    folder = checkpoints[key_rotation]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config["key_rotation"] == key_rotation
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"- key rotation: {key_rotation}" in card
    assert ("other runtimes do not do" in card) == (key_rotation == "hadamard")
    said = " ".join(qoq("inspect", folder).stdout.split())
    assert f"4 bit per token and head, key rotation {key_rotation}" in said
    data = qoq("inspect", folder, "--json").json
    assert data["recipe"]["key_rotation"] == data["quantization_config"]["key_rotation"] == key_rotation
    said = " ".join(qoq("verify", folder).stdout.split())
    assert f"KV cache of 4 bit, key rotation {key_rotation}" in said
    report = qoq("verify", folder, "--json").json
    assert (report["ok"], report["kv_bits"], report["key_rotation"]) == (True, 4, key_rotation)


def test_both_are_served_as_quantized(checkpoints: dict[str, Path]) -> None:
    """The plug-in and the streamed evaluation follow the checkpoint, not a default."""
    logits = {}
    for key_rotation, folder in checkpoints.items():
        served = open_served(folder)
        source = served.checkpoint.source
        cpu = torch.device("cpu")
        streamed = StreamedModel(
            served.skeleton, source, device=cpu, checkpoint=served.checkpoint, act_bits=8, kv_bits=4
        )
        expected = torch.stack(list(streamed.logits(WINDOWS)))
        model = load_model(folder)
        with torch.no_grad():
            found = model(input_ids=WINDOWS).logits
        # A float32 sum in another order may move a code now and then.
        assert float((found - expected).norm() / expected.norm()) < 5e-3
        logits[key_rotation] = expected
    assert float((logits["none"] - logits["hadamard"]).norm() / logits["none"].norm()) > 1e-2


def test_against_the_16_bit_model_keys_are_rotated(qoq: Any, checkpoints: dict[str, Path], small_model: Path) -> None:
    report = qoq("verify", checkpoints["hadamard"], "--against", small_model, "--json").json
    served = open_served(checkpoints["hadamard"])
    for row, record in zip(report["against"], served.checkpoint.manifest["blocks"], strict=True):
        assert 0.5 < row["output_error"] / record["output_error"] < 2, "not the same text, but about the same error"

    def error(served: ServedModel) -> float:
        rows = compare(
            served,
            *open_model(small_model),
            WINDOWS,
            reordered=False,
            device=torch.device("cpu"),
            on_block=lambda _: None,
        )
        return next(rows).output_error

    plain = replace(served.checkpoint.quantization, key_rotation="none")
    assert error(served) != error(replace(served, checkpoint=replace(served.checkpoint, quantization=plain)))


def test_evaluation_says_which_and_16_bits_have_none(qoq: Any, checkpoints: dict[str, Path], text_file: Path) -> None:
    args = ("--ppl", text_file, "--seq-len", 64, "--limit", 2, "--json")
    for bits, expected in ((4, ["none", "hadamard"]), (16, ["none", "none"])):
        texts = qoq("eval", *checkpoints.values(), *args, "--kv-bits", bits).json["texts"]
        models = next(iter(texts.values()))["models"].values()
        assert [model["key_rotation"] for model in models] == expected


def test_recipes_print_it(qoq: Any, fails: Any, tmp_path: Path, small_model: Path) -> None:
    assert "key_rotation: none" in qoq("recipes", "qoq-g128").stdout
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("key_rotation: random\n", encoding="utf-8")
    message = fails(2, "quantize", small_model, "--recipe", recipe)
    assert "key_rotation: Input should be 'none' or 'hadamard'" in message
