"""SmoothAttention: lambda, its folding and its search against loops and a numpy decoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qoq.calib.attention import ATTENTION_NAME, AttentionCall, observe, sliding_mask
from qoq.calib.plan import open_model
from qoq.calib.smooth_attention import (
    KeyRanges,
    RangeObserver,
    StrengthSearch,
    candidate_scales,
    choose,
    fold,
)
from qoq.calib.streaming import BlockRunner, build_block, embed, load_block_tensors
from qoq.recipes.families import Family, family_of
from qoq.recipes.schema import SmoothAttention

MakeModel = Callable[..., Any]
Tokens = Callable[..., Tensor]
CPU = torch.device("cpu")
SEEDS = st.integers(0, 2**32 - 1)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}


class Setting:
    """A block of a random model, what enters it, and the same in float64 for the numpy decoder."""

    def __init__(self, model: Any, windows: Tensor, reference: Any, index: int = 0) -> None:
        self.skeleton, source = open_model(model.folder)
        self.index = index
        self.family: Family = self.skeleton.family
        self.tensors = load_block_tensors(source, self.skeleton, index, CPU)
        self.hidden = embed(source, self.skeleton, windows)
        self.runner = BlockRunner(self.skeleton, windows.shape[1], CPU)
        self._reference, self._model = reference, model

    def decoder(self, tensors: dict[str, Tensor] | None = None) -> Any:
        """The numpy decoder, with `tensors` in place of the block's own."""
        values = {name: tensor.double().numpy() for name, tensor in self._model.tensors.items()}
        prefix = self.family.block_prefix(self.index)
        values |= {prefix + name: tensor.double().numpy() for name, tensor in (tensors or {}).items()}
        return self._reference(self._model.config, values)

    def run(self, tensors: dict[str, Tensor]) -> Tensor:
        return self.runner(self.index, build_block(self.skeleton, self.index, tensors), self.hidden)

    def watch(self, observer: Any) -> None:
        block = build_block(self.skeleton, self.index, self.tensors)
        for _, batch in self.runner.batches(self.hidden):
            observe(block.get_submodule("self_attn"), observer, partial(self.runner, self.index, block, batch))

    def ranges(self) -> KeyRanges:
        seen = RangeObserver()
        self.watch(seen)
        return KeyRanges.from_observer(seen, shared=self.family.key_fold == "norms")


@pytest.fixture
def setting(make_model: MakeModel, tokens: Tokens, reference: Any) -> Callable[..., Setting]:
    """setting(family, windows=2, length=19, **config)"""

    def make(family: str, *, windows: int = 2, length: int = 19, **config: Any) -> Setting:
        return Setting(make_model(family, **config), tokens(windows, length), reference)

    return make


def ranges_of(keys: list[list[float]], queries: list[list[float]]) -> KeyRanges:
    return KeyRanges(torch.tensor(keys), torch.tensor(queries))


def random_scale(kv_heads: int, head_dim: int, seed: int = 0, *, shared: bool = False) -> Tensor:
    """A lambda over three orders of magnitude that is equal within RoPE pairs."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.exp2(torch.rand(1 if shared else kv_heads, head_dim // 2, generator=generator) * 10 - 5)
    return torch.cat((half, half), dim=1).expand(kv_heads, -1)


# ---- ranges and lambda


@pytest.mark.parametrize("family", FAMILIES)
def test_ranges_are_those_of_the_reference(family: str, setting: Callable[..., Setting]) -> None:
    """absmax after RoPE over all windows, max over each pair i, i + D/2 and over the query heads of a group."""
    case = setting(family, **GROUPED)
    keys, queries = np.zeros((2, 64)), np.zeros((2, 64))
    for window in case.hidden.double().numpy():
        decoder = case.decoder()
        decoder.block(0, window)
        for head in range(2):
            for channel in range(64):
                pair = [channel % 32, channel % 32 + 32]
                keys[head, channel] = max(keys[head, channel], np.abs(decoder.keys[0][head][:, pair]).max())
                for query in (2 * head, 2 * head + 1):
                    found = np.abs(decoder.queries[0][query][:, pair]).max()
                    queries[head, channel] = max(queries[head, channel], found)
    if family == "qwen3":  # one gain a channel, shared by all heads
        keys[:], queries[:] = keys.max(axis=0), queries.max(axis=0)
    got = case.ranges()
    np.testing.assert_allclose(got.keys.numpy(), keys, rtol=1e-5)
    np.testing.assert_allclose(got.queries.numpy(), queries, rtol=1e-5)


@given(seed=SEEDS, alpha=st.floats(0, 1), beta=st.floats(0, 1))
def test_lambda(seed: int, alpha: float, beta: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys, queries = (torch.exp2(torch.rand(2, 8, generator=generator) * 20 - 10) for _ in range(2))
    scale = KeyRanges(keys, queries).scale(alpha, beta)
    for head in range(2):
        for channel in range(8):
            want = float(keys[head, channel]) ** alpha / float(queries[head, channel]) ** beta
            assert float(scale[head, channel]) == pytest.approx(want, rel=1e-5)


@given(
    keys=st.floats(0, 2.0**127, width=32),
    queries=st.floats(0, 2.0**127, width=32),
    alpha=st.sampled_from([0.0, 0.25, 0.5, 0.875, 1.0]),
    beta=st.sampled_from([0.0, 0.25, 0.5, 0.875, 1.0]),
)
def test_lambda_can_always_be_multiplied_and_divided_by(keys: float, queries: float, alpha: float, beta: float) -> None:
    scale = ranges_of([[keys]], [[queries]]).scale(alpha, beta)
    assert bool(torch.isfinite(scale).all())
    assert bool((scale > 0).all())
    assert bool(torch.isfinite(1 / scale).all())
    assert bool((1 / scale > 0).all())


def test_channels_that_are_not_used_get_one() -> None:
    scale = ranges_of([[0.0, 2.0, 0.0, 2.0]], [[3.0, 0.0, 0.0, 5.0]]).scale(0.5, 0.5)
    assert scale[0, :3].tolist() == [1.0, 1.0, 1.0]
    assert float(scale[0, 3]) == pytest.approx(math.sqrt(2 / 5))
    # beta 0: queries do not matter
    assert ranges_of([[0.0, 2.0]], [[0.0, 0.0]]).scale(1.0, 0.0).tolist() == [[1.0, 2.0]]
    assert ranges_of([[7.0, 2.0]], [[3.0, 9.0]]).scale(0.0, 0.0).tolist() == [[1.0, 1.0]]


def test_nothing_observed_is_an_error() -> None:
    with pytest.raises(ValueError, match="observed"):
        KeyRanges.from_observer(RangeObserver(), shared=False)


def test_pairs_and_sharing() -> None:
    seen = RangeObserver()
    seen.keys = torch.tensor([[1.0, 5.0, 3.0, 2.0], [9.0, 1.0, 1.0, 8.0]])
    seen.queries = torch.tensor([[1.0, 1.0, 7.0, 2.0], [2.0, 6.0, 1.0, 1.0]])
    own = KeyRanges.from_observer(seen, shared=False)
    assert own.keys.tolist() == [[3, 5, 3, 5], [9, 8, 9, 8]]
    assert own.queries.tolist() == [[7, 2, 7, 2], [2, 6, 2, 6]]
    shared = KeyRanges.from_observer(seen, shared=True)
    assert shared.keys.tolist() == [[9, 8, 9, 8]] * 2
    assert shared.queries.tolist() == [[7, 6, 7, 6]] * 2


def test_candidates() -> None:
    ranges = ranges_of([[4.0, 9.0]], [[2.0, 3.0]])
    fixed = candidate_scales(ranges, SmoothAttention(mode="fixed", alpha=0.5, beta=1.0))
    assert fixed.shape == (1, 1, 2)
    assert fixed[0, 0].tolist() == pytest.approx([1.0, 1.0])
    several = candidate_scales(ranges, SmoothAttention(mode="search", alphas=(0.0, 0.5, 1.0), beta=0.9))
    want = [[1 / 2, 1 / 3], [math.sqrt(2), math.sqrt(3)], [4.0, 9.0]]
    assert several[:, 0].tolist() == [pytest.approx(row) for row in want]


# ---- folding


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", GROUPED),
        ("llama", {"attention_bias": True}),
        ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 384}),
        ("mistral", {**GROUPED, "sliding_window": 6}),
        ("qwen2", GROUPED),
        ("qwen2", {"num_key_value_heads": 2}),
        ("qwen3", GROUPED),
        ("qwen3", {**GROUPED, "attention_bias": True}),
    ],
    ids=str,
)
def test_folding_preserves_the_block(family: str, config: dict[str, Any], setting: Callable[..., Setting]) -> None:
    case = setting(family, windows=1, **config)
    kv_heads, is_shared = case.skeleton.num_kv_heads, case.family.key_fold == "norms"
    scale = random_scale(kv_heads, 64, shared=is_shared)
    before = dict(case.tensors)
    copies = {name: tensor.clone() for name, tensor in case.tensors.items()}
    folded = fold(case.tensors, scale, case.family, case.skeleton.num_heads)

    # the input is left alone: neither other tensors in it nor other numbers in them
    assert case.tensors.keys() == before.keys() == folded.keys()
    assert all(case.tensors[name] is before[name] for name in before)
    assert all(torch.equal(case.tensors[name], copies[name]) for name in copies)
    moved = {name for name in folded if not torch.equal(folded[name], copies[name])}
    parts = ("weight", "bias") if any("q_proj.bias" in name for name in folded) else ("weight",)
    if is_shared:
        assert moved == {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    else:
        assert moved == {f"self_attn.{x}_proj.{part}" for x in "qk" for part in parts}

    # transformers' block in float32, the numpy one in float64
    exact, same = case.run(case.tensors), case.run(folded)
    assert float((same - exact).norm() / exact.norm()) < 2e-6
    x = case.hidden[0].double().numpy()
    one, two = case.decoder(), case.decoder(folded)
    a, b = one.block(0, x), two.block(0, x)
    assert np.linalg.norm(a - b) / np.linalg.norm(a) < 1e-6  # folded weights are float32

    # keys are divided by lambda and queries multiplied, head by head
    factors = scale.double().numpy()
    share = case.skeleton.num_heads // kv_heads
    for head in range(kv_heads):
        np.testing.assert_allclose(two.keys[0][head], one.keys[0][head] / factors[head], rtol=1e-4, atol=1e-5)
        for query in range(head * share, (head + 1) * share):
            got, want = two.queries[0][query], one.queries[0][query] * factors[head]
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_lambda_that_splits_a_rope_pair_would_not_preserve_the_block(setting: Callable[..., Setting]) -> None:
    """That pairs share one lambda is needed: the check above can fail."""
    case = setting("llama", windows=1)
    scale = random_scale(1, 64).clone()
    scale[:, :32] *= 2
    exact, other = case.run(case.tensors), case.run(fold(case.tensors, scale, case.family, 2))
    assert float((other - exact).norm() / exact.norm()) > 1e-3


# ---- an outlier in the keys that the queries undo


def inject(case: Setting, factors: Tensor) -> dict[str, Tensor]:
    """Keys times `factors` [kv_heads, D], queries divided: the block computes the same."""
    return fold(case.tensors, 1 / factors, case.family, case.skeleton.num_heads)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0])
def test_injected_outliers_cancel_where_alpha_and_beta_add_to_one(
    family: str, alpha: float, setting: Callable[..., Setting]
) -> None:
    case = setting(family, **GROUPED)
    factors = torch.ones(2, 64)
    for head, channel in ((0, 3), (1, 17)):
        heads = slice(None) if family == "qwen3" else head
        factors[heads, channel] = factors[heads, channel + 32] = 32.0
    plain = case.ranges()
    want = fold(case.tensors, plain.scale(alpha, 1 - alpha), case.family, 4)

    case.tensors = inject(case, factors)
    spoilt = case.ranges()
    assert torch.allclose(spoilt.keys, plain.keys * factors, rtol=1e-5)
    assert torch.allclose(spoilt.queries, plain.queries / factors, rtol=1e-5)
    scale = spoilt.scale(alpha, 1 - alpha)
    assert torch.allclose(scale, plain.scale(alpha, 1 - alpha) * factors, rtol=1e-5)
    got = fold(case.tensors, scale, case.family, 4)
    for name in want:
        assert torch.allclose(got[name], want[name], rtol=1e-5, atol=0), name
    if alpha < 1:  # without the queries' share, some of the outlier is left
        left = spoilt.scale(alpha, 0.0) / plain.scale(alpha, 0.0)
        assert torch.allclose(left, factors**alpha, rtol=1e-5)


# ---- the search


@pytest.mark.parametrize(
    ("family", "kv_bits", "key_rotation"),
    [*((f, 4, "none") for f in FAMILIES), ("llama", 8, "none"), ("llama", 4, "hadamard"), ("qwen3", 4, "hadamard")],
)
def test_errors_are_those_of_the_reference(
    family: str, kv_bits: int, key_rotation: Any, setting: Callable[..., Setting], in_rotated_heads: Any
) -> None:
    config = {**GROUPED, "sliding_window": 7} if family == "mistral" else GROUPED
    case = setting(family, **config)
    factors = torch.ones(2, 64)
    factors[:, 5] = factors[:, 37] = 20.0
    case.tensors = inject(case, factors)
    spec = SmoothAttention(alphas=(0.0, 0.5, 1.0))
    candidates = candidate_scales(case.ranges(), spec)
    search = StrengthSearch(candidates, kv_bits, 10_000, key_rotation)
    case.watch(search)
    assert not search.is_done

    want = np.zeros((3, 2))
    for window in case.hidden.double().numpy():
        decoder = case.decoder(case.tensors)
        values: dict[str, Any] = {}
        attend = decoder.attend

        def keep_values(
            query: Any, key: Any, value: Any, index: int, attend: Any = attend, values: Any = values
        ) -> Any:
            values["v"] = value
            return attend(query, key, value, index)

        decoder.attend = keep_values
        decoder.block(0, window)
        query, key = decoder.queries[0], decoder.keys[0]
        exact = attend(query, key, values["v"], 0)
        for i in range(3):
            factor = candidates[i].double().numpy()[:, None, :]
            rounded = kv_cached_heads(in_rotated_heads(key / factor, key_rotation), kv_bits)
            queries = in_rotated_heads(query * np.repeat(factor, 2, axis=0), key_rotation)
            moved = attend(queries, rounded, values["v"], 0)
            for head in range(4):
                want[i, head // 2] += ((moved - exact)[:, head] ** 2).sum()
    np.testing.assert_allclose(search.errors.numpy(), want, rtol=2e-2)
    is_shared = family == "qwen3"
    best = choose(candidates, search.errors, spec, shared=is_shared)
    picks = [int(want.sum(axis=1).argmin())] * 2 if is_shared else want.argmin(axis=0).tolist()
    assert best.alphas == tuple(spec.alphas[pick] for pick in picks)
    for head, pick in enumerate(picks):
        assert torch.equal(best.scale[head], candidates[pick, head])


def kv_cached_heads(x: Any, bits: int) -> Any:
    """[heads, T, D] through the cache, with one scale and zero a token and head."""
    low, high = x.min(axis=2, keepdims=True), x.max(axis=2, keepdims=True)
    scale = ((high - low) / (2**bits - 1)).astype(np.float32).astype(np.float16).astype(np.float64)
    zero = (-low / scale).astype(np.float32).astype(np.float16).astype(np.float64)
    return (np.clip(np.rint(x / scale + zero), 0, 2**bits - 1) - zero) * scale


def test_the_search_undoes_what_was_injected(setting: Callable[..., Setting]) -> None:
    """It finds a candidate whose 4-bit keys lose as little as they did before."""
    case = setting("llama", **GROUPED)
    spec = SmoothAttention()

    def least_error() -> Tensor:
        search = StrengthSearch(candidate_scales(case.ranges(), spec), 4, 10_000)
        case.watch(search)
        return search.errors.amin(dim=0)

    before = least_error()
    factors = torch.ones(2, 64)
    factors[:, 5] = factors[:, 37] = 100.0
    case.tensors = inject(case, factors)
    assert torch.allclose(least_error(), before, rtol=1e-2)


def test_the_search_stops_at_its_limit(setting: Callable[..., Setting]) -> None:
    case = setting("llama", windows=3, length=1024, num_hidden_layers=1)  # two windows a batch
    candidates = candidate_scales(case.ranges(), SmoothAttention(alphas=(0.5,)))
    limited, unlimited = StrengthSearch(candidates, 4, 2000), StrengthSearch(candidates, 4, 10**9)
    case.watch(limited)
    case.watch(unlimited)
    assert limited.is_done
    assert not unlimited.is_done
    assert 0 < float(limited.errors.sum()) < float(unlimited.errors.sum())
    case.hidden = case.hidden[:2]
    two = StrengthSearch(candidates, 4, 10**9)
    case.watch(two)
    assert torch.equal(two.errors, limited.errors)


def test_ties_go_to_the_first_candidate() -> None:
    candidates = torch.arange(1.0, 4.0)[:, None, None].expand(3, 2, 4)
    spec = SmoothAttention(alphas=(0.1, 0.2, 0.3))
    errors = torch.tensor([[2.0, 3.0], [1.0, 3.0], [1.0, 3.0]], dtype=torch.float64)
    assert choose(candidates, errors, spec, shared=False).alphas == (0.2, 0.1)
    assert choose(candidates, errors, spec, shared=True).alphas == (0.2, 0.2)


def test_a_candidate_without_a_number_is_never_chosen() -> None:
    candidates = torch.arange(1.0, 4.0)[:, None, None].expand(3, 2, 4)
    spec = SmoothAttention(alphas=(0.1, 0.2, 0.3))
    nan, inf = math.nan, math.inf
    errors = torch.tensor([[nan, inf], [5.0, nan], [7.0, 9.0]], dtype=torch.float64)
    assert choose(candidates, errors, spec, shared=False).alphas == (0.2, 0.3)
    assert choose(candidates, errors, spec, shared=True).alphas == (0.3, 0.3)


# ---- watching


def test_watching_leaves_the_block_as_it_was(setting: Callable[..., Setting]) -> None:
    case = setting("qwen3")
    block = build_block(case.skeleton, 0, case.tensors)
    attention = block.get_submodule("self_attn")
    before = case.runner(0, block, case.hidden)
    calls: list[AttentionCall] = []
    observe(attention, lambda q, k, v, call: calls.append(call), partial(case.runner, 0, block, case.hidden))
    assert len(calls) == 1
    assert torch.equal(case.runner(0, block, case.hidden), before)

    def fail(*_: object) -> None:
        raise KeyError("observer")

    with pytest.raises(KeyError, match="observer"):
        observe(attention, fail, partial(case.runner, 0, block, case.hidden))
    assert torch.equal(case.runner(0, block, case.hidden), before)


def test_an_attention_that_is_not_called_is_an_error(setting: Callable[..., Setting]) -> None:
    case = setting("llama")
    block = build_block(case.skeleton, 0, case.tensors)
    with pytest.raises(RuntimeError, match=ATTENTION_NAME):
        observe(block.get_submodule("self_attn"), lambda *_: None, lambda: None)


def test_the_call_repeats_the_attention_it_was_given(setting: Callable[..., Setting], reference: Any) -> None:
    case = setting("mistral", windows=1, sliding_window=5, **GROUPED)
    seen: dict[str, Tensor] = {}

    def keep(query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> None:
        seen.update(q=query, k=key, v=value, out=call(query, key, value))

    case.watch(keep)
    q, k, v = (seen[name][0].double().numpy() for name in "qkv")
    want = case.decoder().attend(q, k, v, 0)
    np.testing.assert_allclose(seen["out"][0].numpy(), want, rtol=1e-4, atol=1e-5)


@given(length=st.integers(1, 12), window=st.one_of(st.none(), st.integers(1, 14)))
def test_sliding_mask(length: int, window: int | None) -> None:
    mask = sliding_mask(length, window, CPU)
    if window is None or window >= length:
        assert mask is None
        return
    assert mask is not None
    assert mask.shape == (1, 1, length, length)
    for query in range(length):
        for key in range(length):
            assert bool(mask[0, 0, query, key]) == (query - window < key <= query)


def test_fold_points_of_all_families() -> None:
    folds = {name: family_of(name).key_fold for name in FAMILIES}
    assert folds == {"llama": "projections", "mistral": "projections", "qwen2": "projections", "qwen3": "norms"}


@given(seed=SEEDS, alpha=st.sampled_from([0.0, 0.5, 1.0]), beta=st.sampled_from([0.0, 0.5]))
def test_balancing_gives_a_head_one_power_of_two_and_keeps_both_sides_small(
    seed: int, alpha: float, beta: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys, queries = (torch.exp2(torch.rand(3, 8, generator=generator) * 30 - 15) for _ in range(2))
    ranges = KeyRanges(keys, queries)
    scale = ranges.scale(alpha, beta)
    balanced = ranges.balanced(scale)
    for head in range(3):
        factor = (balanced[head] / scale[head]).tolist()
        assert factor == pytest.approx([factor[0]] * 8, rel=1e-6)
        assert math.log2(factor[0]) == pytest.approx(round(math.log2(factor[0])), abs=1e-6)
        largest_key = float((keys[head] / balanced[head]).max())
        largest_query = float((queries[head] * balanced[head]).max())
        assert 0.49 < largest_key / largest_query < 2.05


def test_balancing_leaves_unused_heads_alone() -> None:
    ranges = ranges_of([[0.0, 0.0]], [[3.0, 9.0]])
    assert ranges.balanced(torch.ones(1, 2)).tolist() == [[1.0, 1.0]]
