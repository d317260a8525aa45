"""Tables that people read are those of the measured files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_tables_of_hopper_are_those_of_its_files() -> None:
    made = subprocess.run(
        [sys.executable, str(BENCHMARKS / "hopper_tables.py")], capture_output=True, encoding="utf-8", check=True
    )
    tables = re.findall(r"(?:^\|.*\n)+", made.stdout, flags=re.MULTILINE)
    assert len(tables) == 7
    text = (BENCHMARKS / "hopper.md").read_text(encoding="utf-8")
    for table in tables:
        assert table in text, f"not in hopper.md:\n{table}"
