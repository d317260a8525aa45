"""Lists in the options of `qoq bench`: split, checked, and named in every error."""

from __future__ import annotations

import math

from qoq.recipes.errors import InputError

MAX_ROWS, MAX_SEQUENCES, MAX_LENGTH = 65536, 4096, 1 << 20


def split(option: str, text: str) -> list[str]:
    """Entries of a,b,c in small letters, each once. Raises InputError for an empty one."""
    return list(dict.fromkeys(_words(option, text)))


def _words(option: str, text: str) -> list[str]:
    words = [word.strip().lower() for word in text.split(",")]
    if not all(words):
        raise InputError(f"{option} {text!r}: an empty entry", remedy="separate the entries by single commas: a,b,c")
    return words


def choose(option: str, words: list[str], known: tuple[str, ...]) -> list[str]:
    """`words`. Raises InputError for one that is not known."""
    for word in words:
        if word not in known:
            others = ", or all" if option == "--what" else ""
            raise InputError(f"{option} {word}: not known", remedy=f"use some of {', '.join(known)}{others}")
    return words


def numbers(option: str, text: str, largest: int, *, repeated: bool = False) -> list[int]:
    """Whole numbers from 1 to `largest`, each once unless `repeated`. Raises InputError for anything else."""
    found = []
    for word in _words(option, text) if repeated else split(option, text):
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


def served_lengths(prompt_len: str | None, output_len: str | None) -> list[tuple[int, int]]:
    """Tokens of prompts and answers of whole models: one length of answers for all prompts, or one for each.

    Raises InputError for lists that do not go together.
    """
    prompts = [1024] if prompt_len is None else numbers("--prompt-len", prompt_len, MAX_LENGTH, repeated=True)
    outputs = [512] if output_len is None else numbers("--output-len", output_len, MAX_LENGTH, repeated=True)
    if len(outputs) == 1:
        outputs *= len(prompts)
    if len(outputs) != len(prompts):
        raise InputError(
            f"--output-len {output_len}: {len(outputs)} lengths for {len(prompts)} of --prompt-len",
            remedy="pass one for all of them, or one for each",
        )
    return list(dict.fromkeys(zip(prompts, outputs, strict=True)))


def check_price(price: float | None) -> None:
    """Raises InputError for what is no price."""
    if price is not None and not (price > 0 and math.isfinite(price)):
        raise InputError(f"--price {price}: expected dollars an hour", remedy="such as 1.2")
