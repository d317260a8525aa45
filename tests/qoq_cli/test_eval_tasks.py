"""`qoq eval --tasks`: lm-eval's numbers are those of the model as it is served, and errors name what is wrong.

What needs lm-eval skips without it; `make test-lm-eval` runs all of it.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import qoq.kernels.hf  # noqa: F401  (from_pretrained reads checkpoints)
from qoq.calib.metrics import paired_standard_error
from qoq.calib.served import open_served
from qoq.calib.streaming import StreamedModel
from qoq_cli.model_location import builtin_text, tiny_folder

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra [lm-eval] is not installed")

CHOICE = """
task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
tag: toys
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
LIKELIHOOD = """
task: toy_likelihood
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{' ' + choices[answer]}}}}"
tag: toys
num_fewshot: 0
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
"""
GROUP = """
group: toy_group
task: [toy_choice, toy_likelihood]
"""


def questions(count: int = 24) -> list[dict[str, Any]]:
    """Eight words of the held-out text, and four continuations of which one is the text's own."""
    words = builtin_text("evaluation").read_text(encoding="utf-8").split()
    draw = random.Random(7)
    found = []
    for _ in range(count):
        start = draw.randrange(len(words) - 20)
        starts = [start + 8, *(draw.randrange(len(words) - 4) for _ in range(3))]
        answer = draw.randrange(4)
        starts[0], starts[answer] = starts[answer], starts[0]
        choices = [" ".join(words[at : at + draw.randint(2, 4)]) for at in starts]
        found.append({"question": " ".join(words[start : start + 8]), "choices": choices, "answer": answer})
    return found


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in questions()), encoding="utf-8")
    for name, text in (("choice", CHOICE), ("likelihood", LIKELIHOOD)):
        (folder / f"{name}.yaml").write_text(text.format(data=data), encoding="utf-8")
    (folder / "group.yaml").write_text(GROUP, encoding="utf-8")
    return folder


def log_likelihood(logits_of: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """Of the tokens that `continuation` adds to `context`, after a space, in nats.

    The model does not read the last token, here as in lm-eval: float32 sums of another length may move a code by one.
    """
    before = tokenizer(context)["input_ids"]
    tokens = torch.tensor(tokenizer(f"{context} {continuation}")["input_ids"])
    log_probs = torch.log_softmax(logits_of(tokens[None, :-1])[0].double(), dim=-1)
    positions = range(len(before) - 1, len(tokens) - 1)
    return sum(float(log_probs[at, tokens[at + 1]]) for at in positions)


def of_transformers(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=tokens).logits

    return logits


def of_streamed(folder: Path, *, act_bits: int, kv_bits: int) -> Any:
    """Without the transformers plug-in: decoded weights, one block at a time."""
    served = open_served(folder)
    model = StreamedModel(
        served.skeleton,
        served.checkpoint.source,
        device=torch.device("cpu"),
        checkpoint=served.checkpoint,
        act_bits=act_bits,
        kv_bits=kv_bits,
    )
    return lambda tokens: torch.stack(list(model.logits(tokens)))


def right_answers(logits_of: Any, tokenizer: Any) -> list[float]:
    """1 for each question where the right continuation is the likeliest, 0 for the others."""
    right = []
    for row in questions():
        scores = [log_likelihood(logits_of, tokenizer, row["question"], choice) for choice in row["choices"]]
        right.append(float(scores.index(max(scores)) == row["answer"]))
    return right


def perplexity(logits_of: Any, tokenizer: Any) -> float:
    scores = [
        log_likelihood(logits_of, tokenizer, row["question"], row["choices"][row["answer"]]) for row in questions()
    ]
    return float(torch.tensor(scores, dtype=torch.float64).mean().neg().exp())


def value(run: dict[str, Any], task: str, metric: str) -> float:
    return float(run["tasks"][task]["metrics"][metric]["value"])


# ---- without lm-eval


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--num-fewshot", "2"), "--num-fewshot 2: only --tasks uses it"),
        (("--task-path", "somewhere"), "--task-path somewhere: only --tasks uses it"),
        (("--batch-size", "4"), "--batch-size 4: only --tasks and --longbench use it"),
        (("--tasks", "x", "--num-fewshot", "-1"), "--num-fewshot -1: too small"),
        (("--tasks", "x", "--batch-size", "0"), "--batch-size 0: too small"),
        (("--tasks", " , "), "--tasks: no name"),
        (("--tasks", "x", "--task-path", "nowhere"), "--task-path nowhere: no such folder"),
    ],
)
def test_options_that_do_not_fit_together(args: tuple[str, ...], named: str, fails: Any) -> None:
    assert named in fails(2, "eval", "tiny", *args)


@pytest.mark.parametrize(("option", "what"), [("--tasks", "hellaswag"), ("--longbench", "default")])
def test_without_lm_eval(option: str, what: str, fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = fails(3, "eval", "tiny", option, what)
    assert f"{option} needs lm-eval" in message
    assert "pip install 'qoq[lm-eval]'" in message


def test_the_error_of_a_paired_difference() -> None:
    """Differences 1, 0, -1, 0: variance 2/3, four of them."""
    assert paired_standard_error([1, 1, 0, 0], [0, 1, 1, 0]) == pytest.approx((2 / 3 / 4) ** 0.5)
    assert paired_standard_error([0.5, 0.25], [0.5, 0.25]) == 0


# ---- with lm-eval


@needs_lm_eval
def test_an_old_lm_eval_is_refused(fails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.__version__", "0.4.8")
    assert "0.4.13 or newer, found 0.4.8" in fails(3, "eval", "tiny", "--tasks", "x")


@needs_lm_eval
def test_accuracy_is_that_of_an_independent_scorer(qoq: Any, task_folder: Path, tiny_checkpoint: Path) -> None:
    args = ("eval", tiny_checkpoint, "--baseline", "tiny", "--tasks", "toy_choice", "--task-path", task_folder)
    outcome = qoq(*args, "--json")
    assert outcome.code == 0, outcome.stderr
    baseline, served = outcome.json["tasks"]["runs"]
    assert (baseline["model"], baseline["scheme"], baseline["backend"]) == ("tiny", "w16a16kv16", "reference")
    assert (served["model"], served["scheme"], served["backend"]) == (str(tiny_checkpoint), "w4a8kv4", "reference")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    before, after = (right_answers(of_transformers(folder), tokenizer) for folder in (tiny_folder(), tiny_checkpoint))
    for run, right in ((baseline, before), (served, after)):
        assert run["tasks"]["toy_choice"]["documents"] == 24
        assert run["tasks"]["toy_choice"]["num_fewshot"] == 0
        assert value(run, "toy_choice", "acc,none") == pytest.approx(sum(right) / 24)
        assert value(run, "toy_choice", "acc,none") > 0.3  # guessing gives a quarter
    (between,) = outcome.json["tasks"]["differences"]
    assert between["tasks"]["toy_choice"]["acc,none"] == {
        "value": pytest.approx((sum(after) - sum(before)) / 24),
        "stderr": pytest.approx(paired_standard_error(after, before)),
    }
    shown = qoq(*args)
    assert f"{value(served, 'toy_choice', 'acc,none'):.4f}" in shown.stdout
    assert "16 bit: tiny" in " ".join(shown.stdout.split())
    assert "vs 16 bit" in shown.stdout
    assert "…" not in shown.stdout


@needs_lm_eval
@pytest.mark.parametrize(("act_bits", "kv_bits"), [(8, 4), (8, 16), (16, 16)])
def test_the_model_is_the_served_one(
    act_bits: int, kv_bits: int, qoq: Any, task_folder: Path, tiny_checkpoint: Path
) -> None:
    """A perplexity tells apart what an accuracy of 24 documents may not.

    One prompt at a time: in a batch, float32 sums in another order may move a code by one.
    """
    args = ("eval", tiny_checkpoint, "--tasks", "toy_likelihood", "--task-path", task_folder, "--batch-size", 1)
    outcome = qoq(*args, "--act-bits", act_bits, "--kv-bits", kv_bits, "--json")
    assert outcome.code == 0, outcome.stderr
    (run,) = outcome.json["tasks"]["runs"]
    assert run["scheme"] == f"w4a{act_bits}kv{kv_bits}"
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    found = value(run, "toy_likelihood", "perplexity,none")
    for act, kv in ((8, 4), (8, 16), (16, 16)):
        expected = perplexity(of_streamed(tiny_checkpoint, act_bits=act, kv_bits=kv), tokenizer)
        is_same = abs(found / expected - 1) < 1e-4
        assert is_same == ((act, kv) == (act_bits, kv_bits)), f"a{act}kv{kv}: {expected}, found {found}"


@needs_lm_eval
def test_the_cache_of_a_16_bit_model_can_be_quantized(qoq: Any, task_folder: Path) -> None:
    args = ("eval", "tiny", "--tasks", "toy_likelihood", "--task-path", task_folder, "--json")
    plain, rounded = qoq(*args).json, qoq(*args, "--kv-bits", 4).json
    assert [run["scheme"] for run in (*plain["tasks"]["runs"], *rounded["tasks"]["runs"])] == [
        "w16a16kv16",
        "w16a16kv4",
    ]
    before, after = (value(data["tasks"]["runs"][0], "toy_likelihood", "perplexity,none") for data in (plain, rounded))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    assert before == pytest.approx(perplexity(of_transformers(tiny_folder()), tokenizer), rel=1e-4)
    assert after > 1.01 * before


@needs_lm_eval
def test_json_holds_everything(qoq: Any, task_folder: Path, tiny_checkpoint: Path) -> None:
    """Groups, tags and patterns; perplexity in the same call; the difference with its paired error."""
    args = ("eval", tiny_checkpoint, "--baseline", "tiny", "--tasks", "toy_gr*", "--task-path", task_folder)
    outcome = qoq(*args, "--limit", 5, "--num-fewshot", 2, "--ppl", "builtin", "--seq-len", 256, "--json")
    assert outcome.code == 0, outcome.stderr
    assert set(outcome.json) == {"baseline", "device", "texts", "tasks"}
    assert outcome.json["texts"]["builtin"]["windows"] == 5
    tasks = outcome.json["tasks"]
    assert set(tasks) == {"lm_eval", "limit", "runs", "differences"}
    assert tasks["limit"] == 5
    for run in tasks["runs"]:
        assert run["max_length"] == 256
        assert run["shortened_prompts"] == 0
        assert set(run["tasks"]) == {"toy_choice", "toy_likelihood"}
        assert run["tasks"]["toy_choice"]["num_fewshot"] == 2
        assert run["tasks"]["toy_likelihood"]["num_fewshot"] == 0  # the task says so
        assert run["tasks"]["toy_choice"]["documents"] == 5
        assert run["tasks"]["toy_likelihood"]["metrics"]["perplexity,none"]["higher_is_better"] is False
    (between,) = tasks["differences"]
    assert between["against"] == {"model": "tiny", "scheme": "w16a16kv16"}
    before, after = tasks["runs"]
    for task, metric in (("toy_choice", "acc,none"), ("toy_likelihood", "perplexity,none")):
        expected = value(after, task, metric) - value(before, task, metric)
        assert between["tasks"][task][metric]["value"] == pytest.approx(expected)
    assert between["tasks"]["toy_choice"]["acc,none"]["stderr"] is not None
    assert between["tasks"]["toy_likelihood"]["perplexity,none"]["stderr"] is None  # not a mean


@needs_lm_eval
def test_the_same_again_gives_the_same(qoq: Any, task_folder: Path, tiny_checkpoint: Path) -> None:
    """Also the examples in the prompts, which are drawn."""
    args = ("eval", tiny_checkpoint, "--tasks", "toys", "--task-path", task_folder, "--num-fewshot", 3, "--json")
    assert qoq(*args).json == qoq(*args).json


@needs_lm_eval
def test_every_model_gets_the_same_prompts(qoq: Any, task_folder: Path, tmp_path: Path) -> None:
    """Examples are drawn from a generator, and the first model leaves it in another state."""
    twin = shutil.copytree(tiny_folder(), tmp_path / "twin")
    args = ("--tasks", "toy_choice", "--task-path", task_folder, "--num-fewshot", 3, "--seq-len", 200, "--json")
    one, other = qoq("eval", "tiny", twin, *args).json["tasks"]["runs"]
    assert one["tasks"] == other["tasks"]
    assert one["shortened_prompts"] == other["shortened_prompts"]


@needs_lm_eval
def test_a_checkpoint_as_the_baseline_is_not_called_16_bit(qoq: Any, task_folder: Path, tiny_checkpoint: Path) -> None:
    args = ("--tasks", "toy_choice", "--task-path", task_folder, "--limit", 2)
    shown = " ".join(qoq("eval", "tiny", "--baseline", tiny_checkpoint, *args).stdout.split())
    assert f"baseline: {tiny_checkpoint}" in shown
    assert "vs baseline" in shown
    assert "w4a8kv4" in shown
    assert "16 bit" not in shown


@needs_lm_eval
def test_perplexity_is_not_measured_unasked(qoq: Any, task_folder: Path) -> None:
    outcome = qoq("eval", "tiny", "--tasks", "toy_choice", "--task-path", task_folder, "--limit", 2, "--json")
    assert outcome.json["texts"] == {}


@needs_lm_eval
def test_prompts_that_do_not_fit_are_counted(qoq: Any, task_folder: Path) -> None:
    args = ("eval", "tiny", "--tasks", "toy_choice", "--task-path", task_folder, "--limit", 3, "--num-fewshot", 5)
    outcome = qoq(*args, "--seq-len", 24, "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["tasks"]["runs"][0]["shortened_prompts"] == 12
    assert "12 of the prompts did not fit into 24 tokens; their beginning was left out" in outcome.stderr


@needs_lm_eval
def test_kernels_are_used_where_they_can_be(
    qoq: Any, task_folder: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is a pretence: the model is told to use the kernels, and then kept from it."""
    monkeypatch.setattr("qoq_cli.backends.kernel_problem", lambda device: None)
    monkeypatch.setattr("qoq_cli.backends.gpu_name", lambda device: "Pretended GPU")
    monkeypatch.setattr("qoq_cli.backends.resolve_device", lambda device: "cpu")
    asked: list[str] = []
    monkeypatch.setattr("qoq.kernels.hf.set_backend", lambda model, backend: asked.append(backend))
    args = ("eval", tiny_checkpoint, "--baseline", "tiny", "--tasks", "toy_choice", "--task-path", task_folder)
    outcome = qoq(*args, "--limit", 2, "--json")
    assert outcome.code == 0, outcome.stderr
    assert asked == ["reference", "kernels"]
    assert [run["backend"] for run in outcome.json["tasks"]["runs"]] == asked


@needs_lm_eval
def test_unknown_names_are_one_error(fails: Any, task_folder: Path) -> None:
    message = fails(2, "eval", "tiny", "--tasks", "toy_choise,nonsense-task", "--task-path", task_folder)
    assert "does not know toy_choise, nonsense-task" in message
    assert "did you mean toy_choice" in message


@needs_lm_eval
def test_folders_and_files_that_cannot_be_used(fails: Any, task_folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no task in it" in fails(2, "eval", "tiny", "--tasks", "x", "--task-path", empty)
    (empty / "a.yaml").write_text(CHOICE.format(data="nowhere.jsonl"), encoding="utf-8")
    message = fails(2, "eval", "tiny", "--tasks", "toy_choice", "--task-path", empty)
    assert "nowhere.jsonl" in message
    assert "data_files" in message
    (empty / "a.yaml").write_text(CHOICE.format(data="x").replace("multiple_choice", "telepathy"), encoding="utf-8")
    assert "telepathy" in fails(2, "eval", "tiny", "--tasks", "toy_choice", "--task-path", empty)
    twice = ("--tasks", "toy_group,toy_choice", "--task-path", task_folder)
    assert "toy_choice" in fails(2, "eval", "tiny", *twice)
    long = ("--tasks", "toy_choice", "--task-path", task_folder, "--seq-len", 99999)
    assert "knows 512 positions" in fails(2, "eval", "tiny", *long)
    short = ("--tasks", "toy_choice", "--task-path", task_folder, "--seq-len", 2)
    assert "tokens, and the model reads 2 at once" in fails(2, "eval", "tiny", *short)


@needs_lm_eval
@pytest.mark.parametrize("template", ["{{qestion}}", "{{question"])
def test_a_wrong_template_is_one_error(template: str, fails: Any, task_folder: Path, tmp_path: Path) -> None:
    text = (task_folder / "choice.yaml").read_text(encoding="utf-8").replace("{{question}}", template)
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    assert "lm-eval cannot load this" in fails(2, "eval", "tiny", "--tasks", "toy_choice", "--task-path", tmp_path)


@needs_lm_eval
@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens"])
def test_answers_that_do_not_fit(name: str, fails: Any, task_folder: Path, tmp_path: Path) -> None:
    text = (task_folder / "likelihood.yaml").read_text(encoding="utf-8").replace("loglikelihood", "generate_until")
    text = re.sub("metric_list: .*", "metric_list: [{metric: exact_match}]", text)
    (tmp_path / "a.yaml").write_text(f"{text}generation_kwargs: {{{name}: 4000}}\n", encoding="utf-8")
    message = fails(2, "eval", "tiny", "--tasks", "toy_likelihood", "--task-path", tmp_path)
    assert "toy_likelihood lets the model write 4000 tokens" in message


@needs_lm_eval
def test_a_metric_that_is_no_number_is_named(
    qoq: Any, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log_likelihoods(model: Any, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return [(float("nan"), False) for _ in requests]

    monkeypatch.setattr("lm_eval.models.huggingface.HFLM.loglikelihood", log_likelihoods)
    outcome = qoq("eval", "tiny", "--tasks", "toys", "--task-path", task_folder, "--limit", 3, "--json")
    assert "not a finite number, and left out: perplexity of toy_likelihood" in " ".join(outcome.stderr.split())
    assert set(outcome.json["tasks"]["runs"][0]["tasks"]) == {"toy_choice"}


@needs_lm_eval
def test_a_data_set_without_a_network(fails: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    text = CHOICE.format(data="x").replace("dataset_path: json", "dataset_path: nobody/nothing")
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    message = fails(3, "eval", "tiny", "--tasks", "toy_choice", "--task-path", tmp_path)
    assert "nobody/nothing" in message
    assert "HF_HUB_OFFLINE" in message
    assert "--task-path FOLDER" in message


@needs_lm_eval
def test_code_of_the_model_is_not_run(fails: Any, task_folder: Path, tmp_path: Path) -> None:
    text = (task_folder / "choice.yaml").read_text(encoding="utf-8") + "unsafe_code: true\n"
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    message = fails(2, "eval", "tiny", "--tasks", "toy_choice", "--task-path", tmp_path)
    assert "toy_choice executes what the model writes" in message


@needs_lm_eval
def test_quiet_and_json_keep_the_streams_clean(task_folder: Path, tiny_checkpoint: Path) -> None:
    """Also what libraries write to the descriptors; in a process of its own, as tqdm reads its settings once."""
    words = [
        "eval",
        tiny_checkpoint,
        "--tasks",
        "toys",
        "--task-path",
        task_folder,
        "--limit",
        "4",
        "--json",
        "--quiet",
    ]
    command = [sys.executable, "-c", "import sys; from qoq_cli.app import app; app(sys.argv[1:])", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert set(json.loads(done.stdout)["tasks"]["runs"][0]["tasks"]) == {"toy_choice", "toy_likelihood"}
