"""Corpora and windows: every rule of qoq.calib.corpus, what is said about unusable files, and determinism."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qoq.calib.corpus import Corpus, Windows, calibration_windows, evaluation_windows, load_corpus, named_sets
from qoq.recipes.errors import EnvironmentProblem, InputError

BOS = 0
TEXTS = [f"document {i}: " + " ".join(f"word{i * j % 97}" for j in range(5 + i % 40)) for i in range(60)]


class Characters:
    """A tokenizer with one token a character, after BOS; counts what it was given."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, text: str, **_: bool) -> Mapping[str, Any]:
        self.calls.append(len(text))
        return {"input_ids": [BOS, *(ord(char) for char in text)]}


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts BOS (id 0) in front, and whose model has a context of 64 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=64)


def documents(texts: list[str]) -> Corpus:
    return Corpus("test", texts, is_running_text=False)


def running(texts: list[str]) -> Corpus:
    return Corpus("test", texts, is_running_text=True)


def load(path: Path) -> Corpus:
    return load_corpus(str(path), builtin={}, purpose="calibration")


def texts_of(corpus: Corpus) -> list[str]:
    return [corpus.documents[i] for i in range(len(corpus.documents))]


# ---- windows for calibration


def test_each_document_has_its_own_bos() -> None:
    texts = [chr(ord("a") + i) * 9 for i in range(26)]
    windows = calibration_windows(documents(texts), Characters(), samples=26, seq_len=10, seed=0)
    assert windows.tokens.dtype == torch.int64
    rows = [[BOS, *map(ord, text)] for text in texts]
    assert windows.tokens.tolist() != rows
    assert sorted(windows.tokens.tolist()) == rows


def test_a_real_tokenizer_serves(bpe: PreTrainedTokenizerFast) -> None:
    windows = calibration_windows(documents(TEXTS), bpe, samples=8, seq_len=64, seed=0)
    assert windows.tokens.shape == (8, 64)
    text = bpe.decode(windows.tokens.flatten().tolist())
    assert text.count("<s>") == text.count("document")


def test_long_documents_give_one_window_each() -> None:
    texts = [chr(ord("a") + i) * 500 for i in range(26)]
    windows = calibration_windows(documents(texts), Characters(), samples=20, seq_len=32, seed=1)
    assert windows.tokens.shape == (20, 32)
    letters = [set(row.tolist()) - {BOS} for row in windows.tokens]
    assert all(len(found) == 1 for found in letters)
    assert len({found.pop() for found in letters}) == 20


def test_pieces_are_cut_at_random_places() -> None:
    text = "".join(chr(256 + i) for i in range(1000))
    starts = {
        int(calibration_windows(documents([text]), Characters(), samples=1, seq_len=50, seed=seed).tokens[0, 0])
        for seed in range(20)
    }
    assert len(starts) > 10


def test_rests_of_long_documents_fill_up() -> None:
    """One book in a .jsonl file is enough text, though it gives one random piece only."""
    text = "".join(chr(256 + i) for i in range(999))
    windows = calibration_windows(documents([text]), Characters(), samples=10, seq_len=100, seed=0)
    assert windows.tokens.shape == (10, 100)
    assert len(windows.tokens.unique()) == 1000  # every token once: none is used twice


def test_reading_stops_when_there_are_enough_tokens() -> None:
    tokenizer = Characters()
    calibration_windows(documents(["x" * 99] * 100_000), tokenizer, samples=4, seq_len=50, seed=0)
    assert len(tokenizer.calls) == 4


def test_running_text_is_tokenized_once_in_order() -> None:
    texts = ["abc", "  indented", "\n\n", "def"]
    windows = calibration_windows(running(texts), Characters(), samples=100, seq_len=4, seed=3)
    expected = [BOS, *map(ord, "abc\n\n  indented\n\ndef")]
    rows = [expected[i : i + 4] for i in range(0, len(expected) - 3, 4)]
    assert sorted(windows.tokens.tolist()) == sorted(rows)
    assert windows.tokens.tolist() != rows


def test_of_a_long_running_text_a_beginning_is_tokenized() -> None:
    tokenizer = Characters()
    windows = calibration_windows(running(["x" * 1000] * 1000), tokenizer, samples=4, seq_len=16, seed=0)
    assert windows.tokens.shape == (4, 16)
    assert sum(tokenizer.calls) < 5000


def test_a_beginning_that_is_too_sparse_is_extended() -> None:
    """Text with very few tokens a character: the first look does not suffice."""

    class Sparse(Characters):
        def __call__(self, text: str, **_: bool) -> Mapping[str, Any]:
            super().__call__(text)
            return {"input_ids": [1] * (len(text) // 100)}

    tokenizer = Sparse()
    windows = calibration_windows(running(["x" * 100] * 1000), tokenizer, samples=4, seq_len=16, seed=0)
    assert windows.tokens.shape == (4, 16)
    assert not windows.is_short
    assert len(tokenizer.calls) > 1


@pytest.mark.parametrize("make", [documents, running])
def test_draws_depend_on_the_seed_alone(make: Callable[[list[str]], Corpus], bpe: PreTrainedTokenizerFast) -> None:
    def draw(seed: int) -> Windows:
        return calibration_windows(make(TEXTS), bpe, samples=8, seq_len=32, seed=seed)

    assert torch.equal(draw(0).tokens, draw(0).tokens)
    assert draw(0).fingerprint == draw(0).fingerprint
    assert draw(0).fingerprint != draw(1).fingerprint


@pytest.mark.parametrize("make", [documents, running])
def test_a_short_text_gives_what_it_has(make: Callable[[list[str]], Corpus]) -> None:
    windows = calibration_windows(make(["x" * 69]), Characters(), samples=5, seq_len=20, seed=0)
    assert windows.tokens.shape == (3, 20)
    assert windows.requested == 5
    assert windows.is_short


@pytest.mark.parametrize("make", [documents, running])
def test_a_text_shorter_than_a_window_is_refused(make: Callable[[list[str]], Corpus]) -> None:
    with pytest.raises(InputError, match="test: the text has 31 tokens, one window of --seq-len 64 needs 64") as caught:
        calibration_windows(make(["x" * 30]), Characters(), samples=5, seq_len=64, seed=0)
    assert "--seq-len 31 or less" in str(caught.value.remedy)


@pytest.mark.parametrize("make", [documents, running])
def test_no_text_at_all_is_refused(make: Callable[[list[str]], Corpus]) -> None:
    with pytest.raises(InputError, match="needs 64") as caught:
        calibration_windows(make([" ", "\n"]), Characters(), samples=5, seq_len=64, seed=0)
    assert "or less" not in str(caught.value.remedy)


def test_long_texts_cause_no_warning(bpe: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    calibration_windows(running(TEXTS), bpe, samples=4, seq_len=64, seed=0)
    assert not caplog.records


def test_the_fingerprint_covers_the_shape() -> None:
    first = evaluation_windows(documents(["x" * 63]), Characters(), seq_len=8, limit=None)
    second = evaluation_windows(documents(["x" * 63]), Characters(), seq_len=16, limit=None)
    assert torch.equal(first.tokens.flatten(), second.tokens.flatten())
    assert first.fingerprint != second.fingerprint


# ---- windows for evaluation


def test_evaluation_joins_as_it_is_and_tokenizes_once() -> None:
    tokenizer = Characters()
    texts = [" = Title = \n", "", " First line . \n"]
    windows = evaluation_windows(documents(texts), tokenizer, seq_len=5, limit=None)
    expected = [BOS, *map(ord, "\n\n".join(texts))]
    assert windows.tokens.flatten().tolist() == expected[: len(expected) // 5 * 5]
    assert len(tokenizer.calls) == 1
    assert windows.requested == windows.tokens.shape[0]
    assert not windows.is_short


def test_a_limit_takes_the_first_windows(bpe: PreTrainedTokenizerFast) -> None:
    whole = evaluation_windows(running(TEXTS * 20), bpe, seq_len=16, limit=None)
    tokenizer = Characters()
    part = evaluation_windows(running(TEXTS * 20), bpe, seq_len=16, limit=3)
    assert torch.equal(part.tokens, whole.tokens[:3])
    evaluation_windows(running(["x" * 100_000]), tokenizer, seq_len=16, limit=3)
    assert sum(tokenizer.calls) < 10_000


def test_evaluation_refuses_what_cannot_be_evaluated() -> None:
    corpus = documents(["x" * 30])
    with pytest.raises(InputError, match="31 tokens, one window of --seq-len 64"):
        evaluation_windows(corpus, Characters(), seq_len=64, limit=None)
    with pytest.raises(InputError, match="--seq-len 1:"):
        evaluation_windows(corpus, Characters(), seq_len=1, limit=None)
    with pytest.raises(InputError, match="--limit 0:"):
        evaluation_windows(corpus, Characters(), seq_len=8, limit=0)


# ---- files


def test_text_files_are_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes("\ufeffone\r\nline\r\n\r\n \t\r\n\r\n  indented\n\n\nlast\n".encode())
    corpus = load(path)
    assert texts_of(corpus) == ["one\nline", "  indented", "last"]
    assert corpus.is_running_text


def test_jsonl_and_parquet_give_the_column_text(tmp_path: Path) -> None:
    texts = ["one\u2028still one", "", "three"]
    lines = tmp_path / "texts.jsonl"
    lines.write_text("\n\n".join(json.dumps({"id": 1, "text": text}, ensure_ascii=False) for text in texts) + "\n")
    table = tmp_path / "TEXTS.PARQUET"
    parquet.write_table(pa.table({"id": [1, 2, 3, 4], "text": [*texts, None]}), table)
    assert texts_of(load(lines)) == texts
    assert texts_of(load(table)) == [*texts, ""]
    assert not load(lines).is_running_text
    assert not load(table).is_running_text


def test_builtin_texts_come_from_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\n\ntwo")
    corpus = load_corpus("builtin", builtin={"builtin": path}, purpose="evaluation")
    assert texts_of(corpus) == ["one", "two"]
    assert corpus.name == "builtin"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n\t\n", "is empty"),
        ("blank.jsonl", b"\n\n", "is empty"),
        ("latin.txt", "gr\u00fc\u00dfe".encode("latin-1"), "not UTF-8 text .byte 0xfc at position 2."),
        ("utf16.txt", "text".encode("utf-16"), "not UTF-8"),
        ("junk.txt", b"text\0\0\0text", "binary data"),
        ("bad.jsonl", b'{"text": "one"}\n{"text": \n', "line 2: not valid JSON"),
        ("deep.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
        ("list.jsonl", b'["one", "two"]\n', "line 1: a JSON list, expected an object"),
        ("named.jsonl", b'{"content": "one", "id": 3}\n', "line 1: no column `text`; columns found: content, id"),
        ("number.jsonl", b'{"text": 7}\n', "line 1: `text` is int, expected a string"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', "line 1: `text` is not valid Unicode"),
        ("junk.parquet", b"PAR1 junk", "not a readable parquet file"),
        ("empty.parquet", b"", "not a readable parquet file"),
        ("page.html", b"<html>", "a .html file, expected a text"),
        ("README", b"text", "no kind of file known here, expected a text"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"content": ["one"], "id": [1]}, "no column `text`; columns found: content, id"),
        ({"text": [1, 2]}, "column `text` holds int64, expected strings"),
        ({"text": pa.array([], pa.string())}, "is empty"),
    ],
)
def test_unusable_parquet_columns_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = tmp_path / "texts.parquet"
    parquet.write_table(pa.table(columns), path)
    with pytest.raises(InputError, match=message):
        load(path)


def test_folders_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder, expected a text"):
        load(tmp_path)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match="a folder, expected a text"):
        load(tmp_path / "folder.txt")
    with pytest.raises(InputError, match="neither a known text nor a file that exists"):
        load(tmp_path / "missing.txt")
    with pytest.raises(InputError, match="cannot be read"):
        load_corpus("x" * 5000, builtin={}, purpose="calibration")
    with pytest.raises(InputError) as caught:
        load_corpus("wikitex", builtin={}, purpose="evaluation")
    assert "did you mean wikitext?" in str(caught.value.remedy)
    assert "--ppl wikitex" in caught.value.message


# ---- named sets


class Hub:
    """Stands in for the hub: records what is asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.probe_error: Exception | None = None
        self.load_error: Exception | None = None
        self.rows = [{"text": f"row {i}", "meta": None} for i in range(1200)]
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", self.probe)
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def probe(self, repository: str, timeout: float) -> None:
        if self.probe_error:
            raise self.probe_error

    def load(self, repository: str, config: str | None, **options: Any) -> list[dict[str, Any]]:
        if self.load_error:
            raise self.load_error
        self.asked.append((repository, config, options["split"], options["data_files"]))
        return self.rows


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    monkeypatch.setattr("qoq.calib.corpus.find_spec", lambda name: object())
    return Hub(monkeypatch, tmp_path)


def test_named_sets_are_fetched_by_purpose(hub: Hub) -> None:
    for purpose in ("calibration", "evaluation"):
        for name in named_sets(purpose):
            load_corpus(name, builtin={}, purpose=purpose)
    assert hub.asked == [
        ("mit-han-lab/pile-val-backup", None, "validation", None),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", None),
        ("allenai/c4", None, "train", {"train": "en/c4-train.00000-of-01024.json.gz"}),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None),
        ("allenai/c4", None, "validation", {"validation": "en/c4-validation.00000-of-00008.json.gz"}),
    ]


def test_rows_are_read_when_they_are_needed(hub: Hub) -> None:
    corpus = load_corpus("c4", builtin={}, purpose="evaluation")
    assert len(corpus.documents) == 1100
    windows = evaluation_windows(corpus, Characters(), seq_len=11, limit=1)
    assert windows.tokens.tolist() == [[BOS, *map(ord, "row 0 row ")]]
    assert len(load_corpus("c4", builtin={}, purpose="calibration").documents) == 1200


def test_pileval_is_for_calibration_only(hub: Hub) -> None:
    with pytest.raises(InputError, match="--ppl pileval: this set serves calibration only"):
        load_corpus("pileval", builtin={}, purpose="evaluation")


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), datasets.exceptions.DatasetsError("broken"), ValueError("no such split")]
)
def test_a_failed_download_points_to_local_files(hub: Hub, error: Exception) -> None:
    hub.load_error = error
    with pytest.raises(EnvironmentProblem, match=str(error)) as caught:
        load_corpus("wikitext", builtin={}, purpose="evaluation")
    assert "--ppl FILE.txt" in str(caught.value.remedy)


def test_without_a_network_nothing_is_retried(hub: Hub) -> None:
    hub.probe_error = ConnectionError("no route")
    with pytest.raises(EnvironmentProblem, match="no route"):
        load_corpus("wikitext", builtin={}, purpose="calibration")
    assert not hub.asked


def test_a_cached_set_needs_no_network(hub: Hub, tmp_path: Path) -> None:
    hub.probe_error = ConnectionError("no route")
    (tmp_path / "Salesforce___wikitext").mkdir()
    assert len(load_corpus("wikitext", builtin={}, purpose="calibration").documents) == 1200


def test_a_missing_decompressor_is_named_before_the_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qoq.calib.corpus.find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="needs the package zstandard"):
        load_corpus("pileval", builtin={}, purpose="calibration")
    assert not hub.asked


# ---- other processes

FINGERPRINTS = [
    "561daa028b90a779fac54aef1fcddc77d37595a8aacb7d2781de556a96a3718f",
    "b2618d44d314efddca9ca492429856c65f4857a9a342479d08968c2888caf72b",
]
"""Of what `draw_both` draws: they stay the same whatever the process, the machine or the versions of packages."""

PROBE = """
import json, time
from qoq.calib.corpus import Corpus, calibration_windows, load_corpus
from qoq.recipes.errors import EnvironmentProblem

def draw_both():
    texts = [f"{i} " * (i % 50) for i in range(300)]
    return [
        calibration_windows(
            Corpus("test", texts, form), lambda text, **_: {"input_ids": [0, *map(ord, text)]},
            samples=20, seq_len=32, seed=7,
        ).fingerprint
        for form in (False, True)
    ]
"""
MAIN = """
found = {"fingerprints": draw_both()}
import datasets
start = time.monotonic()
for name in ("pileval", "wikitext", "c4"):
    try:
        load_corpus(name, builtin={}, purpose="calibration")
    except EnvironmentProblem as problem:
        found[name] = str(problem)
print(json.dumps({**found, "seconds": time.monotonic() - start}))
"""


def test_any_process_draws_the_same_and_says_at_once_that_it_is_offline(tmp_path: Path) -> None:
    here: dict[str, Any] = {}
    exec(PROBE, here)
    assert here["draw_both"]() == FINGERPRINTS
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-P", "-c", PROBE + MAIN], env=environment, capture_output=True, text=True, check=True
    )
    answer = json.loads(result.stdout)
    assert answer["fingerprints"] == FINGERPRINTS
    assert answer["seconds"] < 5
    for name in ("pileval", "wikitext", "c4"):
        assert "HF_HUB_OFFLINE is set" in answer[name]
        assert "--calib FILE.txt" in answer[name]
