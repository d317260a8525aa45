"""The activation kernels against the oracles: exact codes, scales and sums of the values that the kernel itself made,
and those values within a rounding of float64's; odd M, K tails, tokens of zeros, extremes, NaN and infinity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qoq.formats.packing import padded_in_features
from qoq.kernels import act_quant
from qoq.kernels.act_oracles import add_oracle, quantize_oracle, rms_norm_oracle, silu_mul_oracle
from qoq.kernels.act_quant import RowShape
from qoq.kernels.launch import Kernel, is_hopper
from qoq.kernels.tiles import untile_activations

pytestmark = pytest.mark.gpu
DTYPES = (torch.float16, torch.bfloat16)
EPS = 1e-5
TINY = [(1, 8), (3, 192), (5, 576), (2, 1032), (3, 1536)]
MODELS = [
    (65, 576),
    (33, 896),
    (130, 1536),
    (17, 4096),
    (9, 4864),
    (7, 5120),
    (5, 8192),
    (7, 11008),
    (6, 14336),
    (5, 16384),
]
LONG = [(3, 16392), (4, 28672), (2, 32768), (3, 32776), (2, 53248)]
MAX_PLACES = 2
"""One place of the first 16-bit rounding is at most two of the second."""
MAX_DIFFERING = 0.004
"""Of the values of random rows: float32's errors, below 2**-20, seldom reach across a border of float16's 2**-11."""


def hard_rows(m: int, k: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random tokens of very different sizes, among them (where m allows) zeros, ties, extremes and the tiniest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator, dtype=torch.float64)
    x *= torch.where(torch.rand(m, k, generator=generator) < 0.01, 100.0, 1.0)
    x *= 10 ** (torch.rand(m, 1, generator=generator) * 4 - 3)
    rows = x.to(dtype)
    ties = (torch.arange(k) % 255 - 127) / 2
    ties[k // 2] = 127
    largest = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    special = [torch.zeros(k), ties, torch.full((k,), largest), torch.randint(-9, 10, (k,), generator=generator) * tiny]
    special[2][::3] = -largest / 3
    for i, row in enumerate(special):
        if 2 * i + 1 < m:
            rows[2 * i + 1] = row.to(dtype)
    return rows


class Case:
    """Operands on the CPU, what the kernel made of them (into poisoned memory), and what it should have."""

    def __init__(self, operation: str, m: int, k: int, dtype: torch.dtype, seed: int = 0) -> None:
        self.operation, self.dtype, self.m, self.k = operation, dtype, m, k
        self.x = hard_rows(m, 2 * k if operation == "silu_mul" else k, dtype, seed)
        if operation != "plain":
            self.x = self.x.clamp(-80, 1e4)  # exp(89) and 1e20**2 are beyond float32
        self.residual = hard_rows(m, k, dtype, seed + 1).clamp(-1e4, 1e4) if operation == "add_rms_norm" else None
        norm = operation.endswith("rms_norm")
        self.weight = (hard_rows(1, k, dtype, seed + 2)[0].float() + 1).to(dtype) if norm else None

    def run(self) -> None:
        m, k = self.m, self.k
        padded = padded_in_features(k)
        codes = torch.full((m + 2, padded), 0x7F, dtype=torch.int8, device="cuda")
        scales = torch.full((m + 2,), torch.nan, device="cuda")
        sums = torch.full((m + 2,), 0x7F7F7F7F, dtype=torch.int32, device="cuda")
        values = torch.full((m + 2, k), torch.nan, dtype=self.dtype, device="cuda")
        out = codes[1:-1], scales[1:-1], sums[1:-1]
        *_, added = act_quant.run_quantizer(
            self.operation,
            self.x.cuda(),
            residual=None if self.residual is None else self.residual.cuda(),
            weight=None if self.weight is None else self.weight.cuda(),
            eps=EPS,
            values=values[1:-1],
            out=out,
        )
        for border in (0, -1):
            assert bool((codes[border] == 0x7F).all()), "wrote codes outside the output"
            assert bool(scales[border].isnan() & (sums[border] == 0x7F7F7F7F)), "wrote scales outside the output"
            assert bool(values[border].isnan().all()), "wrote values outside the output"
        self.codes, self.scales, self.sums = (t.cpu() for t in out)
        self.values = values[1:-1].cpu()
        self.added = None if added is None else added.cpu()

    def expected_values(self) -> Tensor:
        x = self.x
        if self.operation == "silu_mul":
            return silu_mul_oracle(x).to(self.dtype)
        if self.residual is not None:
            x = add_oracle(x, self.residual).to(self.dtype)
        return x if self.weight is None else rms_norm_oracle(x, self.weight, EPS).to(self.dtype)

    def check(self) -> None:
        if self.residual is not None and self.added is not None:
            assert_same("residual", self.added, add_oracle(self.x, self.residual).to(self.dtype))
        expected = self.expected_values()
        if self.operation == "plain":
            assert_same("values", self.values, expected)
        else:
            apart = places_apart(self.values, expected)
            assert int(apart.max()) <= MAX_PLACES, "a value is further off than its roundings explain"
            random = apart[::2]  # in the special rows of hard_rows many values are the same
            differing = int((random > 0).sum())
            assert differing <= max(2, MAX_DIFFERING * random.numel()), f"{differing} of {random.numel()} values differ"
        codes, scales, sums = quantize_oracle(self.values)
        assert_same("codes", self.codes[:, : self.k], codes)
        assert_same("padding", self.codes[:, self.k :], torch.zeros_like(self.codes[:, self.k :]))
        assert_same("scales", self.scales, scales)
        assert_same("sums", self.sums, sums)


def places_apart(found: Tensor, expected: Tensor) -> Tensor:
    """How many numbers of their 16-bit dtype lie between two tensors, element by element."""
    found, expected = (x.contiguous().view(torch.int16).int() for x in (found, expected))
    found, expected = (torch.where(x < 0, -(x & 0x7FFF), x) for x in (found, expected))
    return (found - expected).abs()


def assert_same(what: str, found: Tensor, expected: Tensor) -> None:
    same = (found == expected) | (found.isnan() & expected.isnan())
    if not bool(same.all()):
        first = tuple(int(i) for i in (~same).nonzero()[0])
        wrong = int((~same).sum())
        raise AssertionError(
            f"{what}: {wrong} of {same.numel()} differ, first at {list(first)}: {found[first]}, not {expected[first]}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", TINY, ids=str)
@pytest.mark.parametrize("operation", act_quant.OPERATIONS)
def test_small_rows_are_exact(gpu, operation, shape, dtype) -> None:
    case = Case(operation, *shape, dtype, seed=sum(shape))
    case.run()
    case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_tokens_that_are_not_finite_do_not_look_fine(gpu, dtype) -> None:
    """In one warp a row and in a block a row; the NaN in either half of a pair, and in the last column."""
    inf, nan = float("inf"), float("nan")
    for k in (192, 1544):
        x = hard_rows(7, k, dtype, seed=k)
        x[0, 4], x[1, 5], x[2, k - 1], x[3, 0], x[4, 9], x[4, 10] = nan, -inf, nan, inf, -nan, inf
        codes, scales, sums = (t.cpu() for t in torch.ops.qoq.quantize_activation(x.cuda()))
        expected = quantize_oracle(x)
        assert_same("scales", scales, expected[1])
        assert scales[:5].isfinite().sum() == 0
        assert_same("codes", codes[:, :k], expected[0])
        assert_same("sums", sums, expected[2])
        weight = torch.ones(k, dtype=dtype, device="cuda")
        assert bool(torch.ops.qoq.rms_norm_quantize(x.cuda(), weight, EPS)[1][:5].isnan().all())
        both = torch.cat([x, torch.ones_like(x)], dim=1).cuda()
        assert not bool(torch.ops.qoq.silu_mul_quantize(both)[1][:5].isfinite().any())


@pytest.mark.parametrize("operation", act_quant.OPERATIONS)
def test_small_batches_of_no_tokens(gpu, operation) -> None:
    case = Case(operation, 0, 64, torch.float16)
    case.run()
    assert case.codes.shape == (0, 128)
    assert case.scales.shape == case.sums.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_rows_of_larger_tensors_are_read_in_place(gpu, dtype) -> None:
    wide, wide_residual = hard_rows(5, 640, dtype, seed=1).cuda(), hard_rows(5, 704, dtype, seed=2).cuda()
    x, residual = wide[:, 16:592], wide_residual[:, 128:]
    weight = torch.ones(576, dtype=dtype, device="cuda")
    operators = torch.ops.qoq
    pairs = [
        (operators.quantize_activation(x), operators.quantize_activation(x.contiguous())),
        (operators.silu_mul_quantize(x), operators.silu_mul_quantize(x.contiguous())),
        (
            operators.add_rms_norm_quantize(x, residual, weight, EPS),
            operators.add_rms_norm_quantize(x.contiguous(), residual.contiguous(), weight, EPS),
        ),
    ]
    for found, expected in pairs:
        for a, b in zip(found, expected, strict=True):
            assert_same("result", a.cpu(), b.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MODELS, ids=str)
@pytest.mark.parametrize("operation", act_quant.OPERATIONS)
def test_rows_of_models_are_exact(gpu, operation, shape, dtype) -> None:
    case = Case(operation, *shape, dtype, seed=sum(shape))
    case.run()
    case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LONG, ids=str)
@pytest.mark.parametrize("operation", ["plain", "silu_mul"])
def test_long_rows_are_exact(gpu, operation, shape, dtype) -> None:
    case = Case(operation, *shape, dtype, seed=sum(shape))
    case.run()
    case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_quotient_rounds_as_a_division(gpu, dtype) -> None:
    """A row for each of 1024 amax of one power of two, with every smaller number of nine powers of two."""
    places = 11 if dtype == torch.float16 else 8
    significands = torch.arange(1 << (places - 1), 1 << places, dtype=torch.float64)
    numbers = torch.cat([significands * 2.0**-shift for shift in range(9)])
    sign = torch.where(torch.arange(len(numbers)) % 2 == 0, 1.0, -1.0)
    x = (torch.minimum(numbers, significands[:, None]) * sign)[:, : len(numbers) // 8 * 8]
    x[:, 0] = significands
    for exponent in (0,) if dtype == torch.float16 else (0, -120, -110, 100):
        rows = (x * 2.0**exponent).to(dtype)
        codes, scales, sums = (t.cpu() for t in torch.ops.qoq.quantize_activation(rows.cuda()))
        expected = quantize_oracle(rows)
        assert_same("codes", codes[:, : x.shape[1]], expected[0])
        assert_same("scales", scales, expected[1])
        assert_same("sums", sums, expected[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_agree_with_pytorch_on_the_gpu(gpu, dtype) -> None:
    """As transformers' modules on this GPU; where the amax itself is a place off, so are codes of that token."""
    m, k = 256, 4096
    generator = torch.Generator("cuda").manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    x, residual, weight, gate_up = normal(m, k), normal(m, k), normal(k), normal(m, 2 * k) * 3
    added = x + residual
    hidden = added.float()
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + EPS)
    normalized = weight * hidden.to(dtype)
    gate, up = gate_up.chunk(2, dim=1)
    norm = torch.ops.qoq.add_rms_norm_quantize(x, residual, weight, EPS)
    assert_same("residual", norm[3].cpu(), added.cpu())
    silu = torch.ops.qoq.silu_mul_quantize(gate_up)
    for found, values in ((norm, normalized), (silu, torch.nn.functional.silu(gate) * up)):
        codes, scales, _ = quantize_oracle(values)
        apart = (found[0].cpu().int() - codes.int()).abs()
        assert int(apart.max()) <= 2
        assert (apart > 0).float().mean() < 5e-3
        assert torch.allclose(found[1].cpu(), scales, rtol=2.01 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("operation", act_quant.OPERATIONS)
@pytest.mark.parametrize("k", [576, 4096, 14336])
def test_results_depend_neither_on_the_run_nor_on_the_batch(gpu, operation, k) -> None:
    case = Case(operation, 40, k, torch.bfloat16, seed=k)
    case.run()
    first = case.codes, case.scales, case.sums, case.values
    for _ in range(3):
        case.run()
        for a, b in zip(first, (case.codes, case.scales, case.sums, case.values), strict=True):
            assert_same("a second run", b, a)
    case.m, case.x = 1, case.x[13:14].clone()
    case.residual = None if case.residual is None else case.residual[13:14].clone()
    case.run()
    for a, b in zip(first, (case.codes, case.scales, case.sums, case.values), strict=True):
        assert_same("a token alone", b, a[13:14])


@pytest.mark.parametrize(("m", "k"), [(70_001, 192), (80_003, 28_672)], ids=str)
def test_many_tokens(gpu, m, k) -> None:
    """More tokens than a grid's y axis has, and offsets beyond 2**31."""
    if torch.cuda.mem_get_info()[0] < 5 * m * k:
        pytest.skip(f"needs {5 * m * k >> 30} GiB of GPU memory")
    rows = hard_rows(16, k, torch.float16, seed=m)
    x = torch.zeros(m, k, dtype=torch.float16, device="cuda")
    x[:8], x[-8:] = rows[:8].cuda(), rows[8:].cuda()
    codes, scales, sums = torch.ops.qoq.quantize_activation(x)
    expected = quantize_oracle(rows)
    for found, wanted in zip((codes[:, :k], scales, sums), expected, strict=True):
        assert_same("ends", torch.cat([found[:8], found[-8:]]).cpu(), wanted)
    assert bool((scales[8:-8] == 1).all() & (sums[8:-8] == 0).all())
    assert not bool(codes[8:-8].any())


@pytest.mark.parametrize("operation", act_quant.OPERATIONS)
def test_graphs_replay_and_compiled_functions_run(gpu, operation) -> None:
    x, weight = hard_rows(6, 1024, torch.float16, seed=3).cuda(), torch.ones(1024, dtype=torch.float16, device="cuda")
    operators = torch.ops.qoq

    def step(x: Tensor) -> tuple[Tensor, ...]:
        if operation == "plain":
            return operators.quantize_activation(x)
        if operation == "silu_mul":
            return operators.silu_mul_quantize(x)
        if operation == "rms_norm":
            return operators.rms_norm_quantize(x, weight, EPS)
        return operators.add_rms_norm_quantize(x, x, weight, EPS)

    expected = [t.cpu() for t in step(x)]
    other = [t.cpu() for t in step(x.flip(0))]
    graph = torch.cuda.CUDAGraph()
    static = x.flip(0)
    with torch.cuda.graph(graph):
        results = step(static)
    for source, wanted in ((x.flip(0), other), (x, expected)):
        static.copy_(source)
        graph.replay()
        for a, b in zip(results, wanted, strict=True):
            assert_same("replay", a.cpu(), b)
    compiled = torch.compile(step, fullgraph=True)
    for a, b in zip(compiled(x), expected, strict=True):
        assert_same("compiled", a.cpu(), b)


def test_operators_keep_their_contracts(gpu) -> None:
    x, weight = hard_rows(3, 192, torch.float16, seed=5).cuda(), torch.ones(192, dtype=torch.float16, device="cuda")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.qoq.quantize_activation.default, (x,), test_utils=tests)
    torch.library.opcheck(torch.ops.qoq.silu_mul_quantize.default, (x,), test_utils=tests)
    torch.library.opcheck(torch.ops.qoq.rms_norm_quantize.default, (x, weight, EPS), test_utils=tests)
    torch.library.opcheck(torch.ops.qoq.add_rms_norm_quantize.default, (x, x, weight, EPS), test_utils=tests)
    torch.library.opcheck(torch.ops.qoq.add_rms_norm_quantize.default, (x, x, weight, EPS, True), test_utils=tests)


def run_case(case: Case, **options: Any) -> list[Tensor]:
    """Codes, scales, sums and, with a residual, the sum; codes of tiles as rows."""
    out = act_quant._outputs(case.x.cuda(), case.k, tiled=options.get("tiled", False))
    for tensor in out:
        tensor.view(torch.int8).fill_(0x7F)
    *_, added = act_quant.run_quantizer(
        case.operation,
        case.x.cuda(),
        residual=None if case.residual is None else case.residual.cuda(),
        weight=None if case.weight is None else case.weight.cuda(),
        eps=EPS if case.weight is not None else 0.0,
        out=out,
        **options,
    )
    codes = untile_activations(out[0], case.m) if options.get("tiled") else out[0]
    return [codes, out[1].view(torch.int32), out[2], *([] if added is None else [added.view(torch.int16)])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", act_quant.OPERATIONS)
@pytest.mark.parametrize(
    ("m", "k"),
    [(1, 8), (3, 192), (9, 576), (1, 4096), (17, 4096), (70, 4096), (257, 1032), (2050, 1032), (3, 14336), (21, 14336),
     (70, 14336), (261, 14336), (2051, 8200), (5, 53248), (300, 53248)],
)  # fmt: skip
def test_small_tiles_hold_the_same_codes(gpu, operation: str, m: int, k: int, dtype: torch.dtype) -> None:
    """For numbers of tokens of every shape that is chosen; rows have the one for few rows, which other tests check."""
    if k > act_quant.max_k(operation):
        pytest.skip(f"K is at most {act_quant.max_k(operation)}")
    case = Case(operation, m, k, dtype, seed=m)
    shape = act_quant.row_shape(operation, k, rows=1, tiled=False, hopper=False)
    expected = run_case(case, shape=shape)
    for options in ({"tiled": True}, {}):
        for found, wanted in zip(run_case(case, **options), expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("operation", act_quant.OPERATIONS)
@pytest.mark.parametrize("k", [1288, 4096, 14336])
def test_small_rows_are_the_same_however_they_are_shared(gpu, operation: str, k: int) -> None:
    case = Case(operation, 11, k, torch.float16, seed=k)
    vectors = padded_in_features(k) // 8
    shapes = [
        RowShape(each, warps, blocks=blocks, turns=turns)
        for each in (1, 2, 4)
        for blocks in ((1, 2, 4, 8) if is_hopper(0) else (1,))
        for turns in ((1, 2, 4, 8) if blocks == 1 else (1,))
        if (warps := -(-vectors // (32 * each * blocks))) <= (16 if each == 4 else 32) and warps * blocks * each <= 64
    ]
    expected = run_case(case, shape=act_quant.row_shape(operation, k, rows=1, tiled=False, hopper=False))
    for shape in shapes:
        for found, wanted in zip(run_case(case, shape=shape, tiled=True), expected, strict=True):
            assert torch.equal(found, wanted), shape


def test_short_rows_leave_the_kernel_of_long_rows_its_shared_memory(gpu) -> None:
    """Both are launches of one compiled kernel, and the driver knows one limit for it."""
    m, device = 1024, torch.cuda.current_device()
    specs = []
    for k in (14336, 4096):
        shape = act_quant.row_shape("plain", k, rows=m, tiled=True, hopper=True)
        specs.append(act_quant.spec("plain", torch.float16, shape, k, tiled=True))
    assert specs[0].defines == specs[1].defines
    assert specs[0].shared_bytes > specs[1].shared_bytes
    x = hard_rows(m, 14336, torch.float16, 0).cuda()
    expected = torch.ops.qoq.quantize_activation(x, tiled=True)
    Kernel(specs[1], device)
    for found, first in zip(torch.ops.qoq.quantize_activation(x, tiled=True), expected, strict=True):
        assert torch.equal(found, first)


@pytest.mark.parametrize("m", [1, 16, 300])
def test_kernels_that_overlap_wait_for_each_other(gpu, m: int) -> None:
    """A chain in a graph where each reads what those before wrote, the residual also what lies two kernels back."""
    k = 4096
    x, weight = hard_rows(m, k, torch.bfloat16, seed=m).cuda().clamp(-10, 10), torch.ones(k, device="cuda").bfloat16()
    gate_up = torch.randn(m, 2 * k, device="cuda").bfloat16()
    operators = torch.ops.qoq

    def chain() -> list[Tensor]:
        hidden, kept = x, []
        for i in range(24):
            *norm, hidden = operators.add_rms_norm_quantize(hidden, x, weight, EPS, i % 2 == 0)
            kept += [*norm, *operators.silu_mul_quantize(gate_up, True), *operators.quantize_activation(hidden, True)]
        return [*kept, hidden]

    expected = []
    chain()
    for _ in range(2):
        torch.cuda.synchronize()
    hidden = x
    for i in range(24):
        torch.cuda.synchronize()
        *norm, hidden = operators.add_rms_norm_quantize(hidden, x, weight, EPS, i % 2 == 0)
        torch.cuda.synchronize()
        silu = operators.silu_mul_quantize(gate_up, True)
        torch.cuda.synchronize()
        expected += [*norm, *silu, *operators.quantize_activation(hidden, True)]
    expected.append(hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = chain()
    for _ in range(3):
        for result in results:
            result.view(torch.int8).fill_(0x7F)
        graph.replay()
        for found, wanted in zip(results, expected, strict=True):
            if found.ndim == len(("K", "M", "piece", "token", "byte")):  # what fills the last eight is anything
                assert torch.equal(untile_activations(found, m), untile_activations(wanted, m))
            else:
                assert torch.equal(found, wanted)
