"""The `quantization_config` of a checkpoint's config.json: what a reader must know before it reads a byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from qoq.recipes.errors import InputError
from qoq.recipes.schema import KeyRotation, ZeroDomain

FORMAT_VERSION = 1
QUANT_METHOD = "qoq"
KEPT_ALWAYS = "lm_head"


@dataclass(frozen=True)
class QuantizationConfig:
    """How the packed tensors of a checkpoint are to be read.

    group_size              128 (progressive) or None (per channel); -1 on disk
    act_bits, kv_bits       bits the checkpoint is meant to be served with
    zero_domain             what the zeros mean: codes ("pre_scale") or level-1 offsets ("post_scale")
    norms_folded            whether norm gains were folded into the linears that follow (omniserve requires it)
    key_rotation            how queries and keys are rotated after RoPE (`arithmetic.rotate_heads`); any runtime serves
                            "none", "hadamard" needs one that rotates
    padded                  true in_features of each linear whose K was padded to a multiple of 128
    modules_to_not_convert  linears left in 16 bit; lm_head always is
    """

    group_size: int | None
    act_bits: int = 8
    kv_bits: int = 4
    zero_domain: ZeroDomain = "pre_scale"
    norms_folded: bool = False
    key_rotation: KeyRotation = "none"
    padded: Mapping[str, int] = field(default_factory=dict)
    modules_to_not_convert: tuple[str, ...] = (KEPT_ALWAYS,)

    def to_dict(self) -> dict[str, Any]:
        """As written to config.json; `quant_method`, `wbits` and `group_size` are what SGLang reads."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "wbits": 4,
            "group_size": -1 if self.group_size is None else self.group_size,
            "act_bits": self.act_bits,
            "kv_bits": self.kv_bits,
            "zero_domain": self.zero_domain,
            "norms_folded": self.norms_folded,
            "key_rotation": self.key_rotation,
            "padded": dict(self.padded),
            "modules_to_not_convert": list(self.modules_to_not_convert),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any], *, where: str = "quantization_config") -> QuantizationConfig:
        """Read and check; raises InputError that names the key, what it holds and what is understood."""

        def expect(key: str, value: object, allowed: tuple[object, ...]) -> None:
            if not any(type(value) is type(option) and value == option for option in allowed):  # True is no 1 here
                understood = ", ".join(repr(option) for option in allowed)
                raise InputError(
                    f"{where}: {key} is {value!r}; this version of qoq understands {understood}",
                    remedy="quantize the model again, or use the version of qoq that wrote the checkpoint",
                )

        expect("quant_method", data.get("quant_method"), (QUANT_METHOD,))
        expect("format_version", data.get("format_version", FORMAT_VERSION), (FORMAT_VERSION,))
        expect("wbits", data.get("wbits"), (4,))
        expect("group_size", data.get("group_size"), (128, -1))
        act_bits, kv_bits = data.get("act_bits", 8), data.get("kv_bits", 4)
        expect("act_bits", act_bits, (8, 16))
        expect("kv_bits", kv_bits, (4, 8, 16))
        zero_domain = data.get("zero_domain", "pre_scale")
        expect("zero_domain", zero_domain, ("pre_scale", "post_scale"))
        norms_folded = data.get("norms_folded", False)
        expect("norms_folded", norms_folded, (True, False))
        key_rotation = data.get("key_rotation", "none")
        expect("key_rotation", key_rotation, get_args(KeyRotation))
        padded = data.get("padded", {})
        if not isinstance(padded, dict) or not all(type(v) is int and v > 0 for v in padded.values()):
            raise InputError(f"{where}: padded must map module names to in_features, got {padded!r}")
        kept = data.get("modules_to_not_convert", [KEPT_ALWAYS])
        if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
            raise InputError(f"{where}: modules_to_not_convert must be a list of module names, got {kept!r}")
        return QuantizationConfig(
            group_size=None if data["group_size"] == -1 else 128,
            act_bits=act_bits,
            kv_bits=kv_bits,
            zero_domain=zero_domain,
            norms_folded=norms_folded,
            key_rotation=key_rotation,
            padded=dict(padded),
            modules_to_not_convert=tuple(kept),
        )
