"""The embedded model, quantized once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from qoq_cli.app import app


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not change it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    words = ["quantize", "tiny", "--recipe", "rtn-g128", "-o", str(folder), "--device", "cpu", "--quiet"]
    result = CliRunner().invoke(app, words, catch_exceptions=False, prog_name="qoq")
    assert result.exit_code == 0, result.stderr
    return folder
