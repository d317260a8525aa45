"""The transformers plug-in: `import qoq.kernels.hf`, and `from_pretrained` reads W4A8KV4 checkpoints.

    import qoq.kernels.hf
    model = AutoModelForCausalLM.from_pretrained("checkpoints/llama-3-8b-w4a8kv4-g128")

The import registers quant_method "qoq". Linears become `QoQLinear`: on a CUDA device and in 16 bit they run on qoq's
kernels, elsewhere on the reference arithmetic, which gives the same numbers; `set_backend` chooses one of the two.

With kv_bits 4 or 8 the model's attention is "qoq_kv4" or "qoq_kv8": transformers' sdpa attention, which sees every key
(after RoPE) and value as a cache of that many bits gives it back. transformers' own cache holds the unrounded ones;
rounding is per token and head, so each step, and the prefill, arrive at the same numbers. Where the checkpoint has
key_rotation "hadamard", queries and keys are rotated first ("qoq_kv4_hadamard", ...). Asking `from_pretrained` for
another attention (`attn_implementation="eager"`, ...) is refused, since it would drop the KV quantization unnoticed.
To run without it, ask explicitly: `set_kv_bits(model, 16)`, or `model.set_attn_implementation(...)` after loading.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qoq.formats.quantization_config import QUANT_METHOD, QuantizationConfig
from qoq.kernels.hf_attention import (
    ATTENTION,
    BASE_ATTENTION,
    check_attention,
    choose_attention,
    register_attention,
    set_attention_backend,
)
from qoq.kernels.modules import Backend, QoQLinear
from qoq.recipes.errors import EnvironmentProblem, InputError, raise_problems
from qoq.recipes.families import family_of
from qoq.recipes.schema import KeyRotation

_LEAVES = ("qweight", "s1_scales", "s2_scales", "s2_zeros", "s1_szeros", "bias", "weight")
_SAFETENSORS_NAMES = {torch.int8: "I8", torch.float16: "F16"}


class QoQConfig(QuantizationConfigMixin):
    """transformers' view of `quantization_config`: every key is an attribute, and unknown ones are kept.

    Raises InputError where `QuantizationConfig.from_dict` does.
    """

    def __init__(self, **keys: Any) -> None:
        given = {"quant_method": QUANT_METHOD, **keys}
        self.__dict__.update(copy.deepcopy({**given, **QuantizationConfig.from_dict(given).to_dict()}))

    def get(self, key: str, default: Any = None) -> Any:
        """As a dict's: transformers takes the config of a model that was loaded before for one."""
        return getattr(self, key, default)

    def parsed(self) -> QuantizationConfig:
        """What the keys mean, as they are now."""
        return QuantizationConfig.from_dict(self.to_dict())


class QoQHfQuantizer(HfQuantizer):
    """Builds the modules that hold a checkpoint's packed tensors, and checks that the files fill them."""

    requires_calibration = True

    def __init__(self, quantization_config: QoQConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise InputError(
                "this model is not quantized, and qoq does not quantize while loading",
                remedy="run `qoq quantize MODEL`, then load the folder it writes, without quantization_config=",
            )
        super().__init__(quantization_config, **kwargs)
        self._read_from_files = False

    @property
    def _config(self) -> QuantizationConfig:
        config = self.quantization_config
        return config.parsed() if isinstance(config, QoQConfig) else QuantizationConfig.from_dict(config.to_dict())

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Put a QoQLinear on the meta device for each quantized linear, and check the headers of the files."""
        config = self._config
        if getattr(model.config, "distributed_config", None) is not None:
            raise InputError(
                "tensor parallel loading is not supported: packed tensors cannot be sharded by transformers"
            )
        if config.kv_bits != 16:
            check_attention(model, config.kv_bits, config.key_rotation)
        _replace_linears(model, config)
        files = kwargs.get("checkpoint_files")
        self._read_from_files = files is not None
        if files is not None:
            _check_files(model, files)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if not self._read_from_files:
            _check_loaded(model)
        set_kv_bits(model, self._config.kv_bits, self._config.key_rotation)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """Turn every QoQLinear into a linear in `dtype`, cast the other parameters to it, and drop the KV rounding."""
        target = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float16
        for name, module in list(model.named_modules()):
            if isinstance(module, QoQLinear):
                model.set_submodule(name, module.dequantize(target))
        for parameter in model.parameters():  # buffers stay: RoPE's frequencies are float32 in every dtype
            parameter.data = parameter.data.to(target)
        model.config.dtype = target
        set_kv_bits(model, 16)
        if hasattr(model.config, "_is_quantized"):
            del model.config._is_quantized
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def set_kv_bits(model: PreTrainedModel, bits: int, key_rotation: KeyRotation | None = None) -> None:
    """From now on, `model` attends to keys and values as a cache of `bits` (4, 8 or 16) gives them back.

    `key_rotation`: "none", "hadamard", or what the checkpoint says (None); with 16 bits nothing is rotated.
    The checkpoint's config is left as it is. Raises InputError when the model's attention cannot be chosen.
    """
    if bits not in (4, 8, 16):
        raise InputError(f"kv_bits is {bits}, expected 4, 8 or 16")
    if bits != 16:
        rotation = _rotation_of(model) if key_rotation is None else key_rotation
        check_attention(model, bits, rotation)
        choose_attention(model, ATTENTION[bits, rotation])
    elif model.config._attn_implementation in ATTENTION.values():
        choose_attention(model, BASE_ATTENTION)
    # Continuous batching would change to flash attention, and drop the KV quantization; now it refuses.
    model._supports_flash_attn = bits == 16 and type(model)._supports_flash_attn


def set_act_bits(model: nn.Module, bits: int) -> None:
    """From now on, the quantized linears of `model` round their inputs to 8 bits a token, or (16) do not."""
    if bits not in (8, 16):
        raise InputError(f"act_bits is {bits}, expected 8 or 16")
    for module in model.modules():
        if isinstance(module, QoQLinear):
            module.act_bits = bits


def set_backend(model: nn.Module, backend: Backend) -> None:
    """From now on, the quantized linears and the KV rounding of `model` run on "kernels", on "reference" arithmetic, or
    ("auto") on the kernels where they can: a CUDA device of Ampere or newer, 16-bit inputs, 8-bit activations.

    With "kernels", a linear that cannot run on them raises when it is called. Raises InputError for another name.
    """
    for module in model.modules():
        if isinstance(module, QoQLinear):
            module.backend = backend
        else:
            set_attention_backend(module, backend)


def _rotation_of(model: PreTrainedModel) -> KeyRotation:
    """The key rotation that the model's checkpoint says; "none" for a model of another kind."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return "none"
    keys = config if isinstance(config, Mapping) else config.to_dict()
    return QuantizationConfig.from_dict(keys).key_rotation if keys.get("quant_method") == QUANT_METHOD else "none"


def _canonical(model: PreTrainedModel, name: str) -> str:
    """The name as the model with its head has it, whichever of the two `model` is."""
    prefix = model.base_model_prefix
    return f"{prefix}.{name}" if model.base_model is model and prefix else name


def _replace_linears(model: PreTrainedModel, config: QuantizationConfig) -> None:
    """Replace the linears of the decoder blocks. Raises InputError that lists every linear that does not fit."""
    blocks = family_of(model.config.model_type).blocks
    kept = set(config.modules_to_not_convert)
    problems = []
    for name, module in list(model.named_modules()):
        path = _canonical(model, name)
        if type(module) is not nn.Linear or not path.startswith(f"{blocks}.") or path in kept:
            continue
        recorded = config.padded.get(path, module.in_features)
        if recorded != module.in_features:
            problems.append(f"{path}: in_features is {module.in_features}, but `padded` says {recorded}")
            continue
        try:
            replacement = QoQLinear(
                module.in_features,
                module.out_features,
                progressive=config.group_size is not None,
                has_bias=module.bias is not None,
                zero_domain=config.zero_domain,
                act_bits=config.act_bits,
                name=path,
                device="meta",
            )
        except InputError as error:
            problems.append(error.message)
            continue
        model.set_submodule(name, replacement.train(module.training))
    raise_problems("quantization_config does not fit the model", problems)


def _check_files(model: PreTrainedModel, files: Sequence[str]) -> None:
    """Compare the files' headers with what `model` needs, before a byte is read.

    Every packed tensor must be there with its dtype and shape, as must be the other weights of the decoder and of its
    output head: transformers would fill those missing with random numbers. Raises InputError that lists the problems.
    """
    held: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise InputError(f"{file}: qoq checkpoints are safetensors files")
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (the handle is no mapping)
                header = opened.get_slice(name)
                held[name] = (header.get_dtype(), list(header.get_shape()))

    prefix = f"{model.base_model_prefix}."

    def find(name: str) -> tuple[str, list[int]] | None:
        path = _canonical(model, name)
        return held.get(path, held.get(path.removeprefix(prefix)))

    tied = {name: other for pair in model.all_tied_weights_keys.items() for name, other in (pair, pair[::-1])}
    head = model.get_output_embeddings()
    problems: list[str] = []
    for module_name, module in model.named_modules():
        path = _canonical(model, module_name)
        if isinstance(module, QoQLinear):
            problems += _packed_problems(path, module, {leaf: find(f"{module_name}.{leaf}") for leaf in _LEAVES})
        elif module is head or path.startswith(prefix):
            for leaf in _own_state(module):
                name = f"{module_name}.{leaf}"
                if find(name) is None and (name not in tied or find(tied[name]) is None):
                    problems.append(f"{path}.{leaf} is missing")
    raise_problems(
        "the checkpoint's files do not hold what its config.json calls for",
        problems,
        remedy="the checkpoint is incomplete, or its group_size or modules_to_not_convert were changed",
    )


def _packed_problems(path: str, module: QoQLinear, found: Mapping[str, tuple[str, list[int]] | None]) -> list[str]:
    """What is wrong with the headers `found` for the tensors of one quantized linear."""
    packed = module.packed()
    problems = []
    for leaf, header in found.items():
        if leaf not in packed:
            if header is not None and leaf != "weight":
                problems.append(f"{path}.{leaf} is there, but has no place in the model")
            continue
        expected = (_SAFETENSORS_NAMES[packed[leaf].dtype], list(packed[leaf].shape))
        if header is None:
            hint = " (a 16-bit weight is there instead)" if found["weight"] else ""
            problems.append(f"{path}.{leaf} is missing{hint}")
        elif header != expected:
            problems.append(f"{path}.{leaf}: expected {_show(expected)}, got {_show(header)}")
    return problems


def _own_state(module: nn.Module) -> list[str]:
    """Names of the parameters and persistent buffers of `module` itself."""
    buffers = [name for name, _ in module.named_buffers(recurse=False)]
    persistent = [name for name in buffers if name not in module._non_persistent_buffers_set]
    return [*(name for name, _ in module.named_parameters(recurse=False)), *persistent]


def _show(header: tuple[str, list[int]]) -> str:
    return f"{header[0]} {header[1]}"


def _check_loaded(model: PreTrainedModel) -> None:
    """Where the tensors came as `state_dict=`: each packed one must have been given, with its dtype."""
    problems = []
    for module_name, module in model.named_modules():
        if not isinstance(module, QoQLinear):
            continue
        for leaf, tensor in module.packed().items():
            expected = torch.float16 if tensor.is_floating_point() else torch.int8
            if not getattr(tensor, "_is_hf_initialized", False):
                problems.append(f"{module_name}.{leaf} is missing")
            elif tensor.dtype != expected:
                problems.append(f"{module_name}.{leaf}: expected {expected}, got {tensor.dtype}")
    raise_problems("state_dict does not hold the packed tensors", problems)


def _register() -> None:
    """Make transformers know the names; doing it again, after a reload, replaces our own entries."""
    tables: list[tuple[dict[str, Any], type]] = [
        (AUTO_QUANTIZATION_CONFIG_MAPPING, QoQConfig),
        (AUTO_QUANTIZER_MAPPING, QoQHfQuantizer),
    ]
    for table, cls in tables:
        other = table.get(QUANT_METHOD)
        if other is not None and other.__module__ != __name__:
            raise EnvironmentProblem(
                f"transformers already knows the quantization method {QUANT_METHOD!r}, from {other.__module__}",
                remedy="import only one of the two packages",
            )
        table[QUANT_METHOD] = cls
    register_attention()


_register()
