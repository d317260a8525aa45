"""Attention over the paged cache on the GPU against float64 over the same codes: ragged lengths, any grouping of heads,
shuffled pages, windows, extremes; the same bits in every run; new lengths in a CUDA graph. Extend attention: plain and
packed calls, histories larger than the scratch, in CUDA graphs."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qoq.formats.arithmetic import QuantizedKV, quantize_kv
from qoq.kernels import extend_batch, extend_plan
from qoq.kernels.attention import DecodeOptions, run_decode
from qoq.kernels.attention_oracles import decode_attention_oracle, extend_attention_oracle
from qoq.kernels.extend import extend_attention, run_extend
from qoq.kernels.extend_batch import prepare_extend
from qoq.kernels.launch import is_hopper
from qoq.kernels.layouts import PAGE_SIZE, pack_pages

pytestmark = pytest.mark.gpu
DTYPES = (torch.float16, torch.bfloat16)
TOLERANCES = {torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Relative L2 error. The kernel rounds probabilities to float16 and outputs to their format: half a step of float16 is
2^-12 to 2^-11 of a value (2.4e-4 to 4.9e-4), of bfloat16 2^-9 to 2^-8; the errors are independent, so their mean square
is about half of that (measured on an emulator: 2e-4 to 4e-4 and 1.8e-3). Sums are float32."""
EXTEND_TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Flash attention sees keys and values rounded to their format, and rounds probabilities to it: four such errors. Parts
that are merged are rounded to it once more, each by its share."""
TINY_LENS = (0, 1, 31, 32, 33, 63, 64, 65)
LENS = (511, 0, 1, 1500, 31, 32, 33, 63, 64, 65, 200, 0, 3001)


class Cache:
    """Random keys and values in a pool of shuffled pages, which are not all used.

    What no length reaches is poisoned: scales and zeros of NaN, page numbers out of range.
    """

    def __init__(
        self, lens: Sequence[int], kv_heads: int, head_dim: int, bits: int, kind: str = "normal", seed: int = 0
    ) -> None:
        random = torch.Generator().manual_seed(len(lens) + sum(lens) + seed)
        self.lens, self.bits, self.head_dim = list(lens), bits, head_dim
        pages_each = max(1, math.ceil(max(lens) / PAGE_SIZE))
        size = (len(lens), pages_each * PAGE_SIZE, kv_heads, head_dim)
        key, value = (torch.randn(size, generator=random) for _ in range(2))
        if kind == "hard":
            key[..., :: head_dim // 4] *= 30
            key[:, 5::17], value[:, 6::19] = 0.25, 0
            exponents = torch.linspace(-2.5, 4, size[1])[torch.randperm(size[1], generator=random)]
            value *= (10**exponents).view(1, -1, 1, 1)
        if kind == "growing":  # the largest score keeps rising
            key *= torch.linspace(0.1, 40, size[1]).view(1, -1, 1, 1)
            value *= 4000
        num_pages = len(lens) * pages_each + 3
        table = torch.randperm(num_pages, generator=random)[: len(lens) * pages_each].view(len(lens), pages_each)
        parts = [quantize_kv(part.half(), 4 if bits == 4 else 8) for part in (key, value)]
        for part in parts:
            for i, length in enumerate(lens):
                part.scales[i, length:] = part.zeros[i, length:] = torch.nan

        def by_page(tensor: Tensor) -> Tensor:
            pool = torch.full((num_pages, kv_heads, PAGE_SIZE, tensor.shape[-1]), 15, dtype=tensor.dtype)
            pool[table.view(-1)] = tensor.reshape(-1, PAGE_SIZE, kv_heads, tensor.shape[-1]).transpose(1, 2)
            return pool

        self.pages = pack_pages(
            *(QuantizedKV(by_page(p.codes), by_page(p.scales), by_page(p.zeros)) for p in parts), bits
        )
        self.table = table.int()
        for i, length in enumerate(lens):
            self.table[i, math.ceil(length / PAGE_SIZE) :] = 2**31 - 1

    def query(self, rows: int, heads: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, heads, self.head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)

    def decode(
        self, query: Tensor, window: int = 0, options: DecodeOptions | None = None, fresh_tokens: int | None = None
    ) -> Tensor:
        """Into poisoned memory, which has two rows more that must stay as they are."""
        rows, heads, head_dim = query.shape
        out = torch.empty(rows + 2, heads, head_dim, dtype=query.dtype, device="cuda")
        out.view(torch.uint8).fill_(0x7F)
        lens = torch.tensor(self.lens, dtype=torch.int32, device="cuda")
        run_decode(
            query.cuda(),
            self.pages.cuda(),
            self.table.cuda(),
            lens,
            head_dim**-0.5,
            self.bits,
            window,
            out=out[1:-1],
            fresh_tokens=fresh_tokens,
            options=options,
        )
        assert bool((out[[0, -1]].view(torch.uint8) == 0x7F).all())
        return out[1:-1].cpu()

    def check(self, query: Tensor, window: int = 0, blocks: int | None = None) -> None:
        """What runs on this GPU, and the portable kernel where that is another; early starts give the same bits."""
        lens = torch.tensor(self.lens)
        expected = decode_attention_oracle(
            query.cuda(), self.pages.cuda(), self.table.cuda(), lens, self.head_dim**-0.5, self.bits, window
        ).cpu()
        kernels = (False, True) if is_hopper(torch.cuda.current_device()) else (True,)
        for portable in kernels:
            found = self.decode(query, window, DecodeOptions(blocks=blocks, portable=portable))
            assert not found[lens == 0].any()
            for i, length in enumerate(self.lens):
                what = f"sequence {i}, {length} tokens, {'portable' if portable else 'own'} kernel"
                check_close(found[i], expected[i], TOLERANCES[query.dtype], what)
            for fresh in (0, 1, 40):
                same = self.decode(query, window, DecodeOptions(blocks=blocks, portable=portable), fresh)
                assert torch.equal(same, found)


def check_close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (8, 2), (5, 1), (16, 2), (16, 1), (26, 2)])
def test_small_decode(
    gpu: torch.device, heads: int, kv_heads: int, head_dim: int, bits: int, dtype: torch.dtype
) -> None:
    cache = Cache(TINY_LENS, kv_heads, head_dim, bits)
    cache.check(cache.query(len(TINY_LENS), heads, dtype))


@pytest.mark.parametrize("window", [1, 31, 32, 33, 500])
@pytest.mark.parametrize("blocks", [1, 3, 300])
def test_small_windows_and_grids(gpu: torch.device, blocks: int, window: int) -> None:
    """From all work in one block to more blocks than there is work."""
    cache = Cache((*TINY_LENS, 200), 2, 64, 4)
    cache.check(cache.query(len(TINY_LENS) + 1, 6, torch.float16), window, blocks)


def test_small_batches_without_work(gpu: torch.device) -> None:
    cache = Cache([0, 0, 0], 2, 64, 4)
    assert not cache.decode(cache.query(3, 6, torch.float16)).any()
    nothing = cache.query(0, 6, torch.float16).cuda()
    table, lens = cache.table[:0].cuda(), torch.zeros(0, dtype=torch.int32, device=gpu)
    assert torch.ops.qoq.paged_decode_attention(nothing, cache.pages.cuda(), table, lens, 1.0, 4, 0).shape == (0, 6, 64)


@pytest.mark.parametrize("kind", ["normal", "hard", "growing"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (9, 3, 64), (28, 4, 128), (12, 1, 64)])
def test_decode_of_long_sequences(
    gpu: torch.device, heads: int, kv_heads: int, head_dim: int, bits: int, kind: str
) -> None:
    cache = Cache(LENS, kv_heads, head_dim, bits, kind)
    for dtype in DTYPES:
        cache.check(cache.query(len(LENS), heads, dtype))
    for window, blocks in ((64, None), (1000, 5), (0, 2)):
        cache.check(cache.query(len(LENS), heads, torch.float16), window, blocks)


def test_decode_of_many_sequences(gpu: torch.device) -> None:
    """More sequences than a block has threads, most of them empty."""
    lens = [0] * 1500
    lens[3:1400:7] = [1 + i % 90 for i in range(200)]
    cache = Cache(lens, 2, 64, 4)
    cache.check(cache.query(len(lens), 6, torch.float16))


def test_decode_of_one_very_long_sequence(gpu: torch.device) -> None:
    cache = Cache([20_011], 1, 128, 4)
    cache.check(cache.query(1, 4, torch.float16))
    cache.check(cache.query(1, 4, torch.float16), window=9000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_of_any_size(gpu: torch.device, dtype: torch.dtype) -> None:
    """Tiny queries give the mean of the values; large ones pick the token of the largest score."""
    cache = Cache((300, 40), 2, 128, 4)
    query = cache.query(2, 8, dtype)
    sizes = [1e-7, 1e-4, 1, 30] if dtype == torch.float16 else [1e-38, 1e-20, 1, 30]
    query[:, :4] *= torch.tensor(sizes, dtype=torch.float32).to(dtype).view(1, 4, 1)
    cache.check(query)


def test_a_nan_stays_in_its_sequence_and_head(gpu: torch.device) -> None:
    cache = Cache((70, 300, 5), 2, 64, 4)
    query = cache.query(3, 8, torch.float16)
    clean = cache.decode(query)
    query[1, 2, 7] = torch.nan
    query[2, 6, 0] = torch.inf
    found = cache.decode(query)
    assert bool(found[1, 2].isnan().all())
    assert bool(found[2, 6].isnan().all())
    found[1, 2], found[2, 6] = clean[1, 2], clean[2, 6]
    check_close(found, clean.double(), TOLERANCES[torch.float16], "the others")


def test_rows_of_a_fused_buffer(gpu: torch.device) -> None:
    cache = Cache(TINY_LENS, 2, 64, 4)
    query = cache.query(len(TINY_LENS), 6, torch.float16).cuda()
    fused = torch.full((len(TINY_LENS), 10, 64), torch.nan, dtype=torch.float16, device=gpu)
    fused[:, :6] = query
    lens = torch.tensor(TINY_LENS, dtype=torch.int32, device=gpu)
    rest = (cache.pages.cuda(), cache.table.cuda(), lens, 0.125, 4, 0)
    operator = torch.ops.qoq.paged_decode_attention
    assert torch.equal(operator(fused[:, :6], *rest), operator(query, *rest))


def test_the_same_bits_in_every_run(gpu: torch.device) -> None:
    cache = Cache(LENS, 8, 128, 4, "hard")
    query = cache.query(len(LENS), 32, torch.float16)
    first = cache.decode(query)
    assert all(torch.equal(cache.decode(query), first) for _ in range(20))


def test_a_cuda_graph_follows_the_lengths(gpu: torch.device) -> None:
    cache = Cache((700, 300, 900, 64), 2, 128, 4)
    query, pages, table = cache.query(4, 8, torch.float16).cuda(), cache.pages.cuda(), cache.table.cuda()
    lens = torch.tensor(cache.lens, dtype=torch.int32, device=gpu)
    operator = torch.ops.qoq.paged_decode_attention
    operator(query, pages, table, lens, 0.1, 4, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = operator(query, pages, table, lens, 0.1, 4, 0)
    for other in ([700, 300, 900, 64], [1, 0, 33, 64], [0, 0, 0, 0], [699, 1, 0, 2]):
        lens.copy_(torch.tensor(other))
        output.fill_(torch.nan)
        graph.replay()
        assert torch.equal(output, operator(query, pages, table, lens, 0.1, 4, 0))
        expected = decode_attention_oracle(query, pages, table, lens, 0.1, 4)
        check_close(output, expected, TOLERANCES[torch.float16], f"lengths {other}")
    compiled = torch.compile(lambda q: operator(q, pages, table, lens, 0.1, 4, 0), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query), output)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "bits"), [(32, 8, 128, 4), (6, 2, 64, 8), (16, 1, 64, 4)])
def test_a_chain_of_steps_that_overlap(gpu: torch.device, heads: int, kv_heads: int, head_dim: int, bits: int) -> None:
    """Each appends a token and attends at once, while the host is far ahead. Between two steps a kernel runs that was
    launched the ordinary way, as the choice of the next token is in a decode step."""
    lens = (700, 1, 63, 64, 65, 95, 2000)
    cache = Cache(lens, kv_heads, head_dim, bits)
    pages, table = cache.pages.to(gpu), cache.table.to(gpu)
    random = torch.Generator(gpu).manual_seed(0)
    steps, size = 40, (len(lens), kv_heads, head_dim)
    fresh = torch.randn(steps, 2, *size, generator=random, device=gpu).half()
    queries = torch.randn(steps, len(lens), heads, head_dim, generator=random, device=gpu).half()
    rooms = [math.ceil(length / PAGE_SIZE) * PAGE_SIZE for length in lens]
    at = [torch.tensor([min(n + i, room) for n, room in zip(lens, rooms, strict=True)]) for i in range(steps)]
    all_lens = torch.stack(at).int().to(gpu)
    pages_of = table.gather(1, (all_lens.t().long() - 1) // PAGE_SIZE).t()
    slots = (pages_of.long() * PAGE_SIZE + (all_lens.long() - 1) % PAGE_SIZE).contiguous()
    before, chosen = pages.clone(), torch.zeros(1, device=gpu)
    operator, scale = torch.ops.qoq.overlapping_decode_attention, head_dim**-0.5

    def run(*, synchronize: bool) -> list[Tensor]:
        pages.copy_(before)
        torch.cuda.synchronize()
        if not synchronize:
            torch.cuda._sleep(50_000_000)  # clock cycles, in which the host enqueues all steps
        found = []
        for i in range(steps):
            chosen.add_(1)
            torch.ops.qoq.append_kv(*fresh[i], pages, slots[i], bits)
            found.append(operator(queries[i], pages, table, all_lens[i], scale, bits, 0, 1))
            if synchronize:
                torch.cuda.synchronize()
        return found

    expected = run(synchronize=True)
    last = decode_attention_oracle(queries[-1], pages, table, all_lens[-1], scale, bits)
    check_close(expected[-1], last, TOLERANCES[torch.float16], "the last step")
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(synchronize=False), expected, strict=True))


def test_a_negative_number_of_fresh_tokens_is_refused(gpu: torch.device) -> None:
    cache = Cache((5,), 2, 64, 4)
    lens = torch.tensor([5], dtype=torch.int32, device=gpu)
    query = cache.query(1, 6, torch.float16).to(gpu)
    with pytest.raises(ValueError, match="fresh_tokens: expected 0 or more, got -1"):
        torch.ops.qoq.overlapping_decode_attention(query, cache.pages.to(gpu), cache.table.to(gpu), lens, 1.0, 4, 0, -1)


def test_a_page_that_does_not_exist_stops_the_kernel(gpu: torch.device) -> None:
    """In a process of its own, whose CUDA context is then lost."""
    script = (
        "import torch, qoq.kernels.attention;"
        "from qoq.kernels.layouts import page_bytes;"
        "pages = torch.zeros(4, 2, page_bytes(64, 4), dtype=torch.uint8, device='cuda');"
        "table = torch.tensor([[0, 4]], dtype=torch.int32, device='cuda');"
        "query = torch.zeros(1, 6, 64, dtype=torch.float16, device='cuda');"
        "lens = torch.tensor([64], dtype=torch.int32, device='cuda');"
        "operator = torch.ops.qoq.paged_decode_attention;"
        "operator(query, pages, table, lens, 1.0, 4, 0); torch.cuda.synchronize(); print('first');"
        "operator(query, pages, table, lens + 1, 1.0, 4, 0); torch.cuda.synchronize(); print('second')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.split() == ["first"], done.stderr
    assert done.returncode != 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("window", [None, 50])
def test_small_extend(gpu: torch.device, window: int | None, bits: int, dtype: torch.dtype) -> None:
    check_extend(gpu, [5, 0, 1, 70, 3, 33], [5, 20, 65, 130, 40, 33], (6, 2, 64), bits, dtype, window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("shape", [(32, 8, 128), (9, 3, 64), (16, 1, 128)])
def test_extend_of_long_histories(
    gpu: torch.device, shape: tuple[int, int, int], window: int | None, dtype: torch.dtype
) -> None:
    """The same with a scratch for everything, and with small ones that cut history and new tokens."""
    check_extend(gpu, [300, 1, 0, 17, 4, 64], [300, 700, 30, 1400, 64, 1024], shape, 4, dtype, window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(6, 2, 64), (4, 4, 64), (8, 1, 128)])
def test_small_packed_extend(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], bits: int, dtype: torch.dtype
) -> None:
    """Packed calls beside rows of the decode kernel, a plain call, and no rows; parts of uneven lengths."""
    monkeypatch.setattr(extend_plan, "PACKED_HISTORY", 64)
    monkeypatch.setattr(extend_batch, "PART_KEYS", 15)
    check_extend(gpu, [70, 20, 0, 9, 17, 1], [171, 130, 77, 73, 50, 90], shape, bits, dtype, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(32, 8, 128), (9, 3, 64), (8, 8, 128)])
def test_extend_of_packed_histories(gpu: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    new_lens, kv_lens = [64, 20, 1, 9, 0, 100], [5000, 4116, 100, 4321, 64, 170]
    check_extend(gpu, new_lens, kv_lens, shape, 4, dtype, None)
    check_extend(gpu, [17], [4500], shape, 4, dtype, None)


def check_extend(
    gpu: torch.device,
    new_lens: list[int],
    kv_lens: list[int],
    shape: tuple[int, int, int],
    bits: int,
    dtype: torch.dtype,
    window: int | None,
) -> None:
    heads, kv_heads, head_dim = shape
    cache = Cache(kv_lens, kv_heads, head_dim, bits)
    query = cache.query(sum(new_lens), heads, dtype).to(gpu)
    pages, table, scale = cache.pages.to(gpu), cache.table.to(gpu), head_dim**-0.5
    expected = extend_attention_oracle(query, pages, table, new_lens, kv_lens, scale, bits, window or 0).cpu()
    page = 2 * PAGE_SIZE * kv_heads * head_dim * 2
    for scratch_bytes in (256 << 20, 12 * page, 6 * page):
        found = extend_attention(query, pages, table, new_lens, kv_lens, scale, bits, window, scratch_bytes)
        for i, row in enumerate(found.cpu()):
            check_close(row, expected[i], EXTEND_TOLERANCES[dtype], f"row {i}, scratch {scratch_bytes // page} pages")


@pytest.mark.parametrize("scratch_pages", [1024, 80, 12])
def test_a_prepared_batch_in_a_cuda_graph(gpu: torch.device, scratch_pages: int) -> None:
    """Decode rows, packed, plain and no rows in one step; a replay sees other queries, pages and page numbers."""
    new_lens, kv_lens, scale = [2, 70, 0, 33, 300, 1], [700, 100, 64, 4500, 1000, 33], 128**-0.5
    first, second = (Cache(kv_lens, 2, 128, 4, seed=seed) for seed in (0, 1))
    query = torch.zeros(sum(new_lens), 8, 128, dtype=torch.float16, device=gpu)
    pages, table = first.pages.to(gpu), first.table.to(gpu)
    batch = prepare_extend(
        new_lens,
        kv_lens,
        max_pages=table.shape[1],
        heads=8,
        kv_heads=2,
        head_dim=128,
        device=gpu,
        scratch_bytes=scratch_pages * 2 * PAGE_SIZE * 2 * 128 * 2,
    )
    run_extend(query, pages, table, batch, scale, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run_extend(query, pages, table, batch, scale, 4)
    for layer, cache in enumerate((first, second, first)):
        query.copy_(cache.query(query.shape[0], 8, torch.float16) * (layer + 1))
        pages.copy_(cache.pages)
        table.copy_(cache.table)
        found.fill_(torch.nan)
        graph.replay()
        expected = extend_attention_oracle(query, pages, table, new_lens, kv_lens, scale, 4).cpu()
        for i, row in enumerate(found.cpu()):
            check_close(row, expected[i], EXTEND_TOLERANCES[torch.float16], f"layer {layer}, row {i}")
        assert torch.equal(run_extend(query, pages, table, batch, scale, 4), found)


def test_rows_that_lie_together_are_written_in_place(gpu: torch.device) -> None:
    """Steps of one kind only, whose output is that of its one call."""
    for new_lens, kv_lens in (([1, 1, 1], [70, 1, 200]), ([3, 0, 2], [70, 64, 200]), ([40, 0, 20], [70, 64, 200])):
        check_extend(gpu, new_lens, kv_lens, (6, 2, 64), 4, torch.float16, None)


def test_extend_of_a_fused_buffer(gpu: torch.device) -> None:
    new_lens, kv_lens = [20, 1, 64], [300, 10, 4200]
    cache = Cache(kv_lens, 2, 64, 4)
    query = cache.query(sum(new_lens), 6, torch.float16).to(gpu)
    fused = torch.full((sum(new_lens), 10, 64), torch.nan, dtype=torch.float16, device=gpu)
    fused[:, :6] = query
    rest = (cache.pages.to(gpu), cache.table.to(gpu), new_lens, kv_lens, 0.125, 4)
    assert torch.equal(extend_attention(fused[:, :6], *rest), extend_attention(query, *rest))


def test_prefill_in_one_go_in_chunks_and_token_by_token_agree(gpu: torch.device) -> None:
    total, (heads, kv_heads, head_dim) = 150, (8, 2, 128)
    cache = Cache([total], kv_heads, head_dim, 4)
    query = cache.query(total, heads, torch.float16).to(gpu)
    pages, table = cache.pages.to(gpu), cache.table.to(gpu)

    def run(*cuts: int) -> Tensor:
        borders = [0, *cuts, total]
        parts = [
            extend_attention(query[a:b], pages, table, [b - a], [b], head_dim**-0.5, 4)
            for a, b in itertools.pairwise(borders)
        ]
        return torch.cat(parts).double()

    whole = run()
    for cuts in ((70,), (64, 65, 130), tuple(range(1, total))):
        check_close(run(*cuts), whole, EXTEND_TOLERANCES[torch.float16], f"cut at {cuts[:4]}")
