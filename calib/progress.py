"""How work that takes long says how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Tick = Callable[[str, float], None]
"""(what is being done, share of the block's work just done)."""


@dataclass(frozen=True)
class Progress:
    """`done` of `total` blocks (fractions count), and what is being done in words."""

    done: float
    total: int
    message: str


OnProgress = Callable[[Progress], None]
