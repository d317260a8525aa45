"""Greedy answers of the runtime are those of transformers, token for token, however sequences are cut and mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qoq.kernels.runtime.engine import Engine
from qoq.kernels.runtime.model import Options, RuntimeModel
from qoq.kernels.runtime.scheduler import Request
from qoq.kernels.runtime.scoring import hidden_states
from tests.kernels.runtime.runtime_cases import MODELS, Oracle, random_prompts, write_complete

LENS = (1, 5, 63, 64, 65, 130, 17)
COUNT = 12
TIE = 0.5
"""Logits of tiny, whose standard deviation is 3: codes that float32 rounds another way moved them by 0.28 at most."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write_complete(tmp_path_factory.mktemp("model"), name)
        return made[name]

    return get


def engine(folder: Path, **options: Any) -> Engine:
    return Engine(RuntimeModel.from_folder(folder, Options(**{"max_batch": 8, "chunk_tokens": 40, **options})))


def answers(engine: Engine, prompts: list[list[int]], count: int = COUNT) -> list[tuple[int, ...]]:
    found = engine.generate([Request(prompt, count) for prompt in prompts])
    assert engine.model.pool.free == engine.model.pool.num_pages
    return [completion.tokens for completion in found]


@pytest.mark.parametrize("name", MODELS)
def test_every_family_in_chunks(checkpoints: Any, name: str) -> None:
    """Ragged prompts, in chunks that end anywhere, rows that come and go."""
    prompts = random_prompts(LENS)
    oracle = Oracle(checkpoints(name))
    assert answers(engine(checkpoints(name)), prompts) == [oracle.greedy(prompt, COUNT) for prompt in prompts]


@pytest.mark.parametrize("kv_bits", [4, 8, 16])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_every_cache_in_one_shot(checkpoints: Any, name: str, kv_bits: int) -> None:
    prompts = random_prompts(LENS)
    oracle = Oracle(checkpoints(name), kv_bits)
    found = answers(engine(checkpoints(name), kv_bits=kv_bits, chunk_tokens=4096), prompts)
    assert found == [oracle.greedy(prompt, COUNT) for prompt in prompts]


def test_rotated_keys(tmp_path: Path) -> None:
    folder = write_complete(tmp_path / "model", "llama", key_rotation="hadamard")
    prompts = random_prompts(LENS)
    oracle = Oracle(folder)
    rotated = engine(folder)
    assert rotated.model.config.key_rotation == "hadamard"
    assert answers(rotated, prompts) == [oracle.greedy(prompt, COUNT) for prompt in prompts]
    tokens = random_prompts([150])[0]
    (hidden,) = hidden_states(engine(folder, key_rotation="none").model, [tokens])
    (expected,) = hidden_states(rotated.model, [tokens])
    assert not torch.equal(hidden, expected)


@pytest.mark.parametrize("kept", ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"])
def test_a_linear_that_stays_in_16_bit(tmp_path: Path, kept: str) -> None:
    folder = write_complete(tmp_path / "model", "linear rope, biases", modules_to_not_convert=("lm_head", kept))
    prompts, oracle = random_prompts((5, 70)), Oracle(folder)
    assert answers(engine(folder), prompts) == [oracle.greedy(prompt, COUNT) for prompt in prompts]


def test_activations_of_16_bits(tmp_path: Path) -> None:
    folder = write_complete(tmp_path / "model", "llama", act_bits=16)
    prompts, oracle = random_prompts((5, 70)), Oracle(folder)
    assert answers(engine(folder), prompts) == [oracle.greedy(prompt, COUNT) for prompt in prompts]


def test_preemption_and_pages_that_were_used_before(checkpoints: Any) -> None:
    """Five pages for seven sequences of one to three: some are set back, and the pages of all hold others' remains."""
    prompts = random_prompts(LENS)
    expected = [Oracle(checkpoints("llama")).greedy(prompt, 70) for prompt in prompts]
    small = engine(checkpoints("llama"), num_pages=5)
    for _ in range(2):
        found = small.generate([Request(prompt, 70) for prompt in prompts])
        assert [completion.tokens for completion in found] == expected
        assert sum(completion.preemptions for completion in found) > 0
        assert small.model.pool.free == 5


def test_prefill_first(checkpoints: Any) -> None:
    """All prompts, then all answers: the same tokens in fewer steps."""
    prompts = random_prompts(LENS)
    between, first = engine(checkpoints("llama")), engine(checkpoints("llama"), prefill_first=True)
    assert answers(first, prompts) == answers(between, prompts)
    assert first.stats.prefill_steps == between.stats.prefill_steps
    assert first.stats.decode_steps == COUNT - 1 < between.stats.decode_steps
    small = engine(checkpoints("llama"), prefill_first=True, num_pages=5)
    assert answers(small, prompts) == answers(between, prompts)


def test_one_row(checkpoints: Any) -> None:
    prompts = random_prompts(LENS)
    expected = answers(engine(checkpoints("qwen3")), prompts)
    assert answers(engine(checkpoints("qwen3"), max_batch=1, chunk_tokens=1), prompts[:3]) == expected[:3]
    assert answers(engine(checkpoints("qwen3"), max_batch=3), prompts) == expected


def test_answers_end_where_they_should(checkpoints: Any) -> None:
    """At a stop token, its last one, though the next step was launched before it was seen; or at the length."""
    prompts = random_prompts((9, 33, 70))
    run = engine(checkpoints("llama"), max_batch=2)
    whole = run.generate([Request(prompt, 30) for prompt in prompts])
    stops = [frozenset({completion.tokens[8]}) for completion in whole]
    seen: list[tuple[int, int]] = []
    cut = run.generate(
        [Request(prompt, 30, stop=stop) for prompt, stop in zip(prompts, stops, strict=True)],
        on_token=lambda index, token: seen.append((index, token)),
    )
    for index, (completion, before, stop) in enumerate(zip(cut, whole, stops, strict=True)):
        end = next(i for i, token in enumerate(before.tokens) if token in stop) + 1
        assert completion.tokens == before.tokens[:end]
        assert completion.finish == "stop"
        assert len(completion.times) == end
        assert list(completion.times) == sorted(completion.times)
        assert [token for i, token in seen if i == index] == list(completion.tokens)
    assert {completion.finish for completion in whole} == {"length"}
    (only,) = run.generate([Request(prompts[0], 1)])
    assert only.tokens == whole[0].tokens[:1]
    assert run.model.pool.free == run.model.pool.num_pages


def test_drawn_answers_do_not_depend_on_the_batch(checkpoints: Any) -> None:
    """Nor on chunks, nor on being set back: only on the request."""
    requests = [
        Request(prompt, 70, temperature=temperature, top_p=0.9, seed=seed)
        for prompt, temperature, seed in zip(
            random_prompts(LENS), (1.5, 0, 1.0, 0.7, 2.0, 1.0, 1.0), range(7), strict=True
        )
    ]
    together = engine(checkpoints("llama"), num_pages=5).generate(requests)
    assert sum(completion.preemptions for completion in together) > 0
    alone = engine(checkpoints("llama"), max_batch=1, chunk_tokens=4096)
    assert [c.tokens for c in together] == [alone.generate([request])[0].tokens for request in requests]
    other = alone.generate([Request(requests[0].prompt, 70, temperature=1.5, top_p=0.9, seed=99)])[0]
    assert other.tokens != together[0].tokens


@pytest.mark.parametrize("chunk_tokens", [40, 64, 4096])
def test_logits_of_windows(checkpoints: Any, chunk_tokens: int) -> None:
    """Several windows a step, or one in several steps: transformers' logits."""
    windows = random_prompts([100] * 3)
    model = engine(checkpoints("qwen2"), chunk_tokens=chunk_tokens).model
    oracle = Oracle(checkpoints("qwen2"))
    for hidden, window in zip(hidden_states(model, windows), windows, strict=True):
        expected = oracle.logits(window)
        torch.testing.assert_close(model.decoder.logits(hidden), expected, rtol=1e-5, atol=1e-5)
    assert model.pool.free == model.pool.num_pages


def test_tiny_beside_transformers_as_it_is(tiny_checkpoint: Path) -> None:
    """The embedded model, and transformers' own float32 attention: tokens are the same but for ties."""
    oracle = Oracle(tiny_checkpoint)
    prompts = random_prompts((3, 50, 128, 200), vocabulary=4096)
    found = answers(engine(tiny_checkpoint, max_tokens=256), prompts, 32)
    for prompt, answer in zip(prompts, found, strict=True):
        gaps = oracle.gaps(prompt, answer)
        assert float(gaps.max()) < TIE
        assert int((gaps == 0).sum()) >= 28
    assert found == [oracle.greedy(prompt, 32) for prompt in prompts]
