"""Results of lm-eval as tables for people: one for each model, what it is compared with beside it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from qoq_cli.harness_runs import Difference, Measure, Run, counterparts, difference
from qoq_cli.harness_tasks import Suite
from qoq_cli.terminal import print_text


def render_suite(console: Console, suite: Suite, runs: Sequence[Run]) -> None:
    """Print the tables, and what the numbers after ± are."""
    compared = {id(other) for run in runs for other in counterparts(run, runs)}
    for run in runs:
        if id(run) not in compared:
            _render_run(console, suite, run, counterparts(run, runs))
    paired = "; that of a difference comes from the same documents in both" if compared else ""
    print_text(console, f"±: standard error{paired}", style="dim")


def _render_run(console: Console, suite: Suite, run: Run, others: Sequence[Run]) -> None:
    beside = [f"; {_short(other)}: {other.candidate.label}" for other in others if other.candidate.is_baseline]
    table = Table(title=f"{suite.title}: {run.candidate.label}{''.join(beside)}", title_justify="left")
    table.add_column("task", overflow="fold")
    if suite.shown is None:
        table.add_column("shots", justify="right")
    metrics = {metric for score in run.scores.values() for metric in score.measures if _is_shown(suite, metric)}
    if len(metrics) > 1:
        table.add_column("metric", overflow="fold")
    table.add_column(run.candidate.scheme, justify="right", style="bold")
    for other in others:
        is_16_bit = _short(other) == "16 bit"
        table.add_column("16 bit" if is_16_bit else other.candidate.scheme, justify="right")
    for other in others:
        table.add_column(f"vs {_short(other)}", justify="right")
    for task, score in run.scores.items():
        for metric, measure in score.measures.items():
            if not _is_shown(suite, metric):
                continue
            cells = [task.removeprefix("longbench_")]
            if suite.shown is None:
                cells.append("" if score.num_fewshot is None else str(score.num_fewshot))
            if len(metrics) > 1:
                cells.append(_metric(metric, measure))
            cells.append(_value(measure))
            cells += [
                _value(other.scores[task].measures.get(metric) if task in other.scores else None) for other in others
            ]
            cells += [_difference(difference(run, other, task, metric)) for other in others]
            table.add_row(*cells)
    console.print(table)


def _is_shown(suite: Suite, metric: str) -> bool:
    return suite.shown is None or metric.partition(",")[0] == suite.shown


def _short(run: Run) -> str:
    if not run.candidate.is_baseline:
        return f"kv{run.candidate.kv_bits}"
    return "16 bit" if run.candidate.scheme == "w16a16kv16" else "baseline"


def _metric(metric: str, measure: Measure) -> str:
    """`acc` for acc,none; other filters of the answers are named; ↓ where less is better."""
    name, _, filter_name = metric.partition(",")
    shown = name if filter_name == "none" else f"{name}, {filter_name}"
    return f"{shown} ↓" if measure.higher_is_better is False else shown


def _value(measure: Measure | None) -> str:
    if measure is None:
        return "-"
    return f"{measure.value:.4f}" + ("" if measure.stderr is None else f" ±{measure.stderr:.4f}")


def _difference(between: Difference | None) -> str:
    if between is None:
        return "-"
    return f"{between.value:+.4f}" + ("" if between.stderr is None else f" ±{between.stderr:.4f}")
