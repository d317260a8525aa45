"""The attention backend of the vLLM plug-in over real pages, driven as vLLM does, on stand-ins for the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qoq.kernels import extend_batch
from qoq.kernels.layouts import unpack_pages
from qoq.recipes.errors import InputError
from tests.kernels.attention_cases import StandIns
from tests.kernels.vllm_steps import Server, attention, backend, batch_of, make_builder, make_layer

metadata_module = import_module("qoq.kernels.vllm.metadata")
capability = import_module("vllm.platforms.interface").DeviceCapability


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch, cpu_operators: Any) -> Iterator[StandIns]:
    found = StandIns()
    found.take_place(monkeypatch)
    monkeypatch.setattr(attention, "run_decode", found.run_decode)
    return found


def serve(server: Server) -> None:
    """Prefill, chunks beside decodes, decodes alone."""
    server.step([(0, 70), (1, 5), (2, 33)])
    server.step([(0, 1), (1, 1), (2, 60), (3, 130)])
    server.step([(3, 1), (1, 1), (0, 1), (2, 1)])
    server.step([(2, 1), (0, 40), (1, 3)])
    server.step([(0, 17), (3, 20)])
    server.step([(0, 1)])


# ---- numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "bits"), [(64, 4), (128, 4), (64, 8), (128, 8)])
def test_steps_attend_to_what_the_cache_gives_back(head_dim: int, bits: int, dtype: torch.dtype) -> None:
    serve(Server([make_layer(head_dim=head_dim, bits=bits)], 4, dtype))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 1), (8, 2), (12, 1)])
def test_heads_of_a_gpu_share_kv_heads(heads: int, kv_heads: int) -> None:
    serve(Server([make_layer(heads, kv_heads)], 4, torch.float16))


@pytest.mark.parametrize("bits", [4, 8])
def test_rotated_keys(bits: int, cpu_operators: Any) -> None:
    serve(Server([make_layer(bits=bits, key_rotation="hadamard")], 4, torch.float16))
    assert "rotate_heads" in cpu_operators.calls


def test_layers_with_one_cache_may_have_windows_of_their_own() -> None:
    server = Server([make_layer(window=window) for window in (None, 40, 1, 1000)], 4, torch.float16)
    assert server.builder.windows == [0, 1, 40, 1000]
    serve(server)


def test_a_scratch_that_holds_few_pages(monkeypatch: pytest.MonkeyPatch, stand_ins: StandIns) -> None:
    prepare = metadata_module.prepare_extend
    two_pages = 2 * 2 * 64 * 2 * 64 * 2
    monkeypatch.setattr(metadata_module, "prepare_extend", lambda *a, **k: prepare(*a, **k, scratch_bytes=two_pages))
    serve(Server([make_layer()], 4, torch.float16))
    assert False in stand_ins.flash_calls


def test_pages_that_sequences_share_and_pages_that_are_given_to_others() -> None:
    server = Server([make_layer()], 3, torch.float16)
    server.step([(0, 100)])
    server.table[1, 0] = server.table[0, 0]  # a prefix that the cache already holds
    server.kept[0][1] = (server.kept[0][0][0][:64], server.kept[0][0][1][:64])
    server.step([(0, 1), (1, 20)])
    server.table[2, :2], server.table[0, :2] = server.table[0, :2].flip(0), torch.tensor([0, 0])
    server.table[2, 1] = server.table[0, 2]  # sequence 0 was pre-empted; its second page goes to sequence 2
    server.step([(1, 1), (2, 90)])
    server.step([(1, 1), (2, 1)])


# ---- padding


def test_padded_rows_of_a_decode_batch_are_zeros() -> None:
    server = Server([make_layer()], 3, torch.float16)
    server.step([(0, 70), (1, 5), (2, 33)])
    step = server.step([(2, 1), (0, 1), (1, 1)], padded_sequences=2, padded_rows=2, as_tokens=True)
    assert (step.decode.rows, step.extend, step.rows) == (5, None, 5)
    for padding in ({"padded_rows": 5}, {"padded_sequences": 2}):
        assert server.step([(2, 1), (0, 1), (1, 1)], **padding).rows == 3


@pytest.mark.parametrize("as_tokens", [False, True])
def test_padded_rows_of_a_mixed_batch_are_zeros(as_tokens: bool) -> None:
    server = Server([make_layer()], 3, torch.float16)
    server.step([(0, 70), (1, 5)], padded_rows=3, as_tokens=as_tokens)
    server.step([(0, 1), (2, 33)], padded_rows=6, padded_sequences=2, as_tokens=as_tokens)


def test_tokens_are_written_to_their_slots_alone() -> None:
    layer = make_layer(kv_heads=2)
    pool = torch.full((3, 2, 64, 72), 0x11, dtype=torch.uint8)
    key, value = (torch.randn(4, 2, 64, generator=torch.Generator().manual_seed(n)).half() for n in (1, 2))
    slots = torch.tensor([64 + 63, -1, 128, 3])
    layer.do_kv_cache_update(None, key, value, pool, slots)
    keys, values = unpack_pages(pool.view(3, 2, -1), 64, 4)
    touched = {(0, 3), (1, 63), (2, 0)}
    for page in range(3):
        for place in range(64):
            same = bool((keys.codes[page, :, place] == 1).all() and (values.codes[page, :, place] == 1).all())
            assert same == ((page, place) not in touched)
    for token, (page, place) in ((0, (1, 63)), (2, (2, 0)), (3, (0, 3))):
        for part, x in ((keys, key), (values, value)):
            decoded = (part.codes[page, :, place].float() - part.zeros[page, :, place]) * part.scales[page, :, place]
            assert float((decoded - x[token].float()).abs().max()) < 0.6 * float(part.scales[page, :, place].max())


# ---- what is not read on the host


def test_decodes_leave_their_lengths_on_the_device() -> None:
    layer = make_layer()
    batch = batch_of([1, 1, 1], [5, 70, 9], torch.zeros(3, 5, dtype=torch.int32), torch.zeros(3, dtype=torch.int64))
    batch.seq_lens = torch.empty(3, dtype=torch.int32, device="meta")  # nothing can be read of it
    batch.seq_lens_cpu_upper_bound = None
    builder = make_builder([layer])
    step = builder.build_for_cudagraph_capture(batch)
    assert step.decode.kv_lens.shape == (3,)
    assert step.decode.page_table.data_ptr() == batch.block_table_tensor.data_ptr()
    support = backend.AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert builder.get_cudagraph_support(None, None) is support
    assert builder.reorder_batch_threshold == 1


def test_lengths_that_vllm_keeps_on_the_device_alone_are_fetched() -> None:
    batch = batch_of([1, 4, 20], [5, 70, 20], torch.zeros(3, 5, dtype=torch.int32), torch.zeros(25, dtype=torch.int64))
    batch.seq_lens_cpu_upper_bound = None
    step = make_builder([make_layer()]).build(0, batch)
    assert (step.extend.first, step.extend.end, step.extend.batches[0].rows) == (1, 25, 24)


# ---- without a cache


def test_a_run_that_measures_memory_writes_nothing_and_gives_zeros() -> None:
    layer = make_layer()
    x = torch.ones(7, 4, 64, dtype=torch.float16)
    none = torch.tensor([])
    layer.do_kv_cache_update(None, x[:, :2], x[:, :2], none, None)
    assert not layer.forward(None, x, x[:, :2], x[:, :2], none, None, x.clone()).any()


def test_the_scratch_is_reserved_while_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    query = SimpleNamespace(
        is_cuda=True, numel=lambda: 1000, element_size=lambda: 2, new_empty=lambda size, dtype: asked.append(size)
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    make_layer()._reserve(query)
    assert asked == [extend_batch.DEFAULT_SCRATCH_BYTES + 8000]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    make_layer()._reserve(query)
    assert len(asked) == 1


def test_kernels_are_loaded_before_a_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch, cpu_operators: Any, stand_ins: StandIns
) -> None:
    gathered: list[Any] = []
    monkeypatch.setattr(metadata_module, "run_decode", lambda *a: stand_ins.run_decode(*a, out=None))
    with torch.library._scoped_library("qoq", "IMPL") as library:
        library.impl("gather_kv", lambda *a: gathered.append(a) or (a[0], a[0]), "CPU")
        metadata_module._load_kernels(make_layer(key_rotation="hadamard"), torch.bfloat16, torch.device("cpu"))
    assert {"append_kv", "rotate_heads"} <= set(cpu_operators.calls)
    assert (len(gathered), stand_ins.decoded) == (1, 1)


# ---- what vLLM asks of a backend


def reasons(**changes: Any) -> list[str]:
    asked = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "int4_per_token_head",
        "block_size": None,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": capability(9, 0),
        "attn_type": "decoder",
        **changes,
    }
    found: list[str] = attention.QoQAttentionBackend.validate_configuration(**asked)
    return found


def test_what_the_backend_takes() -> None:
    assert reasons() == []
    assert reasons(head_size=64, kv_cache_dtype="int8_per_token_head", has_sliding_window=True, block_size=128) == []
    assert reasons(device_capability=capability(8, 0), dtype=torch.float16) == []
    assert attention.QoQAttentionBackend.get_preferred_block_size(16) == 64


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_size": 96}, "head_size"),
        ({"dtype": torch.float32}, "dtype"),
        ({"kv_cache_dtype": "auto"}, "kv_cache_dtype"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"block_size": 16}, "block_size"),
        ({"use_mla": True}, "MLA"),
        ({"has_sink": True}, "sinks"),
        ({"device_capability": capability(7, 5)}, "compute capability"),
        ({"attn_type": "encoder_only"}, "attention type"),
        ({"use_kv_connector": True}, "KV connector"),
        ({"use_pcp": True}, "PCP"),
    ],
)
def test_what_the_backend_does_not_take(changes: dict[str, Any], reason: str) -> None:
    (found,) = reasons(**changes)
    assert reason in found


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"alibi_slopes": [1.0]}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "a soft cap of logits"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "the KV cache of another layer"),
        ({"attn_type": "encoder_only"}, "attention of type encoder_only"),
        ({"sinks": torch.zeros(4)}, "sinks"),
        ({"kv_cache_dtype": "fp8"}, "KV cache of type fp8: expected int4_per_token_head or int8_per_token_head"),
        ({"head_dim": 96}, "heads of 96 values: pages hold heads of 64 or 128"),
    ],
)
def test_layers_that_are_not_served_are_refused(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=rf"cannot serve a layer of this model .*\n.*{problem}"):
        make_layer(**keys)


def test_context_parallelism_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(world_size=2, rank_in_group=0)
    monkeypatch.setattr("vllm.distributed.parallel_state.get_dcp_group", lambda: group)
    with pytest.raises(InputError, match="context parallelism: it is not part of"):
        make_layer()
    assert not attention.QoQAttention.supports_dcp


def test_attention_to_later_tokens_is_refused() -> None:
    batch = batch_of([4], [4], torch.zeros(1, 5, dtype=torch.int32), torch.zeros(4, dtype=torch.int64))
    batch.causal = False
    with pytest.raises(InputError, match="attention to later tokens was asked for"):
        make_builder([make_layer()]).build(0, batch)


def test_an_output_that_attention_should_quantize_is_refused() -> None:
    x = torch.zeros(1, 4, 64, dtype=torch.float16)
    with pytest.raises(InputError, match="does not quantize its output"):
        make_layer().forward(None, x, x, x, x, None, x, output_scale=torch.ones(1))


@pytest.mark.parametrize(
    "pool",
    [
        torch.zeros(3, 64, 2, 72, dtype=torch.uint8).transpose(1, 2),
        torch.zeros(3, 2, 64, 80, dtype=torch.uint8)[..., :72],
        torch.zeros(3, 2, 64, 136, dtype=torch.uint8),
        torch.zeros(3, 1, 64, 72, dtype=torch.uint8),
        torch.zeros(3, 2, 64, 72, dtype=torch.float16),
    ],
)
def test_memory_that_is_not_pages_is_refused(pool: torch.Tensor) -> None:
    x = torch.zeros(1, 2, 64, dtype=torch.float16)
    with pytest.raises(InputError, match=r"the KV cache is .* expected contiguous bytes \[3, 2, 64, 72\]"):
        make_layer().do_kv_cache_update(None, x, x, pool, torch.zeros(1, dtype=torch.int64))


def test_blocks_and_layers_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(InputError, match="blocks have 16 tokens, expected 64"):
        make_builder([make_layer()], block_size=16)
    with pytest.raises(InputError, match="layers with one cache have different heads"):
        make_builder([make_layer(), make_layer(heads=8)])
    with pytest.raises(InputError, match="blocks of 16 tokens of type auto, expected 64 of int4_per_token_head"):
        attention.QoQAttentionBackend.get_kv_cache_shape(2, 16, 1, 64)


def test_a_16_bit_model_may_have_our_cache_too() -> None:
    config = import_module("vllm.config")
    with config.set_current_vllm_config(config.VllmConfig(device_config=config.DeviceConfig("cpu"))):
        layer = attention.QoQAttention(4, 64, 0.125, 2, kv_cache_dtype="int4_per_token_head")
    assert layer.key_rotation == "none"
    serve(Server([layer], 4, torch.bfloat16))


# ---- what is told


def test_the_cache_is_told_once_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        attention, "logger", SimpleNamespace(info_once=lambda text, *values: said.append(text % values))
    )
    layer = make_layer(bits=8, key_rotation="hadamard")
    for pages in (3, 3, 5):
        layer._pages(torch.zeros(pages, 2, 64, 136, dtype=torch.int8))
    assert [line.split(" with")[0] for line in said] == [
        "qoq: KV cache of 8 bits, key rotation hadamard: 3 pages of 64 tokens (192 tokens)",
        "qoq: KV cache of 8 bits, key rotation hadamard: 5 pages of 64 tokens (320 tokens)",
    ]
