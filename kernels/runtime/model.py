"""A model that is ready to run: its weights and KV cache on a device, sized to a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qoq.formats.checkpoint import is_checkpoint, open_checkpoint
from qoq.kernels.layouts import PAGE_SIZE
from qoq.kernels.runtime.attention import KVCache, page_nbytes
from qoq.kernels.runtime.config import RuntimeConfig, config_of_shape, read_config, runtime_config
from qoq.kernels.runtime.decoder import Decoder
from qoq.kernels.runtime.elementwise import Fuse, compiled, plain
from qoq.kernels.runtime.kernel_cache import KernelCache
from qoq.kernels.runtime.lane_cache import LaneCache
from qoq.kernels.runtime.memory import GPU_RESERVE, MemoryPlan, plan_memory, workspace_nbytes
from qoq.kernels.runtime.page_pool import PagePool
from qoq.kernels.runtime.random_model import random_weights
from qoq.kernels.runtime.reference_cache import ReferenceCache
from qoq.kernels.runtime.scheduler import decode_batches
from qoq.kernels.runtime.steps import Piece, extend_step
from qoq.kernels.runtime.weights import Arithmetic, ModelWeights, load_weights
from qoq.kernels.upload import Upload
from qoq.recipes.errors import EnvironmentProblem, InputError
from qoq.recipes.precisions import Precision
from qoq.recipes.schema import KeyRotation
from qoq.recipes.shapes import ModelShape

_CPU_CACHE = 2 << 30
"""Bytes of KV cache on the CPU, at most, where nobody says."""
_LIKED_SHARE = 0.95
"""Of the sequences that there are pages for, which a size that products like must have."""
_GPU_SHARE = 0.9
"""Of the memory of a GPU that nobody else has."""


@dataclass(frozen=True)
class Options:
    """How a model is run.

    device         "cpu", or "cuda" for the current CUDA device
    arithmetic     None: the kernels on a GPU, the reference elsewhere
    dtype          of activations; None: the model's 16-bit type on a GPU, float32 on the CPU
    kv_bits, key_rotation   of the cache; act_bits of quantized linears; None: as the checkpoint says
    lm_head_bits   16, or 8 for lm_head in int8, with inputs of int8: no checkpoint says so
    max_batch      sequences at a time
    max_tokens     of a sequence, answer included; None: as many as the model has positions
    chunk_tokens   of a prefill step
    memory_bytes   for everything; None: most of a GPU's memory that is free, or what max_batch needs, up to 2 GiB
    num_pages      of the cache, at most, instead of what max_batch needs
    graphs         decode steps are CUDA graphs where there is a GPU
    prefill_first  no decode step while there is something to prefill: more tokens a second, at longer pauses
    compiled       for measurements: what surrounds 16-bit and float8 products is compiled by torch.compile
                   (`elementwise`), and a 16-bit cache may be attended to whole (`lane_cache`)
    """

    device: str = "cpu"
    arithmetic: Arithmetic | None = None
    dtype: torch.dtype | None = None
    kv_bits: int | None = None
    key_rotation: KeyRotation | None = None
    act_bits: int | None = None
    lm_head_bits: int = 16
    max_batch: int = 64
    max_tokens: int | None = None
    chunk_tokens: int = 4096
    memory_bytes: int | None = None
    num_pages: int | None = None
    graphs: bool = True
    prefill_first: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_tokens", "chunk_tokens", "num_pages"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")
        if self.lm_head_bits not in (8, 16):
            raise InputError(f"lm_head_bits is {self.lm_head_bits}, expected 8 or 16")


class RuntimeModel:
    """Weights, cache and its pages; `memory` says what takes how many bytes, `longest` what a sequence may have.

    max_batch   sequences at a time: what the options say, or as many as there are pages, of which each has one; a few
                less where that makes a size of `decode_batches`, which products like
    """

    def __init__(self, config: RuntimeConfig, weights: ModelWeights, options: Options) -> None:
        """Use `from_folder` or `from_shape`, which make the weights as the options want them."""
        self.config, self.options = config, options
        self.device = torch.device(options.device)
        self.dtype = weights.embedding.dtype
        self.longest = min(options.max_tokens or config.max_positions, config.max_positions)
        kind = _cache_kind(config, options)
        page_size = PAGE_SIZE if kind is not LaneCache else -(-self.longest // PAGE_SIZE) * PAGE_SIZE
        self.memory = self._plan_memory(weights, page_nbytes(config, page_size, self.dtype), page_size)
        self.max_batch = _batch_of(options.max_batch, self.memory.num_pages)
        cache = self._make_cache(kind, page_size)
        self.pool = PagePool(self.memory.num_pages, page_size)
        self.decoder = Decoder(config, weights, cache)

    @staticmethod
    def from_folder(path: Path, options: Options, *, on_block: Callable[[int], None] = lambda _: None) -> RuntimeModel:
        """A checkpoint, or a 16-bit model. Raises InputError for what cannot be read or run, EnvironmentProblem for a
        machine that lacks something."""
        arithmetic = resolve_arithmetic(options)
        config = runtime_config(read_config(path), where=str(path), max_positions=options.max_tokens)
        if is_checkpoint(path):
            quantization = open_checkpoint(path).quantization
            config = config.served_with(quantization.kv_bits, quantization.key_rotation)
        config = config.served_with(options.kv_bits, options.key_rotation)
        device = torch.device(options.device)
        dtype = options.dtype or (torch.float32 if device.type == "cpu" else config.dtype)
        with torch.inference_mode():
            weights = load_weights(
                path,
                config,
                device=device,
                dtype=dtype,
                arithmetic=arithmetic,
                act_bits=options.act_bits,
                lm_head_bits=options.lm_head_bits,
                fuse=_fuse(options),
                on_block=on_block,
            )
            return RuntimeModel(config, weights, options)

    @staticmethod
    def from_shape(shape: ModelShape, precision: Precision, options: Options, *, seed: int = 0) -> RuntimeModel:
        """Random weights in the sizes of a known model: for measurements."""
        arithmetic = resolve_arithmetic(options)
        positions = {} if options.max_tokens is None else {"max_positions": options.max_tokens}
        config = config_of_shape(shape, **positions).served_with(options.kv_bits or precision.kv_bits)
        device = torch.device(options.device)
        sixteen = torch.bfloat16 if precision.weights == "fp8" else torch.float16
        dtype = options.dtype or (torch.float32 if device.type == "cpu" else sixteen)
        with torch.inference_mode():
            weights = random_weights(
                config,
                precision.weights,
                device=device,
                dtype=dtype,
                arithmetic=arithmetic,
                lm_head_bits=options.lm_head_bits,
                seed=seed,
                fuse=_fuse(options),
            )
            return RuntimeModel(config, weights, options)

    def extend(self, pieces: Sequence[Piece]) -> Tensor:
        """Hidden states [T, H] of new tokens of sequences, whose keys and values then are in their pages."""
        upload = Upload(self.device)
        tokens, step = extend_step(pieces, self.pool.page_size, upload)
        upload.send()
        return self.decoder.forward(tokens, step)

    def _plan_memory(self, weights: ModelWeights, page: int, page_size: int) -> MemoryPlan:
        options = self.options
        workspace = workspace_nbytes(
            self.config, self.dtype, chunk_tokens=options.chunk_tokens, max_batch=options.max_batch
        )
        most = options.num_pages or options.max_batch * -(-self.longest // page_size)
        on_gpu = self.device.type == "cuda"
        budget = options.memory_bytes
        if budget is None and on_gpu:
            free, _ = torch.cuda.mem_get_info(self.device)
            budget = int(_GPU_SHARE * (free + torch.cuda.memory_reserved(self.device)))
        return plan_memory(
            budget=budget or weights.nbytes + workspace + min(max(page, _CPU_CACHE), page * most),
            weights=weights.nbytes,
            workspace=workspace,
            reserve=GPU_RESERVE if on_gpu else 0,
            page=page,
            page_size=page_size,
            most_pages=most,
        )

    def _make_cache(self, kind: type[KVCache], page_size: int) -> KVCache:
        pages = self.memory.num_pages
        if kind is KernelCache:
            return KernelCache(self.config, pages, self.device)
        if kind is LaneCache:
            return LaneCache(
                self.config,
                pages,
                page_size,
                self.device,
                self.dtype,
                _fuse(self.options),
                masked=self.options.compiled,
            )
        return ReferenceCache(self.config, pages, self.device, self.dtype)


def resolve_arithmetic(options: Options) -> Arithmetic:
    """What computes. Raises EnvironmentProblem where the kernels are due and cannot run."""
    if options.arithmetic is not None:
        return options.arithmetic
    if torch.device(options.device).type != "cuda":
        return "reference"
    from qoq.kernels.ops import usable_device_problem

    problem = usable_device_problem()
    if problem is not None:
        raise EnvironmentProblem(f"the kernels cannot run: {problem}", remedy="`qoq doctor` says what is missing")
    return "kernels"


def _batch_of(most: int, pages: int) -> int:
    """Sequences at a time, of `most` at the most and with a page for each."""
    liked = max(size for size in decode_batches(most) if size <= pages)
    return liked if liked >= _LIKED_SHARE * pages else min(most, pages)


def _fuse(options: Options) -> Fuse:
    return compiled if options.compiled else plain


def _cache_kind(config: RuntimeConfig, options: Options) -> type[KVCache]:
    if resolve_arithmetic(options) == "reference":
        return ReferenceCache
    return LaneCache if config.kv_bits == 16 else KernelCache
