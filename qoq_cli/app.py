"""The `qoq` command: one file a subcommand under `commands/`. Heavy libraries are imported inside commands only."""

from __future__ import annotations

from typing import Annotated

import typer

from qoq_cli import __version__
from qoq_cli.commands import (
    bench,
    doctor,
    evaluate,
    export,
    generate,
    gpus,
    inspect,
    models,
    quantize,
    recipes,
    serve,
    verify,
)

app = typer.Typer(
    name="qoq",
    help="Turn a Hugging Face language model into a W4A8KV4 checkpoint, prove that it is right, and measure what it "
    "costs.\n\nStart with: `qoq quantize tiny`, then `qoq eval --ppl builtin --baseline tiny`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("quantize")(quantize.quantize)
app.command("verify")(verify.verify)
app.command("eval")(evaluate.evaluate)
app.command("bench")(bench.bench)
app.command("export")(export.export)
app.command("serve", context_settings=serve.PASSED_ON)(serve.serve)
app.command("inspect")(inspect.inspect)
app.command("generate")(generate.generate)
app.command("recipes")(recipes.recipes)
app.command("models")(models.models)
app.command("gpus")(gpus.gpus)
app.command("doctor")(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qoq {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    app()
