"""What we use of vLLM that is not a documented interface, in one place: it may change between versions.

Read in vLLM 0.26.0 and 0.33.0. The latter asks a backend for the bytes of a token (`customize_spec`), which ours does
not tell yet, so that our cache is refused there. Importing it imports neither layers nor models of vLLM.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.layers import quantization as methods
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models import config as model_configs
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

ShardId = str | int | tuple[int, ...] | None
"""Which part of a fused linear a checkpoint's tensor is: q, k or v, a number, several, or all of it (None)."""
_QKV = ("q", "k", "v")

logger = init_logger("vllm.qoq")
"""Below "vllm", so that vLLM's handlers and levels hold."""


def known_method(name: str) -> type | None:
    """The configuration class that a plug-in registered under `name`, QuantizationConfig for one of vLLM's own."""
    registered: dict[str, type] = methods._CUSTOMIZED_METHOD_TO_QUANT_CONFIG
    if name in registered:
        return registered[name]
    return QuantizationConfig if name in methods.QUANTIZATION_METHODS else None


def add_method(name: str, config_class: type) -> None:
    """Register `config_class` under `name`."""
    methods.register_quantization_config(name)(config_class)


def load_as_vllm_does(layer: Any) -> Callable[..., None]:
    """The layer's own loader: copies the rank's output channels of a tensor along its parameter's `output_dim`.

    It knows fused parts and replicated KV heads. It is the first version of vLLM's loaders: parameters of the second
    are given to methods that vLLM knows by name.
    """
    loader: Callable[..., None] = layer.weight_loader
    return loader


def stored_channels(layer: Any, shard_id: ShardId) -> int:
    """Output channels that the checkpoint's tensor for part `shard_id` of a linear has, of all ranks."""
    if hasattr(layer, "total_num_kv_heads"):  # its output_sizes count replicated heads more than once
        sizes = [
            layer.total_num_heads * layer.head_size,
            layer.total_num_kv_heads * layer.head_size,
            layer.total_num_kv_heads * layer.v_head_size,
        ]
    else:
        sizes = list(getattr(layer, "output_sizes", [layer.output_size]))
    return sum(sizes[part] for part in parts_of(shard_id, len(sizes)))


def parts_of(shard_id: ShardId, count: int) -> tuple[int, ...]:
    """`shard_id` as numbers of parts of a linear that is fused of `count`."""
    if shard_id is None:
        return tuple(range(count))
    if isinstance(shard_id, str):
        return (_QKV.index(shard_id),)
    return shard_id if isinstance(shard_id, tuple) else (shard_id,)


def is_attention_of(layer: Any, path: str) -> bool:
    """Whether `layer` is an attention layer of vLLM with the backend whose class is at `path`."""
    backend = getattr(layer, "attn_backend", None)
    return backend is not None and f"{backend.__module__}.{backend.__qualname__}" == path


def cache_type(layer: Any) -> str | None:
    """What an attention layer of vLLM stores keys and values in; None for another layer."""
    name = getattr(layer, "kv_cache_dtype", None)
    if name is None:
        return None
    dtype = getattr(layer, "kv_cache_torch_dtype", None)
    return str(dtype).removeprefix("torch.") if name == "auto" else str(name)


def draws_random_weights() -> bool:
    """Whether the model under construction gets random weights (load_format="dummy"), for benchmarks."""
    from vllm.config import get_current_vllm_config

    return str(get_current_vllm_config().load_config.load_format) == "dummy"


# ---- the choice of a cache, before the model is built


@dataclass(frozen=True)
class CacheChoice:
    """What was asked for, and what a cache depends on.

    checkpoint   quantization_config of the model's config.json
    cache_type   "auto" where none was named, or where "auto" was
    backend      a member of vLLM's list of attention backends, None where none was named
    block_size   None where none was named
    unserved     settings that our attention does not serve
    """

    checkpoint: dict[str, Any]
    cache_type: str
    backend: Any
    head_dim: int
    block_size: int | None
    unserved: tuple[str, ...]


def cache_choice(config: Any) -> CacheChoice:
    """What vLLM's configuration says about the cache of a model with a quantization_config."""
    model, cache, attention, parallel = (
        config.model_config,
        config.cache_config,
        config.attention_config,
        config.parallel_config,
    )
    settings = {
        "speculative decoding": config.speculative_config is not None,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "micro-batches (--enable-dbo, --ubatch-size)": parallel.use_ubatching,
        "KV transfer (--kv-transfer-config)": config.kv_transfer_config is not None,
        "attention backends by kind": bool(attention.backend_per_kind),
        "--kv-cache-dtype-skip-layers": bool(cache.kv_cache_dtype_skip_layers),
    }
    return CacheChoice(
        checkpoint=dict(getattr(model.hf_config, "quantization_config", None) or {}),
        cache_type=cache.cache_dtype,
        backend=attention.backend,
        head_dim=model.get_head_size(),
        block_size=cache.block_size if cache.user_specified_block_size else None,
        unserved=tuple(name for name, chosen in settings.items() if chosen),
    )


def custom_backend() -> Any:
    """The member of vLLM's list of attention backends that plug-ins may take."""
    return AttentionBackendEnum.CUSTOM


def backend_path() -> str | None:
    """The class that was registered as `custom_backend`, None when there is none."""
    try:
        return str(AttentionBackendEnum.CUSTOM.get_path())
    except ValueError:
        return None


def add_backend(path: str) -> None:
    """Register the class at `path`, which is imported when it is needed, as `custom_backend`."""
    register_backend(AttentionBackendEnum.CUSTOM, path)


def add_config_hook(architecture: str, hook: Callable[[Any], None]) -> None:
    """Have vLLM call hook(VllmConfig) of models of `architecture`, after what it calls for these by itself."""
    known: Any = model_configs.MODELS_CONFIG_MAP.get(architecture, model_configs.VerifyAndUpdateConfig)
    if getattr(known, "qoq_hook", None) is hook:
        return

    class Hooked(known):  # type: ignore[misc]
        qoq_hook = staticmethod(hook)

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            known.verify_and_update_config(vllm_config)
            hook(vllm_config)

    model_configs.MODELS_CONFIG_MAP[architecture] = Hooked


# ---- compilation

_LAST_PASS = "post_grad_custom_post_pass"  # PyTorch's name for it
_SILU_MUL = "silu_and_mul"  # has no implementation elsewhere


def add_graph_pass(config: Any, change: Callable[[Any], None]) -> None:
    """Have vLLM call change(graph) on each graph that it compiles for CUDA, with SiLU times up as an operator.

    Nothing changes where another pass has the place.
    """
    from vllm.compilation.passes.inductor_pass import CallableInductorPass, InductorPass
    from vllm.platforms import current_platform

    compilation = config.compilation_config
    if not current_platform.is_cuda() or _LAST_PASS in compilation.inductor_compile_config:
        return
    source = inspect.getsource(sys.modules[change.__module__])  # what was compiled with another one is compiled again
    compilation.inductor_compile_config[_LAST_PASS] = CallableInductorPass(change, InductorPass.hash_source(source))
    if f"-{_SILU_MUL}" not in compilation.custom_ops and f"+{_SILU_MUL}" not in compilation.custom_ops:
        compilation.custom_ops.append(f"+{_SILU_MUL}")


# ---- attention


def current_quantization() -> Any:
    """The configuration object of the quantization method of the model under construction."""
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config().quant_config


def bytes_of_token(layer: Any) -> float:
    """What vLLM will set aside for a token in an attention layer under construction: keys and values, on this GPU."""
    from vllm.config import get_current_vllm_config

    spec = layer.get_kv_cache_spec(get_current_vllm_config())
    return float(spec.page_size_bytes / spec.block_size)


def keep_all_tokens(layer: Any) -> None:
    """Have vLLM keep the tokens that a layer's window has left behind too; its attention does not change."""
    layer.sliding_window = None


def attention_of(config: Any, names: Iterable[str]) -> list[Any]:
    """What computes the attention of the layers `names`."""
    layers = config.compilation_config.static_forward_context
    return [layers[name].impl for name in names]


def host_lens(batch: Any, first: int) -> tuple[Sequence[int], Sequence[int]]:
    """How many new tokens sequences `first` and later have, and how many in all; padding at the end is left out.

    vLLM documents its upper bounds of lengths as exact, but for speculative decoding, which is refused. Where it gives
    none, the device is waited for.
    """
    ends = batch.query_start_loc_cpu.tolist()
    new = [end - start for start, end in zip(ends[first:-1], ends[first + 1 :], strict=True)]
    while new and new[-1] == 0:
        new.pop()
    if not new:
        return [], []
    lens = batch.seq_lens_cpu_upper_bound
    if lens is None:
        lens = batch.seq_lens
    return new, lens[first : first + len(new)].tolist()
