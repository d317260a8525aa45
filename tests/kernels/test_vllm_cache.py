"""Which KV cache vLLM gets to keep for a checkpoint: its own configuration classes, up to where a GPU is needed."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qoq.kernels.layouts import page_bytes
from qoq.recipes.errors import EnvironmentProblem, InputError
from qoq.recipes.families import all_families
from tests.kernels.hf_cases import MODELS, edit_config, write_checkpoint
from tests.kernels.vllm_cases import BACKEND, vllm_config

interface = import_module("qoq.kernels.vllm.interface")
cache = import_module("qoq.kernels.vllm.cache")
plugin_config = import_module("qoq.kernels.vllm.config")
registry = import_module("vllm.v1.attention.backends.registry")
specs = import_module("vllm.v1.kv_cache_interface")
torch_utils = import_module("vllm.utils.torch_utils")
CUSTOM = registry.AttentionBackendEnum.CUSTOM


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    import_module("qoq.kernels.vllm.plugin").register()


def config_of(folder: Path, cache_type: str = "auto", **keys: Any) -> Any:
    """vLLM's configuration of a model, as a server makes it."""
    arguments = import_module("vllm.engine.arg_utils").EngineArgs
    return vllm_config.VllmConfig(
        model_config=arguments(model=str(folder), skip_tokenizer_init=True, dtype="float16").create_model_config(),
        cache_config=vllm_config.CacheConfig(cache_dtype=cache_type, **keys.pop("cache", {})),
        device_config=vllm_config.DeviceConfig(device="cpu"),
        **keys,
    )


def chosen(config: Any) -> tuple[str, Any]:
    return config.cache_config.cache_dtype, config.attention_config.backend


def attention(backend: str) -> Any:
    return vllm_config.AttentionConfig(backend=registry.AttentionBackendEnum[backend])


# ---- what is chosen


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("kv_bits", "cache_type"), [(4, "int4_per_token_head"), (8, "int8_per_token_head")])
def test_a_checkpoint_gets_its_cache(tmp_path: Path, name: str, kv_bits: int, cache_type: str) -> None:
    config = config_of(write_checkpoint(tmp_path / "model", name, kv_bits=kv_bits).folder)
    assert chosen(config) == (cache_type, CUSTOM)
    assert CUSTOM.get_path() == BACKEND
    sent = pickle.loads(pickle.dumps(config))  # noqa: S301  (as vLLM sends it to its other processes)
    assert chosen(sent) == (cache_type, CUSTOM)


def test_16_bits_are_vllms_own(tmp_path: Path) -> None:
    assert chosen(config_of(write_checkpoint(tmp_path / "model", "llama", kv_bits=16).folder)) == ("auto", None)


def test_a_model_of_another_method_is_left_alone(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "llama").folder
    edit_config(folder, lambda data: data.pop("quantization_config"))
    assert chosen(config_of(folder)) == ("auto", None)


@pytest.mark.parametrize("cache_type", ["bfloat16", "fp8"])
def test_a_cache_of_vllms_own_is_kept_where_it_is_asked_for(tmp_path: Path, cache_type: str) -> None:
    folder = write_checkpoint(tmp_path / "model", "llama").folder
    assert chosen(config_of(folder, cache_type)) == (cache_type, None)


def test_our_cache_may_be_asked_for_by_name_and_with_other_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    folder = write_checkpoint(tmp_path / "model", "llama").folder
    assert chosen(config_of(folder, "int4_per_token_head")) == ("int4_per_token_head", CUSTOM)
    assert "as asked" not in caplog.text
    asked = config_of(folder, "int8_per_token_head", attention_config=attention("CUSTOM"))
    assert chosen(asked) == ("int8_per_token_head", CUSTOM)
    assert "the KV cache takes 8 bits, as asked; the checkpoint was made for 4" in caplog.text


def test_vllms_cache_of_our_name_goes_with_a_backend_of_vllm(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "llama").folder
    triton = attention("TRITON_ATTN")
    found = chosen(config_of(folder, "int4_per_token_head", attention_config=triton))
    assert found == ("int4_per_token_head", registry.AttentionBackendEnum.TRITON_ATTN)


# ---- what is refused, by name


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """A configuration for which nothing has been chosen yet."""
    config = config_of(write_checkpoint(tmp_path / "model", "llama").folder)
    config.cache_config.cache_dtype, config.attention_config.backend = "auto", None
    return config


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: setattr(c, "speculative_config", object()), "speculative decoding: it is not part of"),
        (lambda c: setattr(c, "kv_transfer_config", object()), "KV transfer"),
        (lambda c: setattr(c.parallel_config, "decode_context_parallel_size", 2), "decode context parallelism"),
        (lambda c: setattr(c.parallel_config, "prefill_context_parallel_size", 2), "prefill context parallelism"),
        (lambda c: setattr(c.parallel_config, "enable_dbo", True), "micro-batches"),
        (lambda c: setattr(c.attention_config, "backend_per_kind", {"full_attention": CUSTOM}), "backends by kind"),
        (lambda c: setattr(c.cache_config, "kv_cache_dtype_skip_layers", ["0"]), "--kv-cache-dtype-skip-layers"),
        (lambda c: setattr(c, "attention_config", attention("FLASH_ATTN")), "FLASH_ATTN: it does not know qoq's"),
        (lambda c: setattr(c.model_config, "get_head_size", lambda: 96), "heads of 96 values: pages hold .* 64 or 128"),
    ],
)
def test_what_does_not_go_with_our_cache_is_refused(made: Any, change: Callable[[Any], None], problem: str) -> None:
    change(made)
    with pytest.raises(InputError, match=rf"qoq's 4-bit KV cache, which .*\n.*{problem}"):
        cache.choose_cache(made)
    assert made.cache_config.cache_dtype == "auto"


@pytest.mark.parametrize(("block_size", "fits"), [(16, False), (64, True), (128, True)])
def test_blocks_are_whole_pages(tmp_path: Path, block_size: int, fits: bool) -> None:
    folder = write_checkpoint(tmp_path / "model", "llama").folder
    if fits:
        assert chosen(config_of(folder, cache={"block_size": block_size}))[1] is CUSTOM
    else:
        with pytest.raises(InputError, match="--block-size 16: expected a multiple of the 64 tokens of a page"):
            config_of(folder, cache={"block_size": block_size})


def test_another_plug_in_in_our_place_is_named(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._ATTN_OVERRIDES, CUSTOM, "other.plugin.Backend")
    import_module("qoq.kernels.vllm.plugin").register()
    assert interface.backend_path() == "other.plugin.Backend"
    with pytest.raises(EnvironmentProblem, match=r"has the attention backend CUSTOM \(other.plugin.Backend\)"):
        cache.choose_cache(made)


# ---- the hook


def test_every_family_has_the_hook_once() -> None:
    before = dict(interface.model_configs.MODELS_CONFIG_MAP)
    import_module("qoq.kernels.vllm.plugin").register()
    assert interface.model_configs.MODELS_CONFIG_MAP == before
    assert all(before[family.architecture].qoq_hook is plugin_config.prepare for family in all_families())


def test_what_vllm_does_for_an_architecture_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Any]] = []

    class Known:
        @classmethod
        def verify_and_update_config(cls, config: Any) -> None:
            seen.append((cls.__name__, chosen(config)))

        @classmethod
        def verify_and_update_model_config(cls, config: Any) -> None:
            seen.append(("model", config.architecture))

    monkeypatch.setitem(interface.model_configs.MODELS_CONFIG_MAP, "LlamaForCausalLM", Known)
    interface.add_config_hook("LlamaForCausalLM", plugin_config.prepare)
    config = config_of(write_checkpoint(tmp_path / "model", "llama").folder)
    assert seen == [("model", "LlamaForCausalLM"), ("Known", ("auto", None))]
    assert chosen(config) == ("int4_per_token_head", CUSTOM)


# ---- memory


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_vllm_counts_the_bytes_of_our_pages(bits: int, head_dim: int) -> None:
    name = cache.CACHE_TYPES[bits]
    spec = specs.FullAttentionSpec(
        block_size=64,
        num_kv_heads=8,
        head_size=head_dim,
        dtype=torch_utils.STR_DTYPE_TO_TORCH_DTYPE[name],
        kv_quant_mode=specs.get_kv_quant_mode(name),
    )
    backend = CUSTOM.get_class()
    shape = backend.get_kv_cache_shape(5, 64, 8, head_dim, name)
    assert shape == (5, 8, 64, page_bytes(head_dim, bits) // 64)
    assert spec.page_size_bytes == 8 * page_bytes(head_dim, bits) == shape[1] * shape[2] * shape[3]
    assert spec.dtype.itemsize == 1
    assert backend.get_kv_cache_block_dim(64, 8, head_dim, name) == 0
    assert not backend.indexes_kv_by_block_stride()


def layer(window: int | None, *sizes: float) -> Any:
    """An attention layer for which vLLM counts `sizes` bytes a token: with a window, and without."""

    def spec(_: Any) -> Any:
        return SimpleNamespace(page_size_bytes=64 * sizes[found.sliding_window is None], block_size=64)

    impl = SimpleNamespace(bits=4, window=window, memory_fits=False)
    found = SimpleNamespace(impl=impl, num_kv_heads=2, head_size=64, sliding_window=window, get_kv_cache_spec=spec)
    return found


def test_a_window_whose_bytes_vllm_counts_wrongly_keeps_all_tokens() -> None:
    with vllm_config.set_current_vllm_config(vllm_config.VllmConfig(device_config=vllm_config.DeviceConfig("cpu"))):
        right, wrong = layer(30, 144, 144), layer(30, 272, 144)
        cache.fit_memory(right)
        cache.fit_memory(wrong)
        with pytest.raises(InputError, match="sets aside 272 bytes for a token of a layer, qoq's pages take 144"):
            cache.fit_memory(layer(None, 272, 272))
    assert (right.sliding_window, wrong.sliding_window, wrong.impl.window) == (30, None, 30)
