"""Reading `quantization_config`: exact, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qoq.formats.quantization_config import QuantizationConfig
from qoq.recipes.errors import InputError

SMALLEST = {"quant_method": "qoq", "wbits": 4, "group_size": 128}

TEXT = st.text(alphabet='aZ.0_ \n"\\\u00e9\ud800\U0001f600', max_size=8)
"""A small alphabet: to know all of Unicode takes hypothesis seconds."""
CONFIGS = st.builds(
    QuantizationConfig,
    group_size=st.sampled_from((128, None)),
    act_bits=st.sampled_from((8, 16)),
    kv_bits=st.sampled_from((4, 8, 16)),
    zero_domain=st.sampled_from(("pre_scale", "post_scale")),
    norms_folded=st.booleans(),
    key_rotation=st.sampled_from(("none", "hadamard")),
    padded=st.dictionaries(TEXT, st.integers(1, 2**40), max_size=3),
    modules_to_not_convert=st.lists(TEXT, max_size=3).map(tuple),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
WORDS = ("qoq", "pre_scale", "post_scale", "none", "hadamard")
LIKELY = st.sampled_from((*WORDS, 1, 4, 8, 16, 128, -1, 128.0, True, False, [], {}, ["lm_head"], {"a": 72}))


@settings(deadline=None, max_examples=50)
@given(CONFIGS)
def test_configs_survive_json(config: QuantizationConfig) -> None:
    assert QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_what_other_tools_write_is_completed_with_defaults() -> None:
    assert QuantizationConfig.from_dict(SMALLEST) == QuantizationConfig(group_size=128)
    assert QuantizationConfig.from_dict(SMALLEST | {"group_size": -1, "desc_act": False}).group_size is None


def test_sglang_finds_its_three_keys() -> None:
    written = QuantizationConfig(group_size=None).to_dict()
    assert (written["quant_method"], written["wbits"], written["group_size"]) == ("qoq", 4, -1)


@pytest.mark.parametrize(
    ("key", "value", "understood"),
    [
        ("quant_method", "gptq", "'qoq'"),
        ("quant_method", ["qoq"], "'qoq'"),
        ("quant_method", None, "'qoq'"),
        ("format_version", 2, "1"),
        ("format_version", True, "1"),
        ("format_version", "1", "1"),
        ("wbits", 8, "4"),
        ("wbits", 4.0, "4"),
        ("wbits", None, "4"),
        ("group_size", 64, "128, -1"),
        ("group_size", 128.0, "128, -1"),
        ("group_size", None, "128, -1"),
        ("act_bits", 4, "8, 16"),
        ("act_bits", None, "8, 16"),
        ("kv_bits", 2, "4, 8, 16"),
        ("kv_bits", True, "4, 8, 16"),
        ("zero_domain", "scaled", "'pre_scale', 'post_scale'"),
        ("zero_domain", {}, "'pre_scale', 'post_scale'"),
        ("norms_folded", 1, "True, False"),
        ("norms_folded", 0, "True, False"),
        ("norms_folded", "yes", "True, False"),
        ("key_rotation", "random", "'none', 'hadamard'"),
        ("key_rotation", True, "'none', 'hadamard'"),
        ("key_rotation", None, "'none', 'hadamard'"),
    ],
)
def test_each_key_is_refused_by_name(key: str, value: object, understood: str) -> None:
    with pytest.raises(InputError) as caught:
        QuantizationConfig.from_dict(SMALLEST | {key: value}, where="model/config.json")
    assert (
        caught.value.message == f"model/config.json: {key} is {value!r}; this version of qoq understands {understood}"
    )
    assert caught.value.remedy is not None


@pytest.mark.parametrize("key", list(SMALLEST))
def test_keys_without_a_default_must_be_there(key: str) -> None:
    with pytest.raises(InputError, match=f"{key} is None"):
        QuantizationConfig.from_dict({k: v for k, v in SMALLEST.items() if k != key})


@pytest.mark.parametrize("padded", [None, [], 5, {"a": 0}, {"a": -1}, {"a": True}, {"a": 1.0}, {"a": "1"}, {"a": None}])
def test_padded_must_map_names_to_sizes(padded: object) -> None:
    with pytest.raises(InputError, match="padded must map module names to in_features, got"):
        QuantizationConfig.from_dict(SMALLEST | {"padded": padded})


@pytest.mark.parametrize("kept", [None, "lm_head", {"lm_head": 1}, ["lm_head", 1], [None]])
def test_modules_to_not_convert_must_be_names(kept: object) -> None:
    with pytest.raises(InputError, match="modules_to_not_convert must be a list of module names, got"):
        QuantizationConfig.from_dict(SMALLEST | {"modules_to_not_convert": kept})


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.sampled_from(list(QuantizationConfig(128).to_dict())) | TEXT, JSON | LIKELY))
def test_no_json_raises_anything_but_input_errors(data: dict[str, Any]) -> None:
    for candidate in (data, SMALLEST | data):
        try:
            config = QuantizationConfig.from_dict(json.loads(json.dumps(candidate)))
        except InputError:
            continue
        assert QuantizationConfig.from_dict(config.to_dict()) == config


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(list(QuantizationConfig(128).to_dict())), JSON | LIKELY)
def test_one_changed_key_is_refused_or_kept_exactly(key: str, value: object) -> None:
    data = QuantizationConfig(128).to_dict() | {key: value}
    try:
        config = QuantizationConfig.from_dict(data)
    except InputError:
        return
    written = config.to_dict()[key]
    assert written == value
    assert type(written) is type(value)
