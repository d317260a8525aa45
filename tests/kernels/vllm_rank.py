"""One of several processes that share a model in vLLM, on the CPU: loads a checkpoint as vLLM does, and runs it.

    python tests/kernels/vllm_rank.py FOLDER RANK SIZE RENDEZVOUS OUT [CACHE]

Everything is vLLM's own (entry points, configuration, model classes, loaders, collectives over gloo, memory for the
cache, metadata of steps), and qoq's attention, on stand-ins for its kernels: the tokens come in two chunks, then one by
one. Where the cache is vLLM's (kv_bits 16, or CACHE, as --kv-cache-dtype), attention is PyTorch's, in one go: vLLM's
backends need a GPU. Writes logits of `TOKENS` to OUT.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).parents[2]
TOKENS = tuple(7 * i % 90 + 3 for i in range(140))
STEPS = (75, 61, 1, 1, 1, 1)
"""How many tokens come at a time: the first chunk is within a page, the second goes on to a third one."""
PAGES = (4, 1, 6, 0)
"""Of the sequence, in the pool; the last one is not needed."""
POOL = 7
CPU = torch.device("cpu")


def attend(layer: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Causal attention over one sequence [L, heads * D], whose keys and values are those of this very call."""
    heads = [x.view(len(x), -1, layer.head_size).transpose(0, 1) for x in (query, key, value)]
    seen = torch.ones(len(query), len(query), dtype=torch.bool).tril()
    if layer.sliding_window is not None:
        seen = seen.triu(1 - layer.sliding_window)
    out = scaled_dot_product_attention(*heads, attn_mask=seen, scale=layer.impl.scale, enable_gqa=True)
    return out.transpose(0, 1).flatten(1)


@contextmanager
def stand_ins() -> Iterator[None]:
    """In place of our kernels."""
    sys.path.append(str(ROOT))  # the rooms beside `tests` must not be found under a second name
    from tests.kernels.attention_cases import StandIns
    from tests.kernels.conftest import operators_on_cpu

    sys.path.remove(str(ROOT))
    from qoq.kernels.vllm import attention as ours

    found = StandIns()
    with operators_on_cpu(), pytest.MonkeyPatch.context() as patch:
        found.take_place(patch)
        patch.setattr(ours, "run_decode", found.run_decode)
        yield


def in_steps(model: Any, config: Any, tokens: Tensor) -> Tensor:
    """Hidden states [T, hidden]: vLLM's memory for the cache, and its metadata for each of `STEPS`."""
    from vllm.forward_context import set_forward_context
    from vllm.platforms.interface import Platform
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
    from vllm.v1.worker.gpu import attn_utils

    with set_forward_context(None, config, len(tokens), slot_mapping={}):  # as when memory is measured
        model(tokens, torch.arange(len(tokens)))
    Platform.update_block_size_for_backend(config)
    specs = attn_utils.get_kv_cache_spec(config)
    size = POOL * sum(spec.page_size_bytes for spec in specs.values())
    (cache,) = get_kv_cache_configs(config, [specs], [size])
    groups, _, sizes = attn_utils.init_attn_backend(cache, config, CPU)
    layers = config.compilation_config.static_forward_context
    attn_utils.init_kv_cache([], layers, cache, groups, CPU, config.cache_config.cache_dtype, sizes, config)
    table = torch.tensor([PAGES], dtype=torch.int32)
    hidden, start = [], 0
    for count in STEPS:
        places = torch.arange(start, start + count)
        slots = table[0].long()[places // 64] * 64 + places % 64
        ends = torch.tensor([0, count], dtype=torch.int32)
        lens = torch.tensor([start + count], dtype=torch.int32)
        step = attn_utils.build_attn_metadata(
            attn_groups=groups,
            num_reqs=1,
            num_tokens=count,
            query_start_loc_gpu=ends,
            query_start_loc_cpu=ends,
            max_query_len=count,
            seq_lens=lens,
            max_seq_len=start + count,
            block_tables=[table] * len(groups),
            slot_mappings=slots.expand(len(groups), -1),
            kv_cache_config=cache,
            seq_lens_cpu_upper_bound=lens,
        )
        by_layer = attn_utils.build_slot_mappings_by_layer(slots.expand(len(groups), -1), cache)
        with set_forward_context(step, config, count, slot_mapping=by_layer):
            hidden.append(model(tokens[start : start + count], places))
        start += count
    return torch.cat(hidden)


def main(folder: str, rank: int, size: int, rendezvous: str, out: str, cache: str = "auto") -> None:
    from vllm import config as configs
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention import attention
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    model_config = EngineArgs(model=folder, skip_tokenizer_init=True, dtype="float16").create_model_config()
    config = configs.VllmConfig(
        model_config=model_config,
        cache_config=configs.CacheConfig(cache_dtype=cache, sliding_window=model_config.get_sliding_window()),
        device_config=configs.DeviceConfig(device="cpu"),
        parallel_config=configs.ParallelConfig(tensor_parallel_size=size),
        compilation_config=configs.CompilationConfig(mode=0, custom_ops=["none"]),
    )
    chosen = config.attention_config.backend
    backend = CPUAttentionBackend if chosen is None else chosen.get_class()
    attention.get_attn_backend = lambda *_, **__: backend
    if chosen is None:
        attention.Attention.forward = attend
    torch.accelerator.empty_cache = lambda: None  # newer versions of vLLM call it, and there is no accelerator
    with configs.set_current_vllm_config(config), torch.inference_mode(), stand_ins():
        init_distributed_environment(size, rank, f"file://{rendezvous}", rank, "gloo")
        initialize_model_parallel(size)
        model = get_model(vllm_config=config)
        tokens = torch.tensor(TOKENS)
        hidden = model(tokens, torch.arange(len(tokens))) if chosen is None else in_steps(model, config, tokens)
        logits = model.compute_logits(hidden)
    if rank == 0:
        save_file({"logits": logits.contiguous()}, Path(out))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
