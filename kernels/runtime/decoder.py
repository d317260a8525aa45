"""A model's forward over one step: embedding, decoder blocks, logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from qoq.kernels.runtime.attention import Attend, KVCache, Step
from qoq.kernels.runtime.config import RuntimeConfig
from qoq.kernels.runtime.weights import BlockWeights, ModelWeights


class Decoder:
    """A model over its KV cache. All of it is launches: nothing is waited for, but by the reference cache."""

    def __init__(self, config: RuntimeConfig, weights: ModelWeights, cache: KVCache) -> None:
        self.config, self.weights, self.cache = config, weights, cache

    def forward(self, tokens: Tensor, step: Step) -> Tensor:
        """Hidden states [T, H] before the final norm, of tokens int64 [T]; their keys and values are in the cache."""
        x, residual = self._blocks(tokens, step)
        return x if residual is None else x + residual

    def decode(self, tokens: Tensor, step: Step) -> Tensor:
        """Logits [T, V] of all tokens int64 [T]; the last sum is fused with the final norm."""
        x, residual = self._blocks(tokens, step)
        if residual is None:
            return self.logits(x)
        return self.weights.lm_head.of_add_norm(x, residual, self.weights.final_norm)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] in the dtype of hidden states [T, H]."""
        return self.weights.lm_head.of_norm(hidden, self.weights.final_norm)

    def _blocks(self, tokens: Tensor, step: Step) -> tuple[Tensor, Tensor | None]:
        """Output and residual of the last block; without blocks, the embedding and None."""
        attend = self.cache.begin(step)
        x = functional.embedding(tokens, self.weights.embedding)
        residual: Tensor | None = None
        for index, block in enumerate(self.weights.blocks):
            x, residual = self._block(index, block, x, residual, attend)
        return x, residual

    def _block(
        self, index: int, block: BlockWeights, x: Tensor, residual: Tensor | None, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """Output and residual, whose sum is the block's; of the same from the block before, None before the first."""
        if residual is None:
            qkv, residual = block.qkv.of_norm(x, block.input_norm), x
        else:
            qkv, residual = block.qkv.of_add_norm(x, residual, block.input_norm)
        attended = attend(index, *self._heads(qkv, block.head_norms))
        x = block.o.of(attended.flatten(1))
        gate_up, residual = block.gate_up.of_add_norm(x, residual, block.mlp_norm)
        return block.down.of_silu_mul(gate_up), residual

    def _heads(self, qkv: Tensor, gains: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, D], keys and values [T, KV heads, D] of the fused product; without norms they are views."""
        config = self.config
        heads = qkv.unflatten(1, (-1, config.head_dim))
        query_key, value = heads.split([config.num_heads + config.num_kv_heads, config.num_kv_heads], dim=1)
        if gains is not None:
            query_key = functional.rms_norm(query_key, (config.head_dim,), None, config.eps) * gains
        query, key = query_key.split([config.num_heads, config.num_kv_heads], dim=1)
        return query, key, value
