"""Where output goes: results on stdout, progress and messages on stderr; and the boundary that catches errors."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, NoReturn, ParamSpec

import typer
from rich.console import Console
from rich.text import Text

from qoq.recipes.errors import QoQError
from qoq_cli.exit_codes import ExitCode

P = ParamSpec("P")
_ENTRY = re.compile(r" *(?:-> |- )?")

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no warnings.")]
TracebackOption = Annotated[bool, typer.Option("--traceback", help="Show the stack of an error.")]
DeviceOption = Annotated[str, typer.Option(metavar="DEV", help="auto, cpu, cuda, cuda:1, ...")]
RevisionOption = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch, tag or commit on the Hugging Face hub.")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model's tokenizer or config.")
]


class _Console(Console):
    """Shows paths and names as they are, whatever brackets and colons they hold."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False)

    def on_broken_pipe(self) -> NoReturn:
        """Rich would exit with code 1."""
        raise BrokenPipeError


@dataclass
class Terminal:
    """The consoles of one command."""

    as_json: bool = False
    quiet: bool = False
    out: Console = field(default_factory=_Console)
    err: Console = field(default_factory=lambda: _Console(stderr=True))

    def note(self, message: str) -> None:
        """A remark on stderr, unless quiet."""
        if not self.quiet:
            print_text(self.err, message, style="dim")

    def warn(self, message: str) -> None:
        """A warning on stderr, unless quiet."""
        if not self.quiet:
            print_text(self.err, f"warning: {message}", style="yellow")

    def result(self, data: dict[str, Any], render: Callable[[Console], None]) -> None:
        """The result of the command: as one JSON object, or rendered for people."""
        try:
            if self.as_json:
                sys.stdout.write(json.dumps(data, indent=2, allow_nan=False, default=str) + "\n")
            else:
                render(self.out)
            sys.stdout.flush()
        except BrokenPipeError:
            _forget_stdout()  # the exit code is still the command's own


def print_text(console: Console, text: str, *, style: str = "", label: str = "", label_style: str = "") -> None:
    """Print prose, after a label: on a terminal broken between words, in a pipe or a file one line a line."""
    lines = f"{label} {text}".lstrip().split("\n")
    if console.is_terminal:
        lines = [_fold(line, console.width) for line in lines]
    printed = Text("\n".join(lines), style)
    printed.stylize(label_style, 0, len(label))
    console.print(printed, soft_wrap=True)


def _fold(line: str, width: int) -> str:
    """Continuation lines are indented as the text of a list entry or a remedy; a long path stays in one piece."""
    entry = _ENTRY.match(line)
    return textwrap.fill(
        line,
        width,
        subsequent_indent=" " * entry.end() if entry else "",
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn expected errors into one message and an exit code; `--traceback` lets everything through."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if kwargs.get("traceback"):
            command(*args, **kwargs)
            return
        _quiet_libraries()
        try:
            command(*args, **kwargs)
        except QoQError as error:
            _fail(str(error), ExitCode.of(error))
        except KeyboardInterrupt as interruption:
            remedy = f"\n  -> {interruption}" if str(interruption) else ""
            _fail(f"interrupted{remedy}", ExitCode.INTERRUPTED)
        except BrokenPipeError:
            _forget_stdout()
            raise typer.Exit(ExitCode.OK) from None
        except (typer.Exit, typer.Abort, SystemExit):
            raise
        except Exception as error:
            if _is_out_of_memory(error):
                remedy = (
                    "fewer --samples or a shorter --seq-len need less, and --device cpu has other memory than a GPU"
                )
                _fail(f"out of memory\n  -> {remedy}", ExitCode.ENVIRONMENT)
            kind = type(error).__name__
            _fail(
                f"{kind}: {error}\n  -> this is not an error qoq expects; run the same command with --traceback and "
                "report what it prints",
                ExitCode.CHECK_FAILED,
            )

    return run


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch's allocators raise RuntimeError, on CUDA a subclass; its name and text are all there is to go by."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def _forget_stdout() -> None:
    """The reader of our stdout left, as `head` does; there is nobody to tell."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: ExitCode) -> NoReturn:
    print_text(_Console(stderr=True), message, label="error:", label_style="bold red")
    raise typer.Exit(code)


def _quiet_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", module=r"(transformers|datasets|huggingface_hub|torch)\b")
