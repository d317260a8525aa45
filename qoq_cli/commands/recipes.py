"""`qoq recipes`: what recipes there are, and one of them in full."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from qoq_cli.terminal import JsonOption, Terminal, TracebackOption, guarded


@guarded
def recipes(
    name: Annotated[str | None, typer.Argument(help="A recipe's name or YAML file, to print it in full.")] = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """List the recipes, or print one in full, as YAML to start your own from.

    Example: `qoq recipes qoq-g128 > mine.yaml`, then `qoq quantize MODEL --recipe mine.yaml`.
    """
    import yaml

    from qoq.recipes.load import load_recipe, preset_names

    terminal = Terminal(as_json)
    if name is not None:
        data = load_recipe(name).model_dump(mode="json")
        text = yaml.safe_dump(data, sort_keys=False)
        terminal.result(data, lambda console: console.out(text, end="", highlight=False))
        return
    found = [load_recipe(preset) for preset in preset_names()]

    def render(console: Console) -> None:
        table = Table("recipe", "makes", "what it does")
        for recipe in found:
            table.add_row(recipe.name, recipe.scheme, recipe.description)
        console.print(table)

    terminal.result({"recipes": [recipe.model_dump(mode="json") for recipe in found]}, render)
