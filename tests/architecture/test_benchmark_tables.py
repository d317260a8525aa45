"""Tables that people read are those of the measured files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(("page", "count"), [("hopper", 7), ("served", 5)])
def test_the_tables_of_a_page_are_those_of_its_files(page: str, count: int) -> None:
    made = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{page}_tables.py")], capture_output=True, encoding="utf-8", check=True
    )
    tables = re.findall(r"(?:^\|.*\n)+", made.stdout, flags=re.MULTILINE)
    assert len(tables) == count
    text = (BENCHMARKS / f"{page}.md").read_text(encoding="utf-8")
    for table in tables:
        assert table in text, f"not in {page}.md:\n{table}"
