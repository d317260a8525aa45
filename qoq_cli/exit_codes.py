"""What the shell is told."""

from enum import IntEnum

from qoq.recipes.errors import CheckFailed, EnvironmentProblem, QoQError


class ExitCode(IntEnum):
    OK = 0
    CHECK_FAILED = 1
    BAD_INPUT = 2
    ENVIRONMENT = 3
    INTERRUPTED = 130

    @staticmethod
    def of(error: QoQError) -> "ExitCode":
        if isinstance(error, CheckFailed):
            return ExitCode.CHECK_FAILED
        if isinstance(error, EnvironmentProblem):
            return ExitCode.ENVIRONMENT
        return ExitCode.BAD_INPUT
