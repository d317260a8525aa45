"""vLLM with qoq's plug-in on the GPU: its greedy answers are those of our own runtime but for ties, in every setting.

What a tie is, is measured: where 16-bit numbers are rounded otherwise, quantized codes flip. So much do our own answers
in the other 16-bit type differ, and vLLM's may not differ by more.

Engines take a minute or two to start, so those of the tests that were chosen start several at a time:
`pytest -m gpu tests/kernels/gpu/test_vllm_gpu.py -k "g128 and (eager or graphs)"`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from typer.testing import CliRunner

from qoq.kernels.layouts import PAGE_SIZE, page_bytes
from qoq.kernels.modules import wants_tiles
from qoq.kernels.runtime.engine import Engine
from qoq.kernels.runtime.model import Options, RuntimeModel
from qoq.kernels.runtime.scheduler import Request
from qoq.kernels.runtime.scoring import hidden_states
from qoq_cli.app import app
from qoq_cli.model_location import tiny_folder
from tests.kernels.gpu.vllm_answers import Job, Result, ask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        find_spec("vllm") is None, reason="vLLM is not installed: pip install -c constraints-vllm.txt '.[vllm]'"
    ),
]
NEW, LONGEST, VOCABULARY = 48, 512, 4096
LENS = (1, 2, 5, 17, 31, 63, 64, 65, 66, 100, 127, 128, 129, 130, 190, 191, 192, 193, 200, 255, 256, 257, 300, 383, 400)
AT_ONCE, ENGINE_SECONDS = 5, 420
OURS = "qoq.kernels.vllm.attention.QoQAttentionBackend"
COMMON: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "dtype": "float16",
    "max_model_len": LONGEST,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 2048,
    "gpu_memory_utilization": 0.05,  # the cache's size is given below: several engines and our runtime share the GPU
    "kv_cache_memory_bytes": 256 << 20,
    "enable_prefix_caching": False,
    "disable_log_stats": False,
    "generation_config": "vllm",
    "seed": 0,
}
FEW_PAGES = {"num_gpu_blocks_override": 24}  # 1536 tokens, for 16 sequences of up to 448
EVERYTHING = {**FEW_PAGES, "enable_prefix_caching": True, "max_num_batched_tokens": 96}
OLDER_RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "0"}


@dataclass(frozen=True)
class Setting:
    """`options` over COMMON; `shared`: prompts with common beginnings, asked twice; the first `count` prompts."""

    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    shared: bool = False
    kv_bits: int = 4
    count: int | None = None


SETTINGS = {
    "eager": Setting({"enforce_eager": True}),
    "graphs": Setting(),
    "prefixes": Setting({"enable_prefix_caching": True}, shared=True),
    "chunks": Setting({"max_num_batched_tokens": 64}),
    "few-pages": Setting(FEW_PAGES),
    "everything": Setting(EVERYTHING, shared=True),
    "older-runner": Setting(environment=OLDER_RUNNER),
    "older-runner-everything": Setting(EVERYTHING, OLDER_RUNNER, shared=True),
    "16-bit-cache": Setting({"kv_cache_dtype": "float16"}, kv_bits=16),  # vLLM's own cache: only the linears are ours
    "own-process": Setting(environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),  # as `vllm serve` has it
    "fused": Setting(environment={"QOQ_VLLM_FUSE": "1"}),
    "few-sequences": Setting({"max_num_seqs": 2}, count=6),  # vLLM's warm-up then has sequences beyond max_model_len
}
CASES = [
    *(pytest.param("--g128", name, id=f"g128-{name}") for name in SETTINGS),
    *(pytest.param("--per-channel", name, id=f"chn-{name}") for name in ("graphs", "everything")),
]


class Tiny:
    """`tiny`, quantized on the GPU, and our own runtime on it."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.folder = folder
        words = ["quantize", "tiny", mode, "--samples", "2", "--seq-len", "64", "--device", "cuda", "-o", str(folder)]
        assert CliRunner().invoke(app, words, catch_exceptions=False, prog_name="qoq").exit_code == 0
        self._engines: dict[tuple[int, torch.dtype], Engine] = {}

    def engine(self, kv_bits: int, dtype: torch.dtype = torch.float16) -> Engine:
        key = kv_bits, dtype
        if key not in self._engines:
            options = Options(
                device="cuda", dtype=dtype, max_batch=16, max_tokens=LONGEST, kv_bits=kv_bits, memory_bytes=4 << 30
            )  # and vLLM's engines beside it
            self._engines[key] = Engine(RuntimeModel.from_folder(self.folder, options))
        return self._engines[key]

    def answers(self, prompts: Sequence[list[int]], kv_bits: int, dtype: torch.dtype) -> list[list[int]]:
        found = self.engine(kv_bits, dtype).generate([Request(prompt, NEW) for prompt in prompts])
        return [[int(token) for token in completion.tokens] for completion in found]

    def noise(self, prompts: Sequence[list[int]], kv_bits: int) -> torch.Tensor:
        """The gaps of our own answers in bfloat16."""
        return self.gaps(prompts, self.answers(prompts, kv_bits, torch.bfloat16), kv_bits)

    def gaps(self, prompts: Sequence[list[int]], answers: Sequence[list[int]], kv_bits: int) -> torch.Tensor:
        """[prompts, NEW]: by how much the likeliest logit at a token's place exceeds that of the token."""
        model, gaps = self.engine(kv_bits).model, []
        windows = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
        for prompt, answer, hidden in zip(prompts, answers, hidden_states(model, windows), strict=True):
            with torch.inference_mode():
                logits = model.decoder.logits(hidden)[len(prompt) - 1 :].float()
            own = logits.gather(1, torch.tensor(answer, device=logits.device).unsqueeze(1)).squeeze(1)
            gaps.append((logits.amax(-1) - own).cpu())
        return torch.stack(gaps)


def draw_prompts(shared: bool) -> list[list[int]]:
    """50 prompts: passages of text and tokens at random, around the lengths of pages; or with common beginnings."""
    drawn = random.Random(0)
    text = (tiny_folder() / "evaluation.txt").read_text(encoding="utf-8")[:60000]
    ids = Tokenizer.from_file(str(tiny_folder() / "tokenizer.json")).encode(text).ids

    def passage(length: int) -> list[int]:
        first = drawn.randrange(len(ids) - length)
        return ids[first : first + length]

    if shared:
        heads = [passage(length) for length in (64, 128, 150, 200, 300)]
        return [*(heads[i % 5] + passage(drawn.randrange(1, 100)) for i in range(45)), *heads]
    prompts = [passage(length) for length in LENS]
    prompts += [[drawn.randrange(2, VOCABULARY) for _ in range(length)] for length in LENS]
    drawn.shuffle(prompts)
    return prompts


@pytest.fixture(scope="module")
def tiny(gpu: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    made: dict[str, Tiny] = {}

    def find(mode: str) -> Tiny:
        if mode not in made:
            made[mode] = Tiny(tmp_path_factory.mktemp("tiny") / "w4a8kv4", mode)
        return made[mode]

    return find


@pytest.fixture(scope="module")
def served(
    request: pytest.FixtureRequest, tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, str], Result]]:
    """vLLM's result of a case; the cases of all chosen tests are begun at once, AT_ONCE at a time."""
    folder = tmp_path_factory.mktemp("vllm")

    def serve(mode: str, name: str) -> Result:
        setting = SETTINGS[name]
        prompts = draw_prompts(setting.shared)[: setting.count]
        job = Job(str(tiny(mode).folder), {**COMMON, **setting.options}, prompts, NEW, turns=1 + setting.shared)
        return ask(job, folder / f"{mode}-{name}", setting.environment, ENGINE_SECONDS)

    calls = [item.callspec.params for item in request.session.items if item.path == request.path]
    chosen = [(call["mode"], call["name"]) for call in calls]
    for mode in dict.fromkeys(mode for mode, _ in chosen):
        tiny(mode)
    pool = ThreadPoolExecutor(AT_ONCE)
    begun = {case: pool.submit(serve, *case) for case in chosen}
    yield lambda mode, name: begun[mode, name].result()
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("mode", "name"), CASES)
def test_answers_are_those_of_our_runtime(
    mode: str,
    name: str,
    tiny: Callable[[str], Tiny],
    served: Callable[[str, str], Result],
    record_testsuite_property: Callable[[str, object], None],
) -> None:
    setting, model, result = SETTINGS[name], tiny(mode), served(mode, name)
    check_evidence(model, name, result)
    prompts = draw_prompts(setting.shared)[: setting.count]
    own = model.answers(prompts, setting.kv_bits, torch.float16)
    noise = model.noise(prompts, setting.kv_bits)
    for turn, answers in enumerate(result.answers):
        assert [len(answer) for answer in answers] == [NEW] * len(prompts)
        gaps = model.gaps(prompts, answers, setting.kv_bits)
        identical = sum(a == b for a, b in zip(answers, own, strict=True))
        worst = int(gaps.amax(1).argmax())
        told = (
            f"{identical} of {len(prompts)} answers identical; {describe(gaps)}, in the answer to prompt {worst}, of "
            f"{len(prompts[worst])} tokens; our own in bfloat16: {describe(noise)}"
        )
        record_testsuite_property(
            f"vLLM {result.version} {mode} {name} {turn}", f"{told}; {result.metrics}; {result.evidence}"
        )
        assert likeliest(gaps) > likeliest(noise) - 0.01, told
        assert float(gaps.mean()) < 1.2 * float(noise.mean()), told
        assert float(gaps.max()) < 2 * float(noise.max()), told


def likeliest(gaps: torch.Tensor) -> float:
    """The share of tokens that are our runtime's own choice at their place."""
    return float((gaps == 0).float().mean())


def describe(gaps: torch.Tensor) -> str:
    share = f"{likeliest(gaps):.2%} of tokens the likeliest"
    return f"{share}, the others' logits {gaps.mean():.4f} below on the average of all, at most {gaps.max():.3f}"


def check_evidence(model: Tiny, name: str, result: Result) -> None:
    """vLLM did what the setting is for, on our linears, and on our pages of 4 bits unless another cache was asked."""
    found, metrics, setting = result.evidence, result.metrics, SETTINGS[name]
    config = model.engine(setting.kv_bits).model.config
    assert found["linears"] == ["tiles" if wants_tiles(torch.empty(0, device="cuda")) else "packed"], found
    if setting.kv_bits == 4:
        token = config.num_kv_heads * page_bytes(config.head_dim, 4) // PAGE_SIZE
        assert (found["attention"], found["cache_dtype"]) == (OURS, "int4_per_token_head"), found
        assert found["cache_bytes"] == found["cache_shape"][0] * PAGE_SIZE * token, found
        assert found["filled_pages"] > 0, found
    else:
        assert found["attention"] != OURS, found
        assert found["cache_dtype"] == "float16", found
    if "num_gpu_blocks_override" in setting.options:
        assert metrics["vllm:num_preemptions"] > 0, metrics
    if setting.shared:
        assert result.cached_tokens[-1] > 0, result.cached_tokens
    assert ("NONE" in found["cudagraph_mode"]) == bool(setting.options.get("enforce_eager")), found
    fused = [line for line in result.said if "are fused" in line]
    assert bool(fused) == (name == "fused"), result.said
    assert not any(" 0 of" in line for line in fused), fused
    if setting.environment == OLDER_RUNNER:
        assert found["runner"] == "vllm.v1.worker.gpu_model_runner", found
