"""`qoq models`: the aliases and the model families qoq understands."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from qoq.recipes.families import all_families
from qoq.recipes.models import model_aliases
from qoq_cli.terminal import JsonOption, Terminal, TracebackOption, guarded


@guarded
def models(as_json: JsonOption = False, traceback: TracebackOption = False) -> None:
    """List the aliases that stand for a model, and the families that are supported under any name."""
    terminal = Terminal(as_json)
    aliases = model_aliases().values()
    families = [{"family": family.name, "architecture": family.architecture} for family in all_families()]

    def render(console: Console) -> None:
        table = Table("alias", Column("Hugging Face id", no_wrap=True), "family", "note")
        for alias in aliases:
            note = Text.assemble(("refused: ", "red"), alias.refused) if alias.refused else alias.note
            table.add_row(alias.name, alias.hub_id or "(embedded)", alias.family, note)
        console.print(table)
        known = ", ".join(f"{family['family']} ({family['architecture']})" for family in families)
        console.print(f"Families: {known}. Any folder, hub id or .gguf file of these works.", highlight=False)

    terminal.result({"aliases": [asdict(alias) for alias in aliases], "families": families}, render)
