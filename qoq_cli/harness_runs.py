"""Models through tasks of lm-eval: each as it is served, one after the other, and what lies between two of them."""

from __future__ import annotations

import gc
import io
import math
import random
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from qoq.recipes.errors import InputError
from qoq_cli.candidates import Candidate
from qoq_cli.harness_tasks import Suite
from qoq_cli.progress import progress
from qoq_cli.terminal import Terminal

_SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""Those of lm-eval's command line, so that the examples in a prompt are the same."""


@dataclass(frozen=True)
class Measure:
    """One metric of one task.

    stderr  standard error of the value, or None where lm-eval gives none
    each    the metric of each document, where the value is their mean
    """

    value: float
    stderr: float | None
    higher_is_better: bool | None
    each: tuple[float, ...] | None = None


@dataclass(frozen=True)
class TaskScore:
    """The metrics of one task or group, by lm-eval's names: `acc,none` is metric and filter."""

    version: str
    num_fewshot: int | None
    documents: int | None
    measures: dict[str, Measure]


@dataclass(frozen=True)
class Run:
    """What one candidate reached. `shortened` prompts were longer than `max_length` tokens."""

    candidate: Candidate
    max_length: int
    shortened: int
    scores: dict[str, TaskScore]


@dataclass(frozen=True)
class Difference:
    """A metric of `run` less that of `other`, and its standard error where both are means over the same documents."""

    value: float
    stderr: float | None


def run_suite(
    terminal: Terminal,
    suite: Suite,
    candidates: Sequence[Candidate],
    *,
    device: str,
    limit: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    trust_remote_code: bool = False,
) -> list[Run]:
    """Every candidate, and beside it the same with a 16-bit cache if the suite asks for that; not the baseline.

    Raises InputError when a model knows fewer positions than are needed.
    """
    lengths = check_lengths(suite, candidates, seq_len)
    runs: list[Run] = []
    for candidate, max_length in zip(candidates, lengths, strict=True):
        plan = _Plan(suite, device, limit, max_length, batch_size or suite.batch_size, trust_remote_code)
        runs += _run_candidate(terminal, plan, candidate)
        _free_memory()
    return runs


def check_lengths(suite: Suite, candidates: Sequence[Candidate], seq_len: int | None) -> list[int]:
    """Tokens that prompt and answer may have together, for each candidate.

    Raises InputError for more than a model knows, or for fewer than the answer alone may take.
    """
    return [_max_length(candidate, suite, seq_len) for candidate in candidates]


def difference(run: Run, other: Run, task: str, metric: str) -> Difference | None:
    """None where one of the two has no such metric."""
    from qoq.calib.metrics import paired_standard_error

    a, b = (_measure(each, task, metric) for each in (run, other))
    if a is None or b is None:
        return None
    stderr = None
    if a.each is not None and b.each is not None and len(a.each) == len(b.each) > 1:
        stderr = paired_standard_error(a.each, b.each)
    return Difference(a.value - b.value, stderr)


def counterparts(run: Run, runs: Sequence[Run]) -> list[Run]:
    """What a run is compared with: the same model with a 16-bit cache, and the baseline."""
    others = [
        other
        for other in runs
        if other is not run
        and (other.candidate.is_baseline or other.candidate == replace(run.candidate, kv_bits=16))
        and not run.candidate.is_baseline
    ]
    return sorted(others, key=lambda other: other.candidate.is_baseline)


def suite_json(suite: Suite, runs: Sequence[Run], *, limit: int | None) -> dict[str, Any]:
    """All of it but the single documents, as one JSON object."""
    return {
        "lm_eval": suite.version,
        "limit": limit,
        "runs": [_run_json(run) for run in runs],
        "differences": [_difference_json(run, other) for run in runs for other in counterparts(run, runs)],
    }


def _max_length(candidate: Candidate, suite: Suite, seq_len: int | None) -> int:
    if seq_len is not None and seq_len > candidate.positions:
        raise InputError(
            f"--seq-len {seq_len}: {candidate.label} knows {candidate.positions} positions", remedy="pass a shorter one"
        )
    max_length = seq_len or candidate.positions
    answer, task = suite.longest_answer()
    if answer >= max_length:
        where = "--seq-len" if seq_len is not None else f"{candidate.label} knows {max_length} positions"
        raise InputError(
            f"{task} lets the model write {answer} tokens, and with its prompt that does not fit into {max_length} "
            f"({where})",
            remedy="leave this task out, or take a model with a longer context",
        )
    return max_length


@dataclass(frozen=True)
class _Plan:
    """How one candidate goes through a suite."""

    suite: Suite
    device: str
    limit: int | None
    max_length: int
    batch_size: int
    trust_remote_code: bool


def _run_candidate(terminal: Terminal, plan: _Plan, candidate: Candidate) -> list[Run]:
    """Load the model once, for all its variants."""
    from transformers.utils.logging import disable_progress_bar

    from qoq.calib.skeleton import load_tokenizer
    from qoq.kernels.loading import load_as_served

    disable_progress_bar()  # of loading weights; it would write to stderr
    tokenizer = load_tokenizer(candidate.path, trust_remote_code=plan.trust_remote_code)
    model = load_as_served(
        candidate.path,
        device=plan.device,
        kv_bits=candidate.kv_bits,
        act_bits=candidate.act_bits,
        backend=candidate.backend,
        trust_remote_code=plan.trust_remote_code,
    )
    variants = [candidate]
    if plan.suite.beside_kv16 and candidate.kv_bits != 16 and not candidate.is_baseline:
        variants.append(replace(candidate, kv_bits=16))
    return [_run(terminal, plan, variant, model, tokenizer) for variant in variants]


def _run(terminal: Terminal, plan: _Plan, candidate: Candidate, model: Any, tokenizer: Any) -> Run:
    import lm_eval
    import numpy as np
    import torch

    from qoq.kernels.hf import set_kv_bits
    from qoq_cli.harness_model import HarnessModel

    suite, label = plan.suite, f"{candidate.label} ({candidate.scheme})"
    set_kv_bits(model, candidate.kv_bits)
    random.seed(_SEEDS["random"])
    np.random.seed(_SEEDS["numpy"])  # noqa: NPY002  (tasks draw from the global generator)
    torch.manual_seed(_SEEDS["torch"])
    for task in suite.loaded["tasks"].values():
        task.set_fewshot_seed(seed=_SEEDS["fewshot"])
    with progress(terminal, f"{suite.title}: {label}") as update:
        harness = HarnessModel(
            model,
            tokenizer,
            max_length=plan.max_length,
            batch_size=plan.batch_size,
            keeps_both_ends=suite.keeps_both_ends,
            on_requests=lambda done, total: update(done, total, f"{done} of {total} requests"),
        )
        with redirect_stdout(io.StringIO()):  # lm-eval prints here and there; ours is for results
            found = lm_eval.evaluate(harness, task_dict=suite.loaded, limit=plan.limit)
    if harness.shortened:
        lost = "middle" if suite.keeps_both_ends else "beginning"
        terminal.warn(
            f"{label}: {harness.shortened} of the prompts did not fit into {plan.max_length} tokens; their {lost} was "
            "left out"
        )
    if without_value := _not_finite(found):
        terminal.warn(f"{label}: not a finite number, and left out: {', '.join(without_value)}")
    return Run(candidate, plan.max_length, harness.shortened, _scores(found))


def _free_memory() -> None:
    """Before the next model is loaded; a model is held by cycles."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _scores(found: dict[str, Any]) -> dict[str, TaskScore]:
    """Tasks in lm-eval's order, groups after them; those without a metric are left out."""
    scores = {}
    for name, result in found["results"].items():
        higher = found["higher_is_better"].get(name, {})
        measures = {}
        for key, value in result.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            stderr = result.get(f"{metric}_stderr,{filter_name}")
            measures[key] = Measure(
                float(value),
                float(stderr) if _is_number(stderr) else None,
                higher.get(metric),
                _each(found["samples"].get(name, ()), metric, filter_name, float(value)),
            )
        if measures:
            scores[name] = TaskScore(
                version=str(found["versions"].get(name, "")),
                num_fewshot=found["n-shot"].get(name),
                documents=found["n-samples"][name]["effective"] if name in found["n-samples"] else None,
                measures=measures,
            )
    return scores


def _not_finite(found: dict[str, Any]) -> list[str]:
    """Metrics that are infinite or no number, as a model with broken weights has them."""
    return [
        f"{key.partition(',')[0]} of {name}"
        for name, result in found["results"].items()
        for key, value in result.items()
        if "," in key and "_stderr," not in key and isinstance(value, Real) and not math.isfinite(value)
    ]


def _each(samples: Sequence[dict[str, Any]], metric: str, filter_name: str, value: float) -> tuple[float, ...] | None:
    """The metric of each document, in their order, if `value` is the mean of that."""
    chosen = sorted((s for s in samples if s["filter"] == filter_name), key=lambda sample: sample["doc_id"])
    each = [sample.get(metric) for sample in chosen]
    if not each or not all(_is_number(x) for x in each):
        return None
    numbers = tuple(float(x) for x in each if x is not None)
    return numbers if math.isclose(math.fsum(numbers) / len(numbers), value, rel_tol=1e-6, abs_tol=1e-9) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _measure(run: Run, task: str, metric: str) -> Measure | None:
    score = run.scores.get(task)
    return None if score is None else score.measures.get(metric)


def _run_json(run: Run) -> dict[str, Any]:
    return {
        "model": run.candidate.label,
        "scheme": run.candidate.scheme,
        "key_rotation": run.candidate.served_key_rotation,
        "backend": run.candidate.backend,
        "max_length": run.max_length,
        "shortened_prompts": run.shortened,
        "tasks": {
            name: {
                "version": score.version,
                "num_fewshot": score.num_fewshot,
                "documents": score.documents,
                "metrics": {
                    metric: {"value": m.value, "stderr": m.stderr, "higher_is_better": m.higher_is_better}
                    for metric, m in score.measures.items()
                },
            }
            for name, score in run.scores.items()
        },
    }


def _difference_json(run: Run, other: Run) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for task, score in run.scores.items():
        for metric in score.measures:
            between = difference(run, other, task, metric)
            if between is not None:
                found.setdefault(task, {})[metric] = {"value": between.value, "stderr": between.stderr}
    return {
        "model": run.candidate.label,
        "scheme": run.candidate.scheme,
        "against": {"model": other.candidate.label, "scheme": other.candidate.scheme},
        "tasks": found,
    }
