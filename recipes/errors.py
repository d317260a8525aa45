"""Every error a user can cause or meet.

    QoQError                what went wrong, where, and what to do about it
    ├── InputError          bad usage or bad input            (exit code 2)
    ├── EnvironmentProblem  no GPU, no network, no disk space  (exit code 3)
    └── CheckFailed         a verification did not hold        (exit code 1)

The command line turns these into one message and an exit code; library callers catch `QoQError`.
"""

from __future__ import annotations

from collections.abc import Sequence


class QoQError(Exception):
    """Base of all expected errors.

    `message` says what, where, and expected against got; `remedy` says what to do next.
    """

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message if remedy is None else f"{message}\n  -> {remedy}")
        self.message = message
        self.remedy = remedy


class InputError(QoQError):
    """The request or a file it names cannot be used as it is."""


class EnvironmentProblem(QoQError):
    """The machine lacks something: space, network, a device, an optional package."""


class CheckFailed(QoQError):
    """A checkpoint or an evaluation did not pass."""


def raise_problems(heading: str, problems: Sequence[str], *, remedy: str | None = None, shown: int = 20) -> None:
    """Raise one `InputError` that lists every problem found; do nothing when there is none."""
    if not problems:
        return
    lines = [f"  - {problem}" for problem in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"  ... and {len(problems) - shown} more")
    raise InputError("\n".join([f"{heading} ({len(problems)}):", *lines]), remedy=remedy)
