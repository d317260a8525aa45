"""Lists in the options of `qoq bench`: split, checked, and named in every error."""

from __future__ import annotations

import math

from qoq.recipes.errors import InputError

MAX_ROWS, MAX_SEQUENCES, MAX_LENGTH = 65536, 4096, 1 << 20


def split(option: str, text: str) -> list[str]:
    """Entries of a,b,c in small letters, each once. Raises InputError for an empty one."""
    words = [word.strip().lower() for word in text.split(",")]
    if not all(words):
        raise InputError(f"{option} {text!r}: an empty entry", remedy="separate the entries by single commas: a,b,c")
    return list(dict.fromkeys(words))


def choose(option: str, words: list[str], known: tuple[str, ...]) -> list[str]:
    """`words`. Raises InputError for one that is not known."""
    for word in words:
        if word not in known:
            raise InputError(f"{option} {word}: not known", remedy=f"use some of {', '.join(known)}")
    return words


def numbers(option: str, text: str, largest: int) -> list[int]:
    """Whole numbers from 1 to `largest`. Raises InputError for anything else."""
    found = []
    for word in split(option, text):
        if not word.isdecimal() or not 1 <= int(word) <= largest:
            raise InputError(f"{option} {word}: expected whole numbers from 1 to {largest}", remedy="such as 1,16,64")
        found.append(int(word))
    return found


def attention_cases(parts: list[str], batch: str | None, prompt_len: str | None) -> list[tuple[int, int]] | None:
    """Sequences and tokens of each for --batch and --prompt-len; None where the defaults are meant.

    Raises InputError where the two do not make cases.
    """
    if prompt_len is None:
        if parts == ["attention"] and batch is not None:
            raise InputError(
                f"--batch {batch}: attention also needs the tokens of each sequence", remedy="add --prompt-len 1024"
            )
        return None
    lengths = numbers("--prompt-len", prompt_len, MAX_LENGTH)
    if batch is None:
        sequences = [1, 16, 64, 128]
    else:
        sequences = [rows for rows in numbers("--batch", batch, MAX_ROWS) if rows <= MAX_SEQUENCES]
    if "attention" in parts and not sequences:
        raise InputError(f"--batch {batch}: attention takes at most {MAX_SEQUENCES} sequences", remedy="pass fewer")
    return [(rows, length) for length in lengths for rows in sequences]


def check_served(output_len: int | None, price: float | None) -> None:
    """Options of whole models. Raises InputError for one that is out of range."""
    if output_len is not None and not 1 <= output_len <= MAX_LENGTH:
        raise InputError(f"--output-len {output_len}: out of range", remedy=f"pass 1 to {MAX_LENGTH}")
    if price is not None and not (price > 0 and math.isfinite(price)):
        raise InputError(f"--price {price}: expected dollars an hour", remedy="such as 1.2")
