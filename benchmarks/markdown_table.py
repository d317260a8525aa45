"""A table of a page in benchmarks/."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(columns: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Headings, and rows of as many cells, as Markdown."""
    return "\n".join(
        [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *(f"| {' | '.join(row)} |" for row in body)]
    )
