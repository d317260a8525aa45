"""Checkpoints in the forms that other servers read. One exporter a file; `EXPORTERS` has them by name."""

from __future__ import annotations

from qoq.formats.exporters.compressed_tensors import VllmW4A8, VllmW4A16
from qoq.formats.exporters.dequantized import Dequantized
from qoq.formats.exporters.exporter import Exporter
from qoq.formats.exporters.native import Omniserve, SGLang
from qoq.recipes.errors import InputError

EXPORTERS: dict[str, Exporter] = {
    exporter.name: exporter for exporter in (VllmW4A8(), VllmW4A16(), Omniserve(), SGLang(), Dequantized())
}


def find_exporter(name: str) -> Exporter:
    """The exporter called `name`. Raises InputError that lists the known ones."""
    exporter = EXPORTERS.get(name.lower())
    if exporter is None:
        raise InputError(f"--to {name}: not a format that qoq writes", remedy=f"use one of {', '.join(EXPORTERS)}")
    return exporter
