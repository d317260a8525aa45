"""The two texts behind `tiny`, cut into documents and dealt out to training, validation and evaluation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

BLOCKS = 20  # documents of a source are dealt out by index modulo this
EVALUATION_BLOCK, VALIDATION_BLOCK = 19, 9


@dataclass(frozen=True)
class Split:
    """Documents of both sources, merged so that any run of them has both in proportion."""

    train: list[str]
    validation: list[str]
    evaluation: list[str]


def bible_documents(text: str) -> list[str]:
    """One document a chapter: its name, then a line for every verse."""
    documents = []
    chunks = [chunk for chunk in text.split("\n\n") if chunk.strip()]
    for title, body in zip(chunks[::2], chunks[1::2], strict=True):
        verses = re.split(r"^  \d+ ", body, flags=re.MULTILINE)[1:]
        documents.append("\n".join([title.strip(), *(" ".join(verse.split()) for verse in verses)]))
    return documents


def jargon_documents(text: str) -> list[str]:
    """One document a lexicon entry and one an essay, a line for every paragraph; no tables of contents."""
    text = text.replace("\u00a0", " ")
    intro, glossary, rest = re.split(r"^(?=Glossary$|Appendix A\.)", text, flags=re.MULTILINE)
    documents = []
    for entry in re.split(r"^   (?=:\S)", glossary, flags=re.MULTILINE)[1:]:
        body = re.split(r"^   \S$", entry, maxsplit=1, flags=re.MULTILINE)[0]  # a letter opens the next index
        documents.append(_paragraphs(body, shortest=0))
    essays = intro[intro.index("\nChapter 1.") :] + rest
    documents += [_paragraphs(essay, shortest=40) for essay in re.split(r"^(?=\S)", essays, flags=re.MULTILINE)]
    return [document for document in documents if len(document) > 100]


def _paragraphs(text: str, shortest: int) -> str:
    """Unwrap paragraphs; after the first, drop those under `shortest` characters (tables of contents)."""
    lines = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    return "\n".join(line for i, line in enumerate(lines) if line and (i == 0 or len(line) >= shortest))


def split_documents(sources: Sequence[list[str]]) -> Split:
    """Deal documents out by their index modulo BLOCKS, each source for itself, then merge the sources."""

    def merge(wanted: set[int]) -> list[str]:
        chosen = [[doc for i, doc in enumerate(source) if i % BLOCKS in wanted] for source in sources]
        placed = [((i + 0.5) / len(docs), doc) for docs in chosen for i, doc in enumerate(docs)]
        return [doc for _, doc in sorted(placed)]

    held_out = {VALIDATION_BLOCK, EVALUATION_BLOCK}
    return Split(merge(set(range(BLOCKS)) - held_out), merge({VALIDATION_BLOCK}), merge({EVALUATION_BLOCK}))


def sample_documents(documents: list[str], size: int) -> str:
    """About `size` bytes of documents, evenly spaced, with blank lines between them."""
    total = sum(len(doc.encode()) + 2 for doc in documents)
    share = min(1.0, size / total)
    kept = [doc for i, doc in enumerate(documents) if int((i + 1) * share) > int(i * share)]
    return "\n\n".join(kept) + "\n"
