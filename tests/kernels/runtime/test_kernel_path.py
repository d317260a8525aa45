"""What the runtime calls on a GPU, with stand-ins for the kernels on the CPU: the reference's answers, in float16."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from qoq.kernels import extend
from qoq.kernels.attention_oracles import extend_attention_oracle
from qoq.kernels.extend_batch import ExtendBatch, FlashCall
from qoq.kernels.runtime import kernel_cache, lane_cache, weights
from qoq.kernels.runtime.attention import DecodeStep, ExtendStep
from qoq.kernels.runtime.config import runtime_config
from qoq.kernels.runtime.elementwise import plain, rms_norm
from qoq.kernels.runtime.engine import Engine
from qoq.kernels.runtime.graphs import DecodeSteps
from qoq.kernels.runtime.lane_cache import LaneCache
from qoq.kernels.runtime.linears import DenseLinear, Fp8Linear, Norm
from qoq.kernels.runtime.model import Options, RuntimeModel
from qoq.kernels.runtime.random_model import random_weights
from qoq.kernels.runtime.reference_cache import ReferenceCache
from qoq.kernels.runtime.scheduler import Request
from qoq.kernels.runtime.scoring import hidden_states
from qoq.kernels.runtime.steps import DecodeInputs
from qoq.recipes.errors import InputError
from qoq.recipes.families import family_of
from tests.kernels.runtime.runtime_cases import MODELS, random_prompts, write_complete

QWEN3_LINEARS = tuple(
    f"model.layers.{layer}.{name}" for layer in range(2) for name in family_of("qwen3").roles.values()
)
LENS = (1, 5, 63, 65, 17)
COUNT = 6
TIE = 0.1
"""Of the standard deviation of logits. The reference rounds keys and values to float16 when it reads them, which the
kernels' attention over codes does not: now and then an int8 code differs."""
SIXTEEN: dict[str, Any] = {"dtype": torch.float16, "max_batch": 4, "chunk_tokens": 50}


@pytest.fixture(autouse=True)
def extending(monkeypatch: pytest.MonkeyPatch, cpu_operators: Any) -> None:
    """Extend attention by its oracle: plans are made as on a GPU, then what they were made of is used."""
    prepare = kernel_cache.prepare_extend
    lens: dict[int, tuple[Sequence[int], Sequence[int]]] = {}

    def prepared(new_lens: Sequence[int], kv_lens: Sequence[int], **sizes: Any) -> ExtendBatch:
        batch = prepare(new_lens, kv_lens, **sizes)
        lens[id(batch)] = (new_lens, kv_lens)
        return batch

    def run(query: Tensor, pages: Tensor, table: Tensor, batch: ExtendBatch, scale: float, bits: int) -> Tensor:
        extend._check_batch(query, pages, table, batch)
        found = extend_attention_oracle(query, pages, table, *lens[id(batch)], scale, bits, batch.window)
        return found.to(query.dtype)

    monkeypatch.setattr(kernel_cache, "prepare_extend", prepared)
    monkeypatch.setattr(kernel_cache, "run_extend", run)


def engine(folder: Path, **options: Any) -> Engine:
    return Engine(RuntimeModel.from_folder(folder, Options(**{**SIXTEEN, **options})))


def answers(engine: Engine, count: int = COUNT, **request: Any) -> list[tuple[int, ...]]:
    found = engine.generate([Request(prompt, count, **request) for prompt in random_prompts(LENS)])
    assert engine.model.pool.free == engine.model.pool.num_pages
    return [completion.tokens for completion in found]


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("llama", {}),
        ("llama", {"key_rotation": "hadamard"}),
        ("linear rope, biases", {"modules_to_not_convert": ("lm_head", "model.layers.0.self_attn.v_proj")}),
        ("qwen2, windows", {"kv_bits": 8}),
        ("qwen3", {}),
        ("yarn", {}),
    ],
)
def test_kernels_and_reference_agree(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cpu_operators: Any,
    name: str,
    overrides: dict[str, Any],
    hopper: bool,
) -> None:
    folder = write_complete(tmp_path / "model", name, **overrides)
    monkeypatch.setattr(weights, "wants_tiles", lambda weight: hopper)
    found = answers(engine(folder, arithmetic="kernels"))
    gemm = "w4a8_gemm_sm90" if hopper else "w4a8_gemm"
    fused = {"rms_norm_quantize", "silu_mul_quantize", "rope_append", "overlapping_decode_attention"}
    assert {gemm, *fused} <= set(cpu_operators.calls)
    texts = [[*prompt, *answer[:-1]] for prompt, answer in zip(random_prompts(LENS), found, strict=True)]
    cpu_operators.calls.clear()
    reference = engine(folder).model
    gaps = []
    for hidden, answer in zip(hidden_states(reference, texts), found, strict=True):
        logits = reference.decoder.logits(hidden[-COUNT:]).float()
        gaps.append((logits.amax(-1) - logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)) / logits.std())
    assert not cpu_operators.calls
    assert float(torch.cat(gaps).max()) < TIE
    assert float((torch.cat(gaps) == 0).float().mean()) > 0.9


@pytest.mark.parametrize("hopper", [False, True])
def test_lm_head_of_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_operators: Any, hopper: bool) -> None:
    """The kernels' logits are those of the reference, and near those of a 16-bit lm_head, which takes more memory."""
    folder = write_complete(tmp_path / "model", "llama")
    monkeypatch.setattr(weights, "wants_tiles", lambda weight: hopper)
    hidden = torch.randn(7, 128, generator=torch.Generator().manual_seed(0)).half()
    wide = RuntimeModel.from_folder(folder, Options(**SIXTEEN))
    reference = RuntimeModel.from_folder(folder, Options(**SIXTEEN, lm_head_bits=8))
    kernels = RuntimeModel.from_folder(folder, Options(**SIXTEEN, lm_head_bits=8, arithmetic="kernels"))
    expected, found = reference.decoder.logits(hidden), kernels.decoder.logits(hidden)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    error = (expected - wide.decoder.logits(hidden)).float().norm() / wide.decoder.logits(hidden).float().norm()
    assert 0 < error < 0.02
    assert reference.decoder.weights.lm_head.nbytes < 0.6 * wide.decoder.weights.lm_head.nbytes
    assert len(answers(Engine(kernels))) == len(LENS)
    assert ("w8a8_gemm_sm90" if hopper else "w8a8_gemm") in cpu_operators.calls


def test_lm_head_of_other_widths_is_refused() -> None:
    with pytest.raises(InputError, match="lm_head_bits is 4, expected 8 or 16"):
        Options(lm_head_bits=4)
    weight = torch.zeros(33, 128, dtype=torch.float16)
    with pytest.raises(InputError, match="33 tokens of 128 values; in 8 bits the kernels take multiples of 32 and 8"):
        weights.place_head(weight, 8, "kernels", plain)
    with pytest.raises(InputError, match="64 tokens of 132 values"):
        weights.place_head(weight.new_zeros(64, 132), 8, "kernels", plain)


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.usefixtures("cpu_operators")
def test_lm_head_of_8_bits_is_padded(monkeypatch: pytest.MonkeyPatch, hopper: bool) -> None:
    """192 inputs, which the kernels see as 256."""
    monkeypatch.setattr(weights, "wants_tiles", lambda weight: hopper)
    random = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 192, generator=random).half(), torch.randn(5, 192, generator=random).half()
    kernels, reference = (weights.place_head(weight, 8, which, plain) for which in ("kernels", "reference"))
    torch.testing.assert_close(kernels.of(x), reference.of(x), rtol=1e-3, atol=1e-3)


def test_lm_head_of_8_bits_is_counted_beside_a_tied_embedding(tmp_path: Path) -> None:
    folder = write_complete(tmp_path / "model", "llama3 rope, tied")
    wide, small = (
        RuntimeModel.from_folder(folder, Options(**SIXTEEN, lm_head_bits=bits)).decoder.weights for bits in (16, 8)
    )
    assert small.nbytes - wide.nbytes == small.lm_head.nbytes > 0


def replaying(engine: Engine) -> Engine:
    """Decode steps are traced when they are prepared, and the trace runs again on the same memory, as a CUDA graph
    does: what a step read on the host would stay as it was."""
    steps, inputs, run = engine._steps, engine._inputs, engine._steps._run
    traces: dict[tuple[int, bool], Any] = {}

    def prepare(batch: int, draws: bool) -> None:
        if (batch, draws) not in traces:
            tokens = inputs.tokens.clone()
            inputs.send_idle()
            traces[batch, draws] = make_fx(lambda: run(batch, draws))()
            inputs.tokens.copy_(tokens)

    steps.prepare = prepare  # type: ignore[method-assign]
    steps.launch = lambda batch, draws: traces[batch, draws]()  # type: ignore[method-assign]
    return engine


@pytest.mark.parametrize("request_", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 4}], ids=["greedy", "drawn"])
def test_replayed_steps_are_those_that_run(tmp_path: Path, request_: dict[str, Any]) -> None:
    folder = write_complete(tmp_path / "model", "llama")
    expected = answers(engine(folder, arithmetic="kernels"), 20, **request_)
    replayed = replaying(engine(folder, arithmetic="kernels"))
    assert answers(replayed, 20, **request_) == expected
    assert answers(replayed, 20, **request_) == expected


def test_graphs_are_captured_once_and_leave_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        def pool(self) -> str:
            return "pool"

        def replay(self) -> None:
            runs.append("replay")

    def capture(graph: Graph, pool: object) -> Any:
        runs.append(f"capture in {pool}")
        return nullcontext()

    for name, value in (("CUDAGraph", Graph), ("graph", capture), ("synchronize", lambda _: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    runs: list[str] = []
    config = runtime_config(MODELS["llama"][0](), where="llama")
    cache = ReferenceCache(config, 2, torch.device("cpu"), torch.float32)
    inputs = DecodeInputs(cache, 4, 1, torch.device("cpu"))

    def run(batch: int, draws: bool) -> None:
        runs.append(f"run {batch} {draws}")
        assert inputs.step(batch).slots.tolist() == [-1] * batch
        inputs.tokens[:batch] = 7

    steps = DecodeSteps(run, inputs, graphs=True)
    inputs.tokens += torch.arange(4)
    for _ in range(2):
        steps.prepare(2, False)
        steps.launch(2, False)
    steps.prepare(4, True)
    assert inputs.tokens.tolist() == [0, 1, 2, 3]
    first = ["run 2 False", "capture in None", "run 2 False", "replay"]  # whose first replay nobody waits for
    assert runs == [*first, "replay", "replay", "run 4 True", "capture in pool", "run 4 True", "replay"]


def flash(
    query: Tensor, key: Tensor, value: Tensor, call: FlashCall, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Flash attention's definition, item by item in float64; no keys give zeros and an infinite sum, as there."""
    output, sums = torch.zeros_like(query), torch.full(query.shape[1::-1], torch.inf)
    share = query.shape[1] // key.shape[1]
    ends, starts, lens = (part.tolist() for part in (call.row_ends, call.key_starts, call.key_lens))
    assert len(ends) == len(starts) == len(lens) + 1
    for first, last, start, length in zip(ends, ends[1:], starts, lens, strict=False):
        assert last - first <= call.max_rows
        assert length <= call.max_keys
        if not length:
            continue
        rows = query[first:last].double()
        keys, values = (x[start : start + length].double().repeat_interleave(share, dim=1) for x in (key, value))
        scores = torch.einsum("nhd,khd->hnk", rows, keys) * scale
        own = torch.arange(last - first)[:, None] + length - (last - first)
        places = torch.arange(length)
        if call.causal:
            scores.masked_fill_(places > own, -torch.inf)
        if window:
            scores.masked_fill_(places <= own - window, -torch.inf)
        output[first:last] = torch.einsum("hnk,khd->nhd", scores.softmax(-1), values).to(query.dtype)
        sums[:, first:last] = scores.logsumexp(-1).float()
    return output, sums


@pytest.mark.parametrize("name", ["llama", "qwen2, windows"])
def test_lanes_of_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A lane for each sequence, which the next one takes over: the same as pages."""
    monkeypatch.setattr(extend, "_flash", flash)
    monkeypatch.setattr(lane_cache, "BUSY_BLOCKS", 1)
    folder = write_complete(tmp_path / "model", name)
    lanes = engine(folder, kv_bits=16, arithmetic="kernels", num_pages=2)
    assert (lanes.model.pool.page_size, lanes.model.pool.num_pages) == (256, 2)
    assert answers(lanes) == answers(engine(folder, kv_bits=16))


@pytest.mark.parametrize(("parts", "masked"), [(1, False), (1, True), (3, False), (8, False)])
def test_parts_of_a_lane_are_merged(monkeypatch: pytest.MonkeyPatch, parts: int, masked: bool) -> None:
    """Lengths down to fewer tokens than parts, and a row that runs nothing, whose lane another has by now."""
    monkeypatch.setattr(extend, "_flash", flash)
    monkeypatch.setattr(lane_cache, "BUSY_BLOCKS", parts * 6)
    monkeypatch.setattr(lane_cache, "PART_KEYS", 1)
    config = runtime_config(MODELS["qwen3"][0](), where="qwen3")
    random, lens, pages = torch.Generator().manual_seed(0), [130, 1, 2, 70, 33], 3
    lanes = LaneCache(config, 6, 192, torch.device("cpu"), torch.float32, masked=masked)
    reference = ReferenceCache(config, 6 * pages, torch.device("cpu"), torch.float32)

    def heads(tokens: int) -> list[Tensor]:
        counts = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        return [torch.randn(tokens, count, config.head_dim, generator=random) for count in counts]

    def attend(cache: Any, tables: list[list[int]], new: list[int], qkv: list[Tensor], idle: bool) -> Tensor:
        def slots_of(table: list[int], first: int, length: int) -> list[int]:
            size = cache.page_size
            return [table[place // size] * size + place % size for place in range(first, length)]

        table = torch.tensor(tables, dtype=torch.int32)
        firsts = [length - count for length, count in zip(lens, new, strict=True)]
        positions = [place for first, length in zip(firsts, lens, strict=True) for place in range(first, length)]
        slots = [s for t, first, length in zip(tables, firsts, lens, strict=False) for s in slots_of(t, first, length)]
        step: Any
        if idle:
            step = DecodeStep(
                torch.tensor([*positions, 0], dtype=torch.int32),
                torch.tensor([*slots, cache.idle_slot]),
                torch.tensor([*lens, cache.idle_len], dtype=torch.int32),
                table,
            )
        else:
            step = ExtendStep(
                torch.tensor(positions, dtype=torch.int32), torch.tensor(slots), table, tuple(new), tuple(lens)
            )
        found: Tensor = cache.begin(step)(1, *qkv)
        return found

    lane_tables = [[5], [0], [3], [1], [2], [5]]
    page_tables = [[pages * lane[0] + place for place in range(pages)] for lane in lane_tables]
    first = heads(sum(lens))
    for new, qkv, idle in ((lens, first, False), ([1] * len(lens), heads(len(lens) + 1), True)):
        count = len(lens) + idle
        found = attend(lanes, lane_tables[:count], new, qkv, idle)
        expected = attend(reference, page_tables[:count], new, qkv, idle)
        rows = sum(new)
        torch.testing.assert_close(found[:rows], expected[:rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["g128", "per_channel", "int8", "fp16"])
def test_random_weights_run(kind: Any) -> None:
    config = runtime_config(MODELS["qwen3"][0](), where="qwen3").served_with(8)
    options = Options(arithmetic="kernels", **SIXTEEN)
    made = random_weights(config, kind, device=torch.device("cpu"), dtype=torch.float16, arithmetic="kernels")
    (found,) = Engine(RuntimeModel(config, made, options)).generate([Request([5, 6, 7], 4)])
    assert len(found.tokens) == 4
    again = random_weights(config, kind, device=torch.device("cpu"), dtype=torch.float16, arithmetic="kernels")
    assert again.nbytes == made.nbytes
    assert isinstance(made.lm_head, DenseLinear)
    assert isinstance(again.lm_head, DenseLinear)
    assert torch.equal(again.lm_head.weight, made.lm_head.weight)


@pytest.mark.parametrize("function", ["of", "of_norm", "of_add_norm", "of_silu_mul"])
def test_float8_linears(function: str) -> None:
    """Every way to bring inputs to float8, against products of the float8 values in float64."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=random).to(torch.float8_e4m3fn)
    linear = Fp8Linear(weight, torch.tensor(0.02), torch.tensor(0.05))
    x, residual = (torch.randn(3, 64, generator=random).bfloat16() * 8 for _ in range(2))
    norm = Norm(torch.randn(64, generator=random).bfloat16(), 1e-5)
    arguments: dict[str, Any] = {
        "of": (x,),
        "of_norm": (x, norm),
        "of_add_norm": (x, residual, norm),
        "of_silu_mul": (torch.cat([x, residual], dim=1),),
    }
    values = {
        "of": x,
        "of_norm": rms_norm(x, norm.weight, norm.eps),
        "of_add_norm": rms_norm(x + residual, norm.weight, norm.eps),
        "of_silu_mul": torch.nn.functional.silu(x) * residual,
    }[function]
    found = getattr(linear, function)(*arguments[function])
    if function == "of_add_norm":
        found, added = found
        assert torch.equal(added, x + residual)
    codes = (values / torch.tensor(0.05).bfloat16()).clamp(-448, 448).to(torch.float8_e4m3fn)
    expected = codes.double() @ weight.double().t() * 0.02 * 0.05
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.slow
def test_compiled_steps_give_the_same_answers(tmp_path: Path) -> None:
    """torch.compile on the CPU, in float32: the answers of a model of 16 bits."""
    folder = write_complete(tmp_path / "model", "qwen3", modules_to_not_convert=("lm_head", *QWEN3_LINEARS))
    expected = answers(engine(folder, kv_bits=16, dtype=torch.float32))
    found = answers(engine(folder, kv_bits=16, dtype=torch.float32, compiled=True))
    assert found == expected
    torch.compiler.reset()


def test_weights_that_the_runtime_has_no_kernels_for() -> None:
    config = runtime_config(MODELS["llama"][0](), where="llama")
    with pytest.raises(InputError, match="weights of kind int4_fp16: the runtime has no kernels for them"):
        random_weights(config, "int4_fp16", device=torch.device("cpu"), dtype=torch.float16, arithmetic="kernels")
