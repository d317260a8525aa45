"""Drawing tokens, against a slow loop over Python's numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qoq.kernels.runtime.sampling import Draws, sample, uniforms


def draws(rows: int, temperature: float = 1.0, top_p: float = 1.0, place: int = 0) -> Draws:
    return Draws(
        torch.full((rows,), temperature), torch.full((rows,), top_p), torch.arange(rows), torch.full((rows,), place)
    )


def splitmix(seed: int, place: int) -> float:
    """The number `place` of SplitMix64, its upper 24 bits, as the paper's C code has it."""
    mask = (1 << 64) - 1
    z = (seed + (place + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 40) / 2**24


def slow(logits: list[float], temperature: float, top_p: float, target: float) -> int:
    top = max(logits)
    powers = [math.exp((x - top) / temperature) for x in logits]
    total = sum(powers)
    ordered = sorted(((power / total, -i) for i, power in enumerate(powers)), reverse=True)
    kept, mass = [], 0.0
    for probability, index in ordered:
        if kept and mass >= top_p:
            break
        kept.append((probability, -index))
        mass += probability
    reached = 0.0
    for probability, index in kept:
        reached += probability
        if reached > target * mass:
            return index
    return kept[-1][1]


def test_uniforms_are_those_of_the_paper() -> None:
    seeds = torch.tensor([0, 1, 2**63 - 1, -5, 1234567])
    places = torch.tensor([0, 7, 2, 10**6, 3])
    expected = [splitmix(s, p) for s, p in zip(seeds.tolist(), places.tolist(), strict=True)]
    assert uniforms(seeds, places).tolist() == expected
    many = uniforms(torch.zeros(100_000, dtype=torch.int64), torch.arange(100_000))
    assert float(many.mean()) == pytest.approx(0.5, abs=0.005)
    assert 0 <= float(many.min()) < 1e-4
    assert 1 - 1e-4 < float(many.max()) < 1


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 1.0])
def test_draws_are_those_of_the_slow_loop(temperature: float, top_p: float) -> None:
    logits = torch.randn(150, 37, generator=torch.Generator().manual_seed(0)) * 2
    how = draws(150, temperature, top_p, place=11)
    found = sample(logits, how).tolist()
    targets = uniforms(how.seeds, how.places).tolist()
    assert found == [slow(row, temperature, top_p, u) for row, u in zip(logits.tolist(), targets, strict=True)]


def test_frequencies_are_the_probabilities() -> None:
    """Chi-squared of 20,000 draws: below the 99.9th percentile of 5 degrees of freedom."""
    logits, count = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 3.0]), 20_000
    found = sample(logits.expand(count, -1), draws(count)).bincount(minlength=6)
    expected = logits.softmax(0) * count
    assert float(((found - expected) ** 2 / expected).sum()) < 20.5


def test_temperature_0_takes_the_likeliest_beside_rows_that_draw() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    how = draws(6)
    how.temperatures[::2] = 0
    found = sample(logits, how)
    assert torch.equal(found[::2], logits.argmax(-1)[::2])
    assert torch.equal(found[1::2], sample(logits, draws(6))[1::2])
    assert torch.equal(sample(logits, None), logits.argmax(-1))


@pytest.mark.parametrize("vocabulary", [4096, 501 * 256, 37, 384])
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_the_likeliest_is_the_first_of_the_highest(rows: int, vocabulary: int) -> None:
    """Few rows are searched in parts: values come more than once."""
    logits = torch.randint(0, 9, (rows, vocabulary), generator=torch.Generator().manual_seed(rows)).to(torch.float16)
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert sample(logits, None).tolist() == expected


def test_a_draw_depends_on_its_own_row_only() -> None:
    logits = torch.randn(70, 50, generator=torch.Generator().manual_seed(2))
    how = draws(70, top_p=0.8, place=5)
    alone = [sample(logits[i : i + 1], row(how, i)) for i in range(70)]
    assert torch.equal(torch.cat(alone), sample(logits, how))
    later = Draws(how.temperatures, how.top_ps, how.seeds, how.places + 1)
    assert not torch.equal(sample(logits, later), sample(logits, how))


@pytest.mark.parametrize("top_p", [0.0, 1e-9])
def test_the_likeliest_stays_whatever_top_p_is(top_p: float) -> None:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(3))
    assert torch.equal(sample(logits, draws(20, top_p=top_p)), logits.argmax(-1))


def test_extremes() -> None:
    """Logits that leave no doubt, that are all the same, or that rule tokens out."""
    sure: Tensor = torch.tensor([[0.0, 1e4, 0.0]])
    assert sample(sure, draws(1)).tolist() == [1]
    ruled_out = torch.full((500, 4), -torch.inf)
    ruled_out[:, 1:3] = 0
    assert set(sample(ruled_out, draws(500)).tolist()) == {1, 2}
    assert set(sample(torch.zeros(500, 4), draws(500)).tolist()) == {0, 1, 2, 3}


def row(how: Draws, index: int) -> Draws:
    parts = (how.temperatures, how.top_ps, how.seeds, how.places)
    return Draws(*(part[index : index + 1] for part in parts))
