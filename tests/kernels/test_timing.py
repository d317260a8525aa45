"""Timing without a GPU: what is planned, in which order variants take turns, and what is done with the samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from qoq.kernels import timing
from qoq.kernels.timing import Train, Variant, copies_beyond_cache, measure, plan_calls, summarize


def test_median_and_percentiles() -> None:
    found = summarize([5.0, 1.0, 2.0, 4.0, 3.0], calls=7)
    assert (found.median_us, found.low_us, found.high_us) == (3.0, pytest.approx(1.4), pytest.approx(4.6))
    assert (found.samples, found.calls) == (5, 7)
    assert summarize([2.0], calls=1).high_us == 2.0
    assert summarize([1.0, 2.0], calls=1).median_us == 1.5


def test_a_train_is_long_enough_and_visits_all_copies_equally_often() -> None:
    assert plan_calls(copies=3, round_us=30.0, train_us=1000.0) == 102
    assert plan_calls(copies=3, round_us=3000.0, train_us=1000.0) == 3
    assert plan_calls(copies=10, round_us=0.0, train_us=1000.0) == 1020
    assert plan_calls(copies=5000, round_us=1.0, train_us=1000.0) == 5000


def test_copies_exceed_the_cache_within_the_budget() -> None:
    assert copies_beyond_cache(10, cache_bytes=100, budget_bytes=10**6) == 40
    assert copies_beyond_cache(30, cache_bytes=100, budget_bytes=10**6) == 14
    assert copies_beyond_cache(10**4, cache_bytes=100, budget_bytes=10**6) == 2
    assert copies_beyond_cache(10, cache_bytes=100, budget_bytes=55) == 5
    assert copies_beyond_cache(10, cache_bytes=100, budget_bytes=9) == 0


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The order in which trains were replayed, in a world where variant "a" takes 10 us a call and others 20."""
    played: list[list[str]] = []

    def prepare(variant: Variant, train_us: float) -> Train:
        variant.call(0)
        return Train(cast(torch.cuda.CUDAGraph, variant.name), 4)

    def time_trains(trains: Sequence[Train], *, rest: float) -> list[float]:
        assert rest == 2.5
        names = [cast(str, train.graph) for train in trains]
        played.append(names)
        return [40.0 if name == "a" else 80.0 for name in names]

    monkeypatch.setattr(timing, "_prepare", prepare)
    monkeypatch.setattr(timing, "time_trains", time_trains)
    return played


def test_variants_take_turns(turns: list[list[str]]) -> None:
    found = measure([Variant(name, lambda i: None) for name in "abc"], repeat=4, rest=2.5)
    assert turns == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    assert {name: t.median_us for name, t in found.timings.items()} == {"a": 10.0, "b": 20.0, "c": 20.0}
    assert found.timings["a"].samples == 4


def _refuse(_: int) -> Any:
    raise RuntimeError("not on this GPU\nand more text")


def test_what_pytorch_refuses_is_left_out_with_the_reason(turns: list[list[str]]) -> None:
    found = measure([Variant("a", lambda i: None), Variant("b", _refuse, optional=True)], repeat=1, rest=2.5)
    assert list(found.timings) == ["a"]
    assert found.skipped == {"b": "not on this GPU"}
    assert measure([Variant("b", _refuse, optional=True)], repeat=1).timings == {}


def test_an_error_of_our_own_kernels_is_not_hidden(turns: list[list[str]]) -> None:
    with pytest.raises(RuntimeError, match="not on this GPU"):
        measure([Variant("a", _refuse)], repeat=1)
    with pytest.raises(ValueError, match="repeat"):
        measure([], repeat=0)
