"""`qoq eval --longbench`: local data through lm-eval's tasks, the 16-bit cache beside, the cut in the middle.

What needs lm-eval skips without it; `make test-lm-eval` runs all of it.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qoq.kernels.hf  # noqa: F401  (from_pretrained reads checkpoints)
from qoq_cli.model_location import builtin_text, tiny_folder

pytestmark = pytest.mark.skipif(
    any(find_spec(package) is None for package in ("lm_eval", "jieba", "fuzzywuzzy", "rouge")),
    reason="the extra [longbench] is not installed",
)

ANSWER_TOKENS = 128  # what qasper's answers may take
PROMPT = (
    "You are given a scientific article and a question. Answer the question as concisely as you can, using a single "
    "phrase or sentence if possible. If the question cannot be answered based on the information in the article, write "
    '"unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any '
    "explanation.\n\nArticle: {context}\n\n Answer the question based on the above article as concisely as you can, "
    "using a single phrase or sentence if possible. If the question cannot be answered based on the information in the "
    'article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". Do '
    "not provide any explanation.\n\nQuestion: {input}\n\nAnswer:"
)
"""As LongBench has it for qasper."""


def rows(count: int = 3, characters: int = 250) -> list[dict[str, Any]]:
    text = builtin_text("evaluation").read_text(encoding="utf-8")
    return [
        {
            "input": f"What is said in part {i}?",
            "context": text[5000 * i : 5000 * i + characters],
            "answers": ["nothing"],
            "length": characters,
            "dataset": "qasper",
            "language": "en",
            "all_classes": None,
            "_id": str(i),
        }
        for i in range(count)
    ]


def write(folder: Path, name: str, content: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")


def written_by(folder: Path, prompt: str) -> str:
    """What the model writes after a prompt, through transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    assert length + ANSWER_TOKENS <= 512, "the prompt would be cut"
    output = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS, pad_token_id=1)
    return str(tokenizer.decode(output[0, length:], skip_special_tokens=True))


def score(run: dict[str, Any], task: str) -> float:
    return float(run["tasks"][task]["metrics"]["score,none"]["value"])


def test_answers_are_those_of_the_served_model(qoq: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The right answers are what the checkpoint writes: it must score 1, and with another cache, or weights, less."""
    content = rows()
    for row in content:
        row["answers"] = [written_by(tiny_checkpoint, PROMPT.format(**row))]
    write(tmp_path / "data", "qasper", content)
    args = ("eval", tiny_checkpoint, "--baseline", "tiny", "--longbench", tmp_path / "data")
    outcome = qoq(*args, "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["texts"] == {}
    runs = outcome.json["longbench"]["runs"]
    assert [run["scheme"] for run in runs] == ["w16a16kv16", "w4a8kv4", "w4a8kv16"]
    baseline, served, kv16 = runs
    assert score(served, "longbench_qasper") == 1
    assert score(kv16, "longbench_qasper") < 1
    assert score(baseline, "longbench_qasper") < 1
    assert score(served, "longbench (mean)") == 1
    assert {run["shortened_prompts"] for run in runs} == {0}
    against = [(entry["scheme"], entry["against"]["scheme"]) for entry in outcome.json["longbench"]["differences"]]
    assert against == [("w4a8kv4", "w4a8kv16"), ("w4a8kv4", "w16a16kv16"), ("w4a8kv16", "w16a16kv16")]
    shown = qoq(*args).stdout
    assert "w4a8kv16" in shown
    assert "qa_f1" not in shown  # the same number twice
    assert "…" not in shown


def test_a_16_bit_cache_is_not_measured_twice(qoq: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    write(tmp_path / "data", "lcc", rows(1))
    args = ("eval", tiny_checkpoint, "--longbench", tmp_path / "data", "--kv-bits", 16, "--limit", 1, "--json")
    assert [run["scheme"] for run in qoq(*args).json["longbench"]["runs"]] == ["w4a8kv16"]


def test_the_cache_of_a_baseline_is_not_measured_twice(qoq: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """It is what the others are compared with; a second one would be one too many."""
    write(tmp_path / "data", "lcc", rows(1))
    args = ("eval", "tiny", "--baseline", tiny_checkpoint, "--longbench", tmp_path / "data", "--limit", 1, "--json")
    found = qoq(*args).json["longbench"]
    assert [run["scheme"] for run in found["runs"]] == ["w4a8kv4", "w16a16kv16"]
    assert len(found["differences"]) == 1


def test_long_prompts_lose_their_middle(qoq: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    write(tmp_path / "data", "trec", [row | {"all_classes": ["a", "b"], "answers": ["a"]} for row in rows(2, 4000)])
    outcome = qoq("eval", tiny_checkpoint, "--longbench", tmp_path / "data", "--seq-len", 300, "--json")
    assert outcome.code == 0, outcome.stderr
    assert [run["shortened_prompts"] for run in outcome.json["longbench"]["runs"]] == [2, 2]
    assert "did not fit into 300 tokens; their middle was left out" in outcome.stderr


@pytest.mark.parametrize("keeps_both_ends", [True, False])
def test_what_is_left_of_a_long_prompt(keeps_both_ends: bool) -> None:
    from qoq_cli.harness_model import HarnessModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    harness = HarnessModel(
        AutoModelForCausalLM.from_pretrained(tiny_folder()),
        tokenizer,
        max_length=512,
        batch_size=2,
        keeps_both_ends=keeps_both_ends,
        on_requests=lambda done, total: None,
    )
    text = builtin_text("evaluation").read_text(encoding="utf-8")[:3000]
    tokens, mask = harness.tok_batch_encode([text, "Short."], left_truncate_len=100)
    assert harness.shortened == 1
    assert tokens.shape == mask.shape
    assert 90 <= int(mask[0].sum()) <= 100
    shown = tokenizer.decode(tokens[0][mask[0] == 1], skip_special_tokens=True)
    # A few characters about the seam, and the ends, may be tokenized differently.
    assert text.strip().endswith(shown[-100:].strip())
    assert text.startswith(shown[:100]) == keeps_both_ends
    assert "Short." in tokenizer.decode(tokens[1][mask[1] == 1], skip_special_tokens=True)


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from qoq_cli import longbench

    asked: list[list[str]] = []
    monkeypatch.setattr(
        longbench, "_load", lambda members, given: asked.append([member["task"] for member in members]) or {}
    )
    longbench.longbench_suite("default")
    longbench.longbench_suite("all")
    longbench.longbench_suite("e")
    longbench.longbench_suite("longbench_qasper, lcc,qasper")
    default, everything, evenly, named = asked
    assert default == [f"longbench_{name}" for name in longbench.DEFAULT]
    assert len(everything) == 21
    assert len(evenly) == 13
    assert named == ["longbench_qasper", "longbench_lcc"]


def test_what_cannot_be_evaluated(qoq: Any, fails: Any, tmp_path: Path) -> None:
    message = fails(2, "eval", "tiny", "--longbench", "qaspr")
    assert "not known: qaspr" in message
    assert "did you mean qasper" in message
    (tmp_path / "empty").mkdir()
    assert "qasper.jsonl" in fails(2, "eval", "tiny", "--longbench", tmp_path / "empty")
    write(tmp_path / "data", "gov_report", rows(1))
    message = fails(2, "eval", "tiny", "--longbench", tmp_path / "data")
    assert "longbench_gov_report lets the model write 512 tokens" in message
    (tmp_path / "data" / "gov_report.jsonl").write_text("no json", encoding="utf-8")
    outcome = qoq("eval", "tiny", "--longbench", tmp_path / "data")
    assert outcome.code == 2
    assert "data: the data cannot be read: ArrowInvalid: JSON parse error" in outcome.error


def test_without_a_network(fails: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    message = fails(3, "eval", "tiny", "--longbench", "default")
    assert "LongBench is not in the local cache" in message
    assert "--longbench FOLDER" in message


def test_without_the_packages_of_its_metrics(fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qoq_cli.longbench.find_spec", lambda name: None)
    message = fails(3, "eval", "tiny", "--longbench", "default")
    assert "jieba, fuzzywuzzy, rouge" in message
    assert "pip install 'qoq[longbench]'" in message
