"""One of several processes that share a model in vLLM, on the CPU: loads a checkpoint as vLLM does, and runs it once.

    python tests/kernels/vllm_rank.py FOLDER RANK SIZE RENDEZVOUS OUT

Everything is vLLM's own (entry points, configuration, model classes, loaders, collectives over gloo), but attention:
vLLM's backends need a GPU, so PyTorch's takes the place of their forward pass. Writes logits of `TOKENS` to OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

TOKENS = tuple(range(3, 90, 4))


def attend(layer: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Causal attention over one sequence [L, heads * D], whose keys and values are those of this very call."""
    heads = [x.view(len(x), -1, layer.head_size).transpose(0, 1) for x in (query, key, value)]
    seen = torch.ones(len(query), len(query), dtype=torch.bool).tril()
    if layer.sliding_window is not None:
        seen = seen.triu(1 - layer.sliding_window)
    out = scaled_dot_product_attention(*heads, attn_mask=seen, scale=layer.impl.scale, enable_gqa=True)
    return out.transpose(0, 1).flatten(1)


def main(folder: str, rank: int, size: int, rendezvous: str, out: str) -> None:
    from vllm import config as configs
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention import attention
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    model_config = EngineArgs(model=folder, skip_tokenizer_init=True, dtype="float16").create_model_config()
    config = configs.VllmConfig(
        model_config=model_config,
        cache_config=configs.CacheConfig(sliding_window=model_config.get_sliding_window()),
        device_config=configs.DeviceConfig(device="cpu"),
        parallel_config=configs.ParallelConfig(tensor_parallel_size=size),
        compilation_config=configs.CompilationConfig(mode=0, custom_ops=["none"]),
    )
    attention.get_attn_backend = lambda *_, **__: CPUAttentionBackend
    attention.Attention.forward = attend
    torch.accelerator.empty_cache = lambda: None  # newer versions of vLLM call it, and there is no accelerator
    with configs.set_current_vllm_config(config), torch.inference_mode():
        init_distributed_environment(size, rank, f"file://{rendezvous}", rank, "gloo")
        initialize_model_parallel(size)
        model = get_model(vllm_config=config)
        tokens = torch.tensor(TOKENS)
        logits = model.compute_logits(model(tokens, torch.arange(len(tokens))))
    if rank == 0:
        save_file({"logits": logits.contiguous()}, Path(out))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
