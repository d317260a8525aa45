"""Qwen3 (dense): RMSNorm on each head of q and k."""

from qoq.recipes.families.family import Family

QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    key_fold="norms",
    gguf_arch="qwen3",
    gguf_permuted=False,
)
