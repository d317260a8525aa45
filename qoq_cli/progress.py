"""Progress of long work: a bar with time left on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qoq_cli.terminal import Terminal

_LOG_EVERY = 15.0
"""Seconds between lines where there is no terminal."""


class Update(Protocol):
    def __call__(self, done: float, total: float, message: str) -> None: ...


@contextmanager
def progress(terminal: Terminal, title: str) -> Iterator[Update]:
    """Within the context, calls of the yielded function show how far the work is."""
    if terminal.quiet:
        yield lambda done, total, message: None
    elif terminal.err.is_terminal:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.fields[title]}", style="bold", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
        )
        with Progress(*columns, console=terminal.err, transient=True) as bar:
            task = bar.add_task("", total=None, title=title)
            yield lambda done, total, message: bar.update(task, completed=done, total=total, description=message)
    else:
        yield _Log(terminal, title)


class _Log:
    def __init__(self, terminal: Terminal, title: str) -> None:
        self._terminal, self._title = terminal, title
        self._started: tuple[float, float] | None = None
        self._next = time.monotonic() + _LOG_EVERY

    def __call__(self, done: float, total: float, message: str) -> None:
        now = time.monotonic()
        if self._started is None and done < total:
            self._started = (now, done)
        if now < self._next or self._started is None:
            return
        self._next = now + _LOG_EVERY
        began, first = self._started
        left = (now - began) / (done - first) * (total - done) if done > first else None
        rest = "" if left is None else f", {duration(left)} left"
        self._terminal.note(f"{self._title}: {100 * done / total:.0f} %{rest} ({message})")


def duration(seconds: float) -> str:
    """A length of time in words, such as `1 h 05 min` or `42 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """A number of bytes in decimal units, as file managers and disks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
