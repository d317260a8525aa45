"""The happy path of every command, on `tiny`; what goes to which stream; help and exit codes."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from qoq_cli import __version__
from qoq_cli.app import app
from qoq_cli.model_location import tiny_folder

COMMANDS = (
    "quantize",
    "verify",
    "eval",
    "bench",
    "export",
    "serve",
    "inspect",
    "generate",
    "gpus",
    "recipes",
    "models",
    "doctor",
)


def test_quantize_tells_people_what_it_made(qoq: Any, tmp_path: Path) -> None:
    outcome = qoq("quantize", "tiny", "--samples", 2, "--seq-len", 64, "--device", "cpu")
    assert outcome.code == 0, outcome.stderr
    made = tmp_path / "checkpoints" / "tiny-w4a8kv4-g128"
    assert (made / "qoq_manifest.json").is_file()
    assert f"qoq verify {made.relative_to(tmp_path)}" in outcome.stdout
    assert "bits per weight" in outcome.stdout
    assert "writing checkpoints/tiny-w4a8kv4-g128" in outcome.stderr
    # The table of errors fits 80 columns: four digits a cell, nothing cut off.
    assert "…" not in outcome.stdout
    assert len(re.findall(r"^\s+\d\s+0\.\d{4}(?:\s+0\.\d{3}){7}", outcome.stdout, re.MULTILINE)) == 4

    newest = qoq("eval", "--ppl", "builtin", "--limit", 1, "--seq-len", 64)
    assert newest.code == 0, newest.stderr
    assert "tiny-w4a8kv4-g128" in newest.stderr


def test_quantize_as_json(qoq: Any, tmp_path: Path) -> None:
    outcome = qoq("quantize", "tiny", "--samples", 1, "--seq-len", 16, "--per-channel", "--json", "-o", "out")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["output"] == "out"
    assert outcome.json["resumed_at_block"] == 0
    assert len(outcome.json["blocks"]) == 4
    on_disk = json.loads((tmp_path / "out" / "config.json").read_bytes())["quantization_config"]
    assert on_disk == outcome.json["quantization_config"]
    assert on_disk["group_size"] == -1


def test_a_checkpoint_holds_what_it_should(tiny_checkpoint: Path) -> None:
    assert sorted(path.name for path in tiny_checkpoint.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "qoq_manifest.json",
        "quant_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_verify(qoq: Any, tiny_checkpoint: Path) -> None:
    outcome = qoq("verify", tiny_checkpoint)
    assert outcome.code == 0, outcome.stderr
    assert "28 quantized linears are right" in " ".join(outcome.stdout.split())
    report = qoq("verify", tiny_checkpoint, "--json").json
    assert report["ok"] is True
    assert report["problems"] == report["warnings"] == []
    assert len(report["linears"]) == 28
    assert all(0 <= check["margin"] <= 8 for check in report["linears"].values())


def test_verify_against_the_model(qoq: Any, tiny_checkpoint: Path) -> None:
    outcome = qoq("verify", tiny_checkpoint, "--against", "tiny", "--json")
    assert outcome.code == 0, outcome.stderr
    assert [row["block"] for row in outcome.json["against"]] == [0, 1, 2, 3]
    assert all(0 < row["output_error"] < 0.5 for row in outcome.json["against"])
    assert all(0 < error < 0.3 for row in outcome.json["against"] for error in row["weight_errors"].values())


def test_verify_against_another_model(qoq: Any, copied: Any, fails: Any, tiny_checkpoint: Path) -> None:
    """A model of the same shape and other weights is told apart by name."""
    import torch
    from safetensors.torch import load_file, save_file

    other = copied(tiny_folder())
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = torch.randn(tensors[name].shape, generator=torch.manual_seed(0)).half() * 0.02
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    message = fails(1, "verify", tiny_checkpoint, "--against", other)
    assert "model.layers.2.mlp.up_proj" in message


def test_eval_beside_its_baseline(qoq: Any, tiny_checkpoint: Path) -> None:
    args = ("eval", tiny_checkpoint, "--baseline", "tiny", "--limit", 1, "--seq-len", 128)
    outcome = qoq(*args, "--json")
    assert outcome.code == 0, outcome.stderr
    (result,) = outcome.json["texts"].values()
    assert result["windows"] == 1
    assert result["seq_len"] == 128
    before, after = result["models"]["tiny"], result["models"][str(tiny_checkpoint)]
    assert before["scheme"] == "w16a16kv16"
    assert after["scheme"] == "w4a8kv4"
    assert before["perplexity"] < after["perplexity"] < 1.5 * before["perplexity"]
    assert 0 < after["kl_divergence"] < 1
    assert 0.5 < after["top1_agreement"] < 1
    shown = qoq(*args)
    assert f"{after['perplexity']:.3f}" in shown.stdout


def test_eval_of_several_texts_and_bits(qoq: Any, tiny_checkpoint: Path, text_file: Path) -> None:
    args = ("eval", tiny_checkpoint, "--limit", 1, "--seq-len", 64, "--ppl", "builtin", "--ppl", text_file)
    outcome = qoq(*args, "--kv-bits", 16, "--act-bits", 16, "--json")
    assert outcome.code == 0, outcome.stderr
    assert set(outcome.json["texts"]) == {"builtin", str(text_file)}
    schemes = {model["scheme"] for text in outcome.json["texts"].values() for model in text["models"].values()}
    assert schemes == {"w4a16kv16"}


def test_inspect(qoq: Any, tiny_checkpoint: Path) -> None:
    outcome = qoq("inspect", tiny_checkpoint, "--tensors")
    assert outcome.code == 0, outcome.stderr
    assert "model.layers.3.mlp.down_proj.s2_zeros" in outcome.stdout
    data = qoq("inspect", tiny_checkpoint, "--json", "--tensors").json
    assert data["source"]["model"] == "tiny"
    assert data["totals"]["quantized_linears"] == 28
    assert data["tensors"]["model.layers.0.self_attn.q_proj.qweight"] == {
        "dtype": "int8",
        "shape": [256, 128],
        "bytes": 256 * 128,
    }
    assert sum(data["bytes_by_dtype"].values()) == sum(entry["bytes"] for entry in data["tensors"].values())


def test_generate(qoq: Any, tiny_checkpoint: Path) -> None:
    outcome = qoq("generate", tiny_checkpoint, "In the beginning", "-n", 4)
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.startswith("In the beginning")
    data = qoq("generate", tiny_checkpoint, "In the beginning", "-n", 4, "--json").json
    assert 1 <= data["new_tokens"] <= 4
    assert outcome.stdout.strip() == f"In the beginning{data['text']}".strip()


def test_generate_draws_by_the_seed(qoq: Any, tiny_checkpoint: Path) -> None:
    args = ("generate", tiny_checkpoint, "In the", "-n", 8, "--temperature", 2.0, "--json", "--seed")
    assert qoq(*args, 1).json["text"] == qoq(*args, 1).json["text"] != qoq(*args, 2).json["text"]


def test_generate_on_the_runtime(qoq: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, which is pretended: the same text as through transformers, and draws by the seed."""
    args = ("generate", tiny_checkpoint, "In the beginning", "-n", 8, "--device", "cpu")
    expected = qoq(*args)
    assert "(transformers)" in expected.stderr
    monkeypatch.setattr("qoq_cli.continuation.kernel_problem", lambda device: None)
    outcome = qoq(*args)
    assert outcome.code == 0, outcome.stderr
    assert "(qoq's runtime)" in outcome.stderr
    assert outcome.stdout == expected.stdout
    assert qoq(*args, "--json").json["text"] == qoq(*args, "--json").json["text"]
    drawn = [
        qoq(*args, "--temperature", 2, "--top-p", 0.9, "--json", "--seed", seed).json["text"] for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert "(transformers)" in qoq("generate", "tiny", "In", "-n", 2, "--device", "cpu").stderr
    assert "(transformers)" in qoq(*args, "--trust-remote-code").stderr


def test_generate_refuses_more_tokens_than_the_model_knows(
    fails: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qoq_cli.continuation.kernel_problem", lambda device: None)
    message = fails(2, "generate", tiny_checkpoint, "In", "-n", 600, "--device", "cpu")
    assert "600 new ones, but a sequence has at most 512" in message


def test_top_p_without_a_temperature_would_do_nothing(fails: Any, tiny_checkpoint: Path) -> None:
    assert "with temperature 0 nothing is drawn" in fails(2, "generate", tiny_checkpoint, "The", "--top-p", 0.5)


def test_doctor(qoq: Any) -> None:
    outcome = qoq("doctor")
    assert outcome.code == 0, outcome.stdout
    assert "torch" in outcome.stdout
    findings = qoq("doctor", "--json").json
    assert findings["ok"] is True
    assert findings["qoq"] == __version__


def test_models(qoq: Any) -> None:
    assert "mixtral-8x7b" in qoq("models").stdout
    data = qoq("models", "--json").json
    assert {"tiny", "llama-3-8b", "smollm2-135m"} <= {alias["name"] for alias in data["aliases"]}
    assert {family["family"] for family in data["families"]} == {"llama", "mistral", "qwen2", "qwen3"}


def test_recipes(qoq: Any, tmp_path: Path) -> None:
    assert "qoq-g128" in qoq("recipes").stdout
    assert [recipe["name"] for recipe in qoq("recipes", "--json").json["recipes"]] == [
        "qoq-chn",
        "qoq-chn-best",
        "qoq-g128",
        "qoq-g128-best",
        "qoq-sym",
        "rtn-chn",
        "rtn-g128",
    ]
    text = qoq("recipes", "rtn-g128").stdout
    assert yaml.safe_load(text) == qoq("recipes", "rtn-g128", "--json").json
    (tmp_path / "mine.yaml").write_text(text)
    again = qoq("quantize", "tiny", "--recipe", "mine.yaml", "--calib", "builtin", "--dry-run", "--json")
    assert again.code == 0, again.stderr
    assert again.json["recipe"]["rounding"] == "rtn"


def test_dry_run_touches_nothing(qoq: Any, tmp_path: Path) -> None:
    outcome = qoq("quantize", "tiny", "--dry-run")
    assert outcome.code == 0, outcome.stderr
    assert "nothing was written" in outcome.stdout
    facts = qoq("quantize", "tiny", "--dry-run", "--json", "--max-shard-size", "1MB").json
    assert facts["blocks"] == 4
    assert facts["totals"]["checkpoint_bytes"] == sum(facts["shards"].values())
    assert len(facts["shards"]) > 1
    assert facts["memory_bytes"]["total"] > 0
    assert list(tmp_path.iterdir()) == []


def test_the_plan_promises_the_sizes_that_are_written(qoq: Any, tiny_checkpoint: Path) -> None:
    facts = qoq("quantize", "tiny", "--dry-run", "--json").json
    assert facts["shards"] == {"model.safetensors": (tiny_checkpoint / "model.safetensors").stat().st_size}


@pytest.mark.parametrize(
    "args",
    [
        ("verify", "CKPT"),
        ("inspect", "CKPT"),
        ("eval", "CKPT", "--ppl", "builtin", "--limit", "1", "--seq-len", "64"),
        ("generate", "CKPT", "In", "-n", "2"),
        ("recipes",),
        ("models",),
        ("doctor",),
        ("quantize", "tiny", "--dry-run"),
    ],
    ids=lambda args: args[0],
)
def test_json_is_one_object_and_nothing_else(
    args: tuple[str, ...], tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where libraries write to the descriptor behind sys.stdout."""
    words = [str(tiny_checkpoint) if word == "CKPT" else word for word in args]
    with pytest.raises(SystemExit) as exit_:
        app([*words, "--json"])
    assert exit_.value.code == 0
    stdout = capfd.readouterr().out
    assert isinstance(json.loads(stdout), dict)
    assert stdout.endswith("}\n")


@pytest.mark.parametrize(
    "args",
    [
        ("verify", "CKPT"),
        ("eval", "CKPT", "--ppl", "builtin", "--limit", "1", "--seq-len", "64"),
        ("generate", "CKPT", "In", "-n", "2"),
        ("quantize", "tiny", "--samples", "1", "--seq-len", "16", "-o", "quiet"),
    ],
    ids=lambda args: args[0],
)
def test_quiet_says_nothing_on_stderr(
    args: tuple[str, ...], tiny_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [str(tiny_checkpoint) if word == "CKPT" else word for word in args]
    with pytest.raises(SystemExit) as exit_:
        app([*words, "--quiet"])
    assert exit_.value.code == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert captured.out != ""


def test_an_error_is_still_told_when_quiet(qoq: Any) -> None:
    outcome = qoq("quantize", "no-such-model", "--quiet", "--json")
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert "no-such-model" in outcome.error


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_help(command: str, flag: str, qoq: Any) -> None:
    outcome = qoq(command, flag)
    assert outcome.code == 0
    assert "Usage:" in outcome.stdout
    assert outcome.stderr == ""


def test_every_option_is_explained() -> None:
    """Also: the same option means the same in every command that has it."""
    meanings: dict[str, set[str]] = {}
    root = typer.main.get_command(app)
    assert set(root.commands) == set(COMMANDS)  # type: ignore[attr-defined]
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, f"{name}: {parameter.name}"
            for option in ("--json", "--quiet", "--traceback", "--trust-remote-code", "--revision"):
                if option in parameter.opts:
                    meanings.setdefault(option, set()).add(parameter.help)
        assert {"as_json", "traceback"} <= {parameter.name for parameter in command.params}, name
    assert all(len(texts) == 1 for texts in meanings.values()), meanings


def test_version_and_bare_call(qoq: Any) -> None:
    assert qoq("--version").stdout == f"qoq {__version__}\n"
    bare = qoq()
    assert bare.code == 2
    assert all(command in bare.stdout + bare.stderr for command in COMMANDS)


@pytest.mark.parametrize(
    "args",
    [("quantise", "tiny"), ("quantize",), ("quantize", "tiny", "--nope"), ("quantize", "tiny", "--samples", "many")],
)
def test_wrong_usage_is_exit_code_2(args: tuple[str, ...], qoq: Any) -> None:
    outcome = qoq(*args)
    assert outcome.code == 2
    assert outcome.stdout == ""
    assert "Usage:" in outcome.stderr


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("quantize", "--samples", "0"),
        ("quantize", "--seq-len", "15"),
        ("quantize", "--kv-bits", "5"),
        ("quantize", "--act-bits", "4"),
        ("eval", "--limit", "0"),
        ("eval", "--seq-len", "1"),
        ("eval", "--kv-bits", "3"),
    ],
)
def test_numbers_out_of_range_are_named(command: str, option: str, value: str, fails: Any) -> None:
    assert f"{option} {value}" in fails(2, command, "tiny", option, value)


def test_a_defect_shows_its_stack_only_when_asked(
    qoq: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("qoq.formats.checkpoint.open_checkpoint", broken)
    outcome = qoq("inspect", tiny_checkpoint)
    assert outcome.code == 1
    assert "a defect" in outcome.error
    assert "--traceback" in outcome.error
    with pytest.raises(RuntimeError, match="a defect"):
        qoq("inspect", tiny_checkpoint, traceback=True)


@pytest.mark.parametrize("options", ["--tensors", pytest.param("--tensors --json", marks=pytest.mark.slow)])
def test_a_reader_that_leaves_is_no_error(options: str, tiny_checkpoint: Path) -> None:
    qoq = Path(sys.executable).with_name("qoq")
    command = f"{qoq} inspect {tiny_checkpoint} {options} | head -c 1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert result.stdout[1:] == "0\n"
    assert result.stderr == ""


@pytest.mark.parametrize(
    "name", ["with space", "ünï¢ode", "br[ack]et", "[red]", ":smile:", "-dash", "quote'\"", "a" * 200]
)
def test_names_of_folders_are_used_and_shown_as_they_are(
    name: str, qoq: Any, tmp_path: Path, small_model: Path, quick: tuple[object, ...]
) -> None:
    output = tmp_path / name
    outcome = qoq("quantize", small_model, *quick, "-o", output)
    assert outcome.code == 0, outcome.stderr
    assert shlex.split(outcome.stdout.splitlines()[-1]) == ["Next:", "qoq", "verify", str(output)]
    verified = qoq("verify", output)
    assert verified.code == 0, verified.stderr
    assert str(output) in verified.stdout
    assert qoq("inspect", output).code == 0


def test_the_output_may_be_a_link_to_an_empty_folder(
    qoq: Any, tmp_path: Path, small_model: Path, quick: tuple[object, ...], contents: Any
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    assert qoq("quantize", small_model, *quick, "-o", "link").code == 0
    assert qoq("quantize", small_model, *quick, "-o", "plain").code == 0
    assert contents(tmp_path / "elsewhere") == contents(tmp_path / "plain")
    assert qoq("verify", "link").code == 0


def test_the_output_may_lie_inside_the_model(qoq: Any, copied: Any, small_model: Path, quick: Any) -> None:
    model = copied(small_model)
    assert qoq("quantize", model, *quick, "-o", model / "w4").code == 0
    assert qoq("verify", model / "w4").code == 0
    assert qoq("quantize", model, *quick, "-o", model / "again").code == 0
