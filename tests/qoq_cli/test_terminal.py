"""Prose on a terminal and in a pipe."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from qoq_cli.terminal import print_text

MESSAGE = "folder/x: a long message that says what is wrong\n  - an entry that does not fit either\n  -> and what to do"


def printed(text: str, *, terminal: bool, width: int = 30, label: str = "") -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, color_system=None)
    print_text(console, text, label=label)
    return file.getvalue()


def test_a_terminal_breaks_lines_between_words() -> None:
    lines = printed(MESSAGE, terminal=True, label="error:").splitlines()
    assert max(map(len, lines)) <= 30
    assert lines[0] == "error: folder/x: a long"
    assert [line for line in lines if "entry" in line or "either" in line] == [
        "  - an entry that does not fit",
        "    either",
    ]


def test_a_pipe_gets_each_line_whole() -> None:
    assert printed(MESSAGE, terminal=False, label="error:") == f"error: {MESSAGE}\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_path_stays_in_one_piece(terminal: bool) -> None:
    path = "/a/very-long/path/that-no-terminal/of-this-width/would/hold"
    assert path in printed(f"see {path} for more", terminal=terminal).split()
