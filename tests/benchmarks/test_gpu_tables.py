"""The commands that make the tables of a GPU are ones that exist, with options that are understood."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qoq_cli.app import app
from qoq_cli.exit_codes import ExitCode
from tests.benchmarks.scripts import ROOT, load_script

gpu_tables = load_script("gpu_tables")


@pytest.mark.parametrize("name", gpu_tables.TABLES)
def test_commands_are_understood(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, a right command ends for want of one, and a wrong one for its options."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    program, *arguments = shlex.split(gpu_tables.TABLES[name].command.format(out="unused.json"))
    if program == "qoq":
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == ExitCode.ENVIRONMENT, result.output
        return
    script, *options = arguments
    told = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], capture_output=True, encoding="utf-8", check=True
    ).stdout
    assert all(option in told for option in options if option.startswith("--"))


def test_a_table_is_written_when_its_command_ends_well(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    bad.write_text("as it was")
    assert gpu_tables.make(gpu_tables.Table("good", "qoq gpus --json"), good)
    assert good.read_text().startswith("{")
    assert not gpu_tables.make(gpu_tables.Table("bad", "qoq bench --gpu nothing --json"), bad)
    assert bad.read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "good.json"]


@pytest.mark.parametrize(("words", "expected"), [([], ["first", "second"]), (["--stop"], ["first"])])
def test_after_a_failure_the_rest_goes_on_unless_asked_otherwise(
    words: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(gpu_tables, "TABLES", {name: gpu_tables.Table(name, "") for name in ("first", "second")})
    monkeypatch.setattr(gpu_tables, "make", lambda table, _: bool(tried.append(table.stem)))
    monkeypatch.setattr(sys, "argv", ["gpu_tables.py", "--gpu", "none", "--folder", str(tmp_path), *words])
    assert gpu_tables.main() == 1
    assert tried == expected
