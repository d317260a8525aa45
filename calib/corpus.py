"""Text to calibrate and evaluate on, cut into windows of tokens.

A corpus is a named set, the embedded model's text, or a file of the user's. It holds documents in one of two forms:

* independent documents (pileval, c4, .jsonl, .parquet). For calibration they are read in an order drawn from the seed
  until there are enough tokens, each tokenized on its own with the tokenizer's special tokens. A document longer than
  a window gives one piece of a window's length, cut at random, so that no document dominates; what is left of the long
  ones is used only when the whole corpus would not be enough otherwise. The pieces are joined and cut into windows.
* one running text (wikitext, .txt, the embedded text), whose documents are short and follow each other. For calibration
  they are joined in their order, tokenized once and cut into windows, of which the seed draws some.

For evaluation, documents of either form are joined in their order, tokenized once and cut into consecutive windows.
Windows are whole: a tail shorter than a window is dropped. All draws come from `random.Random(seed)` alone.
"""

from __future__ import annotations

import difflib
import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from qoq.calib.text_files import TEXT_SUFFIXES, Documents, Rows, read_documents
from qoq.recipes.errors import EnvironmentProblem, InputError

Purpose = Literal["calibration", "evaluation"]

_OPTION: Mapping[Purpose, str] = {"calibration": "--calib", "evaluation": "--ppl"}
_CHARACTERS_PER_TOKEN = 32  # far more than any tokenizer takes on average, so that one look at a text is mostly enough
_EDGE_TOKENS = 64  # a text cut short may be tokenized differently near the cut, but not this far from it
_SHORTEST_WINDOW = 16  # of calibration, as the recipe's schema has it
_PROBE_SECONDS = 10


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def __call__(
        self, text: str, *, add_special_tokens: bool = ..., return_attention_mask: bool = ..., verbose: bool = ...
    ) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Corpus:
    """Documents and how they belong together; see the head of the module.

    `separator` stands between documents where they are joined for evaluation.
    """

    name: str
    documents: Documents
    is_running_text: bool
    separator: str = "\n\n"


@dataclass(frozen=True, eq=False)
class Windows:
    """Token ids int64 [S, L], and where they come from.

    requested     number of windows asked for; `tokens` has fewer when the text is short
    fingerprint   sha256 of shape and token ids, in hexadecimal
    source        name of the corpus
    """

    tokens: Tensor
    requested: int
    fingerprint: str
    source: str

    @property
    def is_short(self) -> bool:
        """True when the text gave fewer windows than were asked for."""
        return self.tokens.shape[0] < self.requested


@dataclass(frozen=True)
class _Split:
    """Rows of one split of a hub data set; `rows` takes only the first so many."""

    split: str
    data_files: str | None = None
    rows: int | None = None


@dataclass(frozen=True)
class _NamedSet:
    repository: str
    is_running_text: bool
    splits: Mapping[Purpose, _Split]
    config: str | None = None
    separator: str = "\n\n"
    package: str | None = None  # what its compression needs installed


_NAMED_SETS: Mapping[str, _NamedSet] = {
    "pileval": _NamedSet(
        "mit-han-lab/pile-val-backup",
        is_running_text=False,
        splits={"calibration": _Split("validation")},
        package="zstandard",
    ),
    "wikitext": _NamedSet(
        "Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        is_running_text=True,
        splits={"calibration": _Split("train"), "evaluation": _Split("test")},
    ),
    # Evaluation follows the protocol of the GPTQ paper: the first 1100 documents of one shard, joined with spaces.
    "c4": _NamedSet(
        "allenai/c4",
        is_running_text=False,
        splits={
            "calibration": _Split("train", "en/c4-train.00000-of-01024.json.gz"),
            "evaluation": _Split("validation", "en/c4-validation.00000-of-00008.json.gz", rows=1100),
        },
        separator=" ",
    ),
}


def named_sets(purpose: Purpose) -> list[str]:
    """Names of the hub data sets that serve `purpose`."""
    return [name for name, entry in _NAMED_SETS.items() if purpose in entry.splits]


def load_corpus(spec: str, *, builtin: Mapping[str, Path], purpose: Purpose) -> Corpus:
    """Open a corpus: a named set, a name in `builtin` (a .txt file each), or a .txt, .jsonl or .parquet file.

    Raises InputError when there is no such corpus or the file cannot be used, EnvironmentProblem when a named set
    cannot be downloaded.
    """
    if spec in builtin:
        return Corpus(spec, read_documents(builtin[spec]), is_running_text=True)
    if spec in _NAMED_SETS:
        return _open_named_set(spec, purpose)
    path = Path(spec).expanduser()
    known = [*builtin, *named_sets(purpose)]
    try:
        exists = path.exists()
    except OSError as error:
        raise InputError(f"{_OPTION[purpose]} {spec}: cannot be read ({error.strerror})") from error
    if not exists:
        close = difflib.get_close_matches(spec, known, n=1)
        raise InputError(
            f"{_OPTION[purpose]} {spec}: neither a known text nor a file that exists",
            remedy=(f"did you mean {close[0]}? " if close else "")
            + f"known: {', '.join(known)}; or a {', '.join(TEXT_SUFFIXES)} file",
        )
    if path.suffix.lower() not in TEXT_SUFFIXES or not path.is_file():
        kind = "a folder" if path.is_dir() else f"a {path.suffix} file" if path.suffix else "no kind of file known here"
        raise InputError(
            f"{_OPTION[purpose]} {spec}: {kind}, expected a text",
            remedy=f"give a {', '.join(TEXT_SUFFIXES)} file, or one of {', '.join(known)}",
        )
    return Corpus(path.name, read_documents(path), is_running_text=path.suffix.lower() == ".txt")


def calibration_windows(corpus: Corpus, tokenizer: Tokenizer, *, samples: int, seq_len: int, seed: int) -> Windows:
    """Up to `samples` windows of `seq_len` tokens, drawn as the head of the module says: int64 [S, L].

    Raises InputError when the text does not fill a single window.
    """
    draw = random.Random(seed)
    if corpus.is_running_text:
        texts = (text for text in (document.strip("\n") for document in _each(corpus.documents)) if text.strip())
        ids = _encode_enough(texts, "\n\n", tokenizer, samples * seq_len)
        rows = _cut(ids, seq_len)
        order = list(range(rows.shape[0]))
        draw.shuffle(order)
        tokens = rows[order[:samples]]
    else:
        ids = _draw_pieces(corpus.documents, tokenizer, samples * seq_len, seq_len, draw)
        tokens = _cut(ids, seq_len)[:samples]
    return _windows(tokens, samples, corpus.name, len(ids), seq_len)


def evaluation_windows(corpus: Corpus, tokenizer: Tokenizer, *, seq_len: int, limit: int | None) -> Windows:
    """Consecutive windows of `seq_len` tokens, all or the first `limit`: int64 [S, L].

    The documents are joined as they are, so special tokens stand at the start of the text only. Raises InputError when
    the text does not fill a single window, or a window is too short to predict anything.
    """
    if seq_len < 2:
        raise InputError(f"--seq-len {seq_len}: a window of at least 2 tokens is needed to predict one from another")
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: at least one window is needed")
    enough = None if limit is None else limit * seq_len + _EDGE_TOKENS
    ids = _encode_enough(_each(corpus.documents), corpus.separator, tokenizer, enough)
    return _windows(_cut(ids, seq_len)[:limit], limit, corpus.name, len(ids), seq_len)


def _windows(tokens: Tensor, requested: int | None, source: str, found: int, seq_len: int) -> Windows:
    if not tokens.shape[0]:
        shorter = f"--seq-len {found} or less, or " if found >= _SHORTEST_WINDOW else ""
        raise InputError(
            f"{source}: the text has {found} tokens, one window of --seq-len {seq_len} needs {seq_len}",
            remedy=f"use {shorter}a longer text",
        )
    digest = hashlib.sha256(f"int64 {list(tokens.shape)}\n".encode())
    digest.update(tokens.numpy().astype("<i8").tobytes())
    return Windows(tokens, tokens.shape[0] if requested is None else requested, digest.hexdigest(), source)


def _cut(ids: list[int], seq_len: int) -> Tensor:
    """Token ids as rows int64 [len(ids) // seq_len, seq_len]; the tail is dropped."""
    count = len(ids) // seq_len
    return torch.tensor(ids[: count * seq_len], dtype=torch.int64).reshape(count, seq_len)


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    # verbose=False: no warning that the text is longer than the model's context.
    encoded = tokenizer(text, add_special_tokens=True, return_attention_mask=False, verbose=False)
    return cast("list[int]", encoded["input_ids"])


def _encode_enough(texts: Iterable[str], separator: str, tokenizer: Tokenizer, enough: int | None) -> list[int]:
    """Tokens of the joined texts: all of them, or those of a beginning that gives at least `enough`."""
    parts: list[str] = []
    length = 0
    budget = None if enough is None else enough * _CHARACTERS_PER_TOKEN
    for text in texts:
        parts.append(text)
        length += len(text) + len(separator)
        while enough is not None and budget is not None and length > budget:
            ids = _encode(separator.join(parts)[:budget], tokenizer)
            if len(ids) >= enough:
                return ids
            budget *= 2
    return _encode(separator.join(parts), tokenizer)


def _draw_pieces(
    documents: Documents, tokenizer: Tokenizer, enough: int, seq_len: int, draw: random.Random
) -> list[int]:
    """Tokens of documents in a drawn order, at most `seq_len` of each, until there are `enough`."""
    order = list(range(len(documents)))
    draw.shuffle(order)
    pieces: list[int] = []
    rests: list[list[int]] = []
    for index in order:
        text = documents[index].strip()
        if not text:
            continue
        ids = _encode(text, tokenizer)
        if len(ids) > seq_len:
            start = draw.randrange(len(ids) - seq_len + 1)
            rests += [ids[:start], ids[start + seq_len :]]
            ids = ids[start : start + seq_len]
        pieces += ids
        if len(pieces) >= enough:
            return pieces
    for rest in rests:
        if len(pieces) >= enough:
            break
        pieces += rest
    return pieces


def _each(documents: Documents) -> Iterator[str]:
    return (documents[index] for index in range(len(documents)))


def _open_named_set(name: str, purpose: Purpose) -> Corpus:
    entry = _NAMED_SETS[name]
    split = entry.splits.get(purpose)
    if split is None:
        raise InputError(
            f"{_OPTION[purpose]} {name}: this set serves {' and '.join(entry.splits)} only",
            remedy=f"use {', '.join(named_sets(purpose))}, or a {', '.join(TEXT_SUFFIXES)} file",
        )
    rows = _download(entry, split, name, purpose)
    count = len(rows) if split.rows is None else min(split.rows, len(rows))
    documents = Rows(count, lambda index: cast("str | None", rows[index]["text"]))
    return Corpus(name, documents, entry.is_running_text, entry.separator)


def _download(entry: _NamedSet, split: _Split, name: str, purpose: Purpose) -> Any:
    """A split as a `datasets.Dataset`, from the cache where it is there."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # huggingface_hub 1 raises the errors of httpx, version 2 those of httpx2; its own derive from the right ones.
    http_error = cast("type[Exception]", HfHubHTTPError.__bases__[0])
    local_file = (
        f"or give a local file: {_OPTION[purpose]} FILE.txt (or .jsonl, .parquet with a column `text`), or take the "
        f"little text that comes with qoq: {_OPTION[purpose]} builtin"
    )
    is_cached = (Path(datasets.config.HF_DATASETS_CACHE) / entry.repository.replace("/", "___")).is_dir()
    try:
        if not is_cached:
            # Without a network, `datasets` retries for half a minute before it says so; this asks once.
            HfApi().dataset_info(entry.repository, timeout=_PROBE_SECONDS)
            if entry.package is not None and find_spec(entry.package) is None:
                raise EnvironmentProblem(
                    f"{name}: reading {entry.repository} needs the package {entry.package}, which is not installed",
                    remedy=f"pip install {entry.package}, {local_file}",
                )
        files = None if split.data_files is None else {split.split: split.data_files}
        # The hub's table of split sizes describes the whole set and so never fits a single shard of it.
        return datasets.load_dataset(
            entry.repository, entry.config, data_files=files, split=split.split, verification_mode="no_checks"
        )
    except OfflineModeIsEnabled as error:
        raise EnvironmentProblem(
            f"{name}: {entry.repository} is not in the local cache and HF_HUB_OFFLINE is set",
            remedy=f"unset HF_HUB_OFFLINE, {local_file}",
        ) from error
    except (OSError, ValueError, http_error, datasets.exceptions.DatasetsError) as error:
        raise EnvironmentProblem(
            f"{name}: {entry.repository} could not be downloaded from the hub ({_first_line(error)})",
            remedy=f"check the network and HF_ENDPOINT, {local_file}",
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
