"""What must be known of a model family to quantize it: names and fold points, nothing that computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

KeyFold = Literal["projections", "norms"]
"""Where a scale on post-RoPE keys and queries is folded: rows (and biases) of k_proj and q_proj, each KV head its own;
or the gains of the per-head k_norm and q_norm, which all heads share."""

LINEAR_ROLES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "mlp_gate": "mlp.gate_proj",
    "mlp_up": "mlp.up_proj",
    "mlp_down": "mlp.down_proj",
}

SHARED_INPUTS = (("attn_q", "attn_k", "attn_v"), ("attn_out",), ("mlp_gate", "mlp_up"), ("mlp_down",))
"""Roles of linears that multiply the same input."""

GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Family:
    """A model family; names are those of transformers' modules.

    blocks        module path of the decoder blocks; block i is `{blocks}.{i}`
    roles         what each linear of a block is, by role, relative to the block; these are quantized
    shared_inputs roles that multiply the same input
    key_fold      where SmoothAttention folds its scale
    input_norm    the norm before q, k and v, relative to the block; mlp_norm that before gate and up
    rope_types    RoPE variants that rotate channel i with i + head_dim / 2 and so admit a shared scale per pair
    gguf_arch     the architecture's name in GGUF files, and `gguf_names` the tensor names there
    gguf_permuted whether GGUF files of it hold q and k rows in interleaved RoPE order
    """

    name: str
    model_type: str
    architecture: str
    key_fold: KeyFold
    gguf_arch: str
    gguf_permuted: bool
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    lm_head: str = "lm_head"
    roles: Mapping[str, str] = field(default_factory=lambda: dict(LINEAR_ROLES))
    shared_inputs: tuple[tuple[str, ...], ...] = SHARED_INPUTS
    gguf_names: Mapping[str, str] = field(default_factory=lambda: dict(GGUF_NAMES))
    attention: str = "self_attn"
    input_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    rope_types: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn")
    head_dims: tuple[int, ...] = (64, 128)

    def block_prefix(self, index: int) -> str:
        return f"{self.blocks}.{index}."
