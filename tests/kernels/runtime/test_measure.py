"""Figures of a run, from a clock that the test sets."""

from __future__ import annotations

import itertools

import pytest
import torch

from qoq.kernels.runtime import engine as engine_module
from qoq.kernels.runtime.engine import Engine
from qoq.kernels.runtime.measure import decode_nbytes, measure_closed_set
from qoq.kernels.runtime.model import Options, RuntimeModel
from qoq.recipes.precisions import find_precision
from qoq.recipes.shapes import ModelShape

SHAPE = ModelShape("small", 128, 256, 2, 1, 64, 2, 96)


def test_figures_of_a_closed_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes on by a second whenever it is looked at: at the start, for each of 2 + 3 landings, and at the end.

    Prefill and first decode step land together with nothing in between, the rest a turn each.
    """
    model = RuntimeModel.from_shape(SHAPE, find_precision("fp16"), Options(max_batch=2, max_tokens=20))
    clock = itertools.count()
    monkeypatch.setattr(engine_module.time, "perf_counter", lambda: float(next(clock)))
    found = measure_closed_set(Engine(model), requests=2, prompt_len=10, output_len=4)
    assert found.stats.prefill_steps == 1
    assert found.stats.decode_steps == 3
    assert found.seconds == 5
    assert found.output_tokens_s == 8 / 5
    assert found.first_token_s == (1, 1)
    assert found.token_s == (1, 1)
    assert found.preemptions == 0


def test_bytes_of_a_decode_step_by_hand() -> None:
    options = Options(max_batch=2, max_tokens=64, kv_bits=4, dtype=torch.float16)
    model = RuntimeModel.from_shape(SHAPE, find_precision("fp16"), options)
    linears = 2 * 2 * sum(n * k for n, k in SHAPE.layer_gemms().values())
    head = 2 * 96 * 128
    assert decode_nbytes(model, []) == linears + head
    token = 2 * 2304 * 2 // 64  # a page of 64 heads' values has two sub-blocks of 2304 bytes, in each of two layers
    assert decode_nbytes(model, [10, 30]) == linears + head + 40 * token
