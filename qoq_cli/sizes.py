"""Sizes in options: 5GB, 500MB, 1000000."""

from __future__ import annotations

from qoq.recipes.errors import InputError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}


def parse_size(option: str, text: str) -> int:
    """Bytes of a size such as `5GB`, `500MB` or `1000000`. Raises InputError that names the option."""
    upper = text.strip().upper().replace("I", "")
    unit = next((unit for unit in _UNITS if upper.endswith(unit)), "")
    try:
        count = float(upper.removesuffix(unit)) * _UNITS.get(unit, 1)
    except ValueError:
        count = 0
    if not 1 <= count < 10**15:
        raise InputError(f"{option} {text!r}: not a size", remedy="write it like 5GB or 500MB")
    return int(count)
